"""Splits depend on content alone, and keep together what belongs together."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.adapters import ContrastivePair, PairsError, split_pairs
from austeer.adapters.pair_groups import group_keys, whole_texts

THIRDS = (0.6, 0.2, 0.2)


def make(number: int, prompt: str | None = None) -> ContrastivePair:
    text = f"p{number}" if prompt is None else prompt
    return ContrastivePair(text, f"+{number}", f"-{number}")


def sizes(splits: list[list[ContrastivePair]]) -> list[int]:
    return [len(split) for split in splits]


@pytest.mark.parametrize(
    ("count", "fractions", "wanted"),
    [
        (100, (0.6, 0.2, 0.2), [60, 20, 20]),
        (8, (0.5, 0.25, 0.25), [4, 2, 2]),
        (3, (0.9, 0.05, 0.05), [1, 1, 1]),
        (10, (1.0,), [10]),
    ],
)
def test_fractions(count: int, fractions: tuple[float, ...], wanted: list[int]) -> None:
    assert sizes(split_pairs([make(i) for i in range(count)], fractions)) == wanted


@settings(deadline=None, max_examples=60)
@given(
    prompts=st.lists(st.sampled_from(["", "a", "b", "c", "d", "e"]), min_size=3, max_size=40),
    seed=st.integers(0, 5),
)
def test_split_partitions_whatever_the_order(prompts: list[str], seed: int) -> None:
    pairs = [make(number, prompt) for number, prompt in enumerate(prompts)]
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    try:
        splits = split_pairs(pairs, (0.5, 0.3, 0.2), seed)
    except PairsError:
        assert len(set(prompts)) < 3
        return
    assert splits == split_pairs(shuffled, (0.5, 0.3, 0.2), seed)
    assert Counter(p for split in splits for p in split) == Counter(pairs)
    assert all(splits)
    held = [{pair.prompt for pair in split if pair.prompt} for split in splits]
    prompt, most = Counter(prompts).most_common(1)[0]
    if not prompt or most * 2 <= len(pairs):
        assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])


def test_one_prompt_for_most_pairs_is_split_all_the_same() -> None:
    pairs = [make(number, "same" if number < 80 else None) for number in range(100)]
    assert sizes(split_pairs(pairs, (0.6, 0.2, 0.2))) == [60, 20, 20]


def test_another_seed_gives_another_split() -> None:
    pairs = [make(number) for number in range(50)]
    first, second = (set(split_pairs(pairs, (0.5, 0.5), seed)[0]) for seed in (0, 1))
    assert first != second


def test_split_is_the_same_in_another_process() -> None:
    code = (
        "from austeer.adapters.pair_groups import *\n"
        "pairs = [ContrastivePair(f'p{i}', f'+{i}', f'-{i}') for i in range(40)]\n"
        "print([p.prompt for p in split_pairs(pairs, (0.5, 0.5), 3)[0]])\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    here = split_pairs([make(number) for number in range(40)], (0.5, 0.5), 3)[0]
    assert shown.stdout.strip() == str([pair.prompt for pair in here])


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.2, -0.2), (1.0, 0.0)])
def test_bad_fractions(fractions: tuple[float, ...]) -> None:
    with pytest.raises(PairsError, match="sum 1"):
        split_pairs([make(number) for number in range(9)], fractions)


def test_too_few_groups_for_the_splits() -> None:
    pairs = [make(number, "ab"[number % 2]) for number in range(10)]
    with pytest.raises(PairsError, match=r"10 pairs with 2 distinct prompts .* 3 splits"):
        split_pairs(pairs, (0.6, 0.2, 0.2))
    with pytest.raises(PairsError, match="0 pairs"):
        split_pairs([], (0.6, 0.4))


def test_one_prompt_in_most_pairs_loosens_no_other() -> None:
    pairs = [make(number, "always") for number in range(20)]
    pairs += [make(100 + number, f"group {number % 3}") for number in range(12)]
    splits = split_pairs(pairs, (0.6, 0.2, 0.2))
    prompts = [{pair.prompt for pair in split} for split in splits]
    assert sum("always" in found for found in prompts) > 1
    for number in range(3):
        assert sum(f"group {number}" in found for found in prompts) == 1


def seen_twice(splits: list[list[ContrastivePair]]) -> set[str]:
    """Texts that stand in two splits."""
    held = [{text for pair in split for text in whole_texts(pair)} for split in splits]
    return {text for one, other in combinations(held, 2) for text in one & other}


def test_a_text_whose_prompt_ends_a_word_earlier_stays_with_it() -> None:
    pairs = []
    for number in range(40):
        pairs.append(ContrastivePair(f"Tom {number} felt", " very happy", " very sad"))
        pairs.append(ContrastivePair(f"Tom {number} felt very", " happy", " sad"))
    splits = split_pairs(pairs, THIRDS)
    assert sizes(splits) == [48, 16, 16]
    assert not seen_twice(splits)
    assert len(set(group_keys(pairs))) == 40


def test_a_pair_given_over_and_over_is_one_group() -> None:
    assert len(set(group_keys([make(0)] * 5 + [make(1)]))) == 2


def test_several_negatives_of_one_positive_stay_together() -> None:
    pairs = [
        ContrastivePair("", f"good {number}", f"bad {number} {other}")
        for number in range(30)
        for other in range(4)
    ]
    splits = split_pairs(pairs, THIRDS)
    assert sizes(splits) == [72, 24, 24]
    assert not seen_twice(splits)


def test_texts_that_chain_most_pairs_together_join_none() -> None:
    pairs = [
        ContrastivePair("", f"text {number}", f"text {number + 1}") for number in range(50)
    ]
    assert sizes(split_pairs(pairs, THIRDS)) == [30, 10, 10]
    assert len(set(group_keys(pairs))) == 50


def test_keys_of_a_split_are_those_among_all() -> None:
    pairs = [ContrastivePair("a", " b c", " d"), ContrastivePair("a b", " c", " e")]
    pairs += [make(number) for number in range(8)]
    keys = group_keys(pairs)
    assert keys[0] == keys[1] and len(set(keys)) == 9
    assert group_keys(pairs[1:2], pairs) == keys[:1]


def test_one_negative_of_most_pairs_joins_none_and_loosens_no_other() -> None:
    pairs = []
    for number in range(20):
        for other in ("no idea", f"bad {number}", f"worse {number}"):
            pairs.append(ContrastivePair("", f"good {number}", other))
    splits = split_pairs(pairs, THIRDS)
    assert sizes(splits) == [36, 12, 12]
    assert seen_twice(splits) == {"no idea"}
    assert len(set(group_keys(pairs))) == 20
