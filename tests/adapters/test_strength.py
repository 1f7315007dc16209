"""Untrained strengths: the rules themselves."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from austeer.adapters import Component, Site, Strength, UnitTable
from austeer.adapters.strength import alphas_within, constant_sites, unit_direction

TABLE = UnitTable(
    Component.FFN,
    layer=np.array([1, 0, 1]),
    unit=np.array([5, 2, 0]),
    beta=np.array([1.0, -0.75, 0.5]),
)
MEAN = np.zeros((2, 6))
MEAN[1, 5], MEAN[0, 2], MEAN[1, 0] = -3.0, -2.0, 4.0
RANKING = SimpleNamespace(mean=lambda component: MEAN)


def test_paper_rule_is_beta() -> None:
    assert unit_direction(TABLE, RANKING, Strength.PAPER).tolist() == [1.0, -0.75, 0.5]


def test_oriented_rule_pushes_the_value_towards_the_positive_side() -> None:
    """β > 0 asks for a larger value: a unit whose mean is negative must shrink."""
    assert unit_direction(TABLE, RANKING, Strength.ORIENTED).tolist() == [-1.0, 0.75, 0.5]


def test_sites_hold_each_unit_with_its_own_gamma() -> None:
    sites = constant_sites(TABLE, np.array([0.1, -2.0, 0.3]))
    assert [s.site for s in sites] == [Site(0, Component.FFN), Site(1, Component.FFN)]
    assert sites[0].index.tolist() == [2]
    assert np.allclose(sites[0].gamma, [-2.0])
    assert sites[1].index.tolist() == [0, 5]
    assert np.allclose(sites[1].gamma, [0.3, 0.1])


def test_keep_sign_stops_at_zero_gain() -> None:
    sites = constant_sites(TABLE, np.array([0.1, -2.0, -0.5]), keep_sign=True)
    assert sites[0].gamma.tolist() == [-1.0]
    assert np.allclose(sites[1].gamma, [-0.5, 0.1])


def test_alphas_come_close_to_the_budget_and_stay_within() -> None:
    for limit in (0.2, 1.0, 3.3, 700.0):
        found = alphas_within(lambda alpha, limit=limit: alpha <= limit)
        assert max(found) <= limit
        assert max(found) > 0.9 * limit


def test_alphas_end_where_the_budget_never_breaks() -> None:
    assert max(alphas_within(lambda alpha: True)) == 1024.0


def test_a_budget_that_breaks_at_once_still_gives_an_alpha() -> None:
    (alpha,) = alphas_within(lambda alpha: False)
    assert 0 < alpha < 0.125
