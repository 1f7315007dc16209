"""The safetensors weights of a model directory, in one file or in shards with an index."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from austeer.adapters._errors import ModelError
from austeer.adapters._files import read_json
from austeer.adapters.tensors import TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"


class Checkpoint(Mapping[str, TensorEntry]):
    """The tensors of a model directory by name; reads headers, never the model.

    Raises:
        ModelError: no safetensors weights, or a file that is truncated or malformed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files, places = _weight_files(root)
        self._entries: dict[str, TensorEntry] = {}
        for file in self.files:
            for name, entry in read_header(file).items():
                if name in self._entries:
                    raise ModelError(
                        f"{root}: tensor {name} stands in two shards "
                        f"({self._entries[name].file.name}, {file.name}); fetch the model again"
                    )
                self._entries[name] = entry
        # Converters leave names of shared tensors that no shard has; what is there is elsewhere
        # only in a damaged index, which loaders that seek by it stumble over.
        for name, shard in places.items():
            found = self._entries.get(name)
            if found is not None and found.file.name != shard:
                raise ModelError(
                    f"{root / INDEX}: says that tensor {name} is in {shard}, it is in "
                    f"{found.file.name}; fetch the model again"
                )

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, names: tuple[str, ...]) -> TensorEntry | None:
        """The first of `names` that exists."""
        return next((self._entries[name] for name in names if name in self._entries), None)


def _weight_files(root: Path) -> tuple[list[Path], dict[str, str]]:
    """The files, and which of them an index says each tensor is in."""
    index, single = root / INDEX, root / SINGLE
    # transformers looks for the single file first: where both stand, read what it reads.
    if single.is_file():
        return [single], {}
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
    if files := sorted(path.name for path in root.glob("*.gguf")):
        raise ModelError(f"{root}: has only GGUF weights; to merge into them, name {files[0]}")
    raise ModelError(
        f"{root}: expected {SINGLE} or {INDEX}, found no weights; download the whole model"
    )


def _indexed_files(index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json(index, ModelError, "fetch the model again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            f"{index}: expected JSON with a weight_map, could not read one; "
            "fetch the model again"
        )
    for name in weight_map.values():
        if not _is_shard_name(name):
            raise ModelError(
                f"{index}: shard {name!r} is not a plain file name that ends in {_SUFFIX}; "
                "refused"
            )
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (index.parent / name).is_file():
            raise ModelError(f"{index}: shard {name} is missing; download the whole model")
    return [index.parent / name for name in names], weight_map


def _is_shard_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()
        and name.endswith(_SUFFIX)
        and Path(name).name == name
        and len(os.fsencode(name)) < 256
    )
