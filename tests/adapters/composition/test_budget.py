"""The budget of a combination: one factor for all weights, figures from text of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from austeer.adapters import (
    AdapterError,
    ContrastivePair,
    FitError,
    PairsError,
    SteeringAdapter,
)
from austeer.adapters.composition import budget
from austeer.adapters.composition.budget import combine_within_budget, largest_factor
from austeer.adapters.fitting.candidates import HEADROOM
from austeer.adapters.measurement.measure import KLMeter
from austeer.adapters.measurement.neutral import sample_neutral

SMALL: dict[str, Any] = {"sequences": 8, "length": 16}


@pytest.mark.parametrize(
    "kl",
    [
        lambda f: 3.0 * f**2,
        lambda f: 40.0 * f**2,
        lambda f: 5.0 * (1.0 - np.exp(-9.0 * f**2)),
        lambda f: 0.3 * f if f < 0.6 else float("nan"),
        lambda f: float("inf") if f > 0.05 else 9.0 * f,
    ],
)
def test_factor_meets_the_budget_from_below(kl: Callable[[float], float]) -> None:
    tried: list[float] = []

    def counted(factor: float) -> float:
        tried.append(factor)
        return kl(factor)

    factor = largest_factor(counted, 0.1)
    assert 0.09 < kl(factor) <= 0.1
    assert len(tried) <= 17
    assert tried[0] == 1.0


def test_nothing_is_scaled_within_the_budget() -> None:
    assert largest_factor(lambda f: 0.1 * f, 0.1) == 1.0


def test_a_budget_that_no_factor_keeps() -> None:
    with pytest.raises(FitError, match=r"KL budget 0\.1: not reached, KL is 2 nats"):
        largest_factor(lambda f: 2.0, 0.1)


def pair_of(model: Any) -> list[SteeringAdapter]:
    return [
        SteeringAdapter.from_units(model, "ffn", [0, 1], [3, 4], [6.0, -7.0]),
        SteeringAdapter.from_units(model, "attention", [0, 1], [3, 4], [-5.0, 6.0]),
    ]


def test_weights_come_down_together_until_fresh_text_keeps_the_budget(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama")
    adapters, weights = pair_of(model), [1.0, -2.0]
    steps: list[tuple[str, int, int]] = []
    made, report = combine_within_budget(
        adapters,
        model,
        tiny_tokenizer,
        weights,
        kl_budget=0.05,
        names=["up", "down"],
        sequences=256,
        length=24,
        progress=lambda *step: steps.append(step),
    )
    factor = report["factor"]
    assert 0 < factor < 1
    assert report["kl_unscaled"] > 0.05
    aim = 0.05 * HEADROOM
    assert report["kl"] == pytest.approx(aim, rel=0.1)
    assert report["kl_ci95"][0] < aim < report["kl_ci95"][1]
    given = {
        (steered.site, int(unit)): weight * float(gamma)
        for weight, adapter in zip(weights, adapters, strict=True)
        for steered in adapter.sites
        for unit, gamma in zip(steered.index, steered.gamma, strict=True)
    }
    for steered in made.sites:
        for unit, gamma in zip(steered.index, steered.gamma, strict=True):
            assert gamma == pytest.approx(factor * given[steered.site, int(unit)], rel=1e-6)
    assert [row["weight"] for row in report["adapters"]] == [factor, -2.0 * factor]
    assert [row["name"] for row in report["adapters"]] == ["up", "down"]
    assert steps[-1][1] == steps[-1][2]
    # Text of another seed says the same about the adapter as it is.
    text = sample_neutral(model, tiny_tokenizer, sequences=256, length=24, seed=77)
    other = KLMeter(model, text).mean(lambda: made.attached(model))
    assert other == pytest.approx(0.05, rel=0.1)


def test_report_of_a_combination_within_the_budget(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    # In training mode GPT-2's dropout would make every figure another one.
    model = tiny_model("gpt2").train()
    adapters = pair_of(model)
    pairs = [
        ContrastivePair(f"Tom felt {how}", " happy", " sad") for how in ("very", "so", "and")
    ]
    made, report = combine_within_budget(
        adapters,
        model,
        tiny_tokenizer,
        kl_budget=float("inf"),
        pairs={"mood": pairs},
        **SMALL,
    )
    assert model.training
    assert (report["factor"], report["kl_budget"]) == (1.0, None)
    assert report["kl"] == report["kl_unscaled"]
    assert len(report["kl_alone"]) == 2 and report["kl"] not in report["kl_alone"]
    behaviour = report["behaviours"]["mood"]
    gain = behaviour["margin"] - behaviour["base_margin"]
    assert behaviour["margin_gain"] == pytest.approx(gain)
    assert len(set(behaviour["margin_alone"]) | {behaviour["margin"]}) == 3
    folder = made.save_pretrained(tmp_path / "out")
    assert SteeringAdapter.from_pretrained(folder).config.fit["combined"] == report


def test_figures_come_from_text_that_no_choice_saw(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from austeer.adapters.composition import budget as module

    seeds: list[int] = []

    class Recorded(module.Share):
        def __init__(self, *arguments: Any, seed: int, **options: Any) -> None:
            seeds.append(seed)
            super().__init__(*arguments, seed=seed, **options)

    monkeypatch.setattr(module, "Share", Recorded)
    model = tiny_model("llama")
    for seed in (0, 1):
        combine_within_budget(pair_of(model), model, tiny_tokenizer, seed=seed, **SMALL)
    assert len(seeds) == len(set(seeds)) == 4
    assert min(seeds) > 1000, "a fit may have used this text"


def test_margins_are_those_of_the_steered_model(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    import torch

    model = tiny_model("llama")
    adapters = pair_of(model)
    pair = ContrastivePair("Tom felt very", " happy", " sad")
    made, report = combine_within_budget(
        adapters,
        model,
        tiny_tokenizer,
        kl_budget=float("inf"),
        pairs={"mood": [pair]},
        **SMALL,
    )
    ids = torch.tensor([tiny_tokenizer("Tom felt very").input_ids])
    happy, sad = (tiny_tokenizer.convert_tokens_to_ids(f"▁{w}") for w in ("happy", "sad"))

    def margin(context: Any) -> float:
        with torch.no_grad(), context:
            last = model(ids).logits[0, -1]
        return float(last[happy] - last[sad])

    behaviour = report["behaviours"]["mood"]
    assert behaviour["base_margin"] == pytest.approx(margin(nullcontext()), abs=1e-5)
    assert behaviour["margin"] == pytest.approx(margin(made.attached(model)), abs=1e-5)
    alone = [margin(one.attached(model)) for one in adapters]
    assert behaviour["margin_alone"] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_bad_budget(tiny_model: Callable[..., Any], tiny_tokenizer: Any, budget: float) -> None:
    model = tiny_model("llama")
    with pytest.raises(FitError, match="KL budget: expected a positive number"):
        combine_within_budget(pair_of(model), model, tiny_tokenizer, kl_budget=budget)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": 0.5}, AdapterError, "weights 0.5: expected a list"),
        ({"pairs": [1]}, FitError, "pairs: expected lists by behaviour's name, got list"),
        ({"pairs": {"mood": []}}, FitError, "pairs of mood: expected at least one"),
        ({"pairs": {"mood": ["pair"]}}, PairsError, "ContrastivePair objects, got str"),
    ],
)
def test_what_is_no_list_costs_no_search(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tiny_model: Any,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    adapter = SteeringAdapter.from_units(model, "ffn", [0], [1], [0.5])
    monkeypatch.setattr(budget, "largest_factor", lambda *_: pytest.fail("too late"))
    with pytest.raises(error, match=message):
        combine_within_budget([adapter], model, tiny_tokenizer, **options)
