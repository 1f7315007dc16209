"""Baselines of the quality comparison: against formulas of their own, and off means off."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import Component, ContrastivePair, Site
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import find_module
from austeer.adapters.fitting.candidates import FitOptions
from austeer.adapters.fitting.trained import Trainer
from austeer.adapters.measurement.measure import Judgement, Share

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
baselines = importlib.import_module("baselines")
trained = importlib.import_module("baselines_trained")
tuned = importlib.import_module("baselines_tuned")
quality = importlib.import_module("quality")
table = importlib.import_module("quality_table")
texts = importlib.import_module("quality_text")

LLAMA = architecture_of("llama")
LAYERS, WIDTH, NEURONS, HEAD = 2, 32, 48, 8
IDS = torch.tensor([[1, 5, 9, 13, 4, 20], [1, 7, 7, 21, 30, 2]])


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama", seed=3)


@pytest.fixture
def activations() -> dict[Site, Any]:
    """Random activations of 20 pairs, positives and negatives alike."""
    random = np.random.default_rng(0)
    widths = {Component.NEURON: NEURONS}
    return {
        Site(layer, kind): tuple(random.normal(size=(2, 20, widths.get(kind, WIDTH))))
        for layer in range(LAYERS)
        for kind in Component
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def seen_at(model: Any, site: Site, steering: Any = None) -> torch.Tensor:
    """The activation that the rest of the model gets at `site`."""
    place, found = LLAMA.hookpoint(site), []
    module = find_module(model, place.module)
    with steering or torch.no_grad():
        # Hooks run in order of registration: this one sees what the steering left.
        if place.side == "input":
            handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        else:
            handle = module.register_forward_hook(lambda _, __, out: found.append(out))
        logits(model)
        handle.remove()
    return found[0] if isinstance(found[0], torch.Tensor) else found[0][0]


def shift(positive: np.ndarray, part: slice, size: float) -> None:
    positive[:, part] += size


def test_iti_takes_the_heads_that_tell_the_sides_apart(
    model: Any, activations: dict[Site, Any]
) -> None:
    clear = Site(0, Component.ATTENTION)  # the first layer: nothing before it can move it
    shift(activations[clear][0], slice(16, 24), 4.0)
    settings = {s.name: s for s in baselines.iti_settings(model, activations, HEAD)}
    setting = settings["2 heads"]
    assert setting.touched == setting.parameters == 16
    moved = (
        seen_at(model, clear, setting.at(1.0))[..., 16:24] != seen_at(model, clear)[..., 16:24]
    )
    assert moved.all()


def test_iti_adds_the_unit_mean_difference_times_sigma(
    model: Any, activations: dict[Site, Any]
) -> None:
    site = Site(0, Component.ATTENTION)
    positive, negative = activations[site]
    shift(positive, slice(0, 8), 3.0)
    shift(positive, slice(24, 32), -3.0)
    settings = {s.name: s for s in baselines.iti_settings(model, activations, HEAD)}
    setting = settings["2 heads"]
    expected = np.zeros(WIDTH)
    for part in (slice(0, 8), slice(24, 32)):
        difference = positive[:, part].mean(0) - negative[:, part].mean(0)
        theta = difference / math.sqrt(sum(difference**2))
        along = [row @ theta for row in (*positive[:, part], *negative[:, part])]
        expected[part] = theta * np.std(along)
    added = seen_at(model, site, setting.at(2.5)) - seen_at(model, site)
    wanted = torch.tensor(2.5 * expected, dtype=torch.float32).expand_as(added)
    torch.testing.assert_close(added, wanted, atol=1e-5, rtol=1e-5)


def test_probe_accuracy_is_that_of_held_out_pairs() -> None:
    random = np.random.default_rng(1)
    noise = random.normal(size=(1, 40, 30))
    clear = random.normal(size=(1, 40, 30))
    clear[0, :20, 0] += 6.0
    (chance, _), (sure, _) = baselines.probe_worth(np.concatenate([noise, clear]))
    # 30 free weights fit 32 rows of noise perfectly: only held-out rows show that it is noise.
    assert chance < 0.8
    assert sure > 0.9


def test_probe_orders_equal_accuracies_by_likelihood() -> None:
    random = np.random.default_rng(2)
    near, far = random.normal(size=(2, 1, 40, 4))
    near[0, :20, 0] += 9.0
    far[0, :20, 0] += 90.0
    one, other = baselines.probe_worth(np.concatenate([near, far]))
    assert one[0] == other[0] == 1.0
    assert one < other


def test_caa_adds_the_mean_difference_everywhere(
    model: Any, activations: dict[Site, Any]
) -> None:
    settings = list(baselines.caa_settings(model, activations))
    assert [setting.name for setting in settings] == ["layer 0", "layer 1"]
    site = Site(1, Component.LAYER)
    positive, negative = activations[site]
    expected = [p.mean() - n.mean() for p, n in zip(positive.T, negative.T, strict=True)]
    added = seen_at(model, site, settings[1].at(-1.5)) - seen_at(model, site)
    wanted = torch.tensor(expected, dtype=torch.float32).mul(-1.5).expand_as(added)
    torch.testing.assert_close(added, wanted, atol=1e-5, rtol=1e-5)
    assert settings[1].touched == WIDTH


def test_sadi_scales_the_units_of_largest_mean_difference(
    model: Any, activations: dict[Site, Any]
) -> None:
    settings = {s.name: s for s in baselines.sadi_settings(model, activations, HEAD)}
    values = {
        (layer, unit): activations[Site(layer, Component.NEURON)][0][:, unit].mean()
        - activations[Site(layer, Component.NEURON)][1][:, unit].mean()
        for layer in range(LAYERS)
        for unit in range(NEURONS)
    }
    best = set(sorted(values, key=values.__getitem__, reverse=True)[:16])
    setting = settings["neuron K=16"]
    assert setting.touched == 16
    site = Site(0, Component.NEURON)
    ratio = seen_at(model, site, setting.at(0.5)) / seen_at(model, site)
    for unit in range(NEURONS):
        wanted = 1.5 if (0, unit) in best else 1.0
        torch.testing.assert_close(ratio[..., unit], torch.full_like(ratio[..., unit], wanted))


def test_sadi_takes_whole_heads_by_their_mean(model: Any, activations: dict[Site, Any]) -> None:
    # One unit of head 0 differs most of all, the mean of head 2 more.
    site = Site(0, Component.ATTENTION)
    shift(activations[site][0], slice(0, 1), 7.0)
    shift(activations[site][0], slice(16, 24), 5.0)
    shift(activations[site][0], slice(24, 32), 4.0)
    settings = {s.name: s for s in baselines.sadi_settings(model, activations, HEAD)}
    ratio = seen_at(model, site, settings["2 heads"].at(1.0)) / seen_at(model, site)
    wanted = torch.ones(WIDTH).index_fill(0, torch.arange(16, 32), 2.0).expand_as(ratio)
    torch.testing.assert_close(ratio, wanted)


def test_strength_zero_is_the_base_and_hooks_leave_nothing(
    model: Any, activations: dict[Site, Any]
) -> None:
    base = logits(model)
    for settings in (
        baselines.iti_settings(model, activations, HEAD),
        baselines.caa_settings(model, activations),
        baselines.sadi_settings(model, activations, HEAD),
    ):
        for setting in settings:
            with setting.at(0.0):
                assert torch.equal(logits(model), base), setting.name
            with setting.at(1.0):
                assert not torch.equal(logits(model), base), setting.name
            assert torch.equal(logits(model), base), setting.name


class StubShare:
    """Validation data of two settings: margin and KL as formulas of the strength."""

    def __init__(self, bias: float) -> None:
        self.screen = SimpleNamespace(mean=lambda steered: bias * self._read(steered).kl)

    def _read(self, steered: Any) -> Judgement:
        with steered() as found:
            return found

    def mean_margin(self, steered: Any) -> float:
        return self._read(steered).margin

    def judge(self, steered: Any) -> Judgement:
        return self._read(steered)


@contextmanager
def formula(strength: float, *, gain: float, price: float) -> Iterator[Judgement]:
    yield Judgement(gain * strength, price * strength**2)


@pytest.mark.parametrize("bias", [0.8, 1.0, 1.25])
def test_tuner_uses_the_budget_whatever_the_screen_says(bias: float) -> None:
    settings = [
        baselines.Setting(name, partial(formula, gain=gain, price=price), 1, 1)
        for name, gain, price in (
            *(("a", 1.0, 0.01), ("b", 9.0, 1.0), ("c", 1.0, 0.04)),
            *(("d", 1.0, 1.0), ("e", 2.0, 5.0)),
        )
    ]
    tuner = tuned.Tuner(settings, StubShare(bias))
    for limit in (0.05, 0.1):
        best = tuner.best(limit)
        # At KL = limit, setting a gains 10 √limit, b 9 √limit, c 5 √limit.
        assert best.setting.name == "a"
        assert best.within
        assert 0.9 * limit <= best.judgement.kl <= limit
        assert best.judgement.margin == pytest.approx(10 * math.sqrt(best.judgement.kl))


def test_tuner_says_when_nothing_keeps_the_budget() -> None:
    setting = baselines.Setting("a", partial(formula, gain=1.0, price=1e9), 1, 1)
    assert not tuned.Tuner([setting], StubShare(1.0)).best(0.1).within


@pytest.fixture(params=["IA3", "LoRA q,v", "LoRA o,down", "LoRA all linear"])
def peft_place(request: pytest.FixtureRequest, model: Any) -> Callable[[], Any]:
    pytest.importorskip("peft", reason="peft is not installed; pip install peft to run this")
    if request.param == "IA3":
        return trained.ia3_baseline(model, 0).places["k,v,down"]
    return trained.lora_baseline(model, 0).places[request.param.removeprefix("LoRA ")]


def test_peft_is_the_identity_until_trained_and_outside_the_context(
    model: Any, peft_place: Callable[[], Any]
) -> None:
    base, modules = logits(model), dict(model.named_modules())
    steering = peft_place()
    assert torch.equal(logits(model), base)
    with steering.attached(model, LLAMA):
        assert torch.equal(logits(model), base)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in steering.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=noise))
    with steering.attached(model, LLAMA):
        assert not torch.allclose(logits(model), base, atol=1e-3)
    assert torch.equal(logits(model), base)
    steering.remove()
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), base)


def test_peft_shrinks_to_the_base_and_comes_back(
    model: Any, peft_place: Callable[[], Any]
) -> None:
    base, steering = logits(model), peft_place()
    with torch.no_grad():
        for weight in steering.parameters():
            weight.add_(0.1)
    state = {name: value.clone() for name, value in steering.state_dict().items()}
    with steering.attached(model, LLAMA):
        far = logits(model)
        steering.shrink(0.5)
        assert (logits(model) - base).norm() < (far - base).norm()
        steering.shrink(0.0)
        assert torch.equal(logits(model), base)
        steering.load_state_dict(state)
        assert torch.equal(logits(model), far)


def test_peft_counts_what_it_touches(model: Any) -> None:
    pytest.importorskip("peft", reason="peft is not installed; pip install peft to run this")
    # Two key-value heads of width 8, of four heads.
    ia3 = trained.ia3_baseline(model, 0).places["k,v,down"]()
    assert ia3.touched == LAYERS * (16 + 16 + NEURONS)
    assert sum(weight.numel() for weight in ia3.parameters()) == ia3.touched
    ia3.remove()
    lora = trained.lora_baseline(model, 0).places["q,v"]()
    assert lora.touched == LAYERS * (WIDTH + 16)
    assert sum(weight.numel() for weight in lora.parameters()) == LAYERS * (3 * WIDTH + 16)
    lora.remove()


PAIRS = [
    ContrastivePair(f"one day {name} {verb}", " happy", " sad", where=f"p:{number}")
    for number, (name, verb) in enumerate(
        (name, verb) for name in ("Tom", "Mia", "the park") for verb in ("felt", "was so")
    )
]


@pytest.fixture
def share(model: Any, tiny_tokenizer: Any) -> Share:
    sizes = {"seed": 0, "sequences": 8, "length": 12, "batch_size": 4}
    return Share(model, tiny_tokenizer, PAIRS, **sizes)


OPTIONS = FitOptions(kl_budget=0.2, fluency_limit=math.inf, steps=24)


def test_a_trained_vector_gains_within_the_budget(model: Any, share: Share) -> None:
    vector = trained.TrainedVector(Site(0, Component.LAYER), WIDTH)
    base = logits(model)
    with vector.attached(model, LLAMA):
        assert torch.equal(logits(model), base)
    before = float(share.base_margins.mean())
    found = Trainer(model, OPTIONS, share, share).run(vector)
    assert found.within
    assert found.judgement.kl <= 0.2
    assert found.judgement.margin > before + 0.5
    assert torch.equal(logits(model), base)
    vector.shrink(0.0)
    with vector.attached(model, LLAMA):
        assert torch.equal(logits(model), base)


def test_every_trained_baseline_is_chosen_and_gains(model: Any, share: Share) -> None:
    pytest.importorskip("peft", reason="peft is not installed; pip install peft to run this")
    trainer = Trainer(model, OPTIONS, share, share)
    before, base = float(share.base_margins.mean()), logits(model)
    for baseline in (
        trained.vector_baseline(model),
        trained.ia3_baseline(model, 0),
        trained.lora_baseline(model, 0),
    ):
        place, rate = trained.choose(trainer, baseline, steps=8)
        assert torch.equal(logits(model), base)
        assert rate in baseline.rates
        steering = baseline.places[place]()
        assert trainer.run(steering, learning_rate=rate).judgement.margin > before
        steering.remove()


def test_choose_prefers_what_keeps_the_budget() -> None:
    margins = {("near", 0.1): 1.0, ("far", 0.1): 9.0, ("near", 0.3): 2.0, ("near", 0.2): 3.0}
    removed: list[str] = []

    def make(place: str) -> Any:
        return SimpleNamespace(place=place, remove=lambda: removed.append(place))

    def run(steering: Any, *, steps: int, learning_rate: float) -> Any:
        assert steps == 20
        margin = margins[steering.place, learning_rate]
        return SimpleNamespace(
            within=steering.place == "near", judgement=Judgement(margin, 0.0)
        )

    baseline = trained.Baseline({p: partial(make, p) for p in ("near", "far")}, (0.1, 0.2, 0.3))
    assert trained.choose(SimpleNamespace(run=run), baseline, 100) == ("near", 0.2)
    assert sorted(removed) == ["far", "near", "near", "near"]


def test_repetition_and_variety_by_hand() -> None:
    assert texts.repeated([1, 2, 3, 4], 4) == 0.0
    assert texts.repeated([1, 2, 1, 2, 1, 2, 1], 4) == 0.5
    assert texts.repeated([1, 2], 4) == 0.0
    # Bigrams 12, 23 | 12, 24: three of four are distinct over all texts.
    assert texts.distinct([[1, 2, 3], [1, 2, 4]], 2) == 0.75


def cell(method: str, case: str, gain: float, kl: float = 0.1) -> dict[str, Any]:
    figures = {
        "margin_gain": gain, "kl": kl, "fluency": 1.1, "accuracy": 0.9, "base_accuracy": 0.5,
        "base_margin": 0.0, "repetition": 0.0, "base_repetition": 0.0,
    }  # fmt: skip
    test = figures | {f"{name}_ci95": [v - 0.1, v + 0.1] for name, v in figures.items()}
    return {
        "case": case, "method": method, "budget": 0.1, "seed": 0, "steps": 120,
        "outcome": "steered", "setting": {"name": "x"}, "touched": 8, "parameters": 8,
        "fit_seconds": 1.0, "prepare_seconds": 0.0, "repeats_dropped": 0,
        "environment": dict.fromkeys(
            ("revision", "date", "machine", "torch", "transformers"), "?"
        ),
        "test": test | {"pairs": 9, "distinct2": 1.0},
    }  # fmt: skip


def test_verdicts_follow_the_means() -> None:
    gains = {"fitted": (3, 5), "adaptive": (10, 16), "ITI": (4, 4.5), "CAA": (1, 2)}
    gains |= {"LoRA": (12, 12)}
    kl = {"adaptive": 0.12}
    cells = [
        cell(method, case, gain, kl.get(method, 0.1))
        for method, both in gains.items()
        for case, gain in zip("ab", both, strict=True)
    ]
    cells.append(cell("ITI", "only ITI has this", 99.0))
    lines = table.report(cells).splitlines()
    found = {line.split(":")[1].strip(): line for line in lines if line.startswith("- 0.1")}
    assert "**FAILS**" in found["`fitted` +4.00 > `ITI` +4.25"]
    assert "in 1 of 2 cases" in found["`fitted` +4.00 > `ITI` +4.25"]
    assert "**holds**" in found["`fitted` +4.00 > `CAA` +1.50"]
    assert "**holds**" in found["`adaptive` +13.00 ≥ 3 × `ITI` +4.25"]
    assert "**holds**" in found["`adaptive` +13.00 > `LoRA` +12.00"]
    assert "**holds**" in found["`fitted` KL on fresh text 0.100 ≤ 0.11"]
    assert "**FAILS**" in found["`adaptive` KL on fresh text 0.120 ≤ 0.11"]
    assert any("mean over 2 cases; 1 incomplete ones left out" in line for line in lines)


def test_results_are_resumed_by_key(tmp_path: Path) -> None:
    import json

    path = tmp_path / "cells.jsonl"
    assert quality.read_cells(path) == []
    rows = [cell("ITI", "a", 1.0), cell("ITI", "a", 2.0), cell("CAA", "a", 3.0)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["test"]["margin_gain"] for row in quality.read_cells(path)] == [2.0, 3.0]


def test_alphas_come_close_to_the_budget_and_stay_within() -> None:
    for limit in (0.2, 1.0, 3.3, 700.0):
        found = tuned.alphas_within(lambda alpha, limit=limit: alpha <= limit)
        assert max(found) <= limit
        assert max(found) > 0.9 * limit


def test_alphas_end_where_the_budget_never_breaks() -> None:
    assert max(tuned.alphas_within(lambda alpha: True)) == 1024.0


def test_a_budget_that_breaks_at_once_still_gives_an_alpha() -> None:
    (alpha,) = tuned.alphas_within(lambda alpha: False)
    assert 0 < alpha < 0.125
