"""What killed runs leave is removed, what living ones hold is not."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from austeer.adapters import _leftovers
from austeer.adapters._files import publish_directory, publish_file
from austeer.adapters._leftovers import locked_directory, locked_file, remove_leftovers


def killed(fork: Callable[..., Any], work: Callable[[], Any]) -> None:
    """Run `work` in a process that ends as `kill -9` ends it."""

    def die() -> None:
        work()
        os.kill(os.getpid(), signal.SIGKILL)

    assert fork(die).end() == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_runs_directory_goes_with_one_line(
    tmp_path: Path, fork: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"

    def half() -> None:
        work, _ = locked_directory(out)
        (work / "sub").mkdir()
        (work / "sub" / "weights").write_text("half")

    killed(fork, half)
    (left,) = names(tmp_path)
    assert left.startswith(".out.partial-")
    with publish_directory(out) as work:
        assert names(tmp_path) == [work.name]
        (work / "file").write_text("x")
    assert names(tmp_path) == ["out"]
    assert caplog.messages == [f"{tmp_path / left}: removed, an interrupted run had left it"]


def test_a_killed_writers_file_goes_with_what_is_named_after_it(
    tmp_path: Path, fork: Callable[..., Any]
) -> None:
    out = tmp_path / "out.onnx"

    def half() -> None:
        work, _ = locked_file(out)
        nested, _ = locked_file(work.with_name(f"{work.name}.new"))
        nested.write_text("half")
        work.with_name(f".{work.name}.new.unsteered").write_text("half")

    killed(fork, half)
    assert len(names(tmp_path)) == 3
    with publish_file(out) as work:
        work.write_text("whole")
    assert names(tmp_path) == ["out.onnx"]


@pytest.mark.parametrize("publish", [publish_directory, publish_file])
def test_a_living_runs_temporary_stays(tmp_path: Path, publish: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    with publish(out) as mine:
        remove_leftovers(out)
        assert mine.exists()
        with pytest.raises(ValueError, match="stop"), publish(out) as other:
            assert mine.exists() and other != mine
            raise ValueError("stop")
        assert names(tmp_path) == [mine.name]
        if mine.is_dir():
            (mine / "file").write_text("x")
    assert names(tmp_path) == ["out"]


def test_only_our_own_names_are_touched(tmp_path: Path) -> None:
    others = [
        ".out.partial-",
        ".out.partial-mine",
        ".other.partial-abcd1234",
        "out.partial-abcd1234",
    ]
    for name in (*others, ".out.partial-ABCD1234"):
        (tmp_path / name).write_text("precious")
    (tmp_path / ".out.partial-link1234").symlink_to(tmp_path / "out.partial-abcd1234")
    before = names(tmp_path)
    remove_leftovers(tmp_path / "out")
    assert names(tmp_path) == before


def test_nothing_goes_where_nobody_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".out.partial-abcd1234").mkdir()
    monkeypatch.setattr(fcntl, "flock", unsupported)
    with publish_directory(tmp_path / "out") as work:
        (work / "file").write_text("x")
    assert names(tmp_path) == [".out.partial-abcd1234", "out"]


def test_a_temporary_that_was_taken_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = _leftovers._lock, []

    def lock(path: Path, **options: Any) -> int | None:
        seen.append(path)
        if len(seen) == 1:
            # Another run sees it unlocked and removes it.
            path.rmdir()
        return real(path, **options)

    monkeypatch.setattr(_leftovers, "_lock", lock)
    work, descriptor = locked_directory(tmp_path / "out")
    os.close(descriptor)
    assert work == seen[1] and names(tmp_path) == [work.name]


def test_a_temporary_that_was_removed_while_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            next(tmp_path.iterdir()).rmdir()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    work, descriptor = locked_directory(tmp_path / "out")
    os.close(descriptor)
    assert len(calls) == 2 and work.is_dir()


def test_a_directory_published_meanwhile_is_not_a_leftover(tmp_path: Path) -> None:
    work, descriptor = locked_directory(tmp_path / "out")
    late = os.open(work, os.O_RDONLY)
    work.rename(tmp_path / "out")
    os.close(descriptor)
    try:
        assert not _leftovers._is_still(work, late)
    finally:
        os.close(late)
    remove_leftovers(tmp_path / "out")
    assert names(tmp_path) == ["out"]
