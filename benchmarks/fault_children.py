"""Commands in forked processes that are killed, or whose system calls fail, at chosen moments.

A fork has torch imported already, which alone takes longer than what is to be disturbed.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Prepare = Callable[[], None]
_WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.scandir"}
_CALLS = ("fsync", "copy_file_range")


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus a signal's number; what it said; seconds."""

    code: int
    errors: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Job:
    """A command whose last argument is its output, and the digests of an undisturbed one."""

    name: str
    arguments: tuple[str, ...]
    wanted: dict[str, str]
    seconds: float
    operations: int

    def command(self, out: Path, base: Path | None = None) -> list[str]:
        """Its arguments for this output, and for a copy of its base."""
        given = [str(base) if base and a == "BASE" else a for a in self.arguments]
        return [*given, "-o", str(out)]


def run(
    arguments: list[str],
    scratch: Path,
    *,
    kill_after: float | None = None,
    prepare: Prepare | None = None,
) -> Ended:
    """Run one command in a fork, and kill it -9 after so many seconds if it still runs."""
    errors = scratch / "stderr"
    started = time.monotonic()
    sys.stdout.flush()
    with warnings.catch_warnings():
        # Python 3.12 warns where there are other threads; a child needs none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _run_and_exit(arguments, errors, prepare)
    if kill_after is not None:
        time.sleep(max(0.0, kill_after - (time.monotonic() - started)))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    lines = tuple(errors.read_text().splitlines()) if errors.exists() else ()
    return Ended(os.waitstatus_to_exitcode(status), lines, time.monotonic() - started)


def _run_and_exit(arguments: list[str], errors: Path, prepare: Prepare | None) -> None:
    """Whatever happens here must not run on in the parent's code."""
    try:
        with errors.open("w") as stream, Path(os.devnull).open("w") as nothing:
            os.dup2(stream.fileno(), 2)
            os.dup2(nothing.fileno(), 1)
        # The parent's may write elsewhere, as under pytest.
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        from austeer.exporter.cli import cli

        if prepare is not None:
            prepare()
        cli.main(arguments, prog_name="austeer-export")
        os._exit(0)
    except SystemExit as stop:
        sys.stderr.flush()
        os._exit(int(stop.code or 0))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)


def preload() -> None:
    """Import what the commands import, so that no fork does; start no thread."""
    for name in (
        # A child that is nobody may not read a Python that lies in root's home.
        "encodings.utf_8_sig",
        "austeer.exporter.code_export",
        "austeer.exporter.onnx_export",
        "austeer.exporter.proofs.product_check",
        "austeer.exporter.run",
        "austeer.exporter.verify",
        "austeer.graphs",
        "onnxruntime",
        "onnxscript",
        "torch.onnx",
    ):
        importlib.import_module(name)
    import torch

    from austeer.adapters.fitting import fit

    torch.set_num_threads(1)
    # Most of a run's time is text sampled to measure by, of which faults need little.
    fit.FitOptions = partial(fit.FitOptions, neutral_sequences=8)  # type: ignore[misc]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a tree by relative name; empty where there is none."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def at_operation(place: Path, number: int, action: Callable[[], None]) -> Prepare:
    """Do `action` just before the `number`-th operation of a command on files in `place`."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            action()

    return counting(place, count)


def counting(place: Path, count: Callable[[], None]) -> Prepare:
    """Call `count` before each operation of a command on files in `place`."""

    def prepare() -> None:
        def watch(event: str, values: tuple[Any, ...]) -> None:
            if event in _WATCHED and values and str(place) in str(values[0]):
                count()

        sys.addaudithook(watch)
        for name in _CALLS:
            setattr(os, name, _counted(getattr(os, name), count))

    return prepare


def _counted(call: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
    def wrapper(*arguments: Any) -> Any:
        count()
        return call(*arguments)

    return wrapper


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def space_seems_free() -> None:
    """Another process fills the disk once this one has looked: it saw room for everything."""
    room = SimpleNamespace(f_bavail=1 << 50, f_frsize=1, f_blocks=1 << 50)
    os.statvfs = lambda _: room  # type: ignore[assignment,misc]


def copies_fail(number: int) -> Prepare:
    """The `number`-th copy in the kernel meets a bad block."""

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def prepare() -> None:
        seen = 0

        def count() -> None:
            nonlocal seen
            seen += 1
            if seen >= number:
                fail()

        os.copy_file_range = _counted(os.copy_file_range, count)

    return prepare


def as_nobody() -> None:
    """Give up root, whom no permission stops."""
    os.setgid(65534)
    os.setuid(65534)


def fresh(folder: Path) -> Path:
    """An empty folder, writable by everybody."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    return folder
