"""Writes a checkpoint anew, in another dtype or in shards of another size; no torch, no model.

Memory is that of some rows of one tensor for each core.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from austeer.adapters._errors import ModelError, RouteError
from austeer.adapters._files import read_json, write_json
from austeer.adapters._json import is_writable
from austeer.adapters.architectures import Architecture, architecture_of
from austeer.adapters.tensors import (
    DTYPES,
    STORED_DTYPES,
    TensorEntry,
    read_metadata,
    read_rows,
)
from austeer.adapters.weights import INDEX, SINGLE, Checkpoint
from austeer.exporter._threads import run_in_threads
from austeer.exporter.checkpoint import (
    Copied,
    copy_companions,
    index_metadata,
    refuse_unwritable,
)
from austeer.exporter.fold import fold_rows, round_once
from austeer.exporter.plan import FOLDABLE_DTYPES, TensorEdit
from austeer.exporter.settings import StoredAs

_NARROW = ("F8", "F6", "F4")  # starts of float dtypes that numpy has not
_DTYPE_KEYS = {"dtype", "torch_dtype"}  # of transformers 5 and 4
_ALIGNMENT = 8

Array = np.ndarray[Any, np.dtype[Any]]
Edits = Mapping[str, Sequence[TensorEdit]]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the base, and the dtype it gets."""

    entry: TensorEntry
    dtype: str

    @property
    def size(self) -> int:
        if self.dtype == self.entry.dtype:
            return self.entry.size
        return self.entry.size // self.entry.numpy_dtype.itemsize * DTYPES[self.dtype].itemsize


def rewrite_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    edits: Edits,
    stored: StoredAs,
    check: Callable[[], None] | None = None,
) -> Copied:
    """Write the folded checkpoint into `folder` in new weight files.

    The result is that of converting the base first and folding then. Shards keep the base's
    order of tensors; without a largest size they hold what the base's held.

    Args:
        checkpoint: the base.
        folder: an existing directory.
        edits: edits of each touched tensor, by stored name.
        stored: dtype and size of shards.
        check: runs beside the writing; what it raises ends that.

    Raises:
        RouteError: a value leaves the range of the new dtype, or a tensor cannot get it.
        ModelError: a file of the base cannot be read.
        OSError: the copy cannot be written.
    """
    config = read_json(checkpoint.root / "config.json", ModelError, "")
    shards = _shards(checkpoint, stored, _new_dtypes(checkpoint, config, stored.dtype))
    names = _file_names(shards, stored)
    metadata = {
        file: {
            key: text for key, text in read_metadata(file).items() if is_writable([key, text])
        }
        for file in checkpoint.files
    }
    tasks: list[Callable[[Event], int]] = [
        partial(_write_shard, folder / name, tensors, metadata, edits)
        for name, tensors in zip(names, shards, strict=True)
    ]
    if check is not None:
        tasks.insert(0, lambda _: check() or 0)
    copied = copy_companions(checkpoint, folder, index=False)
    changed = sum(run_in_threads(tasks))
    if names != [SINGLE]:
        _write_index(checkpoint, folder, names, shards)
        names.append(INDEX)
    if stored.dtype is not None:
        refuse_unwritable(config, checkpoint.root)
        write_json(folder / "config.json", name_dtype(config, stored.dtype))
    return Copied(tuple(sorted([*names, *copied])), changed)


def _new_dtypes(
    checkpoint: Checkpoint, config: Mapping[str, Any], dtype: str | None
) -> dict[str, str]:
    """The dtype that each tensor gets, by stored name."""
    if dtype is None:
        return {entry.name: entry.dtype for entry in checkpoint.values()}
    for entry in checkpoint.values():
        if entry.dtype.startswith(_NARROW):
            raise RouteError(
                f"{entry.file}: {entry.name} is stored as {entry.dtype}, which is not "
                f"converted to {dtype}; leave the dtype out, or convert the base first"
            )
    row = architecture_of(config.get("model_type"))
    return {entry.name: new_dtype(entry, dtype, row) for entry in checkpoint.values()}


