"""Tidy a graph that came out of `torch.onnx.export`: names as optimum's, no traces left.

What stays of the exporter's metadata are the module paths, by which sites are found. Stack
traces and with them local paths go, so that equal models give equal bytes anywhere.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from austeer.graphs.locating.scopes import NAME_SCOPES

_SYMBOL = re.compile(r"\bs\d+\b")


def tidy_causal_lm(model: ir.Model, layers: int, wrapper: str) -> None:
    """Name the ends and axes of an exported causal language model and drop its traces.

    Args:
        model: inputs `input_ids, attention_mask, position_ids`, then key and value of every
            layer's cache; outputs logits, then the caches again. Changed in place.
        layers: number of decoder layers.
        wrapper: attribute under which the exported module held the language model; it is
            taken off module paths and weight names.
    """
    _name_ends(model.graph, layers)
    _name_axes(model.graph)
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(NAME_SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            node.metadata_props[NAME_SCOPES] = _unwrapped(scopes, wrapper)
    for value in list(model.graph.initializers.values()):
        _rename_weight(value, wrapper)
    for value in _values(model.graph):
        value.metadata_props.clear()
        value.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "model"


def _name_ends(graph: ir.Graph, layers: int) -> None:
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids"]
    inputs += [f"past_key_values.{part}" for part in parts]
    outputs = ["logits", *(f"present.{part}" for part in parts)]
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name


def _name_axes(graph: ir.Graph) -> None:
    """Replace the exporter's symbols (`s10`, `s15 + s70`) by names that say what they count."""
    ids, mask, _, past = graph.inputs[:4]
    names = {
        _axis(ids, 0): "batch_size",
        _axis(ids, 1): "sequence_length",
        _axis(mask, 1): "total_sequence_length",
        _axis(past, 2): "past_sequence_length",
    }
    for value in _values(graph):
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape([_named(dim, names) for dim in value.shape])


def _axis(value: ir.Value, axis: int) -> str:
    return "" if value.shape is None else _text(value.shape[axis])


def _named(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    text = _text(dim)
    return names.get(text) or _SYMBOL.sub(lambda found: names.get(found[0], found[0]), text)


def _text(dim: int | ir.SymbolicDim) -> str:
    return str(dim.value if isinstance(dim, ir.SymbolicDim) else dim)


def _values(graph: ir.Graph) -> list[ir.Value]:
    produced = [value for node in graph.all_nodes() for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *produced]


def _unwrapped(scopes: str, wrapper: str) -> str:
    """`['', 'w', 'w.model', 'add']` → `['', 'model', 'add']`."""
    return scopes.replace(f"'{wrapper}', ", "").replace(f"'{wrapper}.", "'")


def _rename_weight(value: ir.Value, wrapper: str) -> None:
    name = str(value.name)
    if name.startswith(f"{wrapper}."):
        value.name = name.removeprefix(f"{wrapper}.")
