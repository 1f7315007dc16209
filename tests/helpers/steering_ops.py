"""One steering operator in a graph of its own, and what it must compute."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from austeer.graphs import SteerOp, steer_function

DTYPES = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EPSILON = {"float": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
D = 40
INDEX = np.array([39, 0, 7, 8, 21])


def one_node_model(
    op: SteerOp, dtype: str, rank: int, opset: int = 20, width: int = D
) -> ir.Model:
    """float x → cast to dtype → the operator → cast to float (exact)."""
    kind = ir.DataType[dtype.upper()]
    dims = [f"d{axis}" for axis in range(rank - 1)]
    x = ir.val("x", ir.DataType.FLOAT, [*dims, width])
    tensors = [ir.val(name, ir.DataType.FLOAT) for name in op.inputs[1:]]
    shapes: dict[str, list[Any]] = {
        "idx": ["k"], "gamma": ["k"], "V": ["k", "r"], "b": ["r"], "U": ["r", "k"], "scale": [1]
    }  # fmt: skip
    for value in tensors:
        value.shape = ir.Shape(shapes[str(value.name)])
    tensors[0].dtype = ir.DataType.INT64
    narrow = ir.node("Cast", [x], {"to": int(kind)})
    steered = ir.node(op.name, [*narrow.outputs, *tensors], domain="ai.austeer")
    y = ir.val("y", ir.DataType.FLOAT, [*dims, width])
    wide = ir.node("Cast", steered.outputs, {"to": int(ir.DataType.FLOAT)}, outputs=[y])
    graph = ir.Graph(
        [x, *tensors],
        [y],
        nodes=[narrow, steered, wide],
        opset_imports={"": opset, "ai.austeer": 1},
        name="one_node",
    )
    return ir.Model(graph, ir_version=10, functions=[steer_function(op, opset)])


def hold_constants(model: ir.Model, tensors: dict[str, np.ndarray]) -> ir.Model:
    """`model` itself, its inputs of these names made initializers."""
    for value in [value for value in model.graph.inputs if value.name in tensors]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(tensors[str(value.name)], name=value.name)
        model.graph.register_initializer(value)
    return model


def site_tensors(rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    k = len(INDEX)
    tensors = {"idx": INDEX, "gamma": rng.normal(size=k)}
    if rank:
        tensors |= {"V": rng.normal(size=(k, rank)), "b": rng.normal(size=rank)}
        tensors |= {"U": rng.normal(size=(rank, k))}
    return {n: t if n == "idx" else t.astype(np.float32) for n, t in tensors.items()}


def bound(x: np.ndarray, expected: np.ndarray, dtype: str) -> np.ndarray:
    """Half a unit in the last place of the dtype, plus float32 arithmetic before the rounding.

    float16 has a smallest unit, 2⁻²⁴.
    """
    return 0.5 * np.maximum(EPSILON[dtype] * np.abs(expected), 2.0**-24) + 4e-6 * np.abs(x)


def reference(x: np.ndarray, t: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """The formulas of DESIGN §4, in float64."""
    y = x.astype(np.float64)
    selected = y[..., t["idx"]]
    gamma = t["gamma"].astype(np.float64)
    phi: Any = 1.0
    if "V" in t:
        features = selected @ t["V"].astype(np.float64) + t["b"]
        phi = 4.0 / (1.0 + np.exp(-(features @ t["U"].astype(np.float64) - np.log(3.0))))
    y[..., t["idx"]] = selected * (1.0 + scale * gamma * phi)
    return y


def activations(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    x = np.random.default_rng(4).normal(size=(*shape, D))
    return x.astype(DTYPES[dtype]).astype(np.float32)
