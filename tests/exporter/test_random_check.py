"""The check on random input accepts products of every kind and nothing near them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from austeer.adapters import RouteError, SteeringAdapter, VerificationError
from austeer.adapters.tensors import Checkpoint
from austeer.exporter import random_check
from austeer.exporter.merge import write_folded
from austeer.exporter.peft_export import write_peft
from austeer.exporter.random_check import prove_structure
from austeer.exporter.routes import Route

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
