"""The compiled kernels of the steering operators, for onnxruntime; optional everywhere."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

from austeer.adapters._errors import GraphError

_NAMES = {"darwin": "libausteer_ops.dylib", "win32": "austeer_ops.dll"}
_REGISTERED = "austeer.registered"


def library_file() -> Path | None:
    """Where the library lies, None where none was built."""
    path = Path(__file__).resolve().parent / _NAMES.get(sys.platform, "libausteer_ops.so")
    return path if path.is_file() else None


def custom_op_library() -> Path:
    """Path of the library, for `SessionOptions.register_custom_ops_library` and its like.

    It holds the CPU kernels, and the CUDA ones where it was built with nvcc; one file serves
    onnxruntime 1.18 and newer.

    Raises:
        GraphError: none was built with this installation.
    """
    path = library_file()
    if path is None:
        raise GraphError(
            "operator library: none was built with this installation; install a C++ compiler "
            "and reinstall austeer, or run the graph by its function bodies"
        )
    return path


def register(session_options: Any) -> None:
    """Register the kernels with an onnxruntime session's options; a second call does nothing.

    A graph of ours runs without this, by its function bodies. onnxruntime refuses a session
    in which the library was registered twice.

    Args:
        session_options: an `onnxruntime.SessionOptions`.

    Raises:
        GraphError: no library was built, or this onnxruntime cannot use it.
    """
    path = custom_op_library()
    try:
        session_options.get_session_config_entry(_REGISTERED)
    except RuntimeError:
        pass
    else:
        return
    try:
        session_options.register_custom_ops_library(str(path))
    except Exception as error:
        # onnxruntime's errors have no common class outside its C extension.
        raise GraphError(f"{path}: onnxruntime cannot load it ({error})") from error
    session_options.add_session_config_entry(_REGISTERED, "1")


def library_facts() -> dict[str, str] | None:
    """Compiler and CUDA compute capabilities of the library; None where none was built.

    Raises:
        GraphError: the library cannot be loaded on this machine.
    """
    path = library_file()
    if path is None:
        return None
    try:
        build = ctypes.CDLL(str(path)).austeer_build
    except (OSError, AttributeError) as error:
        raise GraphError(f"{path}: cannot be loaded ({error}); reinstall austeer") from error
    build.restype = ctypes.c_char_p
    facts: dict[str, str] = json.loads(build())
    return facts
