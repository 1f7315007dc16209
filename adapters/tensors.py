"""Safetensors checkpoints read by header: single file or sharded, numpy only, no torch.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes
(https://huggingface.co/docs/safetensors, section "Format").
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import ml_dtypes
import numpy as np

from austeer.adapters._errors import ModelError
from austeer.adapters._files import publish_file
from austeer.adapters._json import MAX_BYTES, TooLargeError, parse_json

if TYPE_CHECKING:
    from io import FileIO

Tensors = dict[str, np.ndarray[Any, np.dtype[Any]]]

_BLOCK = 1 << 20  # values
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,15}")
_MAX_NAME = 1000
_MAX_NUMBER = 2**63 - 1
_MAX_AXES = 32  # numpy 1 has no more

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

STORED_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of torch dtypes that models are loaded and stored in, and of those in a file."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor on disk: its bytes are `file[start : start + size]`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The numpy dtype.

        Raises:
            ModelError: a storage type that has no numpy equivalent here.
        """
        if self.dtype not in DTYPES:
            raise ModelError(
                f"{self.file}: {self.name}: dtype {self.dtype} is not supported "
                f"(known: {', '.join(DTYPES)})"
            )
        return DTYPES[self.dtype]

    def read(self, part: int | None = None) -> np.ndarray[Any, np.dtype[Any]]:
        """The tensor, or number `part` of its first axis alone, copied into memory.

        Raises:
            ModelError: a dtype without an equivalent, or a file that became shorter.
            OSError: it cannot be read.
        """
        if part is not None:
            return self.part(part).read()
        dtype = self.numpy_dtype
        with self.file.open("rb", buffering=0) as stream:
            data = np.empty(self.size, np.uint8)
            _read_into(stream, self, 0, data)
            return data.view(dtype).reshape(self.shape)

    def part(self, number: int) -> TensorEntry:
        """Number `number` of the first axis as a tensor of its own."""
        size = self.size // self.shape[0]
        start = self.start + number * size
        return dataclasses.replace(self, start=start, size=size, shape=self.shape[1:])


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file, in file order.

    Raises:
        ModelError: truncated or malformed; the message names the file and what is wrong.
    """
    return _read(file)[1]


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that a writer left in the header of one safetensors file.

    Raises:
        ModelError: truncated or malformed.
    """
    return _read(file)[0]


def read_rows(
    entry: TensorEntry, stream: FileIO, *, whole: bool = False
) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[Any]]]]:
    """A tensor in blocks of rows: number of the first, and values; a scalar is one row.

    Each block takes the memory of the one before it.

    Args:
        entry: the tensor.
        stream: its file, or another with the same bytes.
        whole: give all rows at once.

    Raises:
        ModelError: a dtype without an equivalent, or a file that became shorter.
        OSError: it cannot be read.
    """
    dtype, (count, *rest) = entry.numpy_dtype, entry.shape or (1,)
    width = dtype.itemsize * math.prod(rest)
    # The same rows whatever the dtype, so that two checkpoints can be read side by side.
    step = max(1, count if whole else _BLOCK // max(1, math.prod(rest)))
    # Fresh memory for every block costs more than reading it.
    buffer = np.empty(min(step, count) * width, np.uint8)
    for first in range(0, count, step):
        length = min(step, count - first)
        data = buffer[: length * width]
        _read_into(stream, entry, first * width, data)
        yield first, data.view(dtype).reshape(length, *rest)


def _read_into(
    stream: FileIO, entry: TensorEntry, offset: int, data: np.ndarray[Any, np.dtype[np.uint8]]
) -> None:
    rest = data.data
    stream.seek(entry.start + offset)
    while rest:
        got = stream.readinto(rest)
        if not got:
            raise _corrupt(entry.file, f"it ends within {entry.name}")
        rest = rest[got:]


def read_tensors(file: Path) -> tuple[dict[str, str], Tensors]:
    """Metadata and tensors of one safetensors file, in memory.

    Raises:
        ModelError: truncated or malformed.
        OSError: it cannot be read.
    """
    metadata, entries = _read(file)
    return metadata, {name: entry.read() for name, entry in entries.items()}


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write one safetensors file, atomically; an existing file is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    from safetensors.numpy import save

    with publish_file(path) as work:
        # Not save_file: what it leaves behind when killed has a name of its own.
        work.write_bytes(_in_order(save(tensors, metadata=metadata)))


def _in_order(data: bytes) -> bytes:
    """A file's bytes with its metadata sorted; safetensors puts several keys in any order."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.get("__metadata__", {})
    if len(metadata) < 2:
        return data
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The data starts at a multiple of eight, as safetensors has it.
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[start:]))


def _read(file: Path) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """Metadata and entries: the whole header, each part of it checked."""
    if file.exists() and not file.is_file():
        raise _corrupt(file, "it is no file")
    total = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if total < 8 or length > total - 8:
            raise _corrupt(file, f"its header claims {length} bytes, the file has {total}")
        if length > MAX_BYTES:
            raise _too_large(file, f"{length} bytes, at most {MAX_BYTES} are read")
        raw = stream.read(length)
    try:
        header = parse_json(raw.decode("utf-8"), unique=True)
    except TooLargeError as error:
        raise _too_large(file, str(error)) from error
    except ValueError as error:
        raise _corrupt(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(file, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise _corrupt(file, "its metadata is not an object of texts")
    entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    _check_layout(file, list(entries.values()), 8 + length, total)
    return metadata, entries


def _entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise _corrupt(file, f"{name[:_MAX_NAME]!r} is no name of a tensor")
    facts: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (facts.get(key) for key in ("dtype", "shape", "data_offsets"))
    if (
        not (isinstance(dtype, str) and _DTYPE.fullmatch(dtype))
        or not (_are_counts(shape) and len(shape) <= _MAX_AXES)
        or not (_are_counts(offsets) and len(offsets) == 2)
    ):
        raise _corrupt(file, f"the entry of {name} is malformed")
    begin, end = offsets
    # numpy refuses a huge axis even beside one of length 0.
    if end < begin or math.prod(max(length, 1) for length in shape) > _MAX_NUMBER // 8:
        raise _corrupt(file, f"the entry of {name} has impossible offsets or shape")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _corrupt(file, f"{name}: {end - begin} bytes do not fit shape {shape} of {dtype}")
    return TensorEntry(name, file, dtype, tuple(shape), data_start + begin, end - begin)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    """Whether JSON gave a list of whole numbers from 0; a flag is none, a float neither."""
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number <= _MAX_NUMBER for number in value
    )


def _check_layout(file: Path, entries: list[TensorEntry], start: int, total: int) -> None:
    position = start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.size)):
        if entry.start != position:
            raise _corrupt(
                file, f"{entry.name} starts at byte {entry.start}, expected {position}"
            )
        position += entry.size
    if position != total:
        raise _corrupt(file, f"{total} bytes long, its header describes {position}")


def _too_large(file: Path, what: str) -> ModelError:
    return ModelError(
        f"{file}: its header is larger than austeer reads ({what}); is it a model? If so, save "
        "it in more files"
    )


def _corrupt(file: Path, what: str) -> ModelError:
    return ModelError(f"{file}: corrupt or truncated safetensors: {what}; fetch the file again")
