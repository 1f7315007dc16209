"""Write the demo pairs: mood (positive is happy) and tense (positive is the present).

    python make_demo_pairs.py --out pairs

Training and test pairs share neither names nor templates: the lists of `demo_words` are dealt
out to the two sides here, so that every pair is text the demo model could have met.
"""

import argparse
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import demo_words as words
from demo_text import TENSES, draw_scene, fill
from demo_words import MoodLine

__all__ = [
    "TEST",
    "TRAIN",
    "Pair",
    "Side",
    "make_pairs",
    "mood_pair",
    "tense_pair",
    "write_pairs",
]

Pair = dict[str, str]


_WEATHER = tuple(parts for lines in words.WEATHER.values() for parts in lines)
_NAMES = words.GIRLS + words.BOYS

TRAIN_NAMES, TEST_NAMES = _NAMES[::2], _NAMES[1::2]
TRAIN_PRELUDES, TEST_PRELUDES = words.PRELUDES[::2], words.PRELUDES[1::2]
TRAIN_STEMS, TEST_STEMS = words.OPENING_STEMS[::2], words.OPENING_STEMS[1::2]
TRAIN_ACTIONS, TEST_ACTIONS = words.OPENING_ACTIONS[::2], words.OPENING_ACTIONS[1::2]
TRAIN_QUOTES, TEST_QUOTES = words.FIRST_QUOTES[::2], words.FIRST_QUOTES[1::2]
TRAIN_WEATHER, TEST_WEATHER = _WEATHER[::2], _WEATHER[1::2]
TRAIN_MIDDLES, TEST_MIDDLES = words.MIDDLES[::2], words.MIDDLES[1::2]
# The sentence that shows the mood: no beginning of one serves both sides.
TRAIN_MOODS = (
    MoodLine("{he} [feels|felt]", " {adj}.", " {adj}."),
    MoodLine("{he} [feels|felt]", " {adj} and {act}.", " {adj} and {act}."),
    MoodLine("{name} [is|was]", " {adj}.", " {adj}."),
    MoodLine("{name} [is|was]", " {adj} and {adj}.", " {adj} and {adj}."),
    MoodLine("{name} [becomes|became]", " {adj} and {act}.", " {adj} and {act}."),
    MoodLine("That [makes|made] {him}", " {adj}.", " {adj}."),
)
TEST_MOODS = (
    MoodLine("{he} [feels|felt] very", " {adj}.", " {adj}."),
    MoodLine("{he} [looks|looked]", " {adj} and {act}.", " {adj} and {act}."),
    MoodLine("All day long, {he}", " {act}.", " {act}."),
)


@dataclass(frozen=True, slots=True)
class Side:
    """The names and templates of one side of the train/test split.

    Attributes:
        names: First names.
        preludes: Sentences without a verb.
        stems: Beginnings of the first sentence, up to its subject.
        actions: How the first sentence goes on.
        quotes: Spoken first sentences, each with the words that name the speaker.
        weather: Subjects of weather sentences, each with its predicate.
        middles: Neutral sentences.
        moods: Sentences that show the mood.
    """

    names: Sequence[str]
    preludes: Sequence[str]
    stems: Sequence[str]
    actions: Sequence[str]
    quotes: Sequence[tuple[str, str]]
    weather: Sequence[tuple[str, str]]
    middles: Sequence[str]
    moods: Sequence[MoodLine]


TRAIN = Side(
    TRAIN_NAMES,
    TRAIN_PRELUDES,
    TRAIN_STEMS,
    TRAIN_ACTIONS,
    TRAIN_QUOTES,
    TRAIN_WEATHER,
    TRAIN_MIDDLES,
    TRAIN_MOODS,
)
TEST = Side(
    TEST_NAMES,
    TEST_PRELUDES,
    TEST_STEMS,
    TEST_ACTIONS,
    TEST_QUOTES,
    TEST_WEATHER,
    TEST_MIDDLES,
    TEST_MOODS,
)


def mood_pair(side: Side, rng: random.Random) -> Pair:
    """One pair whose completions differ in mood only.

    Args:
        side: Where the names and templates come from.
        rng: Makes the choices.

    Returns:
        A pair; its prompt ends inside the sentence that shows the mood.
    """
    tense = rng.choice(TENSES)
    happy = draw_scene(rng, mood="happy", tense=tense, names=side.names)
    sad = replace(happy, mood="sad", mood_words=words.MOOD_WORDS["sad"])
    line = rng.choice(side.moods)
    prompt = [rng.choice(side.stems) + rng.choice(side.actions)]
    prompt += rng.sample(list(side.middles), rng.choice((0, 1, 1)))
    return {
        "prompt": " ".join(fill(part, happy, rng) for part in [*prompt, line.stem]),
        "positive": fill(line.happy, happy, rng),
        "negative": fill(line.sad, sad, rng),
    }


def tense_pair(side: Side, rng: random.Random) -> Pair:
    """One pair whose completions differ in tense only.

    Args:
        side: Where the names and templates come from.
        rng: Makes the choices.

    Returns:
        A pair; its prompt ends before the first verb of the story.
    """
    present = draw_scene(rng, tense="present", names=side.names)
    past = replace(present, tense="past")
    stem, rest = _tense_sentence(side, rng)
    prompt = [rng.choice(side.preludes), stem] if rng.random() < 0.4 else [stem]
    return {
        "prompt": " ".join(fill(part, present, rng) for part in prompt),
        "positive": fill(rest, present, rng),
        "negative": fill(rest, past, rng),
    }


def _tense_sentence(side: Side, rng: random.Random) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(side.stems), rng.choice(side.actions)
    return rng.choice(side.quotes if kind < 0.85 else side.weather)


def make_pairs(
    make: Callable[[Side, random.Random], Pair], side: Side, count: int, seed: int
) -> list[Pair]:
    """Draw distinct pairs, the same ones for the same seed.

    Args:
        make: `mood_pair` or `tense_pair`.
        side: TRAIN or TEST.
        count: How many.
        seed: Seed of the choices.

    Returns:
        Pairs, no two of them equal and none with equal completions.
    """
    rng = random.Random(seed)
    found: dict[tuple[str, str], Pair] = {}
    while len(found) < count:
        pair = make(side, rng)
        if pair["positive"] != pair["negative"]:
            found.setdefault((pair["prompt"], pair["positive"]), pair)
    return list(found.values())


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write JSONL, aside first and then renamed into place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    aside.replace(path)


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pairs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, make in (("mood", mood_pair), ("tense", tense_pair)):
        write_pairs(options.out / f"{name}_train.jsonl", make_pairs(make, TRAIN, 200, seed=1))
        write_pairs(options.out / f"{name}_test.jsonl", make_pairs(make, TEST, 100, seed=2))
    print(f"wrote 4 files to {options.out}")


if __name__ == "__main__":
    main()
