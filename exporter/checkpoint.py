"""Copies a checkpoint and changes tensors on the way; no torch, no model.

What stays as it is goes from file to file in the kernel, which shares disk blocks where the
filesystem can; memory is that of some rows of one tensor for each core.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.adapters._errors import ModelError
from austeer.adapters._files import read_json, refuse_foreign_link
from austeer.adapters._json import is_writable
from austeer.adapters.tensors import (
    INDEX,
    SINGLE,
    Checkpoint,
    TensorEntry,
    read_metadata,
    read_rows,
)
from austeer.exporter._threads import run_in_threads

if TYPE_CHECKING:
    from io import FileIO

_BUFFER = 1 << 20
_RANGE = 1 << 26
_SUFFIXES = {".bpe", ".jinja", ".json", ".model", ".py", ".spm", ".tiktoken", ".txt", ".vocab"}
_LEGAL = ("license", "licence", "notice", "copying", "use_policy", "acceptable_use")
_TEMPLATES = "additional_chat_templates"  # the one subfolder that tokenizers read
# Of an adapter, and of a product that becomes a base: they would speak of other files.
_NOT_OURS = {"adapter_config.json", "adapter_model.safetensors", "austeer.json"}

Rows = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Change:
    """What to do to a tensor on the way.

    Attributes:
        apply: changes rows in place, given them and the number of the first; says how many
            values it changed.
        whole: it needs all rows at once.
    """

    apply: Callable[[Rows, int], int]
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Copied:
    """What `copy_checkpoint` wrote.

    Attributes:
        names: the files, relative, sorted.
        changed: values that now have other bits.
    """

    names: tuple[str, ...]
    changed: int


def copy_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    changes: Mapping[str, Change] | None = None,
    check: Callable[[], None] | None = None,
    *,
    link: bool = False,
) -> Copied:
    """Copy weights, config, tokenizer, templates, custom code and licence into `folder`.

    Other weight formats, pickles, the model card, dot files and subfolders stay behind;
    symlinks are followed, those of companions within the model's directory and a Hub cache.

    Args:
        checkpoint: the base.
        folder: an existing directory.
        changes: what to do to tensors, by stored name.
        check: runs beside the copying; what it raises ends that.
        link: hard link weight files without changes, where the filesystem can.

    Raises:
        ModelError: a file of the base cannot be read, or is a link out of it.
        OSError: the copy cannot be written.
    """
    edits: dict[Path, list[tuple[TensorEntry, Change]]] = {}
    for name, change in (changes or {}).items():
        edits.setdefault(checkpoint[name].file, []).append((checkpoint[name], change))
    tasks: list[Callable[[Event], int]] = []
    for source in checkpoint.files:
        target = folder / source.name
        if link and source not in edits:
            tasks.append(partial(link_file, source, target))
        else:
            tasks.append(partial(copy_file, source, target, changes=edits.get(source, ())))
    if check is not None:
        tasks.insert(0, lambda _: check() or 0)
    # First what is quick, and refused where a link leads out of the base.
    names = copy_companions(checkpoint, folder)
    total = sum(run_in_threads(tasks))
    return Copied(tuple(sorted([*names, *(f.name for f in checkpoint.files)])), total)


def copy_companions(checkpoint: Checkpoint, folder: Path, *, index: bool = True) -> list[str]:
    """Copy what `copy_checkpoint` copies besides weights; the index of these on request.

    Raises:
        ModelError: a file of the base cannot be read.
        OSError: the copy cannot be written.
    """
    names = []
    check_companions(checkpoint)
    for source in _wanted_files(checkpoint):
        if source.name == INDEX and not index:
            continue
        name = source.relative_to(checkpoint.root)
        (folder / name).parent.mkdir(exist_ok=True)
        copy_file(source, folder / name)
        names.append(str(name))
    return names


def link_file(source: Path, target: Path, stopped: Event | None = None) -> int:
    """Give the file a second name, or copy it where it can't have one.

    Returns:
        0, the number of changed values.

    Raises:
        ModelError: `source` cannot be read.
        OSError: `target` exists or cannot be written.
    """
    try:
        # What a link of a Hub cache points to, not the link.
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError as error:
        logging.getLogger("austeer").warning(
            "%s: cannot hard link it (%s); copied instead", source, error.strerror
        )
        return copy_file(source, target, stopped)
    return 0


def source_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of a base that `copy_checkpoint` copies, or would but for a link, sorted."""
    companions = (path for path in _wanted_files(checkpoint) if path.is_file())
    return sorted([*checkpoint.files, *companions])


def check_companions(checkpoint: Checkpoint) -> None:
    """Refuse a base of which `copy_checkpoint` would not copy everything.

    Raises:
        ModelError: a link to nothing, or out of the model's directory.
    """
    for path in _wanted_files(checkpoint):
        _existing(path, checkpoint.root)


