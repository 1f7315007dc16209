"""Successive halving: candidates see more data as fewer of them are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float

MarginsOf = Callable[[Sequence[int], slice], Float[np.ndarray, "c n"]]
"""(candidates, pairs) → their margins, nats."""

KLOf = Callable[
    [Sequence[int], slice], tuple[Float[np.ndarray, "c n"], Float[np.ndarray, " n"]]
]
"""(candidates, texts) → KL summed over each text, nats, and the number of its tokens."""

_SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of the data that each round sees
_LEAST_PAIRS, _LEAST_TEXTS = 8, 4  # fewer say nothing about their own spread
_KEPT = 1 / 3  # of all candidates that a round leaves at most, and of those the next one
_CONFIDENCE = 0.99
_WORST = -1e30  # nats; what counts for a figure that is not finite


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The candidate chosen, and what is known of the others.

    Attributes:
        best: largest mean margin within the limit, on all data; the least KL if none is within.
        finalists: candidates that saw every pair, best first; `best` is one of them.
        margins: nats; NaN where a candidate did not see a pair.
        kl: mean over the texts that a candidate saw, nats per token; NaN for none.
        within: whether `best` keeps the limit on all texts.
    """

    best: int
    finalists: list[int]
    margins: Float[np.ndarray, "C pairs"]
    kl: Float[np.ndarray, " C"]
    within: bool


