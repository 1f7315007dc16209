"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """The progress of work that nobody watches."""
