"""State of a localization on disk: counters, and the pairs in them, always in one file.

Each process writes one file of its own, atomically. A file holds sums over the pairs that its
bitmap names; files merge by addition where their pairs are disjoint, so that a run may go on
with another number of processes.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from austeer.adapters._errors import FitError
from austeer.adapters.localization.distributed import Processes
from austeer.adapters.localization.momentum import LayerValues, MomentumCounter
from austeer.adapters.localization.ranking_file import Counts
from austeer.adapters.localization.state_file import (
    Purpose,
    StatePart,
    remove_unfinished,
    state_files,
    state_name,
    write_state,
)
from austeer.adapters.sites import Component
from austeer.adapters.tensors import Tensors

notice = logging.getLogger("austeer")

# Writing the state takes at most one part in so many of the time.
_WRITING_SHARE = 20


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
        self._name = state_name(group.rank)
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
        write_state(self._folder / self._name, self._tensors(), self._purpose)
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
            FitError: a sum is not finite, or a pair was not counted exactly once.
        """
        if self.group.size > 1:
            # Before waiting for the others, one of which may have stopped.
            self.save()
        self._check_complete()
        if self.group.size == 1:
            return {kind: counter.counts() for kind, counter in self.counters.items()}
        found = {}
        for kind, counter in self.counters.items():
            signs, limbs = counter.state()
            whole = MomentumCounter(*signs.shape[1:])
            whole.add_state(self.group.total(signs), self.group.total(limbs), 0)
            found[kind] = whole.counts()
        return found

    def _check_complete(self) -> None:
        times = self.group.total(self._counted.astype(np.int64))
        wrong = np.flatnonzero(times != 1)
        if len(wrong):
            raise FitError(
                f"localize: pair {wrong[0]} was counted {times[wrong[0]]} times (and "
                f"{len(wrong) - 1} others not once); delete the state and start anew"
            )

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
        remove_unfinished(self._folder)
        found = [StatePart.open(path, self._purpose) for path in state_files(self._folder)]
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
