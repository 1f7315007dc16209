"""Several processes, one result: who takes which batch, and sums over all of them.

The processes speak when they start and when they end, and then about a few megabytes at most.
Gloo carries that whatever device the models run on, and unlike NCCL it reports a peer that
died as an error that can be told to the user.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from austeer.adapters._errors import DistributedError

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that share a piece of work; one alone without a process group.

    Attributes:
        rank: number of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads and writes what is everyone's."""
        return self.rank == 0

    def tell(self, value: Any) -> Any:
        """The value (JSON) that the first process gives; the others' own is ignored.

        Raises:
            DistributedError: another process stopped.
        """
        if self.size == 1:
            return value
        data = json.dumps(value).encode() if self.is_first else b""
        with _peers():
            length = torch.tensor([len(data)], device=_device())
            dist.broadcast(length, 0)
            text = torch.empty(int(length), dtype=torch.uint8, device=_device())
            if self.is_first:
                text.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(text, 0)
        return json.loads(text.cpu().numpy().tobytes())

    def check_equal(self, value: dict[str, Any]) -> None:
        """Refuse processes that were started with something else than the first.

        Raises:
            DistributedError: `value` (JSON) differs between processes, or one stopped.
        """
        first = self.tell(value)
        same = json.loads(json.dumps(value))
        differing = [key for key in first if first[key] != same.get(key)]
        worst = self.total(np.array([len(differing)]))[0]
        if differing:
            raise DistributedError(
                f"process {self.rank}: its {' and '.join(differing)} differ from those of "
                "process 0; start all processes with the same command"
            )
        if worst:
            raise DistributedError(
                "another process has other options; start all with the same command"
            )

    def total(self, values: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
        """Sum of an array over all processes.

        Raises:
            DistributedError: another process stopped.
        """
        if self.size == 1:
            return values
        with _peers():
            summed = torch.from_numpy(values.copy()).to(_device())
            dist.all_reduce(summed)
        return summed.cpu().numpy()


def processes() -> Processes:
    """Those of the process group, if torch.distributed is initialized; else this one alone."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()


@contextmanager
def launched(timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
    """Join the processes that torchrun or accelerate started; leave them at the end.

    Does nothing where there is a process group already, or no launcher.

    Args:
        timeout: how long to wait for a process before it counts as stopped.

    Raises:
        DistributedError: the processes cannot meet.
    """
    if launched_size() == 1 or dist.is_initialized():
        yield processes()
        return
    try:
        dist.init_process_group("gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise DistributedError(
            f"cannot join the other processes at {at} ({_reason(error)}); "
            "start them with torchrun or accelerate launch"
        ) from error
    try:
        yield processes()
    finally:
        dist.destroy_process_group()


def launched_size() -> int:
    """Number of processes that a launcher (torchrun, accelerate) says it started, else 1.

    Raises:
        DistributedError: WORLD_SIZE is no number.
    """
    if "RANK" not in os.environ or not dist.is_available():
        return 1
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise DistributedError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']!r}: expected the number of processes; "
            "start them with torchrun or accelerate launch"
        ) from None


def local_device(name: str) -> str:
    """`cuda` as the device of this process, where a launcher numbered the processes."""
    number = os.environ.get("LOCAL_RANK", "")
    numbered = name in ("cuda", "xpu", "npu") and number.isdecimal() and launched_size() > 1
    return f"{name}:{number}" if numbered else name


@contextmanager
def _peers() -> Iterator[None]:
    """A collective that fails means that a peer is gone."""
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            f"another process of this run stopped or hangs ({_reason(error)}); "
            "see its own message, then start the same command again to resume"
        ) from error


def _device() -> torch.device:
    """Where tensors must lie: the group of an embedding program may have NCCL only."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split())[:160] if lines else type(error).__name__
