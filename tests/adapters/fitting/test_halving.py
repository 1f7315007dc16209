"""Successive halving: the exhaustive winner where it is clear, one inside its interval else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from austeer.adapters.fitting.halving import Choice, successive_halving, t_quantile
from austeer.adapters.measurement.intervals import mean_interval

PAIRS, TEXTS, LIMIT = 64, 32, 0.1
Table = np.ndarray[Any, np.dtype[np.float64]]


class Data:
    """Margins and KL of every candidate, and what a race looked at."""

    def __init__(self, margins: Table, kl: Table, tokens: Table | None = None) -> None:
        self.margins, self.tokens = margins, np.full(TEXTS, 50.0) if tokens is None else tokens
        self.sums = kl * self.tokens
        self.seen_margins = np.zeros(margins.shape, int)
        self.seen_texts = np.zeros(kl.shape, int)

    def choose(self, limit: float = LIMIT) -> Choice:
        return successive_halving(
            len(self.margins), self._margins_of, PAIRS, self._kl_of, TEXTS, limit
        )

    def choose_by_margin(self) -> Choice:
        return successive_halving(len(self.margins), self._margins_of, PAIRS)

    def _margins_of(self, chosen: Sequence[int], part: slice) -> Table:
        self.seen_margins[chosen, part] += 1
        return self.margins[chosen, part]

    def _kl_of(self, chosen: Sequence[int], part: slice) -> tuple[Table, Table]:
        self.seen_texts[chosen, part] += 1
        return self.sums[chosen, part], self.tokens[part]

    @property
    def mean_kl(self) -> Table:
        return np.asarray(self.sums.sum(1) / self.tokens.sum())

    @property
    def winner(self) -> int:
        return int(np.where(self.mean_kl <= LIMIT, self.margins.mean(1), -np.inf).argmax())


def noisy(seed: int, quality: Table, kl: Table, noise: float = 0.5) -> Data:
    """Margins share a spread between pairs, as candidates of one direction do."""
    generator = np.random.default_rng(seed)
    common = generator.normal(0, 3, PAIRS)
    own = generator.normal(0, noise, (len(quality), PAIRS))
    spread = generator.lognormal(-0.05, 0.3, (len(kl), TEXTS))
    tokens = generator.integers(20, 60, TEXTS).astype(float)
    return Data(quality[:, None] + common + own, kl[:, None] * spread, tokens)


QUALITY = np.repeat(np.linspace(0, 2, 5), 5) * np.tile([0.2, 0.5, 1.0, 1.6, 2.0], 5)
KL = np.tile([0.004, 0.016, 0.06, 0.25, 1.0], 5) * np.repeat([0.8, 0.9, 1.0, 1.1, 1.2], 5)


@pytest.mark.parametrize("seed", range(10))
def test_a_clear_winner_is_the_exhaustive_one(seed: int) -> None:
    data = noisy(seed, QUALITY, KL)
    assert data.winner == 22
    choice = data.choose()
    assert choice.best == 22
    assert choice.within
    assert choice.finalists[0] == 22
    np.testing.assert_array_equal(choice.margins[22], data.margins[22])
    assert choice.kl[22] == pytest.approx(data.mean_kl[22])


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_measured_twice_and_hopeless_candidates_little(seed: int) -> None:
    data = noisy(seed, QUALITY, KL)
    choice = data.choose()
    assert data.seen_margins.max() == data.seen_texts.max() == 1
    assert data.seen_margins.mean() < 0.25
    assert data.seen_texts.mean() < 0.3
    assert np.isnan(choice.margins).mean() == pytest.approx(1 - data.seen_margins.mean())
    assert (data.seen_margins[KL > 0.8] == 0).all(), "far outside the limit: no pair is shown"


@pytest.mark.parametrize("seed", range(30))
def test_on_noise_the_choice_is_inside_the_winners_interval(seed: int) -> None:
    data = noisy(seed, np.zeros(25), np.full(25, 0.05), noise=2.0)
    choice = data.choose()
    found = mean_interval(data.margins[data.winner])
    assert found.low <= data.margins[choice.best].mean() <= found.high


@pytest.mark.parametrize("seed", range(10))
def test_a_candidate_at_the_limit_is_judged_on_all_texts(seed: int) -> None:
    """The best margins stand at the limit: some are below it by chance, none may break it."""
    data = noisy(seed, np.linspace(0, 3, 25), np.full(25, LIMIT))
    choice = data.choose()
    assert choice.within
    assert data.mean_kl[choice.best] <= LIMIT
    assert data.seen_texts[choice.best].all()


def test_candidates_dropped_for_margin_come_back_when_the_others_break_the_limit() -> None:
    kl = np.full((7, TEXTS), 0.02)
    kl[2:, :24], kl[2:, 24:] = 0.099, 0.2  # within the limit as long as it is a small part
    kl[2:, ::2] *= 0.9
    kl[0] = 0.001
    margins = np.arange(7.0)[:, None] + np.zeros((7, PAIRS))
    data = Data(margins, kl)
    choice = data.choose()
    assert (data.mean_kl[2:] > LIMIT).all()
    assert choice.best == 1, "the gentlest one has a smaller margin"
    assert choice.within
    assert data.seen_margins.max() == data.seen_texts.max() == 1


def test_a_few_texts_by_chance_above_the_limit_drop_nobody() -> None:
    kl = np.full((4, TEXTS), 0.05)
    kl[3, :4] = [0.06, 0.2, 0.08, 0.15]
    margins = np.arange(4.0)[:, None] + np.zeros((4, PAIRS))
    assert Data(margins, kl).choose().best == 3


def test_the_gentlest_where_none_keeps_the_limit() -> None:
    data = noisy(0, QUALITY, KL + 0.5)
    choice = data.choose()
    assert not choice.within
    assert choice.best in np.argsort(data.mean_kl)[:10]
    assert not np.isnan(choice.margins[choice.best]).any()


def test_choosing_by_margin_alone() -> None:
    data = noisy(1, QUALITY, KL)
    choice = data.choose_by_margin()
    assert choice.best == 24
    assert choice.within
    assert np.isnan(choice.kl).all()


def test_what_is_not_finite_never_wins() -> None:
    data = noisy(0, QUALITY, KL)
    data.margins[22], data.sums[17] = np.nan, np.nan
    choice = data.choose()
    assert choice.best == 21
    assert data.choose_by_margin().best == 24


@pytest.mark.parametrize("count", [1, 2])
def test_few_candidates_see_everything(count: int) -> None:
    data = noisy(0, np.arange(float(count)) * 0.01, np.full(count, 0.01))
    assert data.choose().best == data.winner


def test_equal_candidates_are_no_reason_to_drop() -> None:
    data = Data(np.ones((3, PAIRS)), np.full((3, TEXTS), 0.01))
    assert data.choose().finalists[0] == 0


@pytest.mark.parametrize(
    ("freedom", "value"), [(3, 4.541), (7, 2.998), (15, 2.602), (60, 2.390)]
)
def test_t_quantile_is_that_of_the_tables(freedom: int, value: float) -> None:
    assert t_quantile(0.99, freedom) == pytest.approx(value, rel=0.025)
