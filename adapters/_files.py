"""Atomic publishing: an output directory or file exists complete, or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from austeer.adapters._errors import AusteerError, OutputError
from austeer.adapters._json import TooLargeError, parse_json, read_text
from austeer.adapters._leftovers import locked_directory, locked_file, remove_leftovers

_NEW_FILE = "a new file name"


def final_path(out: Path) -> Path:
    """The path that an output gets: links of its parents followed, its own never.

    What is checked and what is written must be the same place, however it was spelled.
    """
    if out.name in ("", ".."):
        return Path(os.path.realpath(out))
    # Not resolve(), which raises where links lead in a circle.
    return Path(os.path.realpath(out.parent)) / out.name


def check_output_free(out: Path, expected: str = "a new or empty directory") -> None:
    """Refuse an output path that exists and is not an empty directory.

    Args:
        out: the path.
        expected: what it should be, for the message.

    Raises:
        OutputError: the path is taken, or cannot be replaced.
    """
    given, out = out, final_path(out)
    if os.path.ismount(out) and not out.is_symlink():
        raise OutputError(
            f"{given}: is a mount point, which nothing can be renamed to; name a directory in "
            f"it, such as {given / 'steered'}"
        )
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        kind = "a directory that is not empty" if out.is_dir() else "an existing file"
        what = "a symbolic link" if out.is_symlink() else kind
        raise OutputError(
            f"{given}: expected {expected}, found {what}; remove it or choose another"
        )


@contextmanager
def publish_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; on a clean exit sync it and rename it to `out`.

    After any exception the temporary is removed and `out` is untouched. After a kill the next
    run for `out` removes it.

    Raises:
        OutputError: `out` is taken, or the filesystem refuses (full, read-only).
    """
    check_output_free(out)
    out = final_path(out)
    with _parents(out), _as_output_error(out):
        work, lock = _claimed(out, locked_directory)
        try:
            yield work
            _sync_tree(work)
            work.chmod(0o777 & ~_umask())
            work.replace(out)
            _sync_path(out.parent)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            os.close(lock)


@contextmanager
def publish_file(out: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `out`; on a clean exit sync it and rename it to `out`.

    Args:
        out: the file.
        replace: whether a file that is there gives way; else it is refused, at once and again
            before the rename, as another run may have been quicker.

    Raises:
        OutputError: `out` is taken, or the filesystem refuses.
    """
    out = final_path(out)
    if out.is_dir():
        raise OutputError(
            f"{out}: expected a file name, found a directory; choose another name"
        )
    if not replace:
        check_output_free(out, _NEW_FILE)
    with _parents(out), _as_output_error(out):
        work, lock = _claimed(out, locked_file)
        try:
            yield work
            work.chmod(0o666 & ~_umask())
            _sync_path(work)
            if not replace:
                check_output_free(out, _NEW_FILE)
            work.replace(out)
            _sync_path(out.parent)
        except FileNotFoundError as error:
            if error.filename != str(work):
                raise
            raise OutputError(
                f"{out}: its temporary file went away; is another run writing there?"
            ) from error
        finally:
            work.unlink(missing_ok=True)
            os.close(lock)


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the folders above `out`; those that it made go again where the work fails."""
    with _as_output_error(out):
        missing = [folder for folder in out.parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _claimed(out: Path, make: Callable[[Path], tuple[Path, int]]) -> tuple[Path, int]:
    """A locked temporary beside `out`, whose folder another run may remove as it fails."""
    for _ in range(3):
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        with suppress(FileNotFoundError):
            return make(out)
    raise OutputError(f"{out.parent}: goes away again; is another run removing it?")


def read_json(path: Path, error: type[AusteerError], remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        error: class of the refusals.
        remedy: what to do about a file that is not there, ends the message.

    Raises:
        AusteerError: of class `error`: unreadable, not JSON or beyond its bounds, or not an
            object.
    """
    try:
        values = parse_json(read_text(path))
    except OSError as failure:
        raise error(f"{path}: cannot read it ({failure.strerror}); {remedy}") from failure
    except TooLargeError as failure:
        raise error(f"{path}: {failure}") from failure
    except ValueError as failure:
        raise error(f"{path}: not valid JSON ({failure}); fetch the file again") from failure
    if not isinstance(values, dict):
        raise error(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def refuse_foreign_link(path: Path, root: Path, error: type[AusteerError]) -> None:
    """Refuse to copy what a link in a model's directory brings in from elsewhere.

    A product is made to be given away, and a stranger's link may name any file of this
    machine. Links of a Hub cache are followed, from `snapshots/` into the `blobs/` beside it
    and the one of the whole cache.

    Args:
        path: a file below `root`.
        root: the directory that it is copied from.
        error: class of the refusal.

    Raises:
        AusteerError: of class `error`.
    """
    found, whole = path.resolve(), root.resolve()
    places = [whole]
    for repository in (x.parent for x in whole.parents if x.name == "snapshots"):
        places.append((repository / "blobs").resolve())
        if repository.name.startswith("models--"):
            # Newer caches keep one file for all repositories that have it.
            places.append((repository.parent / "blobs").resolve())
    if not any(found.is_relative_to(place) for place in places):
        raise error(
            f"{path}: is a link out of the model's directory, to {found}; "
            "put the file itself there, if it is to be copied"
        )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as sorted, indented JSON (UTF-8, newline at the end)."""
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: dict[str, Any]) -> str:
    """What `write_json` writes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text + "\n"


@contextmanager
def _as_output_error(out: Path) -> Iterator[None]:
    """Turn the filesystem's refusals into one line; libraries hide them in their own errors."""
    try:
        yield
    except Exception as error:
        reason = _filesystem_refusal(error)
        if reason is None:
            raise
        raise OutputError(
            f"{out}: cannot write the output: {reason}; nothing was left behind"
        ) from error


def _filesystem_refusal(error: BaseException) -> str | None:
    refusals = {
        errno.ENOSPC: "no space left on the device; free some or choose another disk",
        errno.EDQUOT: "disk quota exceeded; free some or choose another disk",
        errno.EROFS: "the filesystem is read-only; choose another place",
        errno.EACCES: "permission denied; choose another place",
        errno.EPERM: "operation not permitted; choose another place",
        errno.EIO: "an input or output error; check the disks of the base and of the output",
        errno.EFBIG: "file too large for this filesystem or limit",
        errno.ENOTDIR: "a parent of it is a file; choose another place",
        errno.EEXIST: "a file is in the way; choose another place",
        errno.ENOTEMPTY: "something else was written there meanwhile; choose another place",
        errno.ENAMETOOLONG: "the name is too long; choose another",
        errno.EISDIR: "a directory is in the way; choose another place",
        errno.ELOOP: "the links on its way lead in a circle; choose another place",
        errno.EBUSY: "it is in use, as a mount point is; name a directory in it",
        errno.EXDEV: "it is on another filesystem than its parent; name a directory in it",
    }
    if isinstance(error, OSError) and error.errno is not None:
        return refusals.get(error.errno)
    # safetensors and protobuf writers report the errno only inside their message.
    text = str(error)
    if "No space left on device" in text:
        return refusals[errno.ENOSPC]
    found = re.search(r"os error (\d+)", text)
    return refusals.get(int(found[1])) if found else None


def _sync_tree(root: Path) -> None:
    """Sync every file, and make it readable: some libraries write for the owner only."""
    readable = 0o666 & ~_umask()
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            path = Path(folder) / name
            # A file with other names belongs to others as well.
            if path.stat().st_nlink == 1:
                path.chmod(readable)
            _sync_path(path)
        _sync_path(Path(folder))


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
