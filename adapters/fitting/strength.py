"""Gains of the untrained strengths, and what a trained one starts from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from austeer.adapters.config import Strength
from austeer.adapters.sites import UnitTable
from austeer.adapters.steered_site import SteeredSite

if TYPE_CHECKING:
    from austeer.adapters.localization.run import Ranking

_LARGEST_ALPHA = 1024.0
_FIRST_ALPHA, _GENTLEST_ALPHA = 0.5, 1e-4
_AIM, _ENOUGH = 0.97, 0.93  # share of the limit that a proposal aims at, and that ends a search
_LARGEST_STEP = 8.0
_MOST_STEPS = 10


def unit_direction(
    table: UnitTable, ranking: Ranking, strength: Strength
) -> Float[np.ndarray, " k"]:
    """γ per unit of α.

    `paper`: β_i (AUSteer, γ = αβ). Every other strength: β_i · sign(mean x_i), because β says
    that the positive side has the larger value, and scaling up a negative value lowers it.
    """
    if strength is Strength.PAPER:
        return table.beta
    mean = ranking.mean(table.component)[table.layer, table.unit]
    return np.asarray(table.beta * np.where(mean < 0, -1.0, 1.0))


def constant_sites(
    table: UnitTable, gamma: Float[np.ndarray, " k"], keep_sign: bool = False
) -> list[SteeredSite]:
    """Steered sites with constant γ, one γ a row of `table`.

    Args:
        table: the units.
        gamma: their γ, in the table's order.
        keep_sign: raise every γ below −1 to −1, so that no activation changes its sign.
    """
    values = np.maximum(gamma, -1.0) if keep_sign else gamma
    return [
        SteeredSite(site, table.unit[rows].astype(np.int64), values[rows].astype(np.float32))
        for site, rows in table.by_site().items()
    ]


class AlphaSearch:
    """Largest α within a KL limit, as KL grows about as a power of α (2 while it is small).

    Each proposal is where that power law, through what was measured, meets the limit. Where
    even the gentlest α breaks the limit, or the largest one keeps it, the search ends there.

    Args:
        limit: nats per token.
        first: α to begin with.

    Attributes:
        best: the largest α known to keep the limit; else the smallest that was tried.
        kl: its KL; NaN before anything was measured.
    """

    def __init__(self, limit: float, first: float = _FIRST_ALPHA) -> None:
        self.best, self.kl = first, math.nan
        self._limit = limit
        self._below: tuple[float, float] | None = None  # (α, KL) within the limit
        self._above: tuple[float, float] | None = None
        self._next, self._steps = first, 0

    @property
    def done(self) -> bool:
        """Whether there is nothing more to measure."""
        below, above = self._below, self._above
        if self._steps >= _MOST_STEPS or (below and below[1] >= _ENOUGH * self._limit):
            return True
        if below and above:
            return above[0] < 1.02 * below[0]
        return self.best >= _LARGEST_ALPHA or (not below and self.best <= _GENTLEST_ALPHA)

    def propose(self) -> float:
        """The α to measure next."""
        return self._next

    def tell(self, kl: float) -> None:
        """Say what KL the proposed α has."""
        self._steps += 1
        if kl <= self._limit:
            self._below = (self._next, kl)
        else:
            self._above = (self._next, kl)
        found = self._below or self._above
        assert found is not None
        self.best, self.kl = found
        self._next = self._following()

    def _following(self) -> float:
        below, above = self._below, self._above
        if below and above:
            middle = math.sqrt(below[0] * above[0])
            usable = below[1] > 0 and math.isfinite(above[1]) and self._steps % 3
            if not usable:
                return middle
            power = math.log(above[1] / below[1]) / math.log(above[0] / below[0])
            meeting = below[0] * math.pow(_AIM * self._limit / below[1], 1 / power)
            return min(max(meeting, 1.01 * below[0]), above[0] / 1.01)
        alpha, kl = self.best, self.kl
        step = math.sqrt(_AIM * self._limit / kl) if 0 < kl < math.inf else _LARGEST_STEP
        if below:
            return min(alpha * min(max(step, 1.1), _LARGEST_STEP), _LARGEST_ALPHA)
        step = step if kl < math.inf else 0.0
        return max(alpha * min(max(step, 1 / _LARGEST_STEP), 0.9), _GENTLEST_ALPHA)
