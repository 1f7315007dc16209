"""Publishing is all or nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from austeer.adapters import OutputError
from austeer.adapters._files import (
    check_output_free,
    final_path,
    publish_directory,
    publish_file,
    write_json,
)


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_directory_appears_complete(tmp_path: Path, umask: int) -> None:
    out = tmp_path / "a" / "b" / "out"
    with publish_directory(out) as work:
        assert work.parent == out.parent and not out.exists()
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text("x")
    assert (out / "sub" / "file").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert mode(out) == 0o777 & ~umask
    assert mode(out / "sub" / "file") == 0o666 & ~umask


def test_empty_directory_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with publish_directory(out) as work:
        (work / "file").write_text("x")
    assert (out / "file").is_file()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), publish_directory(tmp_path / "out") as work:
        (work / "file").write_text("x")
        raise error
    with pytest.raises(error), publish_file(tmp_path / "file") as path:
        path.write_text("x")
        raise error
    assert not any(tmp_path.iterdir())


def _full(out: Path) -> None:
    out.mkdir()
    (out / "precious").write_text("data")


def _file(out: Path) -> None:
    out.write_text("data")


def _link_to_empty(out: Path) -> None:
    (out.parent / "target").mkdir()
    out.symlink_to(out.parent / "target")


def _dangling(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


@pytest.mark.parametrize("taken", [_full, _file, _link_to_empty, _dangling])
def test_taken_output_is_refused_before_any_work(tmp_path: Path, taken: object) -> None:
    out = tmp_path / "out"
    assert callable(taken)
    taken(out)
    before = sorted(tmp_path.rglob("*"))
    wanted = "expected a new or empty directory"
    with pytest.raises(OutputError, match=wanted), publish_directory(out):
        pytest.fail("the body must not run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_is_called_one(tmp_path: Path) -> None:
    _link_to_empty(tmp_path / "out")
    with pytest.raises(OutputError, match="found a symbolic link"):
        check_output_free(tmp_path / "out")


def test_directory_filled_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="meanwhile"), publish_directory(out) as work:
        (work / "file").write_text("mine")
        _full(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "precious").read_text() == "data"


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError), publish_directory(tmp_path / "file" / "out"):
        pytest.fail("the body must not run")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EFBIG, "too large"),
        (errno.EIO, "input or output error"),
    ],
)
def test_refusals_of_the_filesystem_become_one_line(
    tmp_path: Path, number: int, message: str
) -> None:
    for publish in (publish_directory, publish_file):
        with pytest.raises(OutputError, match=message) as error, publish(tmp_path / "out"):
            raise OSError(number, os.strerror(number))
        assert str(tmp_path / "out") in str(error.value) and "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_writers_that_hide_the_errno(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left"), publish_directory(tmp_path / "out"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), publish_directory(tmp_path / "out"):
        (tmp_path / "nowhere").read_text()


def test_file_is_replaced_atomically(tmp_path: Path, umask: int) -> None:
    out = tmp_path / "new" / "file"
    for text in ("one", "two"):
        with publish_file(out) as work:
            assert work != out
            work.write_text(text)
        assert out.read_text() == text
    assert [path.name for path in out.parent.iterdir()] == ["file"]
    assert mode(out) == 0o666 & ~umask


def test_failed_file_keeps_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_text("old")
    with pytest.raises(ValueError, match="stop"), publish_file(out) as work:
        work.write_text("new")
        raise ValueError("stop")
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("with_its_folder", [False, True])
def test_a_temporary_that_another_run_removes(tmp_path: Path, with_its_folder: bool) -> None:
    with pytest.raises(OutputError, match="is another run writing there"):  # noqa: SIM117
        with publish_file(tmp_path / "state" / "file") as work:
            work.unlink()
            if with_its_folder:
                work.parent.rmdir()
                work.write_text("x")
    assert not list(tmp_path.rglob("*file*"))


def test_another_missing_file_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), publish_file(tmp_path / "file"):
        (tmp_path / "other").read_text()


def test_file_over_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="found a directory"), publish_file(tmp_path):
        pytest.fail("the body must not run")


def test_json_is_stable_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"β": 1.5, "a": [True, None]})
    expected = '{\n  "a": [\n    true,\n    null\n  ],\n  "β": 1.5\n}\n'
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == expected
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", {"x": float("nan")})


@pytest.mark.parametrize(
    ("number", "reason"), [(27, "file too large"), (30, "read-only"), (122, "quota")]
)
def test_an_errno_inside_a_librarys_message_is_found(
    tmp_path: Path, number: int, reason: str
) -> None:
    with pytest.raises(OutputError, match=reason), publish_file(tmp_path / "file"):
        raise RuntimeError(f"I/O error: refused (os error {number})")
    with pytest.raises(RuntimeError), publish_file(tmp_path / "file"):
        raise RuntimeError("I/O error: something else (os error 99)")
    assert list(tmp_path.iterdir()) == []


def test_the_mode_of_a_file_that_others_share_stays(tmp_path: Path, umask: int) -> None:
    shared = tmp_path / "base"
    shared.write_text("x")
    shared.chmod(0o600)
    with publish_directory(tmp_path / "out") as work:
        os.link(shared, work / "linked")
    assert mode(shared) == 0o600


def test_a_mount_point_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty volume looks free, and can't be renamed over once all is done."""
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "volume")
    for look in (check_output_free, lambda out: publish_directory(out).__enter__()):
        with pytest.raises(OutputError, match=r"mount point.*volume/steered"):
            look(tmp_path / "volume")
    with publish_directory(tmp_path / "volume" / "steered"):
        pass


