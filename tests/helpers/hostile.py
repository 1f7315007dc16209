"""Input as an attacker would write it: valid files with something changed, and random bytes."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

BOMB = "[" * 100_000
NUMBERS = (-1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, 0.5, 1e308, float("inf"))
TEXTS = ("", "a\nb", "\x1b]0;x\x07", "\ud800", "\0", "../../etc/passwd", "x" * 300, "ſ", "٣")

# The same examples in every run; a slow one is a finding, too.
attacked = settings(
    derandomize=True,
    database=None,
    deadline=5000,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(NUMBERS)
    | st.sampled_from(TEXTS)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with up to three places below it replaced, removed, added or copied."""
    whole = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, 3))):
        container = whole
        while keys := _children(container):
            key = draw(st.sampled_from(keys))
            if not _children(container[key]) or not draw(st.integers(0, 3)):
                _change(draw, container, key)
                break
            container = container[key]
    return whole


@st.composite
def changed_leaf(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one number or text in it replaced, often by a near one."""
    whole = copy.deepcopy(value)
    container, key = draw(st.sampled_from(list(_leaves(whole))))
    old = container[key]
    near: list[Any] = [[old], None, f"{old} "]
    near += [old.lower()] if isinstance(old, str) else [-old, float(old), bool(old), str(old)]
    container[key] = draw(st.sampled_from([*near, *NUMBERS, *TEXTS]))
    return whole


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in _children(value):
        if isinstance(value[key], (dict, list)):
            yield from _leaves(value[key])
        else:
            yield value, key


@st.composite
def key_twice(draw: st.DrawFn, value: Any) -> bytes:
    """The text of a JSON value in which one object names a key again, first or last."""
    outer = draw(st.sampled_from([found for found in _objects(value) if found]))
    key = draw(st.sampled_from(list(outer)))
    again = (key, draw(st.sampled_from(list(outer.values())) | json_values))
    first = draw(st.booleans())

    def text(inner: Any) -> str:
        if isinstance(inner, list):
            return f"[{','.join(map(text, inner))}]"
        if not isinstance(inner, dict):
            return json.dumps(inner)
        pairs = list(inner.items())
        if inner is outer:
            pairs.insert(0 if first else len(pairs), again)
        return f"{{{','.join(f'{json.dumps(name)}:{text(own)}' for name, own in pairs)}}}"

    return text(value).encode()


def _objects(value: Any) -> list[dict[str, Any]]:
    below = [found for key in _children(value) for found in _objects(value[key])]
    return [value, *below] if isinstance(value, dict) else below


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def _change(draw: st.DrawFn, container: Any, key: Any) -> None:
    how = draw(st.sampled_from(["replace", "replace", "remove", "add", "copy"]))
    if how == "replace":
        container[key] = draw(json_values)
    elif how == "remove":
        del container[key]
    else:
        other = copy.deepcopy(container[key]) if how == "copy" else draw(json_values)
        if isinstance(container, list):
            container.append(other)
        else:
            container[draw(st.sampled_from([*TEXTS, f"{key}x", f" {key}"]))] = other


@st.composite
def changed_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes with up to four pieces overwritten, put in, taken out or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        stop = min(len(raw), start + draw(st.integers(0, 40)))
        middle = draw(
            st.binary(max_size=12)
            | st.sampled_from([b"\xff" * 8, b"\0", b"\xef\xbb\xbf", b'"', b"\n", b"[" * 2000])
            | st.just(raw[start:stop] * 2)
        )
        raw = raw[:start] + middle + raw[stop:]
    return raw


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return (size % 2**64).to_bytes(8, "little") + text + data


def one_line(path: Path, read: Callable[[], Any], error: type[Exception]) -> str:
    """The message of a refusal: it names the file, stays on its line and has an end."""
    try:
        read()
    except error as refusal:
        message = str(refusal)
        assert path.name in message and message.isprintable() and len(message) < 2100
        return message
    raise AssertionError(f"{path} was read")


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Let this process map no more than `more` bytes beyond what it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
