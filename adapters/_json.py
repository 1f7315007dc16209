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

# With these bounds what is read takes some 0.5 GB, its text included (measured). The index
# of a model of 60 layers with 384 quantized experts has 3.2 * 10^7 bytes and 6 * 10^5 values.
MAX_BYTES = 100_000_000  # the longest header that safetensors itself reads
_MAX_WIDE = 1 << 25  # beyond ASCII a character takes up to four bytes, in the text and parsed
_MAX_SEPARATORS = 2_000_000  # a key and its value take some 500 bytes, and as few as 7 of text
_MAX_CONTAINERS = 2_000_000  # each takes up to a hundred bytes, and as few as two of the text
_MAX_DEPTH = 64


class TooLargeError(ValueError):
    """Beyond a limit of ours: the text may be whole, and good JSON."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}, a limit of austeer's own")


def parse_json(text: str, *, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: what was read.
        unique: refuse objects that name a key twice, of which others may take the first.

    Raises:
        TooLargeError: out of bounds of size.
        ValueError: not JSON, or nested too deeply.
    """
    _check_size(text)
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    # Deeper ones parse here, but not where the stack is fuller, and no library can write them.
    if _deeper_than(value, _MAX_DEPTH):
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    return value


def _check_size(text: str) -> None:
    if len(text) > MAX_BYTES:
        raise TooLargeError(f"longer than {MAX_BYTES} characters")
    if len(text) > _MAX_WIDE and not (text.isascii() and "\\u" not in text):
        raise TooLargeError(f"not plain ASCII, and longer than {_MAX_WIDE} characters")
    if text.count(",") + text.count(":") > _MAX_SEPARATORS:
        raise TooLargeError(f"more than {_MAX_SEPARATORS} commas and colons")
    if text.count("[") + text.count("{") > _MAX_CONTAINERS:
        raise TooLargeError(f"more than {_MAX_CONTAINERS} lists and objects")


def read_text(path: Path) -> str:
    """A small text file (UTF-8).

    Raises:
        OSError: no regular file, or it cannot be read.
        TooLargeError: too long.
        ValueError: not UTF-8.
    """
    # To open a pipe waits for its writer, and a device need not end.
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if facts.st_size > MAX_BYTES:
        raise TooLargeError(f"longer than {MAX_BYTES} bytes")
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
