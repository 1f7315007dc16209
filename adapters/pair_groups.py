"""Which pairs belong together, and splits that keep them so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from austeer.adapters._errors import PairsError
from austeer.adapters.pairs import ContrastivePair, text_digest


def split_pairs(
    pairs: Sequence[ContrastivePair], fractions: Sequence[float], seed: int = 0
) -> list[list[ContrastivePair]]:
    """Split by content hash: the same pairs give the same splits, whatever their order.

    Pairs that share a non-empty prompt, or a whole text, stay together, so that none of one
    split is seen in another; but for what would put more than half of all pairs in one group.

    Args:
        pairs: pairs without repetitions.
        fractions: share of each split, positive, summing to 1; held as closely as groups allow.
        seed: another seed gives another split.

    Raises:
        PairsError: bad fractions, or too few pairs (or groups of them) for so many splits.
    """
    if min(fractions, default=0.0) <= 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise PairsError(
            f"split: expected positive fractions with sum 1, got {list(fractions)}"
        )
    groups = _groups(pairs, seed)
    if len(groups) < len(fractions):
        raise PairsError(
            f"split: {len(pairs)} pairs with {len(groups)} distinct prompts do not fill "
            f"{len(fractions)} splits; give more pairs"
        )
    splits: list[list[ContrastivePair]] = [[] for _ in fractions]
    for number, group in enumerate(groups):
        lacking = [
            share * len(pairs) - len(s) for share, s in zip(fractions, splits, strict=True)
        ]
        empty = [index for index, split in enumerate(splits) if not split]
        # The last groups go where there is none yet: rounding must not leave a split empty.
        open_to = empty if len(groups) - number <= len(empty) else range(len(splits))
        splits[max(open_to, key=lambda index: lacking[index])].extend(group)
    return [sorted(split, key=lambda pair: text_digest(pair.content, seed)) for split in splits]


def whole_texts(pair: ContrastivePair) -> tuple[str, str]:
    """Both texts, wherever the prompt ends in them and whatever space is between words."""
    before = pair.prompt or (str(pair.context) if pair.is_chat else "")
    positive, negative = (
        " ".join((before + one).split()) for one in (pair.positive, pair.negative)
    )
    return positive, negative


def group_keys(
    pairs: Sequence[ContrastivePair], among: Sequence[ContrastivePair] | None = None
) -> list[str]:
    """What tells which pairs belong together: those with one prompt, or with a text in common.

    A pair without a prompt counts by its own content. Where one group holds more than half of
    all pairs it tells nothing: of one prompt, each pair then stands for itself; of texts in
    common, those that the most pairs have join none.

    Args:
        pairs: the pairs, of a split say.
        among: all pairs, where these are some of them.
    """
    everyone = pairs if among is None else among
    found = dict(zip((pair.content for pair in everyone), _keys(everyone), strict=True))
    return [found[pair.content] for pair in pairs]


def _keys(pairs: Sequence[ContrastivePair]) -> list[str]:
    keys = [pair.context_text if pair.context else pair.content for pair in pairs]
    alone = _dominating(keys)
    keys = [p.content if key == alone else key for p, key in zip(pairs, keys, strict=True)]
    texts = [set(whole_texts(pair)) for pair in pairs]
    shared = Counter(text for both in texts for text in both)
    joined = _joined(texts, keys)
    while (alone := _dominating(joined)) is not None:
        inside = [both for both, key in zip(texts, joined, strict=True) if key == alone]
        most = max((shared[text] for both in inside for text in both), default=0)
        if not most:  # one pair, given over and over
            break
        for both in inside:
            # Not the most alone: with as many turns as there are numbers it would not end soon.
            both -= {text for text in both if 2 * shared[text] > most}
        joined = _joined(texts, keys)
    return joined


def _dominating(keys: Sequence[str]) -> str | None:
    """The key of more than half of all, if there is one."""
    (most, times), *_ = [*Counter(keys).most_common(1), ("", 0)]
    return most if 2 * times > len(keys) else None


def _joined(texts: Sequence[Iterable[str]], keys: Sequence[str]) -> list[str]:
    """One key for all whose pairs have one of their `texts` in common; the least of them."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = key = parent[above]
        return key

    owners: dict[str, str] = {}
    for both, key in zip(texts, keys, strict=True):
        for text in both:
            first, second = sorted((root(key), root(owners.setdefault(text, key))))
            parent[second] = first
    return [root(key) for key in keys]


def _groups(pairs: Sequence[ContrastivePair], seed: int) -> list[list[ContrastivePair]]:
    """Pairs that must stay together: largest group first, then in order of their hash."""
    groups: dict[str, list[ContrastivePair]] = {}
    for pair, key in zip(pairs, group_keys(pairs), strict=True):
        groups.setdefault(text_digest(key, seed), []).append(pair)
    return [groups[key] for key in sorted(groups, key=lambda key: (-len(groups[key]), key))]
