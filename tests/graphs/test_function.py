"""Function bodies against an independent float64 reference, in every dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from austeer.adapters import GraphError
from austeer.graphs import STEER_AU, STEER_AU_ADAPTIVE, SteerOp, steer_function, steer_functions

DTYPES = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EPSILON = {"float": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
D = 40
INDEX = np.array([39, 0, 7, 8, 21])


def one_node_model(op: SteerOp, dtype: str, rank: int, opset: int = 20) -> ir.Model:
    """float x → cast to dtype → the operator → cast to float (exact)."""
    kind = ir.DataType[dtype.upper()]
    dims = [f"d{axis}" for axis in range(rank - 1)]
    x = ir.val("x", ir.DataType.FLOAT, [*dims, D])
    tensors = [ir.val(name, ir.DataType.FLOAT) for name in op.inputs[1:]]
    shapes: dict[str, list[Any]] = {
        "idx": ["k"], "gamma": ["k"], "V": ["k", "r"], "b": ["r"], "U": ["r", "k"], "scale": [1]
    }  # fmt: skip
    for value in tensors:
        value.shape = ir.Shape(shapes[str(value.name)])
    tensors[0].dtype = ir.DataType.INT64
    narrow = ir.node("Cast", [x], {"to": int(kind)})
    steered = ir.node(op.name, [*narrow.outputs, *tensors], domain="ai.austeer")
    y = ir.val("y", ir.DataType.FLOAT, [*dims, D])
    wide = ir.node("Cast", steered.outputs, {"to": int(ir.DataType.FLOAT)}, outputs=[y])
    graph = ir.Graph(
        [x, *tensors],
        [y],
        nodes=[narrow, steered, wide],
        opset_imports={"": opset, "ai.austeer": 1},
        name="one_node",
    )
    return ir.Model(graph, ir_version=10, functions=[steer_function(op, opset)])


def site_tensors(rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    k = len(INDEX)
    tensors = {"idx": INDEX, "gamma": rng.normal(size=k)}
    if rank:
        tensors |= {"V": rng.normal(size=(k, rank)), "b": rng.normal(size=rank)}
        tensors |= {"U": rng.normal(size=(rank, k))}
    return {n: t if n == "idx" else t.astype(np.float32) for n, t in tensors.items()}


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


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 17, 512])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_body_is_the_float64_formula_rounded_once(
    rank: int, dtype: str, tokens: int, batch: int, run_onnx: Callable[..., list[np.ndarray]]
) -> None:
    op = STEER_AU_ADAPTIVE if rank else STEER_AU
    x, tensors = activations((batch, tokens), dtype), site_tensors(rank)
    model = one_node_model(op, dtype, rank=3)
    scale = np.array([0.7], np.float32)
    (y,) = run_onnx(model, {"x": x, "scale": scale, **tensors})

    expected = reference(x, tensors, float(scale[0]))
    # Half a unit in the last place of the dtype (float16 has a smallest one: 2⁻²⁴), plus
    # float32 arithmetic before the rounding.
    bound = 0.5 * np.maximum(EPSILON[dtype] * np.abs(expected), 2.0**-24) + 4e-6 * np.abs(x)
    assert np.all(np.abs(y - expected) <= bound)
    others = np.setdiff1d(np.arange(D), INDEX)
    assert np.array_equal(y[..., others], x[..., others])
    assert np.abs(y - x)[..., INDEX].max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_body_is_the_torch_adapter(
    rank: int, dtype: str, run_onnx: Callable[..., list[np.ndarray]]
) -> None:
    import torch

    from austeer.adapters.attach import adaptive_gain, constant_gain, rescale

    x, tensors = activations((2, 33), dtype), site_tensors(rank)
    t = {name: torch.from_numpy(array) for name, array in tensors.items()}
    live = torch.from_numpy(x).to({"float": torch.float32}.get(dtype) or getattr(torch, dtype))
    parts = [t[name] for name in ("gamma", "V", "b", "U") if name in t]
    gain = adaptive_gain(*parts, scale=0.7) if rank else constant_gain(*parts, scale=0.7)
    expected = rescale(live, t["idx"], gain).float().numpy()

    op = STEER_AU_ADAPTIVE if rank else STEER_AU
    feeds = {"x": x, "scale": np.array([0.7], np.float32), **tensors}
    (y,) = run_onnx(one_node_model(op, dtype, rank=3), feeds)
    if rank == 0:
        assert np.array_equal(y, expected)
    else:
        # Summation order may move a float32 gain, and with it one rounding of the result.
        step = max(EPSILON[dtype], 4e-6)
        assert np.all(np.abs(y - expected) <= step * np.abs(expected) + 1e-6)


@pytest.mark.parametrize("op", [STEER_AU, STEER_AU_ADAPTIVE])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4)])
def test_any_rank(
    shape: tuple[int, ...], op: SteerOp, run_onnx: Callable[..., list[np.ndarray]]
) -> None:
    tensors = site_tensors(0 if op is STEER_AU else 2)
    x = activations(shape, "float")
    model = one_node_model(op, "float", rank=len(shape) + 1)
    (y,) = run_onnx(model, {"x": x, "scale": np.ones(1, np.float32), **tensors})
    np.testing.assert_allclose(y, reference(x, tensors, 1.0), rtol=1e-5, atol=1e-6)


def test_no_tokens(run_onnx: Callable[..., list[np.ndarray]]) -> None:
    x = np.zeros((2, 0, D), np.float32)
    feeds = {"x": x, "scale": np.ones(1, np.float32), **site_tensors(0)}
    (y,) = run_onnx(one_node_model(STEER_AU, "float", rank=3), feeds)
    assert y.shape == x.shape


@pytest.mark.parametrize("opset", [15, 17, 18, 20, 21])
@pytest.mark.parametrize("op", [STEER_AU, STEER_AU_ADAPTIVE])
def test_body_at_the_opset_of_the_model(
    op: SteerOp, opset: int, run_onnx: Callable[..., list[np.ndarray]]
) -> None:
    model = one_node_model(op, "float16", rank=3, opset=opset)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    tensors = site_tensors(0 if op is STEER_AU else 1)
    x = activations((1, 3), "float16")
    (y,) = run_onnx(model, {"x": x, "scale": np.ones(1, np.float32), **tensors})
    np.testing.assert_allclose(y, reference(x, tensors, 1.0), rtol=2e-3)


def test_opset_without_castlike_is_refused() -> None:
    with pytest.raises(GraphError, match="opset 14: steering needs 15 or newer"):
        steer_functions(14)


def test_functions_declare_exactly_the_operators_inputs() -> None:
    functions = steer_functions(20)
    assert set(functions) == {"SteerAU", "SteerAUAdaptive"}
    names = {name: [v.name for v in f.inputs] for name, f in functions.items()}
    assert names["SteerAU"] == ["x", "idx", "gamma", "scale"]
    assert names["SteerAUAdaptive"] == ["x", "idx", "gamma", "V", "b", "U", "scale"]
    assert all(function.domain == "ai.austeer" for function in functions.values())
