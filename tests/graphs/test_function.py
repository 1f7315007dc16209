"""Function bodies against an independent float64 reference, in every dtype."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from steering_ops import (
    DTYPES,
    EPSILON,
    INDEX,
    D,
    activations,
    bound,
    one_node_model,
    reference,
    site_tensors,
)

from austeer.adapters import GraphError
from austeer.graphs import STEER_AU, STEER_AU_ADAPTIVE, SteerOp, steer_functions


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
    assert np.all(np.abs(y - expected) <= bound(x, expected, dtype))
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
