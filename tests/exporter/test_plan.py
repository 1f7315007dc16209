"""Plans are data: tensor names, axes and gains, or reasons; nothing here opens a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from austeer.adapters import Predictor, SteeredSite, SteeringAdapter, Strength
from austeer.adapters.sites import Component, Refusal, Site
from austeer.adapters.tensors import TensorEntry
from austeer.exporter.plan import FoldPlan, TensorEdit, describe_refusals, plan_fold


def entries(model: Any, dtype: str = "F32", strip: str = "") -> dict[str, TensorEntry]:
    """What a checkpoint of `model` would hold."""
    found = {}
    for name, tensor in model.state_dict().items():
        stored = name.removeprefix(strip)
        shape, size = tuple(tensor.shape), tensor.numel() * 4
        found[stored] = TensorEntry(stored, Path("nowhere"), dtype, shape, 0, size)
    return found


def adapter_for(model: Any, *components: str) -> SteeringAdapter:
    """Units 3 and 5 of layer 1 at γ = 0.5 and −0.25, for each component."""
    sites = [
        SteeredSite(
            Site(1, Component(component)),
            np.array([3, 5], np.int64),
            np.array([0.5, -0.25], np.float32),
        )
        for component in components
    ]
    return SteeringAdapter.from_sites(model, sites, Strength.FITTED)


def planned(plan: FoldPlan | tuple[Refusal, ...]) -> list[tuple[str, int]]:
    assert isinstance(plan, FoldPlan), plan
    return [(edit.name, edit.axis) for edit in plan.edits]


def refused(plan: FoldPlan | tuple[Refusal, ...]) -> str:
    assert not isinstance(plan, FoldPlan)
    return describe_refusals(plan)


LAYER = "model.layers.1"
NEOX = "gpt_neox.layers.1"
GPT2 = "transformer.h.1"


@pytest.mark.parametrize(
    ("model_type", "component", "expected"),
    [
        ("llama", "attention", [(f"{LAYER}.self_attn.o_proj.weight", 1)]),
        ("llama", "neuron", [(f"{LAYER}.mlp.down_proj.weight", 1)]),
        ("llama", "ffn", [(f"{LAYER}.mlp.down_proj.weight", 0)]),
        ("gpt_neox", "attention", [(f"{NEOX}.attention.dense.weight", 1)]),
        (
            "gpt_neox",
            "ffn",
            [(f"{NEOX}.mlp.dense_4h_to_h.weight", 0), (f"{NEOX}.mlp.dense_4h_to_h.bias", 0)],
        ),
        ("gpt2", "attention", [(f"{GPT2}.attn.c_proj.weight", 0)]),
        ("gpt2", "neuron", [(f"{GPT2}.mlp.c_proj.weight", 0)]),
        ("gpt2", "ffn", [(f"{GPT2}.mlp.c_proj.weight", 1), (f"{GPT2}.mlp.c_proj.bias", 0)]),
    ],
)
def test_edits_name_the_stored_tensor_and_its_axis(
    tiny_model: Any, model_type: str, component: str, expected: list[tuple[str, int]]
) -> None:
    model = tiny_model(model_type)
    plan = plan_fold(adapter_for(model, component), entries(model))
    assert planned(plan) == expected
    assert isinstance(plan, FoldPlan)
    for edit in plan.edits:
        assert edit.index.tolist() == [3, 5]
        assert edit.gain.tolist() == [1.5, 0.75]
        assert edit.gain.dtype == np.float64
        assert edit.sites == (Site(1, Component(component)),)


def test_scale_multiplies_gamma(tiny_model: Any) -> None:
    model = tiny_model("llama")
    plan = plan_fold(adapter_for(model, "ffn"), entries(model), scale=-2.0)
    assert isinstance(plan, FoldPlan)
    assert plan.edits[0].gain.tolist() == [0.0, 1.5]


def test_checkpoint_without_the_model_prefix(tiny_model: Any) -> None:
    model = tiny_model("gpt2")
    plan = plan_fold(adapter_for(model, "neuron"), entries(model, strip="transformer."))
    assert planned(plan) == [("h.1.mlp.c_proj.weight", 0)]


def test_both_sides_of_one_weight_are_two_edits_of_one_tensor(tiny_model: Any) -> None:
    model = tiny_model("llama")
    plan = plan_fold(adapter_for(model, "ffn", "neuron", "attention"), entries(model))
    assert isinstance(plan, FoldPlan)
    grouped = plan.by_tensor()
    assert set(grouped) == {
        f"{LAYER}.mlp.down_proj.weight",
        f"{LAYER}.self_attn.o_proj.weight",
    }
    assert sorted(edit.axis for edit in grouped[f"{LAYER}.mlp.down_proj.weight"]) == [0, 1]


def test_tied_embeddings_are_no_obstacle(tiny_model: Any) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    tensors = entries(model)
    tensors.pop("lm_head.weight", None)
    tied = {"model.embed_tokens.weight": ("lm_head.weight",)}
    assert planned(plan_fold(adapter_for(model, "ffn"), tensors, tied))


def test_layer_is_refused_with_reason_and_way_out(tiny_model: Any) -> None:
    model = tiny_model("llama")
    reason = refused(plan_fold(adapter_for(model, "layer", "ffn"), entries(model)))
    assert reason.startswith("layers.1.layer: ")
    assert "residual" in reason and "ONNX" in reason


def test_adaptive_is_refused_with_reason_and_way_out(tiny_model: Any) -> None:
    model = tiny_model("llama")
    ones = np.ones((2, 1), np.float32)
    steered = SteeredSite(
        Site(0, Component.FFN),
        np.array([0, 1]),
        np.ones(2, np.float32),
        Predictor(ones, np.zeros(1, np.float32), ones.T),
    )
    adapter = SteeringAdapter.from_sites(model, [steered], Strength.ADAPTIVE)
    reason = refused(plan_fold(adapter, entries(model)))
    assert "every token" in reason and "ONNX" in reason and "fitted" in reason


@pytest.mark.parametrize("listed", ["kept", "dropped"])
def test_shared_weights_are_refused_with_their_partners(tiny_model: Any, listed: str) -> None:
    model = tiny_model("llama")
    tensors = entries(model)
    mine, other = f"{LAYER}.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"
    if listed == "dropped":
        del tensors[mine]
    reason = refused(
        plan_fold(adapter_for(model, "ffn"), tensors, {mine: (other,), other: (mine,)})
    )
    assert mine in reason and other in reason and "both" in reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(n), "is not in the checkpoint"),
        (lambda t, n: t.update({n.removeprefix("model."): t[n]}), "a second time"),
        (lambda t, n: t.update({n: _with(t[n], dtype="I8")}), "stored as I8"),
        (lambda t, n: t.update({n: _with(t[n], shape=(5, 48))}), "more than 5 units"),
        (lambda t, n: t.update({n: _with(t[n], shape=(2, 32, 48))}), "two axes"),
    ],
)
def test_unusable_tensors_are_refused_by_name(
    tiny_model: Any, change: Any, message: str
) -> None:
    model, name = tiny_model("llama"), f"{LAYER}.mlp.down_proj.weight"
    tensors = entries(model)
    change(tensors, name)
    reason = refused(plan_fold(adapter_for(model, "ffn"), tensors))
    assert message in reason and name in reason
    assert "\n" not in reason


def _with(entry: TensorEntry, **changes: Any) -> TensorEntry:
    facts = {"dtype": entry.dtype, "shape": entry.shape} | changes
    return TensorEntry(entry.name, entry.file, facts["dtype"], facts["shape"], 0, entry.size)


def test_refusals_with_one_reason_become_one_phrase() -> None:
    sites = [Site(layer, Component.LAYER) for layer in range(6)]
    refusals = [Refusal(site, "no") for site in sites] + [Refusal(None, "never")]
    expected = "layers.0.layer, layers.1.layer, layers.2.layer, layers.3.layer and 2 more: no"
    assert describe_refusals(refusals) == f"{expected}; never"


def test_edits_are_frozen(tiny_model: Any) -> None:
    edit = TensorEdit("w", 0, np.array([0]), np.array([1.0]), ())
    with pytest.raises(AttributeError):
        edit.axis = 1  # type: ignore[misc]
