"""Reads the header of a GGUF file, its settings and where its tensors are, and nothing else.

Format (ggml's docs/gguf.md, versions 2 and 3, little-endian): `GGUF`, version u32, number of
tensors u64, number of settings u64; settings as key, type u32, value; tensors as name, number
of axes u32, lengths u64 (innermost first), type u32, offset u64 behind the header, which is
padded to `general.alignment`. A string is its length u64 and its bytes; an array its element
type u32, its length u64 and its elements. A tokenizer is arrays of strings in there, which are
stepped over: 0.3 s and no memory for Llama 3's, where the reader of the `gguf` package, which
keeps them, takes 14 s and 600 MB.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from austeer.adapters._errors import ModelError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 24  # of a string that is kept
_DEEPEST = 4  # arrays in arrays


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        name: its name.
        number: its GGML type.
        shape: rows first, the other way round than in the file.
        start: its first byte in the file.
    """

    name: str
    number: int
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A parsed header.

    Attributes:
        settings: the settings that are a number or a string; no arrays.
        tensors: in file order.
        size: number of its bytes, padding included: the tensors begin there.
    """

    settings: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    size: int


class _MalformedError(Exception):
    """What is wrong with a header."""


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse the header of a GGUF file.

    Raises:
        ModelError: not a GGUF file, truncated, malformed, or of another version.
    """
    if not path.is_file():
        raise ModelError(f"{path}: expected a GGUF file, found none; check the path")
    try:
        with path.open("rb") as stream:
            return _parse(_Cursor(stream, path.stat().st_size))
    except (_MalformedError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise ModelError(f"{path}: not a whole GGUF file: {what}; fetch it again") from error


class _Cursor:
    """Reads numbers and strings in file order, never beyond the end."""

    def __init__(self, stream: IO[bytes], total: int) -> None:
        self.stream = stream
        self.total = total
        self.position = 0

    def take(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) != size:
            raise _MalformedError(f"its header ends at byte {self.total}")
        self.position += size
        return data

    def skip(self, size: int) -> None:
        if size > self.total - self.position:
            raise _MalformedError(f"a value of {size} bytes in a file of {self.total}")
        self.position += size
        self.stream.seek(self.position)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, smallest: int) -> int:
        """A number of things of `smallest` bytes or more, which must have room in the file."""
        found = int(self.number("Q"))
        if found * smallest > self.total - self.position:
            raise _MalformedError(f"it claims {found} entries in a file of {self.total} bytes")
        return found

    def string(self) -> str:
        length = self.count(1)
        if length > _LONGEST:
            raise _MalformedError(f"a string of {length} bytes")
        return self.take(length).decode("utf-8")


def _parse(cursor: _Cursor) -> GgufHeader:
    if cursor.take(4) != b"GGUF":
        raise _MalformedError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        big = ", it is big-endian" if version and version % 65536 == 0 else ""
        raise _MalformedError(f"version {version}, expected 2 or 3{big}")
    tensors, entries = cursor.count(24), cursor.count(13)
    settings = {}
    for _ in range(entries):
        key = cursor.string()
        settings[key] = _value(cursor, cursor.number("I"))
    infos = list(_infos(cursor, tensors))
    if len({name for name, *_ in infos}) != len(infos):
        raise _MalformedError("two tensors have one name")
    alignment = settings.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _MalformedError(f"general.alignment is {alignment!r}, expected a power of two")
    size = -(-cursor.position // alignment) * alignment
    placed = tuple(TensorInfo(name, kind, shape, size + at) for name, kind, shape, at in infos)
    return GgufHeader({k: v for k, v in settings.items() if v is not None}, placed, size)


def _infos(cursor: _Cursor, count: int) -> Iterator[tuple[str, int, tuple[int, ...], int]]:
    for _ in range(count):
        name, axes = cursor.string(), cursor.number("I")
        if axes > 8:
            raise _MalformedError(f"{name} has {axes} axes")
        lengths = [int(cursor.number("Q")) for _ in range(axes)]
        kind, offset = int(cursor.number("I")), int(cursor.number("Q"))
        yield name, kind, tuple(reversed(lengths)), offset


def _value(cursor: _Cursor, kind: int, depth: int = 0) -> Any:
    """One value; None for an array, which is stepped over."""
    if kind == _STRING:
        return cursor.string()
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind != _ARRAY or depth > _DEEPEST:
        raise _MalformedError(f"a value of type {kind}")
    inner = cursor.number("I")
    if inner in _SCALARS:
        size = struct.calcsize(f"<{_SCALARS[inner]}")
        cursor.skip(cursor.count(size) * size)
    elif inner == _STRING:
        for _ in range(cursor.count(8)):
            cursor.skip(cursor.number("Q"))
    else:
        for _ in range(cursor.count(12)):
            _value(cursor, inner, depth + 1)
    return None
