"""`SHA256SUMS` of a product: written last before it is published, checked first afterwards.

The format is that of coreutils' `sha256sum`, so that `sha256sum -c SHA256SUMS` in the folder
checks it without us.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Event
from typing import TypeVar

from austeer.adapters._errors import VerificationError
from austeer.adapters._files import publish_file
from austeer.exporter._threads import run_in_threads

Digest = TypeVar("Digest")

SUMS_NAME = "SHA256SUMS"
_CHUNK = 1 << 20
_LINE = re.compile(rb"(\\?)([0-9a-f]{64}) [ *](.+)", re.DOTALL)
_ESCAPES = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r"}
_ESCAPED = {escape: plain for plain, escape in _ESCAPES.items()}


@dataclass(frozen=True, slots=True)
class SumsReport:
    """How a folder's files differ from its `SHA256SUMS`; names are relative, with slashes.

    Attributes:
        checked: number of files that the sums list.
        changed: names of files with other content.
        missing: names of files that are not there or cannot be read.
        extra: names of files that the sums do not list; no dot files, which nothing loads.
    """

    checked: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every file is as it was published, and no other is there."""
        return not (self.changed or self.missing or self.extra)

    def lines(self) -> tuple[str, ...]:
        """One line for each file that differs."""
        kinds = {"changed": self.changed, "missing": self.missing, "extra": self.extra}
        return tuple(
            f"{kind}: {name}{_notice(kind, name)}"
            for kind, names in kinds.items()
            for name in names
        )


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` over all files of `folder` and its subfolders.

    What a subfolder's own sums say is taken from there, not hashed again.

    Raises:
        OutputError: it cannot be written.
        VerificationError: a subfolder's sums are malformed.
    """
    known: dict[str, str] = {}
    for path in sorted(folder.glob(f"*/{SUMS_NAME}")):
        part = path.parent.name
        known |= {f"{part}/{name}": digest for name, digest in _read(path).items()}
    # What lies in dot files, a repository's say, changes without the product.
    names = sorted(n for n in _names(folder) if n != SUMS_NAME and not _is_hidden(n))
    fresh = [name for name in names if name not in known]
    known |= dict(zip(fresh, file_digests([folder / name for name in fresh]), strict=True))
    text = b"".join(_line(name, known[name]) for name in names)
    with publish_file(folder / SUMS_NAME) as work:
        work.write_bytes(text)


def check_sums(folder: Path) -> SumsReport | None:
    """Compare the files of `folder` with its `SHA256SUMS`; None where it has none.

    Raises:
        VerificationError: the sums are unreadable or malformed.
    """
    if not (folder / SUMS_NAME).exists():
        return None
    wanted = _read(folder / SUMS_NAME)
    found = set(_names(folder))
    there = [name for name in wanted if (folder / name).is_file()]
    digests = dict(zip(there, _found_digests([folder / n for n in there]), strict=True))
    changed = [name for name, digest in digests.items() if digest not in (None, wanted[name])]
    missing = [name for name in wanted if digests.get(name) is None]
    extra = [name for name in found - {*wanted, SUMS_NAME} if not _is_hidden(name)]
    parts = (tuple(sorted(names)) for names in (changed, missing, extra))
    return SumsReport(len(wanted), *parts)


def require_sums(folder: Path) -> int | None:
    """Refuse a folder whose files are not those that its `SHA256SUMS` lists.

    Returns:
        The number of files that were checked, None where there are no sums.

    Raises:
        VerificationError: a difference; `details` has a line for each file.
    """
    report = check_sums(folder)
    if report is None:
        return None
    if not report.passed:
        raise VerificationError(
            f"{folder}: {len(report.lines())} of its files are not as they were published "
            f"({len(report.changed)} changed, {len(report.missing)} missing, "
            f"{len(report.extra)} extra); if that was you, --accept-changes checks the rest "
            "and writes new sums, otherwise fetch or make it again",
            report.lines(),
        )
    return report.checked


def file_digests(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file in hexadecimal digits; some at once, 1 MiB of each in memory.

    Raises:
        OSError: a file cannot be read.
    """
    return _mapped(file_digest, paths)


def file_digest(path: Path, stopped: Event | None = None) -> str:
    """SHA-256 of one file, in hexadecimal digits; of a part of it once `stopped` is set.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while (data := stream.read(_CHUNK)) and not (stopped and stopped.is_set()):
            digest.update(data)
    return digest.hexdigest()


def _found_digests(paths: Sequence[Path]) -> list[str | None]:
    def digest(path: Path, stopped: Event) -> str | None:
        try:
            return file_digest(path, stopped)
        except OSError:
            return None

    return _mapped(digest, paths)


def _mapped(digest: Callable[[Path, Event], Digest], paths: Sequence[Path]) -> list[Digest]:
    # hashlib lets other threads run; with the largest first, none is left alone at the end.
    order = sorted(range(len(paths)), key=lambda i: -_size(paths[i]))
    tasks = [partial(digest, paths[i]) for i in order]
    found = dict(zip(order, run_in_threads(tasks), strict=True))
    return [found[i] for i in range(len(paths))]


def _names(folder: Path) -> Iterator[str]:
    """Relative names of all files below `folder`; a link to a folder counts as a file."""
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(root) / name).relative_to(folder).as_posix()


def _read(path: Path) -> Mapping[str, str]:
    try:
        lines = path.read_bytes().splitlines(keepends=False)
    except OSError as error:
        raise VerificationError(
            f"{path}: cannot read it ({error.strerror}); fetch the product again"
        ) from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        name = _plain_name(match) if match else None
        if match is None or name is None or name in found:
            raise VerificationError(
                f"{path}:{number}: expected a SHA-256, two spaces and the name of a file in "
                "this folder, once; fetch the product again"
            )
        found[name] = match[2].decode()
    return found


def _plain_name(match: re.Match[bytes]) -> str | None:
    """The file name in a line; None where it would lead out of the folder."""
    raw = match[3]
    if match[1]:
        raw = re.sub(rb"\\[\\nr]", lambda found: _ESCAPED[found[0]], raw)
    name = os.fsdecode(raw)
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and b"\0" not in raw
    return name.removeprefix("./") if inside else None


def _line(name: str, digest: str) -> bytes:
    raw = os.fsencode(name)
    escaped = re.sub(rb"[\\\n\r]", lambda found: _ESCAPES[found[0]], raw)
    mark = b"\\" if escaped != raw else b""
    return mark + digest.encode() + b"  " + escaped + b"\n"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _notice(kind: str, name: str) -> str:
    if kind == "changed" and name.endswith("README.md"):
        return " (the model card: text for people, no runtime reads it)"
    return ""
