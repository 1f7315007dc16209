"""Shapes that a graph leaves open are inferred with its own names, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from austeer.graphs import graft_model
from austeer.graphs.shapes import state_shapes


def shape_of(value: ir.Value) -> list[str] | None:
    return None if value.shape is None else [str(dim) for dim in value.shape]


def silent(graph: Any) -> Any:
    """The graph without the shapes of what its nodes make."""
    for value in graph.values.values():
        if not value.is_graph_output():
            value.shape = None
    return graph


def test_names_of_the_inputs_axes_reach_the_last_layer(toy: Any) -> None:
    graph = silent(toy())
    wanted = {"0.mixed": 4, "0.act": 24, "1.out": 4}
    state_shapes(graph.model, [graph.values[name] for name in wanted])
    for name, width in wanted.items():
        assert shape_of(graph.values[name]) == ["B", "T", str(width)]


def test_names_go_through_a_reshape(toy: Any) -> None:
    graph = silent(toy(layers=1))
    out = graph.values["0.out"]
    sizes = graph.add("Shape", [out], "sizes", "model.norm")
    sizes.shape, sizes.type = None, None
    flat = ir.val("flat", const_value=ir.tensor(np.array([-1, 4]), name="flat"))
    graph.graph.register_initializer(flat)
    folded = graph.add("Reshape", [out, flat], "folded", "model.norm")
    unfolded = graph.add("Reshape", [folded, sizes], "unfolded", "model.norm")
    folded.shape = unfolded.shape = None
    state_shapes(graph.model, [unfolded, folded])
    assert shape_of(unfolded) == ["B", "T", "4"]
    assert shape_of(folded) == ["B*T", "4"]


def test_what_is_stated_stays_and_the_rest_is_not_touched(toy: Any) -> None:
    graph = silent(toy())
    stated = graph.values["0.mixed"]
    stated.shape = ir.Shape(["other", "T", 4])
    before = ir.to_proto(graph.model).SerializeToString()
    state_shapes(graph.model, [stated])
    assert ir.to_proto(graph.model).SerializeToString() == before
    state_shapes(graph.model, [graph.values["1.act"]])
    assert shape_of(stated) == ["other", "T", "4"]
    assert graph.values["1.mixed"].shape is None


@pytest.mark.parametrize("domain", ["", "nobody.knows"])
def test_an_unknown_operator_leaves_shapes_open(
    domain: str, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    graph = silent(toy())
    producer = graph.values["0.mixed"].producer()
    producer.op_type, producer.domain = "Riddle", domain
    state_shapes(graph.model, [graph.values["0.mixed"]])
    assert graph.values["0.mixed"].shape is None
    assert not list(tmp_path.iterdir())


def test_large_weights_come_back(toy: Any) -> None:
    graph = silent(toy())
    large = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    weight = ir.val("large", const_value=ir.tensor(large, name="large"))
    graph.graph.register_initializer(weight)
    state_shapes(graph.model, [graph.values["1.out"]])
    assert np.array_equal(weight.const_value.numpy(), large)


def test_a_graft_states_the_shapes_around_its_nodes(toy: Any, make_adapter: Any) -> None:
    graph = silent(toy())
    graft_model(graph.model, make_adapter({"layers.1.ffn": ([0], [1.0])}))
    (node,) = [node for node in graph.graph if node.domain == "ai.austeer"]
    for value in (node.inputs[0], node.outputs[0]):
        assert shape_of(value) == ["B", "T", "4"]
