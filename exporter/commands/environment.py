"""What this machine offers: versions, runtimes, devices, the op library."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from austeer.adapters._errors import GraphError

PACKAGES = (
    "austeer",
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "optimum",
    "optimum-onnx",
    "datasets",
    "peft",
    "numpy",
)
_TRANSFORMERS = ((4, 57), (6, 0))
_ORT = (1, 24)


def describe_environment() -> dict[str, Any]:
    """Everything `austeer-export doctor` reports; `problems` is empty on a sound machine."""
    packages = {name: _version(name) for name in PACKAGES}
    library, trouble = _op_library()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "torch": _torch(),
        "onnxruntime": _onnxruntime(),
        "op_library": library,
        "problems": _problems(packages) + trouble,
    }


def environment_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The description as rows of name and value."""
    rows = [("Python", f"{values['python']} on {values['platform']}")]
    rows += [(name, found or "not installed") for name, found in values["packages"].items()]
    torch, runtime = values["torch"], values["onnxruntime"]
    if torch:
        rows.append(("torch threads", str(torch["threads"])))
        rows.append(("torch devices", ", ".join(["cpu", *torch["cuda"]])))
    if runtime:
        rows.append(("onnxruntime providers", ", ".join(runtime["providers"])))
    rows += _library_rows(values["op_library"])
    return rows


def _torch() -> dict[str, Any] | None:
    try:
        import torch
    except ImportError:
        return None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "threads": torch.get_num_threads(),
        "cuda": [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count)],
    }


def _onnxruntime() -> dict[str, Any] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    return {"providers": onnxruntime.get_available_providers()}


def _op_library() -> tuple[dict[str, Any] | None, list[str]]:
    """What the operator library is and how its self-test went; problems with it."""
    from austeer.graphs.custom_op import library_facts, library_file

    path = library_file()
    if path is None:
        return None, []
    found: dict[str, Any] = {"path": str(path), "self_test": None}
    try:
        found |= library_facts() or {}
        if _onnxruntime():
            from austeer.graphs.self_test import self_test

            found["self_test"] = self_test()
    except GraphError as error:
        return found, [str(error)]
    return found, []


def _library_rows(library: dict[str, Any] | None) -> list[tuple[str, str]]:
    if library is None:
        return [("op library", "not built (portable function body is used)")]
    rows = [("op library", library["path"])]
    if "compiler" in library:
        cuda = f"CUDA for {library['cuda']}" if library["cuda"] else "no CUDA kernels"
        rows.append(("op library built by", f"{library['compiler']}; {cuda}"))
    for provider, difference in (library["self_test"] or {}).items():
        went = "not run, it does not start here or has no kernels"
        if difference is not None:
            went = f"within {difference:.1g}"
        rows.append(("op library self-test", f"{provider}: {went}"))
    return rows


def _problems(packages: dict[str, str | None]) -> list[str]:
    found = []
    transformers = _release(packages["transformers"])
    low, high = _TRANSFORMERS
    if transformers and not low <= transformers < high:
        found.append(
            f"transformers {packages['transformers']}: tested with 4.57 and 5.x; "
            "install one of them"
        )
    runtimes = [name for name in ("onnxruntime", "onnxruntime-gpu") if packages[name]]
    if not runtimes:
        found.append(
            "no onnxruntime: ONNX products cannot be verified; pip install 'austeer[cpu]'"
        )
    if len(runtimes) > 1:
        found.append("onnxruntime and onnxruntime-gpu overwrite each other; uninstall one")
    for name in runtimes:
        if _release(packages[name]) < _ORT:
            found.append(f"{name} {packages[name]}: older than 1.24; update it")
    for name in ("torch", "transformers", "onnx", "onnx-ir", "safetensors"):
        if not packages[name]:
            found.append(f"{name} is not installed; pip install austeer")
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _release(text: str | None) -> tuple[int, ...]:
    """Major and minor number; empty for an absent package."""
    parts = (text or "").split(".")[:2]
    return tuple(int(part) for part in parts if part.isdecimal())
