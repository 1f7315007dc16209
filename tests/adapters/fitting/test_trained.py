"""The trained strengths: they start wide, prune to the budget of units, and stay fluent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from austeer.adapters import (
    Component,
    Strength,
    load_model,
    load_tokenizer,
    localize,
    read_pairs,
)
from austeer.adapters.fitting.candidates import Candidate, FitOptions
from austeer.adapters.fitting.trained import starting_units, trained_candidates
from austeer.adapters.measurement.measure import Share, make_splits

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
FOLDABLE = tuple(kind for kind in Component if kind.foldable)


class Setting:
    """The demo model with a few mood pairs."""

    def __init__(self) -> None:
        folder = str(EXAMPLES / "demo_model")
        self.model, tokenizer = load_model(folder), load_tokenizer(folder)
        pairs = read_pairs(EXAMPLES / "pairs" / "mood_train.jsonl")[:80]
        splits = make_splits(pairs, read_pairs(EXAMPLES / "pairs" / "mood_test.jsonl")[:8])
        self.ranking = localize(self.model, tokenizer, splits.fit)
        self.fit, self.validation = (
            Share(self.model, tokenizer, part, seed=n, sequences=24, length=48, batch_size=16)
            for n, part in enumerate((splits.fit, splits.validation))
        )

    def train(self, **options: Any) -> Candidate:
        chosen = FitOptions(**{"steps": 24, "max_units": 16, "components": FOLDABLE, **options})
        (found,) = trained_candidates(
            self.model, self.ranking, chosen, self.fit, self.validation
        )
        return found


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def test_the_start_is_wide_and_best_first(setting: Setting) -> None:
    chosen = FitOptions(max_units=4, components=FOLDABLE)
    units = starting_units(setting.ranking, chosen)
    for kind in FOLDABLE:
        count = sum(len(start.index) for site, start in units.items() if site.component is kind)
        assert count > 4
        beta = np.abs(setting.ranking.beta(kind))
        chosen_beta = np.concatenate([
            beta[site.layer, start.index]
            for site, start in units.items() if site.component is kind
        ])  # fmt: skip
        assert np.sort(beta.ravel())[-count] == pytest.approx(chosen_beta.min())


@pytest.mark.parametrize("strength", [Strength.FITTED, Strength.ADAPTIVE])
def test_units_of_several_components_are_pruned_to_the_budget(
    strength: Strength, setting: Setting
) -> None:
    found = setting.train(strength=strength)
    assert found.k == 16
    assert len(found.components) > 1
    assert found.within
    assert found.judgement.kl <= 0.1


@pytest.mark.parametrize("steps", [1, 3])
def test_few_steps_prune_as_well(steps: int, setting: Setting) -> None:
    assert setting.train(steps=steps).k == 16


def test_pruned_units_beat_the_best_ranked_ones(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = setting.train(fluency_limit=math.inf, steps=30)
    monkeypatch.setattr("austeer.adapters.fitting.trained._WIDTH", 1)
    narrow = setting.train(fluency_limit=math.inf, steps=30)
    assert narrow.k <= 16
    assert wide.judgement.margin > narrow.judgement.margin


def test_the_fluency_limit_is_kept_and_costs_margin(setting: Setting) -> None:
    loose = {"kl_budget": 5.0, "max_units": 128, "learning_rate": 0.2}
    free, kept = (setting.train(fluency_limit=limit, **loose) for limit in (math.inf, 1.15))
    ratios = [
        setting.validation.probe.ratio(lambda sites=c.sites: steering(setting, sites))
        for c in (free, kept)
    ]
    assert ratios[0] > 1.3
    assert ratios[1] < 1.2
    assert free.judgement.margin > kept.judgement.margin


def steering(setting: Setting, sites: Any) -> Any:
    from austeer.adapters.architectures import architecture_of
    from austeer.adapters.attach import steering_hooks

    return steering_hooks(setting.model, architecture_of("llama"), sites)
