"""Gains of the untrained strengths, and what a trained one starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from austeer.adapters.adapter import SteeredSite
from austeer.adapters.config import Strength
from austeer.adapters.sites import UnitTable

if TYPE_CHECKING:
    from austeer.adapters.localization import Ranking


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
