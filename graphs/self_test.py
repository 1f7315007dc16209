"""Runs the compiled kernels once and compares them with the function bodies."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from austeer.adapters._errors import GraphError
from austeer.graphs.custom_op import library_facts, register
from austeer.graphs.function import steer_function
from austeer.graphs.graft import constant
from austeer.graphs.opset import DOMAIN, STEER_OPS, VERSION, SteerOp

PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider")
TOLERANCE = {ir.DataType.FLOAT: 1e-5, ir.DataType.FLOAT16: 2e-3, ir.DataType.BFLOAT16: 2e-2}
_OPSET = 20
# More units than a block of a CUDA kernel has threads.
_TOKENS, _WIDTH, _UNITS, _RANK = 5, 512, 200, 2


def self_test(providers: tuple[str, ...] = PROVIDERS) -> dict[str, float | None]:
    """Largest relative difference between kernels and function bodies, by provider.

    Both operators run in float, float16 and bfloat16 on every provider of `providers` that
    this onnxruntime offers; None stands for one that it cannot start on this machine, or of
    which the library has no kernels.

    Raises:
        GraphError: no library, no onnxruntime, a kernel that fails, or one that differs by
            more than its dtype's rounding.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise GraphError("self-test: needs onnxruntime; pip install 'austeer[cpu]'") from error
    offered = [name for name in providers if name in onnxruntime.get_available_providers()]
    return {name: _largest_difference(onnxruntime, name) for name in offered}


def _largest_difference(runtime: Any, provider: str) -> float | None:
    if provider.startswith("CUDA") and not (library_facts() or {}).get("cuda"):
        return None
    largest = 0.0
    for op in STEER_OPS:
        for dtype, tolerance in TOLERANCE.items():
            model = ir.to_proto(_model(op, dtype)).SerializeToString()
            x = np.random.default_rng(0).normal(size=(_TOKENS, _WIDTH)).astype(np.float32)
            body, kernel = (
                _run(runtime, model, provider, x, kernels=kernels) for kernels in (False, True)
            )
            if body is None or kernel is None:
                return None
            found = float((np.abs(kernel - body) / (np.abs(body) + 1.0)).max())
            if not found <= tolerance or np.allclose(kernel, x, rtol=1e-2):
                raise GraphError(
                    f"self-test: {op.name} in {dtype.name.lower()} on {provider} differs from "
                    f"its function body by {found:.2g}; reinstall austeer"
                )
            largest = max(largest, found)
    return largest


def _run(
    runtime: Any, model: bytes, provider: str, x: np.ndarray, *, kernels: bool
) -> np.ndarray | None:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if kernels:
        register(options)
    try:
        session = runtime.InferenceSession(model, options, providers=[provider])
        # onnxruntime offers what it was built with, and takes the CPU where that fails.
        if session.get_providers()[0] != provider:
            return None
        (y,) = session.run(None, {"x": x})
    except Exception as error:
        # onnxruntime's errors have no common class outside its C extension.
        raise GraphError(f"self-test: {provider}: {error}") from error
    return np.asarray(y)


def _model(op: SteerOp, dtype: ir.DataType) -> ir.Model:
    """Float x → dtype → the operator → float, everything else constant."""
    rng = np.random.default_rng(1)
    k, r = _UNITS, _RANK
    shapes = {"gamma": (k,), "V": (k, r), "b": (r,), "U": (r, k), "scale": (1,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["idx"] = rng.permutation(_WIDTH)[:k].astype(np.int64)
    x = ir.val("x", ir.DataType.FLOAT, ["tokens", _WIDTH])
    constants = [constant(name, arrays[name]) for name in op.inputs[1:]]
    narrow = ir.node("Cast", [x], {"to": int(dtype)})
    steered = ir.node(op.name, [*narrow.outputs, *constants], domain=DOMAIN)
    y = ir.val("y", ir.DataType.FLOAT, ["tokens", _WIDTH])
    wide = ir.node("Cast", steered.outputs, {"to": int(ir.DataType.FLOAT)}, outputs=[y])
    graph = ir.Graph(
        [x],
        [y],
        nodes=[narrow, steered, wide],
        initializers=constants,
        opset_imports={"": _OPSET, DOMAIN: VERSION},
        name="self_test",
    )
    return ir.Model(graph, ir_version=10, functions=[steer_function(op, _OPSET)])
