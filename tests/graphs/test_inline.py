"""An inlined graft computes the same with standard operators alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_sessions import open_session, run_session
from steering_formula import UNITS, steering

from austeer.graphs import ScaleAs, apply_plan, graft_model, plan_graft, plan_switchable_graft
from austeer.graphs.graft import steered_values
from austeer.graphs.inline import inline_functions

X = np.random.default_rng(7).normal(size=(2, 5, 4)).astype(np.float32)
FEEDS = {"x": X}


def everywhere() -> dict[str, Any]:
    return {f"layers.{i}.{component}": u for i in (0, 1) for component, u in UNITS.items()}


def check_standard(model: ir.Model, imports: dict[str, int]) -> None:
    """No function, no domain of ours, and valid by the checker alone."""
    assert not model.functions
    assert {node.domain for node in model.graph.all_nodes()} <= imports.keys()
    assert dict(model.opset_imports) == imports
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_outputs_stay_and_operators_of_ours_go(rank: int, toy: Any, make_adapter: Any) -> None:
    graph = toy()
    adapter = make_adapter(everywhere(), rank)
    graft_model(graph.model, adapter, 0.6)
    (before,) = run_session(open_session(graph.model), FEEDS)
    values = steered_values(graph.model)
    inline_functions(graph.model)
    check_standard(graph.model, {"": 20})
    (after,) = run_session(open_session(graph.model), FEEDS)
    # a function is inlined by onnxruntime, too, but other nodes are fused then
    bound = 2.0**-20 * np.abs(before).max()
    assert np.abs(after - before).max() <= bound
    expected = graph.compute(X, steering(adapter, scale=0.6))
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-4)
    names = {value.name for node in graph.graph for value in node.outputs}
    assert {name for pair in values.values() for name in pair} <= names
    produced = [value.name for node in graph.graph for value in node.outputs]
    assert len(produced) == len(set(produced))


def test_graph_outputs_keep_their_names(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    graph.graph.outputs.append(graph.values["0.out"])
    graft_model(graph.model, make_adapter({"layers.0.layer": UNITS["layer"]}))
    before = run_session(open_session(graph.model), FEEDS)
    inline_functions(graph.model)
    assert [value.name for value in graph.graph.outputs] == ["logits", "0.out"]
    after = run_session(open_session(graph.model), FEEDS)
    for found, expected in zip(after, before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_inputs_of_the_run_still_set_the_strength(
    rank: int, toy: Any, make_adapter: Any
) -> None:
    graph = toy()
    adapter = make_adapter(everywhere(), rank)
    apply_plan(graph.model, plan_graft(adapter, scale_as=ScaleAs.REQUIRED))
    inline_functions(graph.model)
    check_standard(graph.model, {"": 20})
    session = open_session(graph.model)
    for scale in (0.0, 1.5):
        feeds = FEEDS | {"steering_scale": np.array([scale], np.float32)}
        expected = graph.compute(X, steering(adapter, scale=scale))
        np.testing.assert_allclose(
            run_session(session, feeds)[0], expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("together", [False, True])
def test_adapters_still_switch(together: bool, toy: Any, make_adapter: Any) -> None:
    graph = toy()
    adapters = [make_adapter(everywhere(), 2), make_adapter({"layers.1.ffn": ([0], [1.0])})]
    (base,) = run_session(open_session(graph.model), FEEDS)
    plan = plan_switchable_graft(adapters, together=together)
    apply_plan(graph.model, plan)
    inline_functions(graph.model)
    check_standard(graph.model, {"": 20})
    session = open_session(graph.model)
    for adapter, values in zip(adapters, plan.switched, strict=True):
        (found,) = run_session(session, FEEDS | values)
        expected = graph.compute(X, steering(adapter))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(run_session(session, FEEDS)[0], base)


def test_functions_of_others_are_inlined_too(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    x = ir.val("f_x")
    double = ir.node("Add", [x, x])
    body = ir.Graph([x], double.outputs, nodes=[double], opset_imports={"": 20})
    function = ir.Function("other", "Double", graph=body, attributes=[])
    graph.model.functions[function.identifier()] = function
    graph.model.opset_imports["other"] = 1
    call = graph.values["0.mixed"].producer()
    twice = ir.node("Double", [call.inputs[0]], domain="other", name="twice")
    twice.outputs[0].name = "twice_out"
    graph.graph.insert_before(call, twice)
    call.replace_input_with(0, twice.outputs[0])
    adapter = make_adapter({"layers.0.attention": UNITS["attention"]})
    graft_model(graph.model, adapter)
    (before,) = run_session(open_session(graph.model), FEEDS)
    inline_functions(graph.model)
    assert not graph.model.functions
    assert {node.domain for node in graph.graph} == {""}
    (after,) = run_session(open_session(graph.model), FEEDS)
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
    assert np.abs(after - graph.compute(X, steering(adapter))).max() > 0.01


def test_a_model_without_functions_is_left_alone(toy: Any) -> None:
    graph = toy()
    before = ir.to_proto(graph.model).SerializeToString(deterministic=True)
    inline_functions(graph.model)
    assert ir.to_proto(graph.model).SerializeToString(deterministic=True) == before