def successive_halving(
    count: int,
    margins_of: MarginsOf,
    pairs: int,
    kl_of: KLOf | None = None,
    texts: int = 0,
    limit: float = float("inf"),
) -> Choice:
    """Choose the candidate with the largest mean margin whose KL is within `limit`.

    Rounds see 1/8, 1/4, 1/2 and all of the data. A candidate is dropped when the 99 % interval
    of its KL lies above the limit, when that of its margins' difference to the best lies below
    zero, or when it is not among the best third (then ninth, and so on) of all. Dropping for
    margin is taken back where every candidate that was left turns out to break the limit.

    Args:
        count: number of candidates.
        margins_of: measures margins.
        pairs: number of pairs, in random order.
        kl_of: measures KL; None to choose by margin alone.
        texts: number of texts.
        limit: largest mean KL allowed, nats per token.
    """
    race = _Race(count, margins_of, pairs, kl_of, texts, limit)
    while (best := race.round_trip()) is None:
        pass
    return race.choice(best)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t, by its expansion around the normal one (2 % off at 4)."""
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


class _Race:
    """Everything measured so far; nothing is measured twice."""

    def __init__(
        self,
        count: int,
        margins_of: MarginsOf,
        pairs: int,
        kl_of: KLOf | None,
        texts: int,
        limit: float,
    ) -> None:
        self._count, self._limit = count, limit
        self._margins_of, self._kl_of = margins_of, kl_of
        self._pairs, self._texts = pairs, texts if kl_of else 0
        self._margins = np.full((count, pairs), np.nan)
        self._sums = np.full((count, self._texts), np.nan)
        self._tokens = np.ones(self._texts)
        self._above = np.zeros(count, bool)  # whose KL is above the limit for sure

    def round_trip(self) -> int | None:
        """One race among those not above the limit; None where nobody left keeps it."""
        alive = [c for c in range(self._count) if not self._above[c]]
        for number, share in enumerate(_SHARES):
            pairs = min(self._pairs, max(_LEAST_PAIRS, round(share * self._pairs)))
            texts = min(self._texts, max(_LEAST_TEXTS, round(share * self._texts)))
            alive = self._keep_limit(alive, texts)
            if not alive:
                break
            self._see_pairs(alive, pairs)
            alive = self._leading(alive, pairs, number)
        for candidate in sorted(alive, key=lambda c: -self._margins[c].mean()):
            if not self._breaks(candidate):
                return candidate
        return None if not self._above.all() else self._gentlest()

    def choice(self, best: int) -> Choice:
        """What the race found."""
        self._see_pairs([best], self._pairs)
        complete = [c for c in range(self._count) if not np.isnan(self._margins[c]).any()]
        kl = np.array([self._kl(c)[0] for c in range(self._count)])
        within = not self._breaks(best)
        ranked = sorted(complete, key=lambda c: (c != best, -self._margins[c].mean()))
        return Choice(best, ranked, self._margins, kl, within)

    def _keep_limit(self, alive: list[int], texts: int) -> list[int]:
        """Show more text to those that it may decide about; drop those above the limit."""
        if self._kl_of is None:
            return alive
        self._see_texts([c for c in alive if self._undecided(c)], texts)
        for candidate in alive:
            self._above[candidate] |= self._kl(candidate)[1] > self._limit
        return [c for c in alive if not self._above[c]]

    def _leading(self, alive: list[int], pairs: int, number: int) -> list[int]:
        seen = self._margins[:, :pairs]
        inside = [c for c in alive if not self._kl(c)[0] > self._limit]
        means = seen.mean(axis=1)
        leader = max(inside or alive, key=means.__getitem__)
        behind = _clearly_below(seen[alive] - seen[leader])
        left = [c for c, worse in zip(alive, behind, strict=True) if not worse]
        left.sort(key=lambda c: (c != leader, -means[c]))
        return left[: max(2, int(np.ceil(self._count * _KEPT ** (number + 1))))]

    def _breaks(self, candidate: int) -> bool:
        """Whether a candidate breaks the limit on all texts."""
        if self._kl_of is None:
            return False
        self._see_texts([candidate], self._texts)
        self._above[candidate] = self._kl(candidate)[0] > self._limit
        return bool(self._above[candidate])

    def _gentlest(self) -> int:
        return int(np.argmin([self._kl(c)[0] for c in range(self._count)]))

    def _undecided(self, candidate: int) -> bool:
        _, low, high = self._kl(candidate)
        return not (low > self._limit or high < self._limit)

    def _kl(self, candidate: int) -> tuple[float, float, float]:
        """Mean per token of the texts seen, with its interval."""
        seen = ~np.isnan(self._sums[candidate])
        sums, tokens = self._sums[candidate, seen], self._tokens[seen]
        if not len(sums):
            return np.nan, -np.inf, np.inf
        mean = sums.sum() / tokens.sum()
        if len(sums) == self._texts or mean <= 0:  # not above 0: rounding of no effect at all
            return mean, mean, mean
        if len(sums) == 1:
            return mean, -np.inf, np.inf
        spread = np.sqrt(len(sums) / (len(sums) - 1) * ((sums - mean * tokens) ** 2).sum())
        width = t_quantile(_CONFIDENCE, len(sums) - 1) * spread / sums.sum()
        # In logarithms: few texts would else not tell a KL of ten times the limit from it.
        factor = np.exp(min(width, 50.0))
        return mean, mean / factor, mean * factor

    def _see_pairs(self, candidates: Sequence[int], upto: int) -> None:
        for group, new in _unseen(self._margins, candidates, upto):
            found = self._margins_of(group, new)
            self._margins[group, new] = np.nan_to_num(found, nan=_WORST, neginf=_WORST)

    def _see_texts(self, candidates: Sequence[int], upto: int) -> None:
        for group, new in _unseen(self._sums, candidates, upto):
            assert self._kl_of is not None
            found, self._tokens[new] = self._kl_of(group, new)
            self._sums[group, new] = np.nan_to_num(found, nan=-_WORST, posinf=-_WORST)


def _unseen(
    table: Float[np.ndarray, "C n"], candidates: Sequence[int], upto: int
) -> list[tuple[list[int], slice]]:
    """Candidates by the columns before `upto` that they still have to see."""
    groups: dict[int, list[int]] = {}
    for candidate in candidates:
        groups.setdefault(int((~np.isnan(table[candidate])).sum()), []).append(int(candidate))
    return [(group, slice(seen, upto)) for seen, group in groups.items() if seen < upto]


def _clearly_below(difference: Float[np.ndarray, "c n"]) -> Bool[np.ndarray, " c"]:
    """Whether the interval of each row's mean lies below zero."""
    n = difference.shape[1]
    if n < 2:
        return np.zeros(len(difference), bool)
    error = difference.std(axis=1, ddof=1) / np.sqrt(n)
    return np.asarray(difference.mean(axis=1) + t_quantile(_CONFIDENCE, n - 1) * error < 0)
