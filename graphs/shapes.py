"""Shapes that a graph does not state, inferred with the names of its inputs' axes.

onnxruntime lets a kernel work in place only where input and output have provably equal shapes.
Exporters of the older kind leave shapes out, and the inference that runs when a session is made
loses the names of axes behind a Reshape; the symbolic inference that comes with onnxruntime
keeps them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir

_SMALL = 1024
"""Elements of a tensor up to which it may be a shape or an index, and is needed for itself."""


def state_shapes(model: ir.Model, values: Sequence[ir.Value]) -> None:
    """Set the shapes of those of `values` that the graph leaves open.

    Nothing else of the model changes. Where inference fails, nothing does: a shape is worth
    speed only.
    """
    unknown = {str(value.name): value for value in values if not _is_known(value)}
    if not unknown:
        return
    for name, shape in _inferred(model).items():
        if name in unknown:
            unknown[name].shape = ir.Shape(shape)


def _is_known(value: ir.Value) -> bool:
    if value.shape is None:
        return False
    return all(isinstance(dim, int) or dim.value is not None for dim in value.shape)


def _inferred(model: ir.Model) -> dict[str, list[int | str]]:
    try:
        from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
    except ImportError:
        return {}
    logger = logging.getLogger("onnxruntime.tools.symbolic_shape_infer")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with _without_weights(model):
            proto = ir.to_proto(model)
        # Its one public function writes a file into the working directory where it gives up.
        inference = SymbolicShapeInference(2**31 - 1, False, False, 0)
        inference._preprocess(proto)
        while inference.run_:
            inference._infer_impl()
        found = inference.out_mp_
    except Exception:
        # It raises whatever an operator that it does not know makes it stumble over.
        return {}
    finally:
        logger.setLevel(level)
    shapes = {info.name: info.type.tensor_type.shape.dim for info in found.graph.value_info}
    # Behind an operator that it does not know it states no axes at all.
    return {
        name: [dim.dim_param or dim.dim_value for dim in dims]
        for name, dims in shapes.items()
        if dims and all(dim.dim_param or dim.HasField("dim_value") for dim in dims)
    }


@contextmanager
def _without_weights(model: ir.Model) -> Iterator[None]:
    """Inside, large tensors stand for themselves by shape and type, and are not copied."""
    kept = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size <= _SMALL:
            continue
        kept[value] = tensor
        value.const_value = ir.ExternalTensor(
            "weights",
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=str(value.name),
        )
    try:
        yield
    finally:
        for value, tensor in kept.items():
            value.const_value = tensor
