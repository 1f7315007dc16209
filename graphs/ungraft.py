"""Recognize a graft in a model, and take it out again."""

from __future__ import annotations

import onnx_ir as ir

from austeer.adapters._errors import GraphError
from austeer.graphs.opset import DOMAIN, PREFIX


def steering_nodes(model: ir.Model) -> list[ir.Node]:
    """The steering nodes of a model, in graph order."""
    return [node for node in model.graph.all_nodes() if node.domain == DOMAIN]


def check_not_grafted(model: ir.Model) -> None:
    """Refuse a model that holds steering nodes or their constants already.

    Raises:
        GraphError: it does; names one, and what to do.
    """
    _check_removable(model)
    if nodes := steering_nodes(model):
        raise GraphError(
            f"the model is steered already, see {nodes[0].name}; graft onto the base model "
            "instead, or with --replace"
        )


def remove_graft(model: ir.Model) -> int:
    """Take every steering node out, with its constants, inputs and bodies.

    Returns:
        How many nodes were there.

    Raises:
        GraphError: the graft was inlined, so that its nodes cannot be told from the model's,
            or lies in a branch of an If node.
    """
    _check_removable(model)
    nodes = steering_nodes(model)
    constants = [value for node in nodes for value in node.inputs[1:] if value is not None]
    for node in nodes:
        _take_out(model.graph, node)
    for value in dict.fromkeys(constants):
        _drop(model.graph, value)
    for identifier in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[identifier]
    model.opset_imports.pop(DOMAIN, None)
    return len(nodes)


def _check_removable(model: ir.Model) -> None:
    nodes = steering_nodes(model)
    # Inlined, by us or by onnxruntime's optimizer, a graft has no nodes left but its constants.
    if not nodes and (names := _own_names(model.graph)):
        raise GraphError(
            f"the model is steered already by an inlined graft, see {names[0]}, which cannot "
            "be taken out; graft onto the base model instead"
        )
    for node in nodes:
        if node.graph is not model.graph:
            raise GraphError(
                f"the model is steered already: {node.name} is inside a branch of it, where it "
                "cannot be taken out; graft onto the base model instead"
            )


def _take_out(graph: ir.Graph, node: ir.Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    if x is None:
        raise GraphError(f"{node.name}: expected an activation as first input, found none")
    for reader, position in tuple(y.uses()):
        reader.replace_input_with(position, x)
    for position, output in enumerate(graph.outputs):
        if output is y:
            # The graft had taken over the name.
            name = y.name
            graph.outputs[position], y.name = x, f"{name}.steered"
            x.name = name
    graph.remove(node, safe=True)


def _own_names(graph: ir.Graph) -> list[str]:
    names = [str(name) for name in graph.initializers]
    return [name for name in names if name.startswith(f"{PREFIX}.")]


def _drop(graph: ir.Graph, value: ir.Value) -> None:
    name = str(value.name)
    if value.uses() or value.is_graph_output():
        # onnxruntime's optimizer lets equal constants be one, the model's own among them.
        if name in _own_names(graph):
            value.name = _free_name(graph, f"shared.{name}")
        return
    graph.initializers.pop(name, None)
    if value in graph.inputs:
        graph.inputs.remove(value)


def _free_name(graph: ir.Graph, name: str) -> str:
    nodes = graph.all_nodes()
    taken = {value.name for node in nodes for value in (*node.inputs, *node.outputs) if value}
    taken |= {*graph.initializers}
    number, free = 2, name
    while free in taken:
        number, free = number + 1, f"{name}.{number}"
    return free