@pytest.mark.parametrize("spelled", ["missing/../taken", "link/../taken"])
def test_what_is_checked_is_what_is_written(tmp_path: Path, spelled: str) -> None:
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "folder")
    place = tmp_path / ("deep" if spelled.startswith("link") else ".") / "taken"
    out = tmp_path / spelled
    assert final_path(out) == place.resolve()
    place.write_text("precious")
    with pytest.raises(OutputError, match="existing file"):
        check_output_free(out)
    place.unlink()
    with publish_file(out) as work:
        work.write_text("new")
    assert place.read_text() == "new"


@pytest.mark.parametrize("early", [True, False])
def test_a_file_gives_way_only_where_it_may(tmp_path: Path, early: bool) -> None:
    """Neither one that was there nor that of a run that was quicker."""
    out = tmp_path / "file"
    if early:
        out.write_text("precious")
    with (
        pytest.raises(OutputError, match="expected a new file name, found an existing file"),
        publish_file(out, replace=False) as work,
    ):
        assert not early
        work.write_text("new")
        out.write_text("precious")
    assert out.read_text() == "precious" and list(tmp_path.iterdir()) == [out]
    with publish_file(out) as work:
        work.write_text("new")
    assert out.read_text() == "new"


def test_the_link_itself_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert final_path(tmp_path / "link").name == "link"


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for publish in (publish_directory, publish_file):
        with (
            pytest.raises(OutputError, match="cannot write the output"),
            publish(tmp_path / "circle" / "out"),
        ):
            pass
    assert list(tmp_path.iterdir()) == [tmp_path / "circle"]


def test_parents_that_were_made_go_again(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for publish in (publish_directory, publish_file):
        with (
            pytest.raises(ValueError, match="no"),
            publish(tmp_path / "there" / "a" / "b" / "c"),
        ):
            raise ValueError("no")
        assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_a_folder_that_another_run_removes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from austeer.adapters import _files

    claim, times = _files.locked_directory, []

    def late(out: Path) -> tuple[Path, int]:
        times.append(out)
        if len(times) == 1:
            out.parent.rmdir()
        return claim(out)

    monkeypatch.setattr(_files, "locked_directory", late)
    with publish_directory(tmp_path / "new" / "out") as work:
        (work / "file").touch()
    assert (tmp_path / "new" / "out" / "file").exists() and len(times) == 2
