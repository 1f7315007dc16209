"""`contributions` of several adapters to one site: where they overlap, and how they merge.

At every site, on the same activations x (ours; arXiv 2602.04428 steers one behaviour):

    gain(x)_i = 1 + Σ_a w_a · γ_ai · φ_a(x)_i        φ_a = 1 for constant gains

One unit holds one γ and one φ, so a sum at a unit that a predictor steers cannot be kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from austeer.adapters._errors import AdapterError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.predictor import Predictor
from austeer.adapters.sites import Site
from austeer.adapters.steered_site import SteeredSite


@dataclass(frozen=True, slots=True)
class Overlap:
    """A unit that several adapters steer.

    Attributes:
        site: where.
        unit: its number.
        gamma: w · γ of each adapter in order, None where it does not steer the unit.
        summable: whether the sum of the gains can be kept, as it can for constant gains.
    """

    site: Site
    unit: int
    gamma: tuple[float | None, ...]
    summable: bool

    @property
    def conflict(self) -> bool:
        """Whether two adapters pull the unit in opposite directions."""
        pulls = [value for value in self.gamma if value]
        return any(value < 0 for value in pulls) and any(value > 0 for value in pulls)

    def as_dict(self) -> dict[str, Any]:
        """JSON values for machines."""
        return {
            "site": self.site.key,
            "unit": self.unit,
            "gamma": list(self.gamma),
            "summable": self.summable,
            "conflict": self.conflict,
        }


def overlaps(
    adapters: Sequence[SteeringAdapter], weights: Sequence[float] | None = None
) -> tuple[Overlap, ...]:
    """Units that several of `adapters` steer, in the order of sites and units.

    Args:
        adapters: adapters of one base model.
        weights: factor on every γ of each; None for 1.

    Raises:
        AdapterError: weights that are not one finite number an adapter.
    """
    factors = checked_weights(weights, len(adapters))
    found = []
    for site, parts in contributions(adapters, factors).items():
        units, counts = np.unique(
            np.concatenate([part.index for part in parts]), return_counts=True
        )
        found += [_overlap(site, int(unit), parts, len(adapters)) for unit in units[counts > 1]]
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """What one adapter does at one site, its weight applied.

    Attributes:
        adapter: its number.
        index: unit numbers.
        gamma: w · γ of each.
        predictor: makes γ depend on the token, or None.
    """

    adapter: int
    index: Int[np.ndarray, " k"]
    gamma: Float[np.ndarray, " k"]
    predictor: Predictor | None

    @property
    def rank(self) -> int:
        """Number of features of the predictor, 0 without one."""
        return self.predictor.rank if self.predictor else 0


def contributions(
    adapters: Sequence[SteeringAdapter], weights: Sequence[float]
) -> dict[Site, list[Contribution]]:
    """What each adapter does at each site, sites ascending."""
    found: dict[Site, list[Contribution]] = {}
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for steered in adapter.sites:
            gamma = weight * steered.gamma.astype(np.float64)
            part = Contribution(number, steered.index, gamma, steered.predictor)
            found.setdefault(steered.site, []).append(part)
    return {site: found[site] for site in sorted(found)}


def _overlap(site: Site, unit: int, parts: Sequence[Contribution], count: int) -> Overlap:
    gamma: list[float | None] = [None] * count
    steering = [part for part in parts if unit in part.index]
    for part in steering:
        gamma[part.adapter] = float(part.gamma[part.index == unit][0])
    return Overlap(site, unit, tuple(gamma), not any(part.predictor for part in steering))


def merged_sites(contributions: dict[Site, list[Contribution]]) -> list[SteeredSite]:
    """Merge what several adapters do into one steered site each.

    Constant gains of a unit add up. A unit that a predictor and anything else steer goes to the
    largest |w · γ|, the first of equal ones.

    Raises:
        SiteError: a weighted γ is not finite.
    """
    # Every site of an adapter has the same rank: the largest that a site needs.
    rank = max(sum(part.rank for part in parts) for parts in contributions.values())
    return [_merged(site, parts, rank) for site, parts in contributions.items()]


def _merged(site: Site, parts: Sequence[Contribution], rank: int) -> SteeredSite:
    """One site: the union of the units, each part's features beside those of the others."""
    index = np.unique(np.concatenate([part.index for part in parts]))
    given = np.zeros((len(parts), len(index)))
    steers, predicted = np.zeros(given.shape, bool), np.zeros(given.shape, bool)
    for row, part in enumerate(parts):
        columns = np.searchsorted(index, part.index)
        given[row, columns], steers[row, columns] = part.gamma, True
        predicted[row, columns] = part.predictor is not None
    strongest = np.where(steers, np.abs(given), -1.0).argmax(axis=0)
    alone = predicted.any(axis=0) & (steers.sum(axis=0) > 1)
    kept = given * (~alone | (strongest == np.arange(len(parts))[:, None]))
    with np.errstate(over="ignore"):  # an infinite γ is refused by name
        gamma = kept.sum(axis=0).astype(np.float32)
    return SteeredSite(site, index, gamma, _side_by_side(index, parts, strongest, rank))


def _side_by_side(
    index: Int[np.ndarray, " k"],
    parts: Sequence[Contribution],
    strongest: Int[np.ndarray, " k"],
    rank: int,
) -> Predictor | None:
    """Predictors of one site as one: a unit reads the features of the part that steers it.

    A part's features read all its own units, also those that another part steers, so that φ
    stays what it was at the others. Zero columns of U make φ = 1: a constant gain.
    """
    if rank == 0:
        return None
    V, U = np.zeros((len(index), rank), np.float32), np.zeros((rank, len(index)), np.float32)
    b = np.zeros(rank, np.float32)
    start = 0
    for row, part in enumerate(parts):
        if part.predictor is None:
            continue
        features = slice(start, start + part.rank)
        columns = np.searchsorted(index, part.index)
        own = strongest[columns] == row
        V[columns, features] = part.predictor.V
        b[features] = part.predictor.b
        U[features, columns[own]] = part.predictor.U[:, own]
        start += part.rank
    return Predictor(V, b, U)


def checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One finite weight an adapter, 1 by default.

    Raises:
        AdapterError: another number of weights, or one that is not finite, or all 0.
    """
    if weights is None:
        return (1.0,) * count
    given: object = weights
    if isinstance(given, str) or not isinstance(given, Sequence | np.ndarray):
        raise AdapterError(
            f"combine: weights {weights!r}: expected a list, one number an adapter"
        )
    if len(given) != count:
        raise AdapterError(
            f"combine: expected one weight for each of {count} adapters, got {len(given)}"
        )
    for weight in given:
        if not (isinstance(weight, Real) and math.isfinite(weight)):
            raise AdapterError(f"combine: weight {weight!r}: expected a finite number")
    if not any(weights):
        raise AdapterError("combine: with all weights 0 nothing is steered; raise one")
    return tuple(float(weight) for weight in weights)
