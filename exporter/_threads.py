"""Runs file work in threads: the kernel copies, reads and syncs with one core for each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event
from typing import TypeVar

T = TypeVar("T")

_MOST = 4


def run_in_threads(tasks: Sequence[Callable[[Event], T]]) -> list[T]:
    """Results of all tasks, in their order.

    Args:
        tasks: each is given an event, and should end early once that is set.

    Raises:
        BaseException: what the first task to fail raised; the others were told to stop.
    """
    stopped = Event()
    with ThreadPoolExecutor(_MOST) as pool:
        try:
            futures = [pool.submit(task, stopped) for task in tasks]
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]
