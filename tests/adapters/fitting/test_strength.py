"""Untrained strengths: the rules themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from austeer.adapters import Component, Site, Strength, UnitTable
from austeer.adapters.fitting.strength import (
    AlphaSearch,
    constant_sites,
    unit_direction,
)

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


def searched(kl_of: Callable[[float], float], limit: float) -> tuple[AlphaSearch, int]:
    search, steps = AlphaSearch(limit), 0
    while not search.done:
        search.tell(kl_of(search.propose()))
        steps += 1
    return search, steps


@pytest.mark.parametrize("limit", [1e-4, 0.05, 0.2, 3.0])
@pytest.mark.parametrize(
    "kl_of",
    [
        lambda alpha: 0.3 * alpha**2,
        lambda alpha: 0.01 * alpha**2 + 0.002 * alpha**5,
        lambda alpha: 4 * alpha**1.3,
        lambda alpha: math.inf if alpha > 0.7 else alpha**2 * 0.01,
    ],
)
def test_the_search_ends_close_below_the_limit(
    kl_of: Callable[[float], float], limit: float
) -> None:
    search, steps = searched(kl_of, limit)
    assert search.kl == kl_of(search.best) <= limit
    assert kl_of(search.best * 1.1) > 0.93 * limit
    assert steps <= 10


def test_the_search_ends_where_no_alpha_breaks_the_limit() -> None:
    search, _ = searched(lambda alpha: 0.0, 0.1)
    assert search.best == 1024.0


def test_the_search_ends_where_every_alpha_breaks_the_limit() -> None:
    search, steps = searched(lambda alpha: 1.0, 0.1)
    assert search.best < 0.01
    assert search.kl == 1.0
    assert steps <= 10
    assert searched(lambda alpha: math.inf, 0.1)[0].kl == math.inf
