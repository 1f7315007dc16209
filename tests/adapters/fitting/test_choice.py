"""The choice on a model: as an exhaustive one, at a fraction of the runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import Component, Site
from austeer.adapters.fitting.choice import choose
from austeer.adapters.fitting.sweep import sweep_kl, sweep_margins
from austeer.adapters.measurement.evaluate import batch_pairs
from austeer.adapters.measurement.intervals import mean_interval
from austeer.adapters.measurement.neutral import TokenText
from austeer.adapters.steered_site import SteeredSite
from austeer.adapters.tokens import PairTokens

CANDIDATES = [
    [SteeredSite(Site(1, Component.FFN), np.arange(k), alpha * np.linspace(1, -1, k))]
    for k in (1, 4, 12)
    for alpha in (0.1, 0.5, 2.0, 8.0)
]


@pytest.fixture
def llama(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama")


def some_pairs(count: int) -> list[PairTokens]:
    generator = np.random.default_rng(0)
    rows = generator.integers(4, 40, (count, 6)).tolist()
    return [
        PairTokens((1, *row[: 2 + n % 3]), (row[4],), (row[5], 7)) for n, row in enumerate(rows)
    ]


def some_text() -> TokenText:
    ids = torch.randint(4, 40, (24, 10), generator=torch.Generator().manual_seed(0))
    return TokenText(ids, torch.ones_like(ids, dtype=torch.bool))


def test_margins_come_in_the_order_of_the_pairs(llama: Any) -> None:
    tokens = some_pairs(40)
    choice = choose(llama, CANDIDATES, tokens, some_text(), 0.05)
    wanted = sweep_margins(llama, batch_pairs(llama, tokens, 16), CANDIDATES)
    seen = ~np.isnan(choice.margins)
    np.testing.assert_allclose(choice.margins[seen], wanted[seen], rtol=0, atol=2e-6)
    assert seen[choice.best].all()
    assert 0.1 < seen.mean() < 0.6


@pytest.mark.parametrize("limit", [0.001, 0.015, 0.1])
def test_the_choice_is_the_exhaustive_one_or_inside_its_interval(
    limit: float, llama: Any
) -> None:
    tokens, text = some_pairs(40), some_text()
    margins = sweep_margins(llama, batch_pairs(llama, tokens, 16), CANDIDATES)
    sums, counts = sweep_kl(llama, text, CANDIDATES)
    kl = sums.sum(1) / counts.sum()
    assert 0 < (kl <= limit).sum() < len(kl)
    choice = choose(llama, CANDIDATES, tokens, text, limit)
    assert choice.within
    winner = np.where(kl <= limit, margins.mean(1), -np.inf).argmax()
    assert kl[choice.best] <= limit
    assert margins[choice.best].mean() >= mean_interval(margins[winner]).low
    assert choice.kl[choice.best] == pytest.approx(kl[choice.best], rel=1e-5)


def test_without_text_the_largest_margin_is_chosen(llama: Any) -> None:
    tokens = some_pairs(12)
    margins = sweep_margins(llama, batch_pairs(llama, tokens, 16), CANDIDATES).mean(1)
    assert choose(llama, CANDIDATES, tokens).best == margins.argmax()


def test_the_order_in_which_pairs_are_seen_follows_the_seed(llama: Any) -> None:
    tokens = some_pairs(40)
    first, again, other = (
        choose(llama, CANDIDATES, tokens, seed=seed).margins for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.isnan(first) != np.isnan(other)).any()
