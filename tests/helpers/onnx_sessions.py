"""Plain onnxruntime sessions, with or without the compiled kernels, and active adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from austeer.graphs import register
from austeer.graphs.custom_op import library_file

FUNCTIONS_AND_KERNELS = [
    pytest.param(False, id="functions"),
    pytest.param(
        True,
        id="kernels",
        marks=pytest.mark.skipif(library_file() is None, reason="no operator library built"),
    ),
]


def open_session(model: ir.Model | Path, *, kernels: bool = False, prepack: bool = True) -> Any:
    """A session on one thread.

    Without `prepack`, onnxruntime multiplies by constant and by fed matrices in one order:
    else two graphs that differ in this alone differ by a rounding.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if kernels:
        register(options)
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_session(
    session: Any, feeds: Mapping[str, np.ndarray], active: Sequence[Path] = ()
) -> list[np.ndarray]:
    """All outputs of one run, with these `.onnx_adapter` files active."""
    import onnxruntime

    options, loaded = onnxruntime.RunOptions(), []
    for file in active:
        loaded.append(onnxruntime.LoraAdapter())
        loaded[-1].Load(str(file))
        options.add_active_adapter(loaded[-1])
    return [np.asarray(array) for array in session.run(None, dict(feeds), options)]
