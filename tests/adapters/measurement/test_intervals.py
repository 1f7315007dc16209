"""Bootstrap intervals: what they cover, and what is resampled together."""

from __future__ import annotations

import numpy as np
import pytest

from austeer.adapters.measurement.intervals import (
    bootstrap,
    grouped_interval,
    mean_interval,
    ratio_interval,
)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = mean_interval(generator.normal(1.0, 2.0, size=50), seed=trial)
        hits += found.low <= 1.0 <= found.high
    assert 180 <= hits <= 199


def test_ratio_interval_is_the_ratio_of_sums() -> None:
    found = ratio_interval(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))
    assert found.value == pytest.approx(1.0)
    assert found.low < 1.0 < found.high


def test_bootstrap_is_deterministic() -> None:
    rows = np.random.default_rng(1).normal(size=(20, 1))
    first, second = (bootstrap(rows, lambda m: m[..., 0], seed=3) for _ in range(2))
    assert first == second
    assert first != bootstrap(rows, lambda m: m[..., 0], seed=4)


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    """Ten copies of each value know no more than one: the interval must not shrink."""
    values = np.random.default_rng(2).normal(size=12)
    single = grouped_interval(values, [f"p{n}" for n in range(12)])
    copies = grouped_interval(np.repeat(values, 10), np.repeat(np.arange(12), 10).astype(str))
    blind = mean_interval(np.repeat(values, 10))
    assert copies.value == pytest.approx(single.value) == pytest.approx(values.mean())
    assert copies.high - copies.low == pytest.approx(single.high - single.low, rel=0.05)
    assert blind.high - blind.low < 0.5 * (copies.high - copies.low)
