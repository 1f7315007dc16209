"""Training: the loss falls, the constraints hold, the best judged state is what is left."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from austeer.adapters import Component, FitError, Site
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import transformed
from austeer.adapters.fitting.gains import TrainableGains, UnitStart
from austeer.adapters.fitting.objective import Objective
from austeer.adapters.fitting.train import Limits, TrainOptions, train
from austeer.adapters.measurement.evaluate import KLMeter, batch_pairs
from austeer.adapters.measurement.measure import Judgement
from austeer.adapters.measurement.neutral import sample_neutral
from austeer.adapters.pairs import ContrastivePair
from austeer.adapters.tokens import tokenize_pairs

PAIRS = [
    ContrastivePair(f"one day {name} {verb}", " happy", " sad", where=f"p:{number}")
    for number, (name, verb) in enumerate(
        (name, verb) for name in ("Tom", "Mia", "the park") for verb in ("felt", "was so")
    )
]
LLAMA = architecture_of("llama")


def gains(rank: int = 0, **options: Any) -> TrainableGains:
    units = {
        Site(layer, Component.ATTENTION): UnitStart(
            np.arange(0, 30, 5), np.zeros(6), np.zeros(6), np.ones(6)
        )
        for layer in range(2)
    }
    return TrainableGains(units, rank=rank, seed=1, **options)


class Setting:
    """A tiny model with pairs and neutral text."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.pairs = batch_pairs(model, tokenize_pairs(PAIRS, tokenizer), 3)
        self.meter = KLMeter(model, sample_neutral(model, tokenizer, sequences=8, length=12), 4)

    def margin(self, steering: Any) -> float:
        with torch.no_grad(), steering.attached(self.model, LLAMA):
            return float(self.pairs.margins(self.model).mean())

    def judge(self, steering: Any, beat: float = -np.inf) -> Judgement | None:
        margin = self.margin(steering)
        attached = partial(steering.attached, self.model, LLAMA)
        return None if margin <= beat else Judgement(margin, self.meter.mean(attached))

    def train(
        self,
        steering: Any,
        limit: float,
        judge: Callable[[float], Judgement | None] | None = None,
        **options: Any,
    ) -> Any:
        objective = Objective(self.model, self.pairs.batches, self.meter, limit * 0.9)
        return train(
            self.model, LLAMA, steering, objective, judge or partial(self.judge, steering),
            Limits(limit), TrainOptions(**{"steps": 60, "judge_every": 5, **options}),
        )  # fmt: skip


@pytest.fixture
def setting(tiny_model: Any, tiny_tokenizer: Any) -> Setting:
    return Setting(tiny_model("llama").requires_grad_(True), tiny_tokenizer)


@pytest.mark.parametrize("rank", [0, 1])
def test_training_raises_the_margin_within_the_budget(rank: int, setting: Setting) -> None:
    before = {name: value.clone() for name, value in setting.model.state_dict().items()}
    steering = gains(rank)
    base = setting.margin(steering)
    found = setting.train(steering, 0.02)
    assert found.within
    assert found.judgement.kl <= 0.02
    assert found.judgement.margin > base + 0.1
    after = setting.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(parameter.grad is None for parameter in setting.model.parameters())


def test_the_best_judged_state_is_left_in_place(setting: Setting) -> None:
    steering = gains()
    found = setting.train(steering, 0.02)
    assert setting.margin(steering) == pytest.approx(found.judgement.margin, abs=1e-5)


def test_a_state_above_the_limit_is_scaled_down_until_it_fits(setting: Setting) -> None:
    """Judged once only, at the end and far above the limit: scaling is all that is left."""
    steering = gains()
    calls: list[float] = []

    def judge(beat: float) -> Judgement | None:
        found = setting.judge(steering, beat)
        assert found is not None
        calls.append(found.kl)
        return Judgement(found.margin, found.kl * (1.0 if len(calls) > 1 else 2.0))

    found = setting.train(steering, 0.02, judge, judge_every=1000)
    assert calls[0] * 2 > 0.02
    assert len(calls) > 2
    assert found.within
    assert found.judgement.kl <= 0.02


def test_training_ends_early_when_nothing_gets_better(setting: Setting) -> None:
    found = setting.train(
        gains(), 0.02, lambda _: Judgement(1.0, 0.01), steps=60, judge_every=2, patience=3
    )
    assert found.steps == 8
    assert found.step == 2


def test_any_module_with_the_protocol_can_be_trained(setting: Setting) -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.zeros(32))

        def attached(self, model: Any, architecture: Any) -> Any:
            place = architecture.hookpoint(Site(0, Component.LAYER))
            return transformed(model, place, lambda x: x + self.v)

        def constrain(self) -> None:
            pass

        def shrink(self, factor: float) -> None:
            with torch.no_grad():
                self.v.mul_(factor)

    steering = Vector()
    base = setting.margin(steering)
    found = setting.train(steering, 0.05)
    assert found.within
    assert found.judgement.margin > base + 0.1


def test_a_loss_that_is_not_finite_is_an_error(setting: Setting) -> None:
    steering = gains()
    with torch.no_grad():
        steering.gamma.fill_(float("inf"))
    with pytest.raises(FitError, match=r"became .* at step 1; try --dtype float32"):
        setting.train(steering, 0.02)


def test_limits_take_the_worst_side_effect() -> None:
    limits = Limits(0.1, 1.3)
    assert limits.excess(Judgement(9.0, 0.05, 1.3)) == pytest.approx(0.0)
    assert limits.excess(Judgement(9.0, 0.2, 1.0)) == pytest.approx(1.0)
    assert limits.excess(Judgement(9.0, 0.01, 2.6)) == pytest.approx(1.0)
