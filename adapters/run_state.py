"""State of a localization on disk: counters, and the pairs in them, always in one file.

Each process writes one file of its own, atomically. A file holds sums over the pairs that its
bitmap names; files merge by addition where their pairs are disjoint, so that a run may go on
with another number of processes.
"""

from __future__ import annotations

import base64
import json
import logging
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from austeer.adapters._errors import FitError, ModelError
from austeer.adapters._files import publish_file
from austeer.adapters.distributed import Processes
from austeer.adapters.momentum import LayerValues, MomentumCounter
from austeer.adapters.ranking import Counts
from austeer.adapters.sites import Component
from austeer.adapters.tensors import read_header

notice = logging.getLogger("austeer")

FORMAT = "austeer-localization-state"
FORMAT_VERSION = "1"
_SUFFIX = ".safetensors"
# Writing the state takes at most one part in so many of the time.
_WRITING_SHARE = 20

Tensors = dict[str, np.ndarray[Any, np.dtype[Any]]]


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


class RunState:
    """Counters of a localization, the pairs counted so far, and both on disk now and then.

    Args:
        counters: empty counters of each component; `add` fills them.
        purpose: what the state belongs to.
        folder: where it is kept; None for nowhere.
        every: seconds between two files; 0 for one after each batch.
        group: the processes that share the pairs.

    Raises:
        FitError: the folder holds the state of another run, or a damaged one.
        DistributedError: another process stopped.
    """

    def __init__(
        self,
        counters: Mapping[Component, MomentumCounter],
        purpose: Purpose,
        folder: Path | None,
        every: float,
        group: Processes,
    ) -> None:
        self.counters = counters
        self._folder, self._every, self.group = folder, every, group
        self._name = f"{group.rank}-{secrets.token_hex(4)}{_SUFFIX}"
        self._counted = np.zeros(purpose.pairs, dtype=bool)
        self._purpose = purpose
        self._absorbed: list[Path] = []
        self._adding = self._unsaved = False
        self._due = time.monotonic() + every
        self.group.check_equal(dict(purpose.facts))
        self._begin()

    @property
    def token_budget(self) -> int:
        """Tokens of a batch: those of the run that goes on, or the ones asked for."""
        return self._purpose.token_budget

    def add(self, numbers: Sequence[int], values: Mapping[Component, LayerValues]) -> None:
        """Count the pairs with these numbers, once; write the state if it is time to.

        Raises:
            OutputError: the state cannot be written.
        """
        # An interrupt may end this half-way; what is in memory is then worth nothing.
        self._adding = True
        for component, layers in values.items():
            self.counters[component].update_layers(layers)
        self._counted[list(numbers)] = True
        self._adding, self._unsaved = False, True
        if self._folder is not None and time.monotonic() >= self._due:
            self.save()

    def save(self) -> None:
        """Write this process's file, if it has something new.

        Raises:
            OutputError: it cannot be written.
        """
        if self._folder is None or not self._unsaved or self._adding:
            return
        started = time.monotonic()
        _write(self._folder / self._name, self._tensors(), self._purpose)
        self._unsaved = False
        # Only now: their sums are in the file that was just written.
        while self._absorbed:
            self._absorbed.pop().unlink(missing_ok=True)
        now = time.monotonic()
        self._due = now + (self._every and max(self._every, _WRITING_SHARE * (now - started)))

    def totals(self) -> dict[Component, Counts]:
        """Sums over the pairs of all processes, the same bits in each.

        Raises:
            DistributedError: another process stopped.
            FitError: a sum is not finite.
        """
        if self.group.size == 1:
            return {kind: counter.counts() for kind, counter in self.counters.items()}
        # Before waiting for the others, one of which may have stopped.
        self.save()
        found = {}
        for kind, counter in self.counters.items():
            signs, limbs = counter.state()
            whole = MomentumCounter(*signs.shape[1:])
            whole.add_state(self.group.total(signs), self.group.total(limbs), 0)
            found[kind] = whole.counts()
        return found

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write the state when the work inside ends early, whatever the reason."""
        try:
            yield
        except BaseException:
            with suppress(Exception):
                self.save()
            raise

    def _begin(self) -> None:
        """The first process reads what there is; all learn which pairs are done."""
        told: dict[str, Any] = {}
        if self.group.is_first:
            try:
                self._read()
                told["done"] = base64.b64encode(np.packbits(self._counted).tobytes()).decode()
                told["token_budget"] = self._purpose.token_budget
            except FitError as error:
                told["error"] = str(error)
        told = self.group.tell(told)
        if "error" in told:
            raise FitError(told["error"])
        bits = np.frombuffer(base64.b64decode(told["done"]), dtype=np.uint8)
        self.done: Bool[np.ndarray, " N"] = np.unpackbits(
            bits, count=self._purpose.pairs
        ).astype(bool)
        self._purpose = Purpose(
            self._purpose.facts, self._purpose.pairs, int(told["token_budget"])
        )

    def _read(self) -> None:
        if self._folder is None or not self._folder.is_dir():
            return
        for leftover in self._folder.glob(f".*{_SUFFIX}.partial-*"):
            leftover.unlink(missing_ok=True)
        found = [_Part.open(path, self._purpose) for path in self._folder.glob(f"*{_SUFFIX}")]
        # The first process's file grows to hold the others'. Where a kill came before these
        # were removed, or a second run wrote here, pairs overlap: they are counted once.
        for part in sorted(found, key=lambda part: (-int(part.pairs.sum()), part.path)):
            if not (part.pairs & self._counted).any():
                part.add_to(self.counters)
                self._counted |= part.pairs
                self._purpose = part.purpose
                self._unsaved = len(found) > 1
            self._absorbed.append(part.path)
        done = int(self._counted.sum())
        if done:
            notice.warning("resumed: %d of %d pairs were done", done, self._purpose.pairs)

    def _tensors(self) -> Tensors:
        found: Tensors = {"pairs": np.packbits(self._counted)}
        for component, counter in self.counters.items():
            signs, limbs = counter.state()
            found[f"{component.value}.signs"] = signs
            found[f"{component.value}.limbs"] = limbs
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One file of a state, read and checked."""

    path: Path
    pairs: Bool[np.ndarray, " N"]
    purpose: Purpose

    @classmethod
    def open(cls, path: Path, wanted: Purpose) -> _Part:
        metadata, tensors = _load(path)
        if metadata.get("format_version") != FORMAT_VERSION:
            raise _damaged(path, f"format version {metadata.get('format_version')!r}")
        try:
            facts = json.loads(metadata["facts"])
            budget = int(metadata["token_budget"])
            size = int(metadata["pairs"])
        except (KeyError, ValueError) as error:
            raise _damaged(path, f"malformed description, {error}") from error
        _check_facts(path, facts, wanted.facts)
        if metadata.get("checksum") != _checksum(tensors):
            raise _damaged(path, "its checksum does not match")
        pairs = np.unpackbits(tensors["pairs"], count=size).astype(bool)
        return cls(path, pairs, Purpose(facts, size, budget))

    def add_to(self, counters: Mapping[Component, MomentumCounter]) -> None:
        # Read again, so that memory holds the counters of one file at a time.
        _, tensors = _load(self.path)
        for component, counter in counters.items():
            signs, limbs = (tensors[f"{component.value}.{name}"] for name in ("signs", "limbs"))
            counter.add_state(signs, limbs, int(self.pairs.sum()))


def _write(path: Path, tensors: Tensors, purpose: Purpose) -> None:
    from safetensors.numpy import save_file

    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "facts": json.dumps(dict(purpose.facts), sort_keys=True),
        "pairs": str(purpose.pairs),
        "token_budget": str(purpose.token_budget),
        "checksum": _checksum(tensors),
    }
    with publish_file(path) as work:
        save_file(tensors, work, metadata=metadata)


def _load(path: Path) -> tuple[dict[str, str], Tensors]:
    from safetensors import SafetensorError, safe_open

    try:
        tensors = {name: entry.read() for name, entry in read_header(path).items()}
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (ModelError, SafetensorError, OSError) as error:
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
