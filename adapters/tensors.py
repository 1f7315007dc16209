"""Safetensors checkpoints read by header: single file or sharded, numpy only, no torch.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes
(https://huggingface.co/docs/safetensors, section "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from austeer.adapters._errors import ModelError
from austeer.adapters._files import publish_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, np.ndarray[Any, np.dtype[Any]]]

_MAX_HEADER = 100_000_000  # the format's own limit

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

    def read(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The tensor, copied into memory.

        Raises:
            ModelError: the file became shorter since its header was read.
        """
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            data = stream.read(self.size)
        if len(data) < self.size:
            raise _corrupt(self.file, f"{self.name} ends {self.size - len(data)} bytes early")
        return np.frombuffer(data, dtype=self.numpy_dtype).reshape(self.shape).copy()


class Checkpoint(Mapping[str, TensorEntry]):
    """The tensors of a model directory by name; reads headers, never the model.

    Raises:
        ModelError: no safetensors weights, or a file that is truncated or malformed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = _weight_files(root)
        self._entries: dict[str, TensorEntry] = {}
        for file in self.files:
            for name, entry in read_header(file).items():
                if name in self._entries:
                    raise ModelError(
                        f"{root}: tensor {name} stands in two shards "
                        f"({self._entries[name].file.name}, {file.name}); fetch the model again"
                    )
                self._entries[name] = entry

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, names: tuple[str, ...]) -> TensorEntry | None:
        """The first of `names` that exists."""
        return next((self._entries[name] for name in names if name in self._entries), None)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file, in file order.

    Raises:
        ModelError: truncated or malformed; the message names the file and what is wrong.
    """
    total = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if total < 8 or length > min(total - 8, _MAX_HEADER):
            raise _corrupt(file, f"its header claims {length} bytes, the file has {total}")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _corrupt(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    _check_layout(file, list(entries.values()), 8 + length, total)
    return entries


def read_tensors(file: Path) -> tuple[dict[str, str], Tensors]:
    """Metadata and tensors of one safetensors file, in memory.

    Raises:
        ModelError: truncated or malformed.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {name: entry.read() for name, entry in read_header(file).items()}
    try:
        with safe_open(file, framework="numpy") as opened:
            return opened.metadata() or {}, tensors
    except SafetensorError as error:
        raise ModelError(str(error)) from error


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


def _entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        begin, end = (int(offset) for offset in value["data_offsets"])
        shape = tuple(int(length) for length in value["shape"])
        dtype = str(value["dtype"])
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(file, f"the entry of {name} is malformed") from error
    if begin < 0 or end < begin or any(length < 0 for length in shape):
        raise _corrupt(file, f"the entry of {name} has impossible offsets or shape")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _corrupt(file, f"{name}: {end - begin} bytes do not fit shape {shape} of {dtype}")
    return TensorEntry(name, file, dtype, shape, data_start + begin, end - begin)


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


def _weight_files(root: Path) -> list[Path]:
    index, single = root / INDEX, root / SINGLE
    # transformers looks for the single file first: where both stand, read what it reads.
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed_files(index)
    pickles = sorted(path.name for path in root.glob("*.bin")) + sorted(
        path.name for path in root.glob("*.pt*")
    )
    if pickles:
        raise ModelError(
            f"{root}: has only pickle weights ({pickles[0]}), which can run code when opened; "
            "convert them to safetensors first"
        )
    raise ModelError(
        f"{root}: expected {SINGLE} or {INDEX}, found no weights; download the whole model"
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index}: expected JSON with a weight_map, could not read one ({error}); "
            "fetch the model again"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: shard {name!r} is not a plain file name; refused")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index}: shard {name} is missing; download the whole model")
    return [index.parent / name for name in names]


def _corrupt(file: Path, what: str) -> ModelError:
    return ModelError(f"{file}: corrupt or truncated safetensors: {what}; fetch the file again")
