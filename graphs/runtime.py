"""onnxruntime itself, and what a model's folder says to whoever runs the model."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from austeer.adapters._errors import GraphError
from austeer.adapters._files import read_json

MODEL_NAME = "model.onnx"


def model_file(path: str | Path) -> Path:
    """The `.onnx` file that a path names: itself, or the one in a folder.

    Raises:
        GraphError: a folder without `model.onnx` and with several others.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.onnx"))
    named = path / MODEL_NAME
    if named in found or not found:
        return named
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise GraphError(f"{path}: expected one .onnx file in it, found {names}; name the file")
    return found[0]


def onnxruntime_module() -> Any:
    """The onnxruntime package.

    Raises:
        GraphError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise GraphError(
            "onnxruntime is not installed; run: pip install 'austeer[cpu]' (or 'austeer[gpu]')"
        ) from error
    return onnxruntime


def config_number(folder: Path, keys: Sequence[str]) -> int | None:
    """A number of the `genai_config.json` or `config.json` beside a model."""
    for name, outer in (("genai_config.json", "model"), ("config.json", None)):
        if not (folder / name).is_file():
            continue
        found: Any = read_json(folder / name, GraphError, "export the model again")
        for key in (outer, *keys) if outer else keys:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, int):
            return found
    return None


def as_array(value: Any) -> np.ndarray:
    """The values of an `OrtValue`; bfloat16 as float32."""
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    # numpy has no bfloat16 and onnxruntime refuses to convert: read its memory, widen the bits.
    shape = value.shape()
    memory = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    wide = np.frombuffer(memory, np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(shape)


def failure_reason(error: Exception) -> str:
    """The first line of what onnxruntime says, or what it stands for."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "NOT_IMPLEMENTED" in text and "Could not find an implementation" in text:
        return (
            f"onnxruntime has no kernel for a part of this model ({text}); its CPU provider "
            "does not compute in bfloat16: export a model loaded in float32, or run on a GPU"
        )
    return text
