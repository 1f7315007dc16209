"""Analyses of single units: KL against a direct loop, means against captured activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import (
    AdapterError,
    Component,
    FitError,
    ModelError,
    Predictor,
    Site,
    SteeredSite,
    SteeringAdapter,
    Strength,
)
from austeer.adapters.analysis.units import analyze_units, mean_activations, pairwise_kl
from austeer.adapters.measurement.neutral import sample_neutral


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama")


@pytest.fixture
def text(model: Any, tiny_tokenizer: Any) -> Any:
    return sample_neutral(model, tiny_tokenizer, sequences=20, length=12, seed=3)


def adaptive(model: Any) -> SteeringAdapter:
    rng, sites = np.random.default_rng(0), []
    for layer, component, units in ((0, "ffn", [3, 1]), (1, "attention", [5, 2, 0])):
        k = len(units)
        predictor = Predictor(
            *(rng.normal(size=shape).astype(np.float32) for shape in ((k, 2), (2,), (2, k)))
        )
        gamma = rng.normal(size=k).astype(np.float32)
        site = Site(layer, Component(component))
        sites.append(SteeredSite(site, np.array(units), gamma, predictor))
    return SteeringAdapter.from_sites(model, sites, Strength.ADAPTIVE)


def single(steered: SteeredSite, row: int) -> SteeredSite:
    gamma = np.where(np.arange(len(steered.gamma)) == row, steered.gamma, 0)
    return SteeredSite(steered.site, steered.index, gamma, steered.predictor)


def probabilities(model: Any, text: Any, *sites: SteeredSite) -> Any:
    """Float64 probabilities, text by text without padding."""
    found = []
    made = (
        SteeringAdapter.from_sites(model, sites, Strength.ADAPTIVE if sites else None)
        if sites
        else None
    )
    for ids, valid in zip(text.input_ids, text.valid, strict=True):
        with torch.no_grad():
            if made is None:
                logits = model(ids[valid][None]).logits
            else:
                with made.attached(model):
                    logits = model(ids[valid][None]).logits
        found.append(logits[0].double().softmax(-1).numpy())
    return np.concatenate(found)


def test_kl_is_that_of_a_direct_loop(model: Any, text: Any) -> None:
    adapter = adaptive(model)
    alone = [single(adapter.sites[0], 1), single(adapter.sites[1], 0), adapter.sites[1]]
    to_base, between = pairwise_kl(model, [[one] for one in alone], text)
    base, *steered = [
        probabilities(model, text), *(probabilities(model, text, one) for one in alone)
    ]  # fmt: skip
    assert len(base) == int(text.valid.sum())

    def kl(p: Any, q: Any) -> float:
        return float((p * np.log(p / q)).sum(-1).mean())

    np.testing.assert_allclose(to_base, [kl(base, q) for q in steered], rtol=1e-4)
    wanted = [[kl(p, q) for q in steered] for p in steered]
    np.testing.assert_allclose(between, wanted, rtol=1e-4, atol=1e-12)
    assert (np.diag(between) == 0.0).all()
    assert between[0, 1] != pytest.approx(between[1, 0], rel=1e-3)
    assert to_base.min() > 1e-6


def test_batches_do_not_matter(model: Any, text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [[single(one, 0)] for one in adaptive(model).sites]
    whole = pairwise_kl(model, alone, text)
    monkeypatch.setattr("austeer.adapters.analysis.units._BYTES", 5000)
    for one, other in zip(pairwise_kl(model, alone, text), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-12)


def test_the_kl_of_a_tiny_change_is_not_rounding(model: Any, text: Any) -> None:
    """KL grows with the square of a small γ; float32 probabilities would give noise."""

    def weak(gamma: float) -> list[SteeredSite]:
        return [SteeredSite(Site(1, Component.FFN), np.array([3]), np.array([gamma]))]

    small, large = pairwise_kl(model, [weak(1e-3), weak(1e-2)], text)[0]
    assert small < 1e-7
    assert large / small == pytest.approx(100.0, rel=0.02)


def test_means_are_those_of_the_unsteered_model(model: Any, text: Any) -> None:
    adapter = adaptive(model)
    found = mean_activations(model, adapter.sites, text)
    for steered in adapter.sites:
        hookpoint = adapter.architecture.hookpoint(steered.site)
        module, seen = model.get_submodule(hookpoint.module), []
        handle = module.register_forward_hook(
            lambda _, args, out, seen=seen, side=hookpoint.side: seen.append(
                args[0][0] if side == "input" else out[0]
            )
        )
        for ids, valid in zip(text.input_ids, text.valid, strict=True):
            model(ids[valid][None])
        handle.remove()
        x = torch.cat(seen).detach().numpy()[:, steered.index].astype(np.float64)
        assert steered.predictor is not None
        change = steered.gamma * steered.predictor.phi(x) * x
        activation, moved = found[steered.site]
        np.testing.assert_allclose(activation, x.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(moved, change.mean(0), rtol=1e-4, atol=1e-6)


def test_units_are_the_strongest_and_their_tokens_point_where_they_move(
    model: Any, tiny_tokenizer: Any
) -> None:
    from austeer.adapters.analysis.unembedding import unit_logits

    adapter = adaptive(model)
    found = analyze_units(
        adapter, model, tiny_tokenizer, units=4, tokens=3, sequences=8, length=10
    )
    every = sorted((abs(float(g)) for one in adapter.sites for g in one.gamma), reverse=True)
    assert [abs(unit.gamma) for unit in found.units] == every[:4]
    assert found.kl.shape == (4, 4)
    assert {unit.mean_change > 0 for unit in found.units} == {True, False}
    for unit in found.units:
        logits = unit_logits(model, unit.site, unit.unit)[: len(tiny_tokenizer)]
        best = logits.argmax() if unit.mean_change > 0 else logits.argmin()
        assert unit.promotes[0].token == int(best)
        assert unit.promotes[0].logit > 0 > unit.suppresses[0].logit
        assert [score.logit for score in unit.promotes] == sorted(
            (score.logit for score in unit.promotes), reverse=True
        )
        assert len(unit.promotes) == len(unit.suppresses) == 3
    places = {
        (steered.site, int(unit)): [single(steered, row)]
        for steered in adapter.sites
        for row, unit in enumerate(steered.index)
    }
    text = sample_neutral(model, tiny_tokenizer, sequences=8, length=10)
    alone = [places[unit.site, unit.unit] for unit in found.units]
    to_base, between = pairwise_kl(model, alone, text)
    assert [unit.kl for unit in found.units] == to_base.tolist()
    assert np.array_equal(found.kl, between) and found.tokens == int(text.valid.sum())
    values = found.as_dict()
    assert values["units"][0]["site"] in ("layers.0.ffn", "layers.1.attention")
    assert values["units"][0]["promotes"][0].keys() == {"token", "text", "logit"}
    assert values["kl"] == found.kl.tolist()


def test_more_units_than_there_are(model: Any, tiny_tokenizer: Any) -> None:
    small: dict[str, Any] = {"sequences": 2, "length": 6}
    found = analyze_units(adaptive(model), model, tiny_tokenizer, units=99, **small)
    assert len(found.units) == 5


def test_bad_input(model: Any, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    adapter = adaptive(model)
    with pytest.raises(FitError, match="units: expected a whole number from 1 on, got 0"):
        analyze_units(adapter, model, tiny_tokenizer, units=0)
    with pytest.raises(FitError, match="length: expected a whole number from 2 on, got 1"):
        analyze_units(adapter, model, tiny_tokenizer, length=1)
    with pytest.raises(AdapterError, match="another base model"):
        analyze_units(adapter, tiny_model("llama", seed=1), tiny_tokenizer)


@pytest.mark.parametrize("model_type", ["opt", "llama4_text"])
def test_models_that_flatten_rows_and_positions(
    model_type: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_model(model_type)
    adapter = SteeringAdapter.from_units(model, "ffn", [0, 1], [1, 2], [0.5, -0.5])
    text = sample_neutral(model, tiny_tokenizer, sequences=6, length=9, seed=1)
    found = mean_activations(model, adapter.sites, text)
    for number, steered in enumerate(adapter.sites):
        seen: list[torch.Tensor] = []
        name = "model.decoder.layers" if model_type == "opt" else "model.layers"
        layer = model.get_submodule(f"{name}.{steered.site.layer}")
        module = layer.fc2 if model_type == "opt" else layer.feed_forward
        handle = module.register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)  # noqa: B023
        )
        with torch.no_grad():
            model(text.input_ids, attention_mask=text.valid.long())
        handle.remove()
        values = seen[0].reshape(*text.valid.shape, -1)[text.valid][:, number + 1]
        wanted = float(values.double().mean())
        np.testing.assert_allclose(found[steered.site][0][0], wanted, atol=1e-6)


def test_a_steered_model_is_no_base(model: Any, tiny_tokenizer: Any) -> None:
    adapter = adaptive(model)
    with adapter.attached(model), pytest.raises(ModelError, match="an adapter is attached"):
        analyze_units(adapter, model, tiny_tokenizer)
