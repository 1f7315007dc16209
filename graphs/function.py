"""Portable function bodies of the steering operators, made of standard ONNX operators only.

One body serves float, float16 and bfloat16: it computes in float32 and casts back once.
A runtime with a kernel for the operator ignores the body.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from austeer.adapters._errors import GraphError
from austeer.adapters.predictor import PHI_MAX, PHI_SHIFT
from austeer.graphs.opset import (
    DOMAIN,
    MIN_ONNX_OPSET,
    STEER_AU,
    STEER_AU_ADAPTIVE,
    STEER_OPS,
    SteerOp,
)


def steer_functions(onnx_opset: int) -> dict[str, ir.Function]:
    """Bodies of both operators by name, for a model at `onnx_opset`.

    Raises:
        GraphError: the opset is too old for the bodies.
    """
    return {op.name: steer_function(op, onnx_opset) for op in STEER_OPS}


def steer_function(op: SteerOp, onnx_opset: int) -> ir.Function:
    """Body of one operator, at the model's own version of the default domain.

    Raises:
        GraphError: the opset is too old for the bodies, or newer than the installed onnx.
    """
    if onnx_opset < MIN_ONNX_OPSET:
        raise GraphError(
            f"ONNX opset {onnx_opset}: steering needs {MIN_ONNX_OPSET} or newer; "
            "export the base model again with a newer opset"
        )
    if onnx_opset > onnx.defs.onnx_opset_version():
        raise GraphError(
            f"ONNX opset {onnx_opset}: the installed onnx {onnx.__version__} knows them up to "
            f"{onnx.defs.onnx_opset_version()}; install a newer onnx"
        )
    body = _Body(op.inputs, onnx_opset)
    gain = {STEER_AU: _constant_gain, STEER_AU_ADAPTIVE: _adaptive_gain}[op]
    return body.function(op.name, _rescale(body, gain))


class _Body:
    """Builds the nodes of one function; values are named after what they hold."""

    def __init__(self, inputs: tuple[str, ...], onnx_opset: int) -> None:
        self._opset = onnx_opset
        self._inputs = {name: ir.Value(name=name) for name in inputs}
        self._nodes: list[ir.Node] = []

    def __getitem__(self, name: str) -> ir.Value:
        return self._inputs[name]

    def add(self, op_type: str, *inputs: ir.Value, name: str, **attributes: int) -> ir.Value:
        output = ir.Value(name=name)
        self._nodes.append(
            ir.node(op_type, inputs, attributes, outputs=[output], name=f"{name}_node")
        )
        return output

    def number(self, value: float, name: str) -> ir.Value:
        output = ir.Value(name=name)
        tensor = ir.tensor(np.array(value, np.float32), name=name)
        self._nodes.append(
            ir.node("Constant", [], {"value": tensor}, outputs=[output], name=f"{name}_node")
        )
        return output

    def function(self, name: str, output: ir.Value) -> ir.Function:
        graph = ir.Graph(
            list(self._inputs.values()),
            [output],
            nodes=self._nodes,
            opset_imports={"": self._opset},
        )
        return ir.Function(DOMAIN, name, graph=graph, attributes=[])


_Gain = Callable[[_Body, ir.Value], ir.Value]


def _rescale(body: _Body, gain_of: _Gain) -> ir.Value:
    x, idx = body["x"], body["idx"]
    selected = body.add("Gather", x, idx, name="selected", axis=-1)
    wide = body.add("Cast", selected, name="wide", to=int(ir.DataType.FLOAT))
    steered = body.add("Mul", wide, gain_of(body, wide), name="steered")
    rounded = body.add("CastLike", steered, x, name="rounded")
    shape = body.add("Shape", selected, name="selected_shape")
    # ScatterElements does not broadcast its indices.
    indices = body.add("Expand", idx, shape, name="indices")
    return body.add("ScatterElements", x, indices, rounded, name="y", axis=-1)


def _constant_gain(body: _Body, _: ir.Value) -> ir.Value:
    return _one_plus(body, _amount(body))


def _adaptive_gain(body: _Body, wide: ir.Value) -> ir.Value:
    read = body.add("MatMul", wide, body["V"], name="read")
    features = body.add("Add", read, body["b"], name="features")
    spread = body.add("MatMul", features, body["U"], name="spread")
    logits = body.add("Sub", spread, body.number(PHI_SHIFT, "phi_shift"), name="logits")
    share = body.add("Sigmoid", logits, name="share")
    phi = body.add("Mul", share, body.number(PHI_MAX, "phi_max"), name="phi")
    return _one_plus(body, body.add("Mul", _amount(body), phi, name="token_amount"))


def _amount(body: _Body) -> ir.Value:
    return body.add("Mul", body["scale"], body["gamma"], name="amount")


def _one_plus(body: _Body, amount: ir.Value) -> ir.Value:
    return body.add("Add", body.number(1.0, "one"), amount, name="gain")