def copy_file(
    source: Path,
    target: Path,
    stopped: Event | None = None,
    changes: Iterable[tuple[TensorEntry, Change]] = (),
    *,
    existing: bool = False,
) -> int:
    """Copy content, never mode or links; the kernel clones blocks where it can.

    Leaves a part of the file once `stopped` is set.

    Args:
        source: what to copy.
        target: a new file.
        stopped: ends the copying.
        changes: what to do to tensors of it.
        existing: `target` is an empty file that is there.

    Returns:
        How many values were changed.

    Raises:
        ModelError: `source` cannot be read, or became shorter.
        OSError: `target` exists or cannot be written.
    """
    changed = position = 0
    with (
        _open_source(source) as read,
        target.open("r+b" if existing else "xb", buffering=0) as write,
    ):
        size = os.fstat(read.fileno()).st_size
        for entry, change in sorted(changes, key=lambda one: one[0].start):
            _copy_range(read, write, position, entry.start, stopped)
            for first, rows in read_rows(entry, read, whole=change.whole):
                changed += change.apply(rows, first)
                _write_all(write, rows.reshape(-1).view(np.uint8).data)
            _begin_writing(write, entry.start, entry.size)
            position = entry.start + entry.size
        _copy_range(read, write, position, size, stopped)
    return changed


def _open_source(source: Path) -> FileIO:
    try:
        return source.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(source, error) from error


def _copy_range(
    read: FileIO, write: FileIO, start: int, end: int, stopped: Event | None
) -> None:
    """Copy bytes [start, end) to the same place; `write` stands there before and after."""
    while start < end and not (stopped is not None and stopped.is_set()):
        done = _range_in_kernel(read, write, start, min(_RANGE, end - start))
        done = done or _range_by_hand(read, write, start, min(_BUFFER, end - start))
        _begin_writing(write, start, done)
        start += done


def _range_in_kernel(read: FileIO, write: FileIO, start: int, length: int) -> int:
    """Bytes copied; 0 where the kernel can't, whatever its reason."""
    try:
        return os.copy_file_range(read.fileno(), write.fileno(), length, start)
    except (AttributeError, OSError):
        # Not on this platform or filesystem; or an error that reading and writing will name.
        return 0


def _range_by_hand(read: FileIO, write: FileIO, start: int, length: int) -> int:
    source = Path(os.fsdecode(read.name))
    try:
        read.seek(start)
        data = read.read(length)
    except OSError as error:
        raise _unreadable(source, error) from error
    if not data:
        raise ModelError(f"{source}: became shorter while it was read; fetch the file again")
    _write_all(write, data)
    return len(data)


def _begin_writing(write: FileIO, start: int, length: int) -> None:
    """Let the disk work beside the copying: the sync before publishing waits for it.

    What it is told to forget, the kernel first writes, without waiting, and keeps till then.
    """
    with suppress(AttributeError, OSError):
        os.posix_fadvise(write.fileno(), start, length, os.POSIX_FADV_DONTNEED)


def _write_all(write: FileIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[write.write(rest) :]


def _unreadable(source: Path, error: OSError) -> ModelError:
    return ModelError(f"{source}: cannot read it ({error.strerror}); fetch the model again")


def refuse_unwritable(config: Mapping[str, Any], root: Path) -> None:
    """Refuse a config that is to be written anew, and holds what JSON cannot say.

    Raises:
        ModelError: as said.
    """
    if not is_writable(config):
        raise ModelError(
            f"{root}/config.json: holds NaN, infinity or half of a surrogate pair, which JSON "
            "has no way to write; fetch the model again"
        )


def index_metadata(folder: Path) -> dict[str, Any]:
    """What the index of a sharded checkpoint says besides its map; empty without one."""
    path = folder / INDEX
    found = read_json(path, ModelError, "").get("metadata") if path.is_file() else None
    return found if isinstance(found, dict) and is_writable(found) else {}


def shared_names(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Partners of tensors that several names stand for.

    Writers that drop duplicates (safetensors' `save_model`, accelerate) note
    `dropped name: kept name` in the file's metadata.

    Returns:
        Every name of a shared tensor, dropped or kept, with all its other names.
    """
    groups: dict[str, set[str]] = {}
    for file in checkpoint.files:
        for dropped, kept in read_metadata(file).items():
            if kept in checkpoint:
                groups.setdefault(kept, {kept}).add(dropped)
    return {name: tuple(sorted(names - {name})) for names in groups.values() for name in names}


def _wanted_files(checkpoint: Checkpoint) -> Iterator[Path]:
    root = checkpoint.root
    sharded = checkpoint.files != [root / SINGLE]
    yield from (path for path in sorted(root.iterdir()) if _wanted(path, sharded))
    if (root / _TEMPLATES).is_dir():
        yield from sorted((root / _TEMPLATES).glob("*.jinja"))


def _wanted(path: Path, sharded: bool) -> bool:
    name = path.name.lower()
    if path.is_dir() or name.startswith(".") or name in _NOT_OURS:
        return False
    if name.endswith(".index.json"):
        return sharded and path.name == INDEX
    legal = name.startswith(_LEGAL) and path.suffix.lower() in ("", ".md", ".txt")
    return legal or path.suffix.lower() in _SUFFIXES


def _existing(path: Path, root: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"{path}: expected a file or a link to one; download the whole model")
    refuse_foreign_link(path, root, ModelError)
    return path
