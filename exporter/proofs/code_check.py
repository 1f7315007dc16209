"""Checks the files of a steered checkpoint with code, and loads it as its users will."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from austeer.adapters._errors import ModelError, VerificationError
from austeer.adapters._files import read_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.steered_format import (
    CODE_NAME,
    code_file,
    steered_config,
    steering_tensors,
)
from austeer.adapters.weights import Checkpoint
from austeer.exporter.proofs.values import same_bytes


def verify_code_structure(
    base: Path, folder: Path, adapter: SteeringAdapter, scale: float = 1.0
) -> None:
    """Prove that `folder` is `base`, the adapter, and this release's code, and nothing else.

    What passes is safe to load with `trust_remote_code`: the only code is our own file.

    Args:
        base: directory of the base checkpoint.
        folder: directory of the steered checkpoint.
        adapter: what was exported.
        scale: factor on every γ.

    Raises:
        VerificationError: a difference; names the file or tensor.
        ModelError: one of the two cannot be read.
    """
    before, after = Checkpoint(base), Checkpoint(folder)
    _check_config(base, folder, adapter, scale)
    code = folder / CODE_NAME
    if not code.is_file() or code.read_bytes() != code_file().read_bytes():
        raise VerificationError(
            f"{code}: is not this release's modelling file, it was not run; export again"
        )
    _check_foreign_code(folder)
    names = [set(steering_tensors(adapter, bare)) for bare in (False, True)]
    added = set(after) - set(before)
    if set(before) - set(after) or added not in names:
        different = sorted((set(before) ^ set(after)) - names[0])
        raise VerificationError(
            f"{folder}: expected the base's tensors and the adapter's, found otherwise "
            f"{', '.join(different[:3]) or 'no steering'}; export again"
        )
    _check_tensors(before, after, steering_tensors(adapter, added == names[1]))


@contextmanager
def private_code_cache() -> Iterator[None]:
    """Let transformers copy a product's code to a temporary folder inside the context.

    Its own cache would keep a copy of every export, and may not be writable.
    """
    from transformers import dynamic_module_utils as dynamic

    before, path, modules = dynamic.HF_MODULES_CACHE, list(sys.path), set(sys.modules)
    with tempfile.TemporaryDirectory() as folder:
        dynamic.HF_MODULES_CACHE = folder
        try:
            yield
        finally:
            dynamic.HF_MODULES_CACHE = before
            sys.path[:] = path
            for name in set(sys.modules) - modules:
                if name.split(".")[0] == "transformers_modules":
                    del sys.modules[name]


def _check_config(base: Path, folder: Path, adapter: SteeringAdapter, scale: float) -> None:
    values = [
        read_json(where / "config.json", ModelError, "is the directory complete?")
        for where in (base, folder)
    ]
    wanted = steered_config(values[0], adapter, scale)
    keys = sorted(set(wanted) | set(values[1]))
    different = [key for key in keys if wanted.get(key) != values[1].get(key)]
    if different:
        raise VerificationError(
            f"{folder}/config.json: {different[0]} is not what the base and the adapter give; "
            "is it a product of both, at this scale?"
        )


def _check_foreign_code(folder: Path) -> None:
    """Refuse what transformers runs besides: `custom_generate`, a tokenizer's code."""
    foreign = sorted(set(folder.rglob("*.py")) - {folder / CODE_NAME})
    if foreign:
        raise VerificationError(f"{foreign[0]}: is not ours, nothing was run; remove it")
    path = folder / "tokenizer_config.json"
    if path.is_file() and read_json(path, ModelError, "").get("auto_map"):
        raise VerificationError(f"{path}: names code (auto_map), nothing was run; remove that")


def _check_tensors(before: Checkpoint, after: Checkpoint, steering: dict[str, Any]) -> None:
    for name, entry in before.items():
        found = after[name]
        alike = (entry.dtype, entry.shape) == (found.dtype, found.shape)
        if not alike or not same_bytes(entry, found):
            raise VerificationError(f"{found.file}: {name} differs from the base's")
    for name, tensor in steering.items():
        stored = after[name].read()
        if stored.dtype != tensor.dtype or stored.tobytes() != tensor.tobytes():
            raise VerificationError(f"{after[name].file}: {name} differs from the adapter's")
