"""Shapes are stated where they can be inferred; a model that resists stays as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from austeer.graphs.shapes import state_shapes

pytest.importorskip("onnxruntime")


def content(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def dims(value: ir.Value) -> list[Any]:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


@pytest.fixture
def silent(toy: Any) -> Any:
    """A toy whose values between input and output have no shapes."""
    graph = toy()
    for value in graph.values.values():
        if not value.is_graph_output():
            value.shape = None
    return graph


def test_only_the_asked_values_get_shapes_with_the_names_of_the_inputs(silent: Any) -> None:
    asked = [silent.values[name] for name in ("0.mixed", "1.act")]
    state_shapes(silent.model, asked)
    assert [dims(value) for value in asked] == [["B", "T", 4], ["B", "T", 24]]
    others = [v for v in silent.values.values() if v not in asked and not v.is_graph_output()]
    assert all(value.shape is None for value in others)
    for value in asked:
        value.shape = None
    assert content(silent.model) == content(silent.model)


def test_everything_else_of_the_model_stays(silent: Any) -> None:
    before = content(silent.model)
    weights = {name: value.const_value for name, value in silent.graph.initializers.items()}
    asked = [silent.values["0.mixed"]]
    state_shapes(silent.model, asked)
    assert all(silent.graph.initializers[name].const_value is t for name, t in weights.items())
    asked[0].shape = None
    assert content(silent.model) == before


def test_stated_shapes_stay(toy: Any) -> None:
    graph = toy()
    value = graph.values["0.mixed"]
    value.shape = ir.Shape(["other", "names", 4])
    before = content(graph.model)
    state_shapes(graph.model, [value])
    assert content(graph.model) == before


def test_large_weights_are_not_needed(silent: Any) -> None:
    weight = silent.graph.initializers["0.up"]
    weight.const_value = tensor = ir.tensor(np.zeros((4, 2000), np.float32), name="0.up")
    weight.shape = ir.Shape([4, 2000])
    down = silent.graph.initializers["0.down"]
    down.const_value = ir.tensor(np.zeros((2000, 4), np.float32), name="0.down")
    down.shape = ir.Shape([2000, 4])
    state_shapes(silent.model, [silent.values["0.act"]])
    assert dims(silent.values["0.act"]) == ["B", "T", 2000]
    assert weight.const_value is tensor


def test_a_model_that_resists_stays_as_it_is(silent: Any) -> None:
    silent.values["0.mixed"].producer().op_type = "NoSuchOperator"
    before = content(silent.model)
    state_shapes(silent.model, [silent.values["0.act"]])
    assert content(silent.model) == before
