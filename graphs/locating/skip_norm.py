"""Residual sums that onnxruntime's fused norms hide: found, and taken out of the norm.

`SkipLayerNormalization(input, skip, gamma[, beta, bias])` adds and normalizes in one node, and
`SkipSimplifiedLayerNormalization` likewise. The sum, the output of a decoder layer, can be
steered only where it is a value of its own.
"""

from __future__ import annotations

import onnx_ir as ir

from austeer.graphs.locating.projections import MICROSOFT

_NORMS = {
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
}
_SUM = 3
"""Position of the output that holds the sum."""


def is_skip_norm(node: ir.Node) -> bool:
    """Whether the node adds two activations and normalizes the sum."""
    return node.domain == MICROSOFT and node.op_type in _NORMS and len(node.inputs) >= 3


def norm_width(node: ir.Node) -> int | None:
    """Length of the normalized axis; None where the graph is silent."""
    gamma = node.inputs[2]
    size = gamma.shape[0] if gamma is not None and gamma.shape is not None else None
    return size if isinstance(size, int) else None


def added_bias(node: ir.Node) -> ir.Value | None:
    """The bias that a skip norm adds to the sum, taken from a projection before it."""
    position = 3 if node.op_type == "SkipSimplifiedLayerNormalization" else 4
    return node.inputs[position] if len(node.inputs) > position else None


def split_skip_norm(node: ir.Node, name: str) -> ir.Value:
    """Replace a skip norm by a sum and a norm that reads it; the graph computes the same.

    Args:
        node: the skip norm, of a main graph.
        name: name of the new node that adds.

    Returns:
        The sum, `[..., width]`, read by all that read it before and by the norm.
    """
    graph = node.graph
    assert graph is not None
    first, skip, gamma = node.inputs[:3]
    simple = node.op_type == "SkipSimplifiedLayerNormalization"
    beta = None if simple or len(node.inputs) < 4 else node.inputs[3]
    bias = added_bias(node)
    normalized, old_sum = node.outputs[0], _output(node, _SUM)
    fresh = [ir.node("Add", [first, skip], name=name)]
    if bias is not None:
        fresh.append(ir.node("Add", [fresh[0].outputs[0], bias], name=f"{name}_bias"))
    total = fresh[-1].outputs[0]
    # Who asks a graph for its hidden states asks by name.
    _describe(total, old_sum or first, old_sum.name if old_sum else f"{name}/output_0")
    for value in [part.outputs[0] for part in fresh[:-1]]:
        _describe(value, total, f"{name}/partial")
    parts = [total, gamma] if simple or beta is None else [total, gamma, beta]
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    settings = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    norm = ir.node(_NORMS[node.op_type], parts, settings, name=f"{node.name}/norm")
    output = norm.outputs[0]
    _describe(output, normalized, normalized.name)
    graph.insert_before(node, [*fresh, norm])
    _replace(graph, normalized, output)
    if old_sum is not None:
        _replace(graph, old_sum, total)
    graph.remove(node, safe=True)
    return total


def _output(node: ir.Node, position: int) -> ir.Value | None:
    value = node.outputs[position] if len(node.outputs) > position else None
    return value if value is not None and (value.name or value.uses()) else None


def _describe(value: ir.Value, like: ir.Value | None, name: str | None) -> None:
    value.name = name
    if like is not None:
        value.shape = None if like.shape is None else ir.Shape(like.shape.dims)
        value.type = like.type


def _replace(graph: ir.Graph | ir.Function, old: ir.Value, new: ir.Value) -> None:
    if isinstance(graph, ir.Graph):
        for position, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[position] = new
    for reader, position in tuple(old.uses()):
        reader.replace_input_with(position, new)
