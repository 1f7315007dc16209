"""Linear projections as nodes of a graph: plain, fused, int8 or int4.

What a site needs of one: the activation that it reads and who reads it, the float value that
it makes, the lengths of both, and its weight where that can be read back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from austeer.graphs.model_io import tensor_values

MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's own operators."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Element types that an activation can be steered in."""

_SAME_TYPE = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), (0, 1)),
    **dict.fromkeys(("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze"), (0,)),
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul"), (1, 0)),
    # Some norms compute in another type than they give out, which is that of their gain.
    **dict.fromkeys(("LayerNormalization", "SimplifiedLayerNormalization"), (1,)),
    "RMSNormalization": (1,),
    "DequantizeLinear": (1,),
}
"""Positions of the inputs that have the element type of an operator's result."""

_QUANTIZED = ("quant", "qlinear", "integer", "nbits", "bnb4", "qmoe", "qattention")
"""Parts of the names of the operators that read quantized weights."""

_SAME_VALUES = ("Cast", "Identity", "Transpose")
_SAME_SHAPE = (*_SAME_VALUES, "DequantizeLinear")


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """One linear projection.

    Attributes:
        node: the node that multiplies.
        activation: the float value that it reads, `[..., in_width]`.
        reader: the node that reads `activation`: `node`, or what quantizes for it.
        dtype: element type of `activation` and of the result; None where the graph is silent.
        in_width: length of the activation's last axis; None where the graph is silent.
        out_width: length of the result's last axis; None where the graph is silent.
    """

    node: ir.Node
    activation: ir.Value
    reader: ir.Node
    dtype: ir.DataType | None
    in_width: int | None
    out_width: int | None


def is_projection(node: ir.Node) -> bool:
    """Whether the node multiplies an activation by a matrix."""
    return (node.domain, node.op_type) in _READERS


def read_projection(node: ir.Node) -> Projection | str:
    """The projection that `node` computes, or why it is none that can be steered."""
    return _READERS[node.domain, node.op_type](node)


def stored_weight(node: ir.Node) -> np.ndarray[Any, np.dtype[Any]] | None:
    """The projection's matrix as `[in, out]`; None where it is quantized or computed."""
    if (node.domain, node.op_type) not in (("", "MatMul"), ("", "Gemm")):
        return None
    found = stored_tensor(_input(node, 1))
    if found is None or found[0].dtype not in FLOATS:
        return None
    tensor, transposed = found
    transposed ^= node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    weight = tensor_values(tensor)
    return weight.T if transposed else weight


def is_quantized(model: ir.Model) -> bool:
    """Whether a part of the model computes with quantized weights."""
    kinds = {node.op_type.lower() for node in model.graph.all_nodes()}
    return any(part in kind for part in _QUANTIZED for kind in kinds)


def element_type(
    value: ir.Value | None, projection: Projection | None = None
) -> ir.DataType | None:
    """What the graph says of a value's element type, itself or by the operators before it.

    Args:
        value: where to start; None has no type.
        projection: one that may come before it, with a known type.
    """
    queue = [] if value is None else [value]
    for found in queue:
        node = found.producer()
        if found.dtype is not None:
            return found.dtype
        if found.const_value is not None:
            return found.const_value.dtype
        if projection is not None and node is projection.node:
            return projection.dtype
        if node is None:
            continue
        if node.op_type == "Cast":
            return ir.DataType(node.attributes.get_int("to", 0))
        for position in _SAME_TYPE.get(node.op_type, ()):
            before = _input(node, position)
            if before is not None and before not in queue:
                queue.append(before)
    return None


