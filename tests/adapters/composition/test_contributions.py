"""Merged sites against the formula, written out again in numpy float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import random_site

from austeer.adapters import (
    AdapterConfig,
    AdapterError,
    Component,
    Site,
    SteeredSite,
    SteeringAdapter,
    Strength,
)
from austeer.adapters.attach import SiteSteer
from austeer.adapters.composition.contributions import (
    checked_weights,
    contributions,
    merged_sites,
    overlaps,
)

WIDTH = 12
SITE = Site(0, Component.FFN)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, WIDTH)).astype(np.float32)


def part(units: Sequence[int], rank: int = 0, seed: int = 0, site: Site = SITE) -> SteeredSite:
    return random_site(site, units, rank, np.random.default_rng(seed))


def adapter(*sites: SteeredSite) -> SteeringAdapter:
    rank = sites[0].predictor.rank if sites[0].predictor else 0
    config = AdapterConfig(
        base_model_name_or_path="base",
        base_model_fingerprint="sha256:" + "0" * 64,
        model_type="llama",
        components=tuple({steered.site.component for steered in sites}),
        strength=Strength.ADAPTIVE if rank else Strength.FITTED,
        k=sum(len(steered.index) for steered in sites),
        rank=rank,
    )
    return SteeringAdapter(config, sites)


def merge(
    parts: Sequence[SteeredSite], weights: Sequence[float] | None = None
) -> list[SteeredSite]:
    factors = weights or [1.0] * len(parts)
    return merged_sites(contributions([adapter(one) for one in parts], factors))


def expected(parts: Sequence[SteeredSite], weights: Sequence[float]) -> Any:
    """x + Σ w γ φ(x) x with every φ of the unsteered x, unit by unit."""
    result = X.astype(np.float64)
    for one, weight in zip(parts, weights, strict=True):
        selected = X[:, one.index].astype(np.float64)
        phi = one.predictor.phi(selected) if one.predictor else 1.0
        result[:, one.index] += weight * one.gamma.astype(np.float64) * phi * selected
    return result


def steer(merged: SteeredSite) -> Any:
    return SiteSteer(merged, 1.0)(torch.from_numpy(X)).numpy()


def assert_is_the_formula(
    merged: SteeredSite, parts: Sequence[SteeredSite], weights: Sequence[float]
) -> None:
    np.testing.assert_allclose(steer(merged), expected(parts, weights), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("ranks", [(0, 0), (1, 1), (2, 1), (0, 1), (2, 0), (1, 0, 2)])
def test_disjoint_units_of_one_site(ranks: tuple[int, ...]) -> None:
    units = ([7, 2, 4], [0, 11], [5])
    parts = [part(units[n], rank, seed=n) for n, rank in enumerate(ranks)]
    weights = [1.0, -0.5, 2.0][: len(parts)]
    (merged,) = merge(parts, weights)
    assert merged.index.tolist() == sorted(unit for one in parts for unit in one.index)
    assert (merged.predictor.rank if merged.predictor else 0) == sum(ranks)
    assert_is_the_formula(merged, parts, weights)


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.lists(
        st.tuples(st.sets(st.integers(0, WIDTH - 1), min_size=1), st.floats(-3, 3)),
        min_size=1,
        max_size=4,
    )
)
def test_constant_gains_always_add_up(chosen: list[tuple[set[int], float]]) -> None:
    parts = [part(list(units), seed=n) for n, (units, _) in enumerate(chosen)]
    weights = [weight for _, weight in chosen]
    (merged,) = merge(parts, weights)
    assert merged.predictor is None
    assert_is_the_formula(merged, parts, weights)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (0, 1), (1, 0)])
def test_the_strongest_takes_a_unit_that_a_predictor_steers(ranks: tuple[int, int]) -> None:
    parts = [part([3, 5, 8], ranks[0], seed=1), part([9, 5, 3], ranks[1], seed=2)]
    gamma = [dict(zip(one.index.tolist(), one.gamma, strict=True)) for one in parts]
    # Weighted so that each of the two shared units has another winner.
    weights = [1.0, 0.5 * sum(abs(gamma[0][u] / gamma[1][u]) for u in (3, 5))]
    wins = {u: int(abs(weights[1] * gamma[1][u]) > abs(gamma[0][u])) for u in (3, 5)}
    assert set(wins.values()) == {0, 1}
    (merged,) = merge(parts, weights)
    alone = [expected([one], [weight]) for one, weight in zip(parts, weights, strict=True)]
    owner = {8: 0, 9: 1} | wins
    found = steer(merged)
    for unit, number in owner.items():
        # A part's φ reads its own units even where it lost them.
        np.testing.assert_allclose(found[:, unit], alone[number][:, unit], rtol=2e-6, atol=2e-6)
    rest = [unit for unit in range(WIDTH) if unit not in owner]
    assert np.array_equal(found[:, rest], X[:, rest])


def test_constants_add_up_beside_a_predictor() -> None:
    parts = [part([1, 2], 0, seed=1), part([2, 3], 0, seed=2), part([4, 5], 2, seed=3)]
    (merged,) = merge(parts)
    assert_is_the_formula(merged, parts, [1.0] * 3)


def test_a_constant_gain_is_exact_under_a_predictor() -> None:
    """φ = 4 sigmoid(−ln 3) must be 1 in float32, or constants would drift."""
    const = part(list(range(0, WIDTH, 2)), 0, seed=1)
    (merged,) = merge([const, part([1], 1, seed=2)])
    even = const.index
    assert np.array_equal(steer(merged)[:, even], steer(const)[:, even])


def test_every_site_gets_the_same_rank() -> None:
    other = Site(3, Component.ATTENTION)
    first = adapter(part([1, 2], 2, seed=1), part([3], 2, seed=2, site=other))
    second = adapter(part([4], 1, seed=3))
    sites = merged_sites(contributions([first, second], [1.0, 1.0]))
    assert [steered.site for steered in sites] == [SITE, other]
    assert [steered.predictor and steered.predictor.rank for steered in sites] == [3, 3]
    assert_is_the_formula(sites[0], [first.sites[0], second.sites[0]], [1.0, 1.0])
    assert_is_the_formula(sites[1], [first.sites[1]], [1.0])


def test_overlaps_say_who_pulls_where() -> None:
    other = Site(1, Component.FFN)
    first = adapter(part([1, 2, 3]), part([1], site=other))
    second = adapter(part([3, 2], 1, seed=5))
    third = adapter(part([3], 0, seed=6), part([1], seed=7, site=other))
    found = overlaps([first, second, third], [1.0, -2.0, 1.0])
    assert [(o.site, o.unit, o.summable) for o in found] == [
        (SITE, 2, False),
        (SITE, 3, False),
        (other, 1, True),
    ]
    gamma = {3: first.sites[0].gamma[2], 2: first.sites[0].gamma[1]}
    assert found[0].gamma == (gamma[2], -2.0 * second.sites[0].gamma[1], None)
    assert found[1].gamma[0] == gamma[3] and None not in found[1].gamma
    for overlap in found:
        signs = {np.sign(value) for value in overlap.gamma if value}
        assert overlap.conflict == (len(signs) == 2)
    assert {overlap.conflict for overlap in found} == {True, False}


def test_a_weight_of_zero_pulls_nowhere() -> None:
    up, down = part([1]), part([1])
    gamma = np.array([1.0], np.float32)
    up, down = SteeredSite(SITE, up.index, gamma), SteeredSite(SITE, down.index, -gamma)
    pair = [adapter(up), adapter(down)]
    assert overlaps(pair)[0].conflict
    assert not overlaps(pair, [1.0, 0.0])[0].conflict


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "one weight for each of 2 adapters, got 1"),
        ([1.0, float("nan")], "weight nan: expected a finite number"),
        ([1.0, float("inf")], "weight inf"),
    ],
)
def test_bad_weights(weights: list[float], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        overlaps([adapter(part([1])), adapter(part([2]))], weights)


def test_weights_that_steer_nothing_are_refused() -> None:
    with pytest.raises(AdapterError, match="nothing is steered"):
        checked_weights([0, 0.0], 2)
