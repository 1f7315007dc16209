"""Gains of the untrained strengths, and what a trained one starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from austeer.adapters.config import Strength
from austeer.adapters.sites import UnitTable
from austeer.adapters.steered_site import SteeredSite

if TYPE_CHECKING:
    from austeer.adapters.localization import Ranking

_LEAST_ALPHA, _LARGEST_ALPHA = 0.125, 1024.0


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


def alphas_within(within: Callable[[float], bool]) -> list[float]:
    """Values of α inside the budget: doubled until it breaks, then bisected four times.

    α ends at 1024: beyond the paper's largest (100), a longer search finds nothing new. Where
    even the least α breaks the budget, one below it is returned all the same.
    """
    inside: list[float] = []
    alpha = _LEAST_ALPHA
    while within(alpha):
        inside.append(alpha)
        alpha *= 2
        if alpha > _LARGEST_ALPHA:
            return inside
    low, high = (inside[-1] if inside else alpha / 8), alpha
    for _ in range(4):
        middle = (low * high) ** 0.5
        if within(middle):
            inside.append(middle)
            low = middle
        else:
            high = middle
    return inside or [low]
