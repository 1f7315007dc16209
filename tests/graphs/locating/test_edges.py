"""Walks along a graph's edges."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import pytest

from austeer.graphs.locating.edges import (
    downstream,
    is_standard,
    may_be_activation,
    only_reader,
    values_behind,
    values_leaving,
)


@pytest.fixture
def graph() -> Iterator[dict[str, ir.Node]]:
    """x → a → b → c, a → d, b + d → e; c and e are outputs."""
    x = ir.Value(name="x")
    nodes: dict[str, ir.Node] = {}

    def add(name: str, *sources: ir.Value, op: str = "Neg", domain: str = "") -> ir.Value:
        nodes[name] = ir.Node(domain, op, list(sources), name=name)
        return nodes[name].outputs[0]

    a = add("a", x)
    b = add("b", a)
    c = add("c", b, op="Shape")
    d = add("d", a, op="Add", domain="other")
    e = add("e", b, d, op="Add")
    model = ir.Graph([x], [c, e], nodes=list(nodes.values()), opset_imports={"": 21})
    yield nodes
    assert len(model) == 5


def names(graph: dict[str, ir.Node], values: object) -> str:
    of = {node.outputs[0]: name for name, node in graph.items()}
    return "".join(sorted(of[value] for value in values))  # type: ignore[attr-defined]


def test_only_reader(graph: dict[str, ir.Node]) -> None:
    assert only_reader(graph["d"].outputs[0]) is graph["e"]
    assert only_reader(graph["a"].outputs[0]) is None
    assert only_reader(graph["e"].outputs[0]) is None


def test_values_behind_are_those_computed_from_a_node(graph: dict[str, ir.Node]) -> None:
    assert names(graph, values_behind([graph["b"]])) == "bce"
    assert names(graph, values_behind([graph["d"]])) == "de"
    assert names(graph, values_behind([])) == ""


def test_downstream_stays_inside(graph: dict[str, ir.Node]) -> None:
    inside = {graph[name] for name in "bc"}
    assert names(graph, downstream(graph["a"].outputs[0], inside)) == "bc"


def test_values_leave_to_other_readers_or_as_outputs(graph: dict[str, ir.Node]) -> None:
    values = [node.outputs[0] for node in graph.values()]
    assert names(graph, values_leaving(values, {graph["a"], graph["b"]})) == "abcde"
    assert names(graph, values_leaving(values[:2], {graph[x] for x in "abcd"})) == "b"
    assert names(graph, values_leaving(values, set(graph.values()))) == "ce"


def test_what_may_be_an_activation(graph: dict[str, ir.Node]) -> None:
    assert may_be_activation(graph["a"].outputs[0])
    assert not may_be_activation(graph["c"].outputs[0])
    value = graph["a"].outputs[0]
    value.dtype = ir.DataType.INT64
    assert not may_be_activation(value)
    value.dtype = ir.DataType.BFLOAT16
    assert may_be_activation(value)


def test_a_standard_node_is_of_the_default_domain(graph: dict[str, ir.Node]) -> None:
    assert is_standard(graph["e"], "Add")
    assert not is_standard(graph["d"], "Add")
    assert not is_standard(graph["a"], "Add")
