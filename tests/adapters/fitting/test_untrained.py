"""Untrained candidates: within the budget, and as good as trying everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from austeer.adapters import Component, ContrastivePair, Strength, localize
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import steering_hooks
from austeer.adapters.fitting.candidates import HEADROOM, Candidate, FitOptions, best_of
from austeer.adapters.fitting.untrained import untrained_candidates
from austeer.adapters.measurement.measure import Share

NAMES = ("Tom", "Mia", "the park", "the sun", "one day", "home", "it", "rain")


class Case:
    """A tiny model, pairs and a ranking of its units."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.pairs = [
            ContrastivePair(f"{name} {verb}", " happy", " sad", where=f"p:{name}{verb}")
            for name in NAMES
            for verb in ("was", "felt", "went", "and")
        ]
        components = ["attention", "ffn"]
        self.ranking = localize(model, tokenizer, self.pairs[::2], components=components)

    def run(self, **changes: Any) -> tuple[list[Candidate], Share, list[tuple[str, int, int]]]:
        share = Share(
            self.model, self.tokenizer, self.pairs[1::2], seed=0, sequences=32, length=16,
            batch_size=8,
        )  # fmt: skip
        settings: dict[str, Any] = {"strength": Strength.ORIENTED, "max_units": 16}
        settings["components"] = (Component.ATTENTION, Component.FFN)
        options = FitOptions(**{**settings, **changes})
        said: list[tuple[str, int, int]] = []
        progress = lambda *call: said.append(call)  # noqa: E731
        found = untrained_candidates(self.model, self.ranking, options, share, progress)
        return list(found), share, said


@pytest.fixture
def tiny(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Case:
    return Case(tiny_model("llama"), tiny_tokenizer)


@pytest.mark.parametrize("budget", [0.01, 0.1])
@pytest.mark.parametrize("strength", [Strength.ORIENTED, Strength.PAPER])
def test_candidates_are_judged_on_all_data_and_keep_the_budget(
    strength: Strength, budget: float, tiny: Case
) -> None:
    candidates, share, _ = tiny.run(strength=strength, kl_budget=budget)
    architecture = architecture_of("llama")
    for found in candidates:
        assert found.within
        assert found.judgement.kl <= budget * HEADROOM
        steered = lambda found=found: steering_hooks(tiny.model, architecture, found.sites)  # noqa: E731
        again = share.judge(steered)
        assert found.judgement.margin == pytest.approx(again.margin, abs=1e-5)
        assert found.judgement.kl == pytest.approx(again.kl, rel=1e-4)
    assert len({(found.components, found.k) for found in candidates}) == len(candidates)


def test_the_best_uses_the_budget_and_helps(tiny: Case) -> None:
    candidates, share, _ = tiny.run(kl_budget=0.1)
    best = best_of(candidates)
    assert best.judgement.kl > 0.7 * 0.1
    assert best.judgement.margin > share.base_margins.mean() + 0.1


def test_keep_sign_is_kept(tiny: Case) -> None:
    free, kept = (tiny.run(kl_budget=3.0, keep_sign=keep)[0] for keep in (False, True))
    assert min(site.gamma.min() for found in free for site in found.sites) < -1
    assert min(site.gamma.min() for found in kept for site in found.sites) >= -1


def test_progress_ends_at_its_total(tiny: Case) -> None:
    _, _, said = tiny.run()
    stages = {stage for stage, _, _ in said}
    assert stages == {"strengths", "candidates"}
    for stage in stages:
        *_, (_, done, total) = (call for call in said if call[0] == stage)
        assert done == total > 0


def test_equal_seeds_give_equal_candidates(tiny: Case) -> None:
    first, second = (tiny.run(seed=3)[0] for _ in range(2))
    assert [found.alpha for found in first] == [found.alpha for found in second]
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left.sites[0].gamma, right.sites[0].gamma)
