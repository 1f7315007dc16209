"""The check on random input accepts products of every kind and nothing near them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from austeer.adapters import RouteError, SteeringAdapter, VerificationError
from austeer.adapters.weights import Checkpoint
from austeer.exporter.markdown import verify_sentences
from austeer.exporter.merge import write_folded
from austeer.exporter.peft_export import write_peft
from austeer.exporter.proofs import random_check
from austeer.exporter.proofs.random_check import prove_structure
from austeer.exporter.routes import Route
from austeer.exporter.settings import StoredAs

GAINS: tuple[list[int], list[int], list[float]] = ([0, 0, 1], [3, 5, 9], [0.7, -2.3, 1.1])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def product(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> Callable[..., tuple[Path, Path, SteeringAdapter]]:
    """Base, product and adapter of a tiny model."""

    def make(
        route: Route, model_type: str, component: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Path, Path, SteeringAdapter]:
        base, out = tmp_path / "base", tmp_path / "out"
        model = tiny_model(model_type).to(dtype)
        model.save_pretrained(base)
        adapter = SteeringAdapter.from_units(model, component, *GAINS)
        out.mkdir()
        if route is Route.SAFETENSORS:
            write_folded(base, adapter, out)
        else:
            write_peft(base, adapter, out, route=route)
        return base, out, adapter

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("component", ["attention", "ffn", "neuron"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_folds_pass_within_their_bound(
    product: Any, model_type: str, component: str, dtype: torch.dtype
) -> None:
    base, out, adapter = product(Route.SAFETENSORS, model_type, component, dtype)
    proof = prove_structure(Route.SAFETENSORS, base, out, adapter)
    assert 0 < proof.random_error <= 1 and proof.steering > 0.1
    # gpt2's projections have biases, which an output gain scales as well.
    biases = 2 if (model_type, component) == ("gpt2", "ffn") else 0
    assert len(proof.touched) == 2 + biases
    assert proof.identical == len(Checkpoint(base)) - len(proof.touched)


@pytest.mark.parametrize("route", [Route.LORA, Route.IA3])
@pytest.mark.parametrize(
    ("model_type", "component"),
    [("llama", "attention"), ("llama", "ffn"), ("llama", "neuron"), ("gpt2", "neuron")],
)
def test_peft_adapters_pass(
    product: Any, route: Route, model_type: str, component: str
) -> None:
    base, out, adapter = product(route, model_type, component)
    proof = prove_structure(route, base, out, adapter)
    assert 0 < proof.random_error <= 1 and len(proof.touched) == 2


def test_a_weight_a_rounding_off_is_caught_by_random_input_alone(
    product: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out, adapter = product(Route.SAFETENSORS, "llama", "attention")
    name = "model.layers.0.self_attn.o_proj.weight"
    entry = Checkpoint(out)[name]
    values = entry.read()
    # Other columns than the steered ones: what they add is no rounding of theirs.
    values[2] *= np.float32(1 + 4e-7 * values.shape[1])
    with entry.file.open("r+b") as stream:
        stream.seek(entry.start)
        stream.write(values.tobytes())
    nothing = type("Report", (), {"identical": 0})
    monkeypatch.setattr(random_check, "verify_fold_structure", lambda *_: nothing)
    with pytest.raises(VerificationError, match=r"layers\.0\.self_attn.*off by"):
        prove_structure(Route.SAFETENSORS, base, out, adapter)


@pytest.mark.parametrize("route", [Route.LORA, Route.IA3])
def test_another_factor_in_a_peft_adapter_is_caught(product: Any, route: Route) -> None:
    base, out, adapter = product(route, "llama", "attention")
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(("lora_B.weight", "ia3_l")))
    tensors[name] = tensors[name] * np.float32(1.00001)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="off by"):
        prove_structure(route, base, out, adapter)


def test_a_lora_without_a_module_is_caught(product: Any) -> None:
    base, out, adapter = product(Route.LORA, "llama", "attention")
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({k: v for k, v in tensors.items() if k != gone}, file)
    with pytest.raises(VerificationError, match=gone):
        prove_structure(Route.LORA, base, out, adapter)


def test_another_scale_is_another_product(product: Any) -> None:
    base, out, adapter = product(Route.LORA, "llama", "attention")
    with pytest.raises(VerificationError, match="off by"):
        prove_structure(Route.LORA, base, out, adapter, scale=0.5)


def test_a_product_that_steers_nothing_is_no_product(product: Any) -> None:
    base, out, adapter = product(Route.LORA, "llama", "attention")
    file = out / "adapter_model.safetensors"
    save_file({k: v * 0 for k, v in load_file(file).items()}, file)
    with pytest.raises(VerificationError, match="it is not steered"):
        prove_structure(Route.LORA, base, out, adapter, scale=0.0)


def test_a_graph_is_not_proved_without_running(product: Any) -> None:
    base, out, adapter = product(Route.LORA, "llama", "attention")
    with pytest.raises(RouteError, match="proved by running"):
        prove_structure(Route.ONNX, base, out, adapter)


def test_blocks_of_rows_say_the_same(product: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out, adapter = product(Route.SAFETENSORS, "llama", "ffn")
    whole = prove_structure(Route.SAFETENSORS, base, out, adapter)
    monkeypatch.setattr(random_check, "_BLOCK", 100)
    parts = prove_structure(Route.SAFETENSORS, base, out, adapter)
    assert parts.random_error == pytest.approx(whole.random_error)
    assert parts.steering == pytest.approx(whole.steering)


WEIGHTS = "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0"


@pytest.mark.parametrize(
    ("route", "key", "value"),
    [
        (Route.LORA, "lora_alpha", 30),
        (Route.LORA, "target_modules", ["q_proj"]),
        (Route.LORA, "layers_to_transform", [0]),
        (Route.LORA, "use_rslora", True),
        (Route.LORA, "rank_pattern", {"o_proj": 1}),
        (Route.LORA, "r", None),
        (Route.IA3, "feedforward_modules", []),
        (Route.IA3, "target_modules", ["down_proj"]),
    ],
)
def test_a_config_that_steers_otherwise_is_caught(
    product: Any, route: Route, key: str, value: Any
) -> None:
    base, out, adapter = product(route, "llama", "neuron")
    file = out / "adapter_config.json"
    config = json.loads(file.read_text()) | {key: value}
    file.write_text(json.dumps({k: v for k, v in config.items() if (k, v) != ("r", None)}))
    with pytest.raises(VerificationError, match=rf"adapter_config\.json: {key} is .*expected"):
        prove_structure(route, base, out, adapter)


def changed(product: Any, route: Route, changes: dict[str, Any]) -> str:
    """The one line that refuses an adapter with other tensors."""
    base, out, adapter = product(route, "llama", "attention")
    save_file(load_file(out / WEIGHTS) | changes, out / WEIGHTS)
    with pytest.raises(VerificationError) as caught:
        prove_structure(route, base, out, adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tensor_too_many_is_caught(product: Any) -> None:
    name = f"{LAYER}.self_attn.q_proj.lora_A.weight"
    text = changed(product, Route.LORA, {name: np.ones((2, 32), np.float32)})
    assert f"{name} is no part of this adapter" in text


@pytest.mark.parametrize(
    ("route", "name", "shape"),
    [
        (Route.LORA, "o_proj.lora_B.weight", (32, 1)),
        (Route.LORA, "o_proj.lora_A.weight", (2,)),
        (Route.IA3, "o_proj.ia3_l", (32, 1)),
        (Route.IA3, "o_proj.ia3_l", (1, 31)),
        (Route.IA3, "o_proj.ia3_l", ()),
    ],
)
def test_another_shape_is_one_line(
    product: Any, route: Route, name: str, shape: tuple[int, ...]
) -> None:
    name = f"{LAYER}.self_attn.{name}"
    text = changed(product, route, {name: np.ones(shape, np.float32)})
    assert f"{name} is float32 of shape {shape}, expected float32 of shape" in text


def test_another_dtype_is_one_line(product: Any) -> None:
    name = f"{LAYER}.self_attn.o_proj.ia3_l"
    text = changed(product, Route.IA3, {name: np.ones((1, 32), np.float16)})
    assert f"{name} is float16" in text


def test_values_in_the_padding_of_a_lora_are_caught(product: Any) -> None:
    # Layer 1 has one unit, rank is two: a row of A meets a column of zeros, for now.
    base, out, adapter = product(Route.LORA, "llama", "attention")
    name = f"{LAYER.replace('0', '1')}.self_attn.o_proj.lora_A.weight"
    tensors = load_file(out / WEIGHTS)
    assert not tensors[name][1].any()
    tensors[name][1] = 1
    save_file(tensors, out / WEIGHTS)
    with pytest.raises(VerificationError, match="where the adapter steers nothing"):
        prove_structure(Route.LORA, base, out, adapter)


@pytest.mark.parametrize("route", [Route.LORA, Route.IA3])
def test_what_is_not_a_number_is_caught(product: Any, route: Route) -> None:
    base, out, adapter = product(route, "llama", "attention")
    tensors = load_file(out / WEIGHTS)
    name = next(name for name in tensors if name.endswith(("lora_B.weight", "ia3_l")))
    tensors[name][0, 0 if route is Route.LORA else 3] = np.nan
    save_file(tensors, out / WEIGHTS)
    with pytest.raises(VerificationError, match="off by nan"):
        prove_structure(route, base, out, adapter)


def test_missing_weights_are_one_line(product: Any) -> None:
    base, out, adapter = product(Route.IA3, "llama", "attention")
    (out / WEIGHTS).unlink()
    with pytest.raises(VerificationError, match="cannot read it"):
        prove_structure(Route.IA3, base, out, adapter)


def test_the_sentence_says_what_a_conversion_did(product: Any, tmp_path: Path) -> None:
    base, out, adapter = product(Route.SAFETENSORS, "llama", "attention")
    other = tmp_path / "other"
    other.mkdir()
    write_folded(base, adapter, other, stored=StoredAs(dtype="bfloat16"))
    lora = tmp_path / "lora"
    lora.mkdir()
    write_peft(base, adapter, lora, route=Route.LORA)
    said = []
    for route, folder in (
        (Route.SAFETENSORS, out),
        (Route.SAFETENSORS, other),
        (Route.LORA, lora),
    ):
        row = dataclasses.asdict(prove_structure(route, base, folder, adapter))
        said.append(verify_sentences(row | {"files_checked": None, "structure_only": True})[-1])
    assert "byte for byte" in said[0] and "rounded once" not in said[0]
    assert "floats rounded once to bfloat16" in said[1] and "byte for byte" not in said[1]
    assert "other tensors" not in said[2] and "no model was run" in said[2]
