"""Files of a localization's state: sums and the pairs they are of, checked when read."""

from __future__ import annotations

import json
import re
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from austeer.adapters._errors import FitError, ModelError, OutputError
from austeer.adapters._json import parse_json
from austeer.adapters.localization.momentum import MomentumCounter
from austeer.adapters.sites import Component
from austeer.adapters.tensors import Tensors, read_tensors, write_tensors

FORMAT = "austeer-localization-state"
FORMAT_VERSION = "1"
SUFFIX = ".safetensors"
_NAME = re.compile(r"\d+-[0-9a-f]{8}\.safetensors")


def state_name(rank: int) -> str:
    """A name for one process's file, which no other has."""
    return f"{rank}-{secrets.token_hex(4)}{SUFFIX}"


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a state belongs to; one of anything else is refused.

    Attributes:
        facts: names of inputs and options, and their values or digests (JSON).
        pairs: number of pairs.
        token_budget: tokens of a batch; a resumed run keeps to it, so that its batches, and
            with them the last bits of its sums, are those of one undisturbed run.
    """

    facts: Mapping[str, Any]
    pairs: int
    token_budget: int


def state_files(folder: Path) -> list[Path]:
    """The files of a state, by their names: whatever else lies in the folder is not ours."""
    return [path for path in folder.glob(f"*{SUFFIX}") if _NAME.fullmatch(path.name)]


def remove_unfinished(folder: Path) -> None:
    """Remove what a kill left of files that were being written."""
    for path in folder.glob(f".*{SUFFIX}.partial-*"):
        if _NAME.match(path.name, 1):
            path.unlink(missing_ok=True)


def discard_state(folder: Path) -> None:
    """Remove the files of a state, and its folder if nothing else lies in it.

    Raises:
        OutputError: a file cannot be removed.
    """
    try:
        for path in state_files(folder):
            path.unlink(missing_ok=True)
        remove_unfinished(folder)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise OutputError(f"{folder}: cannot remove this state ({error.strerror})") from error


@dataclass(frozen=True, slots=True, eq=False)
class StatePart:
    """One file of a state, read and checked."""

    path: Path
    pairs: Bool[np.ndarray, " N"]
    purpose: Purpose

    @classmethod
    def open(cls, path: Path, wanted: Purpose) -> StatePart:
        """Read and check a file.

        Raises:
            FitError: damaged, or the state of another run.
        """
        metadata, tensors = _load(path)
        if metadata.get("format_version") != FORMAT_VERSION:
            raise _damaged(path, f"format version {metadata.get('format_version')!r}")
        try:
            facts = parse_json(metadata["facts"])
            budget = int(metadata["token_budget"])
            size = int(metadata["pairs"])
        except (KeyError, ValueError) as error:
            raise _damaged(path, f"malformed description, {error}") from error
        if not isinstance(facts, dict) or budget < 1:
            raise _damaged(path, "malformed description")
        _check_facts(path, facts, wanted.facts)
        if metadata.get("checksum") != _checksum(tensors):
            raise _damaged(path, "its checksum does not match")
        bits = tensors.get("pairs")
        if bits is None or bits.dtype != np.uint8 or bits.shape != (-(-size // 8),):
            raise _damaged(path, "its pairs are no bitmap of that size")
        if size != wanted.pairs:
            raise _damaged(path, f"of {size} pairs, expected {wanted.pairs}")
        pairs = np.unpackbits(bits, count=size).astype(bool)
        return cls(path, pairs, Purpose(facts, size, budget))

    def add_to(self, counters: Mapping[Component, MomentumCounter]) -> None:
        """Add its sums to counters.

        Raises:
            FitError: it has none for one of them, or of other shapes.
        """
        # Read again, so that memory holds the counters of one file at a time.
        _, tensors = _load(self.path)
        for component, counter in counters.items():
            parts = []
            for name, own in zip(("signs", "limbs"), counter.state(), strict=True):
                part = tensors.get(f"{component.value}.{name}")
                if part is None or (part.shape, part.dtype) != (own.shape, own.dtype):
                    raise _damaged(self.path, f"no {name} of {component} for this model")
                parts.append(part)
            counter.add_state(parts[0], parts[1], int(self.pairs.sum()))


def write_state(path: Path, tensors: Tensors, purpose: Purpose) -> None:
    """Write one file, atomically.

    Raises:
        OutputError: it cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "facts": json.dumps(dict(purpose.facts), sort_keys=True),
        "pairs": str(purpose.pairs),
        "token_budget": str(purpose.token_budget),
        "checksum": _checksum(tensors),
    }
    write_tensors(path, tensors, metadata)


def _load(path: Path) -> tuple[dict[str, str], Tensors]:
    try:
        metadata, tensors = read_tensors(path)
    except (ModelError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if metadata.get("format") != FORMAT:
        raise _damaged(path, f"format {metadata.get('format')!r}")
    return metadata, tensors


def _checksum(tensors: Tensors) -> str:
    total = 0
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        total = zlib.crc32(f"{name}{array.dtype}{array.shape}".encode(), total)
        total = zlib.crc32(array.view(np.uint8).data, total)
    return f"crc32:{total:08x}"


def _check_facts(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        raise FitError(
            f"{path.parent}: the state of another run: made with other "
            f"{' and other '.join(differing)}; delete that folder (--restart) to start anew, "
            "or choose another output"
        )


def _damaged(path: Path, reason: str) -> FitError:
    return FitError(
        f"{path}: not a readable state of a localization ({reason}); "
        f"delete {path.parent} (--restart) to start anew"
    )
