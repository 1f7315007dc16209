"""Copies a file, and changes tensors on the way.

What stays as it is goes from file to file in the kernel, which shares disk blocks where the
filesystem can; memory is that of some rows of one tensor.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.adapters._errors import ModelError
from austeer.adapters.tensors import TensorEntry, read_rows

if TYPE_CHECKING:
    from io import FileIO

_BUFFER = 1 << 20
_RANGE = 1 << 26
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
