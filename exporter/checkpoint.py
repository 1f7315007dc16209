"""Copies a checkpoint byte for byte and patches tensors in the copy; no torch, no model.

Memory is that of one tensor; files share disk blocks with the base where the filesystem can.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from austeer.adapters._errors import ModelError
from austeer.adapters.tensors import INDEX, SINGLE, Checkpoint, TensorEntry

_BUFFER = 1 << 20
_RANGE = 1 << 28
_COPIES = 4  # files copied at once
_SUFFIXES = {".bpe", ".jinja", ".json", ".model", ".py", ".spm", ".tiktoken", ".txt", ".vocab"}
_LEGAL = ("license", "licence", "notice", "copying", "use_policy", "acceptable_use")
_TEMPLATES = "additional_chat_templates"  # the one subfolder that tokenizers read
# Of an adapter, and of a product that becomes a base: they would speak of other files.
_NOT_OURS = {"adapter_config.json", "adapter_model.safetensors", "austeer.json"}
_NO_RANGE_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def copy_checkpoint(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy weights, config, tokenizer, templates, custom code and licence into `folder`.

    Other weight formats, pickles, the model card, dot files and subfolders stay behind;
    symlinks are followed.

    Returns:
        Names of the copied files, relative, sorted.

    Raises:
        ModelError: a file of the base cannot be read.
        OSError: the copy cannot be written.
    """
    sources = source_files(checkpoint)
    names = [source.relative_to(checkpoint.root) for source in sources]
    targets = [folder / name for name in names]
    for parent in {target.parent for target in targets}:
        parent.mkdir(exist_ok=True)
    _copy_files(sources, targets)
    return [str(name) for name in names]


def source_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of a base that `copy_checkpoint` copies, sorted.

    Raises:
        ModelError: a link to nothing.
    """
    return sorted([*checkpoint.files, *_companions(checkpoint)])


def _copy_files(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    # The kernel copies with one core for each call.
    stopped = Event()
    with ThreadPoolExecutor(min(_COPIES, os.cpu_count() or 1)) as pool:
        try:
            list(pool.map(copy_file, sources, targets, repeat(stopped)))
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def copy_file(source: Path, target: Path, stopped: Event | None = None) -> None:
    """Copy content, never mode or links; the kernel clones blocks where it can.

    Leaves a part of the file once `stopped` is set.

    Raises:
        ModelError: `source` cannot be opened.
        OSError: `target` exists or cannot be written.
    """
    try:
        read = source.open("rb")
    except OSError as error:
        raise ModelError(
            f"{source}: cannot read it ({error.strerror}); fetch the model again"
        ) from error
    with read, target.open("xb") as write:
        try:
            while os.copy_file_range(read.fileno(), write.fileno(), _RANGE):
                if stopped is not None and stopped.is_set():
                    return
        except AttributeError:
            pass  # not on this platform
        except OSError as error:
            if error.errno not in _NO_RANGE_COPY:
                raise
        # Some filesystems claim the end early; both files stand where the kernel stopped.
        shutil.copyfileobj(read, write, _BUFFER)


def patch_tensor(
    entry: TensorEntry,
    folder: Path,
    change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
) -> int:
    """Rewrite one tensor of a copied checkpoint in place.

    Args:
        entry: the tensor in the base.
        folder: the copy.
        change: new values from the base's; same shape and dtype.

    Returns:
        How many values differ from the base's, bit for bit.
    """
    before = entry.read()
    after = np.ascontiguousarray(change(before))
    with (folder / entry.file.name).open("r+b") as stream:
        stream.seek(entry.start)
        stream.write(after.view(np.uint8).data)
    bits = np.dtype(f"u{after.itemsize}")
    return int(np.count_nonzero(before.view(bits) != after.view(bits)))


def shared_names(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Partners of tensors that several names stand for.

    Writers that drop duplicates (safetensors' `save_model`, accelerate) note
    `dropped name: kept name` in the file's metadata.

    Returns:
        Every name of a shared tensor, dropped or kept, with all its other names.
    """
    groups: dict[str, set[str]] = {}
    for file in checkpoint.files:
        for dropped, kept in _metadata(file).items():
            if kept in checkpoint:
                groups.setdefault(kept, {kept}).add(dropped)
    return {name: tuple(sorted(names - {name})) for names in groups.values() for name in names}


def _metadata(file: Path) -> dict[str, str]:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    found = header.get("__metadata__")
    return found if isinstance(found, dict) else {}


def _companions(checkpoint: Checkpoint) -> Iterator[Path]:
    root = checkpoint.root
    sharded = checkpoint.files != [root / SINGLE]
    for path in sorted(root.iterdir()):
        if _wanted(path, sharded):
            yield _existing(path)
    if (root / _TEMPLATES).is_dir():
        yield from (_existing(path) for path in sorted((root / _TEMPLATES).glob("*.jinja")))


def _wanted(path: Path, sharded: bool) -> bool:
    name = path.name.lower()
    if path.is_dir() or name.startswith(".") or name in _NOT_OURS:
        return False
    if name.endswith(".index.json"):
        return sharded and path.name == INDEX
    legal = name.startswith(_LEGAL) and path.suffix.lower() in ("", ".md", ".txt")
    return legal or path.suffix.lower() in _SUFFIXES


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"{path}: expected a file or a link to one; download the whole model")
    return path
