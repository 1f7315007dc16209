"""JSON from strangers: read within bounds of size, nesting and number of values.

A small file can otherwise end in a RecursionError, or in many times its size of memory.
"""

from __future__ import annotations

import errno
import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 25  # the longest real ones, indexes of many experts, have some 2 * 10^7
_MAX_CONTAINERS = 2_000_000  # each takes up to a hundred bytes, and as few as two of the text
_MAX_DEPTH = 64


def parse_json(text: str, *, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: what was read.
        unique: refuse objects that name a key twice, of which others may take the first.

    Raises:
        ValueError: not JSON, or out of bounds.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text)} characters long, at most {MAX_BYTES} are read")
    if text.count("[") + text.count("{") > _MAX_CONTAINERS:
        raise ValueError(f"more than {_MAX_CONTAINERS} lists and objects")
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    # Deeper ones parse here, but not where the stack is fuller, and no library can write them.
    if _deeper_than(value, _MAX_DEPTH):
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    return value


def read_text(path: Path) -> str:
    """A small text file (UTF-8).

    Raises:
        OSError: no regular file, or it cannot be read.
        ValueError: too long, or not UTF-8.
    """
    # To open a pipe waits for its writer, and a device need not end.
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if facts.st_size > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} bytes")
    with path.open("rb") as stream:
        return stream.read(facts.st_size).decode("utf-8")


def is_writable(value: Any) -> bool:
    """Whether JSON can hold a value: no NaN, no infinity, no half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {twice[:80]!r} stands twice in one object")
    return found


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(inner, (dict, list)) for inner in level)
