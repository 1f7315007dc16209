"""A graft is recognized, and what it put into a graph can be taken out byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from builder_decoder import BuilderDecoder
from onnx_sessions import open_session, run_session
from steering_formula import UNITS, steering

from austeer.adapters import GraphError, SteeringAdapter
from austeer.graphs import (
    ScaleAs,
    apply_plan,
    graft_model,
    load_model,
    plan_graft,
    plan_switchable_graft,
    register,
    remove_graft,
    save_model,
)
from austeer.graphs.custom_op import library_file
from austeer.graphs.graft import constant
from austeer.graphs.inline import inline_functions
from austeer.graphs.ungraft import check_not_grafted, steering_nodes

X = np.random.default_rng(7).normal(size=(2, 5, 4)).astype(np.float32)
Graft = Callable[[ir.Model, SteeringAdapter], None]


def content(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def fixed(scale_as: ScaleAs) -> Graft:
    return lambda model, adapter: apply_plan(model, plan_graft(adapter, 0.5, scale_as))


def switchable(together: bool) -> Graft:
    def graft(model: ir.Model, adapter: SteeringAdapter) -> None:
        apply_plan(model, plan_switchable_graft([adapter, adapter], together=together))

    return graft


GRAFTS = {
    **{f"fixed-{scale_as}": fixed(scale_as) for scale_as in ScaleAs},
    "switchable": switchable(False),
    "together": switchable(True),
}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("component", [*UNITS, "all"])
@pytest.mark.parametrize("graft", GRAFTS)
def test_what_a_graft_adds_comes_out_byte_for_byte(
    graft: str, component: str, rank: int, toy: Any, make_adapter: Any
) -> None:
    graph = toy()
    before = content(graph.model)
    kinds = UNITS if component == "all" else [component]
    units = {f"layers.{i}.{c}": UNITS[c] for i in (0, 1) for c in kinds}
    GRAFTS[graft](graph.model, make_adapter(units, rank))
    assert content(graph.model) != before
    slots = 2 if graft == "together" else 1
    assert remove_graft(graph.model) == len(units) * slots
    assert content(graph.model) == before


@pytest.mark.parametrize("graft", [name for name in GRAFTS if name != "together"])
def test_a_file_that_was_grafted_and_written(
    graft: str, tmp_path: Path, toy: Any, make_adapter: Any
) -> None:
    save_model(toy().model, tmp_path / "base.onnx")
    model = load_model(tmp_path / "base.onnx")
    units = {f"layers.{i}.{c}": u for i in (0, 1) for c, u in UNITS.items()}
    GRAFTS[graft](model, make_adapter(units, 1))
    save_model(model, tmp_path / "steered.onnx")
    again = load_model(tmp_path / "steered.onnx")
    assert remove_graft(again) == 8
    save_model(again, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "base.onnx").read_bytes()


@pytest.mark.parametrize("component", ["ffn", "layer"])
@pytest.mark.parametrize("name", ["0.down_out", "0.out"])
def test_graph_outputs_get_their_value_and_name_back(
    name: str, component: str, tmp_path: Path, toy: Any, make_adapter: Any
) -> None:
    graph = toy()
    graph.graph.outputs.append(graph.values[name])
    save_model(graph.model, tmp_path / "base.onnx")
    model = load_model(tmp_path / "base.onnx")
    graft_model(model, make_adapter({f"layers.0.{component}": UNITS[component]}))
    save_model(model, tmp_path / "steered.onnx")
    again = load_model(tmp_path / "steered.onnx")
    remove_graft(again)
    save_model(again, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "base.onnx").read_bytes()


def test_several_slots_at_a_graph_output(tmp_path: Path, toy: Any, make_adapter: Any) -> None:
    graph = toy()
    graph.graph.outputs.append(graph.values["0.out"])
    save_model(graph.model, tmp_path / "base.onnx")
    model = load_model(tmp_path / "base.onnx")
    adapter = make_adapter({"layers.0.layer": UNITS["layer"]})
    apply_plan(model, plan_switchable_graft([adapter] * 3, together=True))
    save_model(model, tmp_path / "steered.onnx")
    again = load_model(tmp_path / "steered.onnx")
    assert remove_graft(again) == 3
    save_model(again, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "base.onnx").read_bytes()


def test_the_file_version_and_learned_types_may_stay(toy: Any, make_adapter: Any) -> None:
    """Functions need version 8, and a type that the graft read off the weight is true."""
    graph = toy()
    graph.model.ir_version = 7
    for value in graph.values.values():
        if not value.is_graph_output():
            value.type = value.shape = None
    expected = run_session(open_session(graph.model), {"x": X})[0]
    adapter = make_adapter({f"layers.0.{c}": u for c, u in UNITS.items()})
    graft_model(graph.model, adapter)
    remove_graft(graph.model)
    assert graph.model.ir_version == 8
    typed = {name for name, value in graph.values.items() if value.dtype is not None}
    assert typed <= {"logits", "0.mixed", "0.act", "0.down_out", "0.out"}
    graph.model.ir_version = 7
    plain = toy()
    plain.model.ir_version = 7
    for value in [*graph.values.values(), *plain.values.values()]:
        if not value.is_graph_output():
            value.type = value.shape = None
    assert content(graph.model) == content(plain.model)
    assert np.array_equal(run_session(open_session(graph.model), {"x": X})[0], expected)


def test_a_split_norm_stays_split_and_computes_the_same(make_adapter: Any) -> None:
    decoder = BuilderDecoder()
    (base,) = run_session(open_session(decoder.model), {"x": X})
    graft_model(decoder.model, make_adapter({"layers.0.layer": UNITS["layer"]}))
    assert remove_graft(decoder.model) == 1
    (found,) = run_session(open_session(decoder.model), {"x": X})
    np.testing.assert_allclose(found, base, rtol=1e-5, atol=1e-6)
    assert not [name for name in decoder.graph.initializers if name.startswith("austeer")]


def test_a_new_graft_on_what_is_left(toy: Any, make_adapter: Any, run_onnx: Any) -> None:
    graph = toy()
    first = make_adapter({"layers.0.layer": ([0], [5.0])})
    second = make_adapter({f"layers.1.{c}": u for c, u in UNITS.items()}, 1)
    graft_model(graph.model, first)
    remove_graft(graph.model)
    graft_model(graph.model, second)
    (found,) = run_onnx(graph.model, {"x": X})
    expected = graph.compute(X, steering(second))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_graft_is_left_alone(toy: Any) -> None:
    graph = toy()
    own = ir.val("steering_scale", ir.DataType.FLOAT, ["B", "T", 4])
    graph.graph.inputs.append(own)
    graph.graph.outputs.append(graph.add("Neg", [own], "probe", "model.probe"))
    before = content(graph.model)
    assert steering_nodes(graph.model) == []
    check_not_grafted(graph.model)
    assert remove_graft(graph.model) == 0
    assert content(graph.model) == before


def test_functions_of_others_stay(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    x = ir.val("f_x")
    body = ir.Graph([x], [], nodes=[ir.node("Neg", [x])], opset_imports={"": 20})
    body.outputs.append(body[0].outputs[0])
    function = ir.Function("other", "Twin", graph=body, attributes=[])
    graph.model.functions[function.identifier()] = function
    graph.model.opset_imports["other"] = 1
    before = content(graph.model)
    graft_model(graph.model, make_adapter({"layers.0.ffn": UNITS["ffn"]}))
    assert len(graph.model.functions) == 2
    remove_graft(graph.model)
    assert content(graph.model) == before


def test_steering_nodes_in_graph_order(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    graft_model(graph.model, make_adapter({f"layers.0.{c}": u for c, u in UNITS.items()}))
    names = [node.name for node in steering_nodes(graph.model)]
    order = ("attention", "neuron", "ffn", "layer")
    assert names == [f"austeer.layers.0.{component}" for component in order]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_inlined_graft_is_recognized_and_cannot_be_taken_out(
    rank: int, toy: Any, make_adapter: Any
) -> None:
    graph = toy()
    graft_model(graph.model, make_adapter({"layers.0.ffn": UNITS["ffn"]}, rank))
    inline_functions(graph.model)
    before = content(graph.model)
    for check in (remove_graft, check_not_grafted):
        with pytest.raises(GraphError, match=r"inlined graft, see austeer\..*base model") as e:
            check(graph.model)
        assert "steered already" in str(e.value)
        assert "--replace" not in str(e.value)
    assert content(graph.model) == before


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("reader", ["node", "output"])
def test_a_constant_that_the_model_itself_uses_stays(
    reader: str, taken: bool, toy: Any, make_adapter: Any
) -> None:
    """onnxruntime's optimizer lets equal constants be one, under either name."""
    graph = toy()
    graft_model(graph.model, make_adapter({"layers.0.ffn": UNITS["ffn"]}))
    shared = graph.graph.initializers["austeer.scale"]
    if taken:
        other = constant("shared.austeer.scale", np.ones(4, np.float32))
        graph.graph.register_initializer(other)
        graph.graph.node("node_1.mixed").replace_input_with(1, other)
    if reader == "node":
        graph.graph.node("node_0.mixed").replace_input_with(1, shared)
    else:
        graph.graph.outputs.append(shared)
    assert remove_graft(graph.model) == 1
    check_not_grafted(graph.model)
    name = "shared.austeer.scale.2" if taken else "shared.austeer.scale"
    assert graph.graph.initializers[name] is shared
    assert not [name for name in graph.graph.initializers if name.startswith("austeer")]
    for i in (0, 1):
        if (i == 0 and reader == "node") or (i == 1 and taken):
            graph.weights[f"{i}.w"] = np.ones(4, np.float32)
    adapter = make_adapter({"layers.1.layer": UNITS["layer"]})
    found = run_session(open_session(graph.model), {"x": X})[0]
    np.testing.assert_allclose(found, graph.compute(X, {}), rtol=1e-4, atol=1e-4)
    graft_model(graph.model, adapter)
    found = run_session(open_session(graph.model), {"x": X})[0]
    expected = graph.compute(X, steering(adapter))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(library_file() is None, reason="no operator library built")
def test_a_file_that_onnxruntime_optimized(tmp_path: Path, toy: Any, make_adapter: Any) -> None:
    """With the kernels the nodes stay, and their scale is merged with the model's own 1."""
    graph = toy()
    shift = constant("shift", np.ones(1, np.float32))
    graph.graph.register_initializer(shift)
    (last,) = graph.graph.outputs
    moved = graph.add("Add", [last, shift], "moved", "model.shift")
    graph.graph.outputs[0] = moved
    base = run_session(open_session(graph.model), {"x": X})[0]
    graft_model(graph.model, make_adapter({"layers.0.ffn": UNITS["ffn"]}))
    save_model(graph.model, tmp_path / "steered.onnx")
    options = onnxruntime.SessionOptions()
    register(options)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        tmp_path / "steered.onnx", options, providers=["CPUExecutionProvider"]
    )
    model = load_model(tmp_path / "optimized.onnx")
    (node,) = steering_nodes(model)
    assert len(node.inputs[-1].uses()) == 2, "not merged: the test shows nothing"
    assert remove_graft(model) == 1
    found = run_session(open_session(model), {"x": X})[0]
    np.testing.assert_allclose(found, base, rtol=1e-5, atol=1e-6)
