"""Temporaries beside an output: locked while their run lives, removed once it is dead.

The lock is `flock` on the temporary itself. The kernel drops it when a process ends, however
it ends, and it tells processes of several containers on one filesystem apart, which process
numbers do not. Where a filesystem has no such locks, nothing is ever removed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

notice = logging.getLogger("austeer")

_TRIES = 100


def locked_directory(out: Path) -> tuple[Path, int]:
    """A new directory beside `out`, and the descriptor that keeps it locked until closed.

    Raises:
        OSError: it cannot be made.
    """
    return _locked(out, lambda: tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))


def locked_file(out: Path) -> tuple[Path, int]:
    """A new empty file beside `out`, and the descriptor that keeps it locked until closed.

    Raises:
        OSError: it cannot be made.
    """

    def make() -> str:
        handle, name = tempfile.mkstemp(prefix=_prefix(out), dir=out.parent)
        os.close(handle)
        return name

    return _locked(out, make)


def _locked(out: Path, make: Callable[[], str]) -> tuple[Path, int]:
    for _ in range(_TRIES):
        work = Path(make())
        lock = _lock(work)
        if lock is not None:
            return work, lock
    raise FileExistsError(f"{out}: other runs took every temporary beside it")


def remove_leftovers(out: Path) -> None:
    """Remove what killed runs left beside `out`; say so in a line for each.

    What a living run has locked stays, and so does what cannot be removed.
    """
    wanted = re.compile(re.escape(_prefix(out)) + r"[a-z0-9_]{8}")
    try:
        names = [entry.name for entry in os.scandir(out.parent)]
    except OSError:
        return
    for name in names:
        if wanted.fullmatch(name) and _removed(out.parent / name, names):
            notice.warning("%s: removed, an interrupted run had left it", out.parent / name)


def _removed(leftover: Path, names: list[str]) -> bool:
    lock = _lock(leftover, certain=True)
    if lock is None:
        return False
    try:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
            return not leftover.exists()
        # A writer may have put more beside its temporary, named after it.
        stem = leftover.name.lstrip(".") + "."
        for name in names:
            if name.startswith(".") and name.lstrip(".").startswith(stem):
                (leftover.parent / name).unlink(missing_ok=True)
        leftover.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _lock(path: Path, *, certain: bool = False) -> int | None:
    """Lock a temporary; None where another process has it, or has removed it.

    Args:
        path: the temporary, never a link.
        certain: also None where the filesystem has no locks, so that nobody can tell.
    """
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except BlockingIOError:
        held = False
    except OSError:
        held = not certain
    if held and _is_still(path, descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether what was opened still has that name; another run may have renamed it."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False