def _plain(node: ir.Node) -> Projection | str:
    if any(node.attributes.get_int(name, 0) for name in ("transA", "transBatchA")):
        return f"{node.name} transposes its activation"
    found = stored_tensor(_input(node, 1), _SAME_SHAPE)
    shape = (None, None) if found is None else tuple(found[0].shape)
    if len(shape) != 2:
        return f"{node.name} has a weight of {len(shape)} dimensions, expected 2"
    turned = bool(node.attributes.get_int("transB", 0)) ^ (found is not None and found[1])
    sizes = [int(size) if isinstance(size, int) else None for size in shape]
    if turned:
        sizes.reverse()
    dtype = element_type(_input(node, 1))
    return _projection(node, dtype if dtype in FLOATS else None, sizes[0], sizes[1])


def _block_quantized(node: ir.Node) -> Projection | str:
    sizes = (node.attributes.get_int("K", 0) or None, node.attributes.get_int("N", 0) or None)
    scales = _input(node, 2)
    dtype = scales.dtype if scales is not None and scales.dtype in FLOATS else None
    return _projection(node, dtype, *sizes)


def _matmul_integer(node: ir.Node) -> Projection | str:
    """`MatMulInteger` of a model quantized dynamically: its activation is quantized before."""
    quantized = _input(node, 0)
    source = None if quantized is None else quantized.producer()
    if source is None or source.op_type != "DynamicQuantizeLinear":
        return f"{node.name} reads no activation that DynamicQuantizeLinear makes"
    others = {reader for value in source.outputs for reader in value.consumers()}
    others = {reader for reader in others if is_projection(reader)} - {node}
    if others:
        names = ", ".join(sorted(str(other.name) for other in others))
        return f"{node.name} shares its quantized activation with {names}"
    return _integer(node, source)


def _dynamic_quantize_matmul(node: ir.Node) -> Projection | str:
    return _integer(node, node)


def _integer(node: ir.Node, reader: ir.Node) -> Projection | str:
    found = stored_tensor(_input(node, 1), _SAME_SHAPE)
    shape = (None, None) if found is None else tuple(found[0].shape)
    sizes = [int(size) if isinstance(size, int) else None for size in shape]
    if len(sizes) != 2:
        return f"{node.name} has a weight of {len(sizes)} dimensions, expected 2"
    activation = _input(reader, 0)
    if activation is None or activation.is_initializer():
        return f"{node.name} reads no activation"
    # Both operators are defined for float alone.
    return Projection(node, activation, reader, ir.DataType.FLOAT, sizes[0], sizes[1])


def _projection(
    node: ir.Node, dtype: ir.DataType | None, in_width: int | None, out_width: int | None
) -> Projection | str:
    activation = _input(node, 0)
    if activation is None or activation.is_initializer():
        return f"{node.name} reads no activation as first input"
    known = activation.dtype or node.outputs[0].dtype or dtype
    return Projection(
        node,
        activation,
        node,
        known,
        _last(activation) or in_width,
        _last(node.outputs[0]) or out_width,
    )


def _input(node: ir.Node, position: int) -> ir.Value | None:
    """An input, None where a malformed node lacks it."""
    return node.inputs[position] if len(node.inputs) > position else None


def _last(value: ir.Value) -> int | None:
    size = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return size if isinstance(size, int) else None


def stored_tensor(
    value: ir.Value | None, through: tuple[str, ...] = _SAME_VALUES
) -> tuple[ir.TensorProtocol, bool] | None:
    """The constant behind a value, and whether it is transposed on the way; None without.

    Args:
        value: where to start.
        through: the operators that may lie between.
    """
    turned = False
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type not in through:
            return None
        turned ^= producer.op_type == "Transpose"
        value = _input(producer, 0)
    return None if value is None or value.const_value is None else (value.const_value, turned)


_READERS: dict[tuple[str, str], Callable[[ir.Node], Projection | str]] = {
    ("", "MatMul"): _plain,
    ("", "Gemm"): _plain,
    ("", "MatMulInteger"): _matmul_integer,
    (MICROSOFT, "FusedMatMul"): _plain,
    (MICROSOFT, "MatMulNBits"): _block_quantized,
    (MICROSOFT, "MatMulBnb4"): _block_quantized,
    (MICROSOFT, "DynamicQuantizeMatMul"): _dynamic_quantize_matmul,
}
