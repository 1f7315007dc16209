"""Whether a graph is an adapter's base: its weights say it where it holds them as they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from plain_graphs import PlainGraph
from steering_formula import UNITS

from austeer.adapters import AdapterError, GraphError, SteeringAdapter
from austeer.adapters.architectures import architecture_of
from austeer.adapters.fingerprint import fingerprint
from austeer.graphs import graft_model, load_model, remove_graft, save_model
from austeer.graphs.base_check import BaseWeights, check_base

Made = Callable[..., SteeringAdapter]


class Named(dict[str, np.ndarray]):
    """Tensors by name, read as those of a model are."""

    def __call__(self, name: str, part: int | None = None, /) -> np.ndarray | None:
        return self.get(name)

    def shape(self, name: str, /) -> tuple[int, ...] | None:
        return self[name].shape if name in self else None


@pytest.fixture
def adapter_for(make_adapter: Any) -> Made:
    """An adapter whose fingerprint is that of these module tensors, as torch names them."""

    def build(
        units: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model_type: str = "llama"
    ) -> SteeringAdapter:
        made = make_adapter(units)
        architecture = architecture_of(model_type)
        digest = fingerprint(architecture, [s.site for s in made.sites], Named(tensors))
        config = dataclasses.replace(
            made.config, model_type=model_type, base_model_fingerprint=digest
        )
        return SteeringAdapter(config, made.sites)

    return build


def torch_tensors(toy: Any) -> dict[str, np.ndarray]:
    """`Linear` stores `[out, in]`; only down_proj has a bias."""
    found = {}
    for i in (0, 1):
        at = f"model.layers.{i}"
        found[f"{at}.self_attn.o_proj.weight"] = toy.weights[f"{i}.o"].T
        found[f"{at}.mlp.down_proj.weight"] = toy.weights[f"{i}.down"].T
        if toy.bias:
            found[f"{at}.mlp.down_proj.bias"] = toy.weights[f"{i}.bias"]
    return found


def everywhere(components: Any = UNITS) -> dict[str, Any]:
    return {
        f"layers.{i}.{component}": UNITS[component] for i in (0, 1) for component in components
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("component", [*UNITS, "all"])
def test_equal_weights_are_the_base(
    component: str, bias: bool, toy: Any, adapter_for: Made, tmp_path: Path
) -> None:
    graph = toy(bias=bias)
    units = everywhere(UNITS if component == "all" else [component])
    adapter = adapter_for(units, torch_tensors(graph))
    assert check_base(graph.model, tmp_path, adapter) is BaseWeights.EQUAL


@pytest.mark.parametrize("part", ["o_proj.weight", "down_proj.weight", "down_proj.bias"])
def test_other_weights_are_refused_unless_forced(
    part: str, toy: Any, adapter_for: Made, tmp_path: Path
) -> None:
    graph = toy()
    tensors = torch_tensors(graph)
    (name,) = [name for name in tensors if name.startswith("model.layers.1") and part in name]
    tensors[name] = tensors[name] + np.float32(0.1)
    adapter = adapter_for(everywhere(), tensors)
    with pytest.raises(AdapterError, match="another base model: made for 'toy'") as error:
        check_base(graph.model, tmp_path, adapter)
    assert adapter.config.base_model_fingerprint in str(error.value)
    assert "--force" in str(error.value)
    assert check_base(graph.model, tmp_path, adapter, force=True) is BaseWeights.DIFFERENT


def test_weights_that_no_site_touches_do_not_matter(
    toy: Any, adapter_for: Made, tmp_path: Path
) -> None:
    graph = toy()
    tensors = torch_tensors(graph)
    tensors["model.layers.0.self_attn.o_proj.weight"] = np.zeros((4, 4), np.float32)
    adapter = adapter_for(everywhere(["ffn"]), tensors)
    assert check_base(graph.model, tmp_path, adapter) is BaseWeights.EQUAL


@pytest.mark.parametrize("size", [0, 10**9])
def test_weights_in_a_file_of_their_own(
    size: int, toy: Any, adapter_for: Made, tmp_path: Path
) -> None:
    graph = toy()
    adapter = adapter_for(everywhere(), torch_tensors(graph))
    save_model(graph.model, tmp_path / "base.onnx", limit=size)
    model = load_model(tmp_path / "base.onnx")
    assert check_base(model, tmp_path, adapter) is BaseWeights.EQUAL


def test_data_files_with_several_links_are_read(
    toy: Any, adapter_for: Made, tmp_path: Path
) -> None:
    graph = toy()
    adapter = adapter_for(everywhere(), torch_tensors(graph))
    save_model(graph.model, tmp_path / "base.onnx", limit=0)
    (tmp_path / "backup").hardlink_to(tmp_path / "base.onnx.data")
    model = load_model(tmp_path / "base.onnx")
    assert check_base(model, tmp_path, adapter) is BaseWeights.EQUAL


def test_a_graph_that_was_steered_before(toy: Any, adapter_for: Made, tmp_path: Path) -> None:
    graph = toy()
    adapter = adapter_for(everywhere(), torch_tensors(graph))
    graft_model(graph.model, adapter)
    remove_graft(graph.model)
    assert check_base(graph.model, tmp_path, adapter) is BaseWeights.EQUAL


# Weights that a graph holds otherwise


def in_dtype(graph: Any, dtype: Any) -> None:
    for name in [n for n in graph.graph.initializers if n.endswith((".o", ".down", ".bias"))]:
        value = graph.graph.initializers[name]
        tensor = ir.tensor(value.const_value.numpy().astype(dtype), name=name)
        value.const_value, value.dtype = tensor, tensor.dtype


def test_rounded_weights_cannot_be_compared(
    toy: Any, adapter_for: Made, tmp_path: Path
) -> None:
    graph = toy()
    adapter = adapter_for(everywhere(), torch_tensors(graph))
    in_dtype(graph, np.float16)
    assert check_base(graph.model, tmp_path, adapter) is BaseWeights.NOT_COMPARABLE


@pytest.mark.parametrize("op", ["MatMulNBits", "MatMulInteger", "DequantizeLinear"])
def test_quantized_weights_cannot_be_compared(
    op: str, toy: Any, adapter_for: Made, tmp_path: Path
) -> None:
    graph = toy()
    other = {name: array + 1 for name, array in torch_tensors(graph).items()}
    adapter = adapter_for(everywhere(["ffn"]), other)
    for i in (0, 1):
        node = graph.values[f"{i}.product"].producer()
        if op == "DequantizeLinear":
            scale = graph.graph.initializers[f"{i}.bias"]
            wide = ir.node(op, [node.inputs[1], scale], name=f"wide_{i}")
            graph.graph.insert_before(node, wide)
            node.replace_input_with(1, wide.outputs[0])
            continue
        node.op_type = op
        if op == "MatMulNBits":
            node.domain = "com.microsoft"
            node.resize_inputs(3)
            node.replace_input_with(2, graph.graph.initializers[f"{i}.bias"])
        else:
            first = ir.node("DynamicQuantizeLinear", [node.inputs[0]], num_outputs=3)
            graph.graph.insert_before(node, first)
            node.replace_input_with(0, first.outputs[0])
    assert check_base(graph.model, tmp_path, adapter) is BaseWeights.NOT_COMPARABLE


def gpt2_graph(operator: str, bias: str) -> tuple[PlainGraph, dict[str, np.ndarray]]:
    """One MLP projection of GPT-2, and its tensors as `Conv1D` holds them: `[in, out]`."""
    rng = np.random.default_rng(2)
    W, b = rng.normal(size=(24, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    graph, at = PlainGraph(opset=18), "transformer.h.0.mlp.c_proj"
    x = graph.input("x", ["rows", 24])
    act = graph.add("Tanh", [x], "transformer.h.0.mlp.act")
    turned = operator.endswith("transB")
    weight = graph.constant("w", np.ascontiguousarray(W.T) if turned else W)
    if operator == "MatMul-Transpose":
        weight = graph.constant("turned", np.ascontiguousarray(W.T))
        weight = graph.add("Transpose", [weight], at, perm=[1, 0])
    parts = [act, weight]
    if bias == "inside":
        parts.append(graph.constant("b", b))
    attributes = {"transB": 1} if turned else {}
    result = graph.add(operator.split("-")[0], parts, at, **attributes)
    if bias == "added":
        result = graph.add("Add", [result, graph.constant("b", b)], at)
    h = graph.input("h", ["rows", 4])
    graph.output(graph.add("Add", [h, result], "transformer.h.0"), ["rows", 4])
    name = "transformer.h.0.mlp.c_proj"
    tensors = {f"{name}.weight": W}
    return graph, tensors if bias == "none" else {**tensors, f"{name}.bias": b}


VARIANTS = [
    (operator, bias)
    for operator in ("MatMul", "MatMul-Transpose", "Gemm", "Gemm-transB")
    for bias in ("none", "added", "inside")
    if bias != "inside" or operator.startswith("Gemm")
]


@pytest.mark.parametrize(("operator", "bias"), VARIANTS)
def test_every_way_to_write_a_linear_layer(
    operator: str, bias: str, adapter_for: Made, tmp_path: Path
) -> None:
    graph, tensors = gpt2_graph(operator, bias)
    units = {"layers.0.ffn": UNITS["ffn"]}
    assert (
        check_base(graph.model, tmp_path, adapter_for(units, tensors, "gpt2"))
        is BaseWeights.EQUAL
    )
    for name in tensors:
        other = {**tensors, name: tensors[name] * np.float32(1.1)}
        with pytest.raises(AdapterError, match="another base model"):
            check_base(graph.model, tmp_path, adapter_for(units, other, "gpt2"))


# The config beside the graph


def test_another_architecture_in_the_config_is_refused_even_by_force(
    toy: Any, adapter_for: Made, tmp_path: Path
) -> None:
    graph = toy()
    adapter = adapter_for(everywhere(), torch_tensors(graph))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    for force in (False, True):
        with pytest.raises(AdapterError, match="llama model, this one is mistral") as error:
            check_base(graph.model, tmp_path, adapter, force=force)
        assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {}, {"vocab_size": 3}])
def test_a_config_that_agrees_or_says_nothing(
    config: dict[str, Any], toy: Any, adapter_for: Made, tmp_path: Path
) -> None:
    graph = toy()
    (tmp_path / "config.json").write_text(json.dumps(config))
    adapter = adapter_for(everywhere(), torch_tensors(graph))
    assert check_base(graph.model, tmp_path, adapter) is BaseWeights.EQUAL


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_config_that_is_none(text: str, toy: Any, adapter_for: Made, tmp_path: Path) -> None:
    graph = toy()
    (tmp_path / "config.json").write_text(text)
    adapter = adapter_for(everywhere(), torch_tensors(graph))
    with pytest.raises(GraphError, match=r"config\.json"):
        check_base(graph.model, tmp_path, adapter)


def test_a_graph_without_the_site_is_not_compared(
    toy: Any, adapter_for: Made, tmp_path: Path
) -> None:
    """The graft refuses it with the nearest names."""
    graph = toy(layers=1)
    adapter = adapter_for(everywhere(), torch_tensors(toy()))
    assert check_base(graph.model, tmp_path, adapter) is BaseWeights.NOT_COMPARABLE