def new_dtype(entry: TensorEntry, dtype: str, row: Architecture) -> str:
    """The stored dtype of a tensor where a checkpoint gets the torch dtype `dtype`.

    What a model in half precision keeps in float32 stays as the base has it.
    """
    if entry.dtype not in FOLDABLE_DTYPES or row.stays_wide(entry.name, dtype):
        return entry.dtype
    return STORED_DTYPES[dtype]


def _shards(
    checkpoint: Checkpoint, stored: StoredAs, dtypes: Mapping[str, str]
) -> list[list[_Tensor]]:
    """The tensors of each new file."""
    shards: list[list[_Tensor]] = []
    filled, file, most = 0, None, stored.max_shard_size
    for entry in sorted(checkpoint.values(), key=lambda entry: (entry.file, entry.start)):
        tensor = _Tensor(entry, dtypes[entry.name])
        if most is None:
            full = entry.file != file
        else:
            full = not shards or (filled > 0 and filled + tensor.size > most)
        if full:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, file = filled + tensor.size, entry.file
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    return [sorted(shard, key=lambda tensor: -_item_size(tensor.dtype)) for shard in shards]


def _item_size(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else 1


def _file_names(shards: Sequence[Sequence[_Tensor]], stored: StoredAs) -> list[str]:
    if stored.max_shard_size is None:
        return [shard[0].entry.file.name for shard in shards]
    if len(shards) == 1:
        return [SINGLE]
    count = len(shards)
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _write_shard(
    path: Path,
    tensors: Sequence[_Tensor],
    metadata: Mapping[Path, dict[str, str]],
    edits: Edits,
    stopped: Event,
) -> int:
    header: dict[str, Any] = {}
    for file in sorted({tensor.entry.file for tensor in tensors}):
        header.setdefault("__metadata__", {"format": "pt"}).update(metadata[file])
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        header[tensor.entry.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.entry.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    changed = 0
    with path.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for data, count in _data(tensor, edits.get(tensor.entry.name, ())):
                stream.write(data)
                changed += count
                if stopped.is_set():
                    return changed
    return changed


def _data(tensor: _Tensor, edits: Sequence[TensorEdit]) -> Iterator[tuple[memoryview, int]]:
    """The new bytes of a tensor, in blocks, each with how many values the fold changed."""
    entry = tensor.entry
    if entry.dtype == tensor.dtype and not edits:
        # Bytes, whatever they mean.
        entry = dataclasses.replace(entry, dtype="U8", shape=(entry.size,))
    with entry.file.open("rb", buffering=0) as stream:
        for first, rows in read_rows(entry, stream):
            out = _converted(rows, tensor) if tensor.dtype != tensor.entry.dtype else rows
            changed = fold_rows(out, first, edits, entry.file) if edits else 0
            yield out.reshape(-1).view(np.uint8).data, changed


def _converted(rows: Array, tensor: _Tensor) -> Array:
    dtype = DTYPES[tensor.dtype]
    if tensor.entry.dtype == "F64":
        out = round_once(rows, dtype)
    else:
        with np.errstate(over="ignore"):
            out = rows.astype(dtype)
    if (np.isfinite(rows) & ~np.isfinite(out)).any():
        raise RouteError(
            f"{tensor.entry.name}: a value leaves the range of {tensor.dtype}; keep "
            f"{tensor.entry.dtype}, or choose bfloat16"
        )
    return out


def _write_index(
    checkpoint: Checkpoint,
    folder: Path,
    names: Sequence[str],
    shards: Sequence[Sequence[_Tensor]],
) -> None:
    sizes = sum(tensor.size for shard in shards for tensor in shard)
    weight_map = {
        tensor.entry.name: name
        for name, shard in zip(names, shards, strict=True)
        for tensor in shard
    }
    metadata = index_metadata(checkpoint.root) | {"total_size": sizes}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def name_dtype(values: Any, dtype: str | None) -> Any:
    """A parsed config with another dtype wherever it names one, or none for None."""
    if isinstance(values, list):
        return [name_dtype(value, dtype) for value in values]
    if not isinstance(values, dict):
        return values
    named = {key: name_dtype(value, dtype) for key, value in values.items()}
    for key in _DTYPE_KEYS & named.keys():
        if isinstance(named[key], str):
            named[key] = dtype
    return named
