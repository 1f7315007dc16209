"""Figures with their 95 % bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(
    rows: Float[np.ndarray, "n columns"],
    statistic: Callable[[Float[np.ndarray, "... columns"]], Float[np.ndarray, ...]],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> Measured:
    """A statistic of column means, with the percentile interval of resampled rows.

    Rows that do not differ (a single one, or pairs that are all won) give an interval without
    width: it says nothing then about how well the figure is known.

    Args:
        rows: one independent observation a row (a pair, a text).
        statistic: maps column means to the figure.
        seed: of the resampling.
        draws: number of resamples.
    """
    generator = np.random.default_rng(seed)
    n = len(rows)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=draws)
    drawn = statistic(counts @ rows / n)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Measured(float(statistic(rows.mean(axis=0))), float(low), float(high))


def mean_interval(values: Float[np.ndarray, " n"], seed: int = 0) -> Measured:
    """Mean of independent values with its interval."""
    return bootstrap(values[:, None].astype(np.float64), lambda means: means[..., 0], seed=seed)


def grouped_interval(
    values: Float[np.ndarray, " n"], groups: Sequence[str], seed: int = 0
) -> Measured:
    """Mean of values with the interval over groups: values of one group are not independent.

    Args:
        values: one figure a pair.
        groups: the prompt of each pair; pairs that share it are resampled together.
        seed: of the resampling.
    """
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(numbers, values.astype(np.float64))
    return ratio_interval(sums, np.bincount(numbers).astype(np.float64), seed)


def ratio_interval(
    above: Float[np.ndarray, " n"], below: Float[np.ndarray, " n"], seed: int = 0
) -> Measured:
    """Σ above / Σ below with its interval over rows."""
    rows = np.stack([above, below], axis=1).astype(np.float64)
    return bootstrap(rows, lambda means: means[..., 0] / means[..., 1], seed=seed)
