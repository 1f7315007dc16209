"""Write short children's stories whose mood, tense, place, weather and speech vary freely.

Every property is drawn on its own, and the mood shows only after a few neutral sentences, so a
model of these stories is undecided there and consistent afterwards.

    python demo_text.py --count 5 --seed 1
"""

import argparse
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import demo_words as words
from demo_words import MoodLine

__all__ = [
    "MOODS",
    "TENSES",
    "Mood",
    "Scene",
    "Tense",
    "draw_scene",
    "fill",
    "stories",
    "story",
]

Mood = Literal["happy", "sad"]
Tense = Literal["present", "past"]
MOODS: tuple[Mood, ...] = ("happy", "sad")
TENSES: tuple[Tense, ...] = ("present", "past")

_SLOT = re.compile(r"\{(\w+)\}")
_VERB = re.compile(r"\[([^|\]]*)\|([^|\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
_SENTENCE_START = re.compile(r"(^|[.!?] )(\"?)([a-z])")


@dataclass(frozen=True, slots=True)
class Scene:
    """What stays the same from the first sentence of a story to its last.

    Attributes:
        mood: How the story turns out.
        tense: The tense of the narration.
        indoors: Whether it happens in a house.
        speech: Whether people talk.
        weather: A key of `demo_words.WEATHER`.
        slots: Values of the template slots that never change within the story.
        mood_words: Values to draw from, for the slots that follow the mood.
    """

    mood: Mood
    tense: Tense
    indoors: bool
    speech: bool
    weather: str
    slots: Mapping[str, str]
    mood_words: Mapping[str, Sequence[str]]


def draw_scene(
    rng: random.Random,
    *,
    mood: Mood | None = None,
    tense: Tense | None = None,
    names: Sequence[str] = words.GIRLS + words.BOYS,
) -> Scene:
    """Draw the properties of one story.

    Args:
        rng: Source of randomness.
        mood: The mood, or None to draw it.
        tense: The tense, or None to draw it.
        names: First names to draw the hero and the friend from.

    Returns:
        The scene, with every property drawn independently of the others.
    """
    indoors = rng.random() < 0.5
    drawn_mood: Mood = rng.choice(MOODS) if mood is None else mood
    return Scene(
        mood=drawn_mood,
        tense=rng.choice(TENSES) if tense is None else tense,
        indoors=indoors,
        speech=rng.random() < 0.5,
        weather=rng.choice(tuple(words.WEATHER)),
        slots=_draw_slots(rng, names, indoors),
        mood_words=words.MOOD_WORDS[drawn_mood],
    )


def _draw_slots(rng: random.Random, names: Sequence[str], indoors: bool) -> dict[str, str]:
    name, friend = rng.sample(list(names), 2)
    girl = name in words.GIRLS
    noun, colour = rng.choice(words.NOUNS), rng.choice(words.COLOURS)
    return {
        "name": name,
        "friend": friend,
        "parent": rng.choice(words.PARENTS),
        "animal": rng.choice(words.ANIMALS),
        "noun": noun,
        "colour": colour,
        "thing": f"{colour} {noun}",
        "place": rng.choice(words.INDOORS if indoors else words.OUTDOORS),
        "child": "girl" if girl else "boy",
        "he": "she" if girl else "he",
        "him": "her" if girl else "him",
        "his": "her" if girl else "his",
    }


def fill(template: str, scene: Scene, rng: random.Random) -> str:
    """Turn a template into text.

    Args:
        template: Text with `{slots}` and `[present|past]` verb forms.
        scene: The story it belongs to.
        rng: Chooses the mood words.

    Returns:
        The text, with capitals at the beginnings of sentences.
    """
    used: set[str] = set()

    def value(match: re.Match[str]) -> str:
        slot = match.group(1)
        if slot in scene.slots:
            return scene.slots[slot]
        word = _draw_word(rng, [w for w in scene.mood_words[slot] if w not in used])
        used.add(word)
        return word

    text = _VERB.sub(r"\1" if scene.tense == "present" else r"\2", _SLOT.sub(value, template))
    text = _ARTICLE.sub(r"\1n ", text)
    return _SENTENCE_START.sub(lambda m: m.group(1) + m.group(2) + m.group(3).upper(), text)


def _draw_word(rng: random.Random, choices: Sequence[str]) -> str:
    weights = [1.0 / (2 + rank) for rank in range(len(choices))]
    return rng.choices(choices, weights)[0]


def story(scene: Scene, rng: random.Random) -> str:
    """Write one story.

    Args:
        scene: Its fixed properties.
        rng: Chooses the sentences.

    Returns:
        About five to nine sentences on one line.
    """
    templates = [*_opening(scene, rng), *_middle(scene, rng), *_ending(scene, rng)]
    return " ".join(fill(template, scene, rng) for template in templates)


def _opening(scene: Scene, rng: random.Random) -> list[str]:
    # A few stories tell their mood at once, so that it must be kept through neutral sentences.
    preludes = words.MOOD_PRELUDES if rng.random() < 0.35 else words.PRELUDES
    lines = [rng.choice(preludes)] if rng.random() < 0.5 else []
    kind = rng.random()
    if kind < 0.2:
        lines.append("".join(rng.choice(words.WEATHER[scene.weather])))
    elif kind < 0.45 and scene.speech:
        lines.append(" ".join(part.strip() for part in rng.choice(words.FIRST_QUOTES)))
        return [*lines, rng.choice(words.AFTER_QUOTE)]
    return [*lines, rng.choice(words.OPENING_STEMS) + rng.choice(words.OPENING_ACTIONS)]


def _middle(scene: Scene, rng: random.Random) -> list[str]:
    pool = [*words.MIDDLES, *(words.INDOOR_MIDDLES if scene.indoors else words.OUTDOOR_MIDDLES)]
    lines = rng.sample(pool, rng.choice((0, 1, 1, 2, 2)))
    if scene.speech and rng.random() < 0.5:
        lines.append(rng.choice(words.QUOTES))
    if rng.random() < 0.15:
        lines.insert(0, "".join(rng.choice(words.WEATHER[scene.weather])))
    return lines


def _ending(scene: Scene, rng: random.Random) -> list[str]:
    """Choose the sentences that show the mood; any of them may come first."""
    subjects = rng.sample(sorted(words.EVENTS), rng.choice((1, 1, 2)))
    lines = [rng.choice(words.EVENTS[subject]) for subject in subjects]
    lines += rng.sample(words.FEELINGS, rng.choice((1, 2)))
    if scene.speech:
        lines.append(rng.choice(words.MOOD_QUOTES))
    rng.shuffle(lines)
    templates = [_mood_text(line, scene.mood) for line in lines]
    if rng.random() < 0.4:
        templates.insert(rng.randint(1, len(templates)), rng.choice(words.LATER))
    return [*templates, _mood_text(rng.choice(words.CLOSINGS), scene.mood)]


def _mood_text(line: MoodLine, mood: Mood) -> str:
    return line.stem + (line.happy if mood == "happy" else line.sad)


def stories(count: int, seed: int) -> list[str]:
    """Write stories, the same ones for the same seed.

    Args:
        count: How many.
        seed: Seed of the generator.

    Returns:
        One text a story.
    """
    rng = random.Random(seed)
    return [story(draw_scene(rng), rng) for _ in range(count)]


def main() -> None:
    """Print a few stories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("\n\n".join(stories(options.count, options.seed)))


if __name__ == "__main__":
    main()
