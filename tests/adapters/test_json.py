"""JSON from strangers: what is read, and each bound that keeps it small."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hostile import BOMB, attacked, json_values, memory_limit
from hypothesis import given
from hypothesis import strategies as st

from austeer.adapters._json import MAX_BYTES, is_writable, parse_json, read_text


@attacked
@given(json_values)
def test_what_json_can_hold_is_read_as_it_is(value: object) -> None:
    assert repr(parse_json(json.dumps(value))) == repr(json.loads(json.dumps(value)))


@attacked
@given(st.text() | st.text(alphabet='[]{}":,0e-\\u', max_size=60))
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    try:
        wanted = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):
            parse_json(text)
    else:
        assert repr(parse_json(text)) == repr(wanted)


BOMBS = {
    "lists": BOMB,
    "objects": '{"a":' * 100_000,
    "closed": "[" * 500 + "]" * 500,
    "a little too deep": "[" * 65 + "]" * 65,
    "digits": "9" * 100_000,
    "many lists": "[" + "[]," * 2_000_001 + "0]",
    "long": " " * (MAX_BYTES + 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name: str) -> None:
    with memory_limit(1 << 30), pytest.raises(ValueError) as caught:
        parse_json(BOMBS[name])
    assert "\n" not in str(caught.value)


def test_ordinary_depth_is_read() -> None:
    value = parse_json("[" * 64 + "]" * 64)
    for _ in range(63):
        (value,) = value
    assert value == []


def test_a_text_as_long_as_allowed_stays_below_a_gigabyte() -> None:
    # The most memory for its length: characters beyond Latin 1, each an object of its own.
    text = "[" + '"Ā",' * ((MAX_BYTES - 8) // 5) + "0]"
    with memory_limit((1 << 30) - 10 * MAX_BYTES):
        assert len(parse_json(text)) > 6_000_000


def test_keys_that_stand_twice() -> None:
    text = '{"a": 1, "b": {"c": 1, "c": 2}}'
    assert parse_json(text) == {"a": 1, "b": {"c": 2}}
    with pytest.raises(ValueError, match="'c' stands twice"):
        parse_json(text, unique=True)


@pytest.mark.timeout(20)
def test_read_text_takes_files_only(tmp_path: Path) -> None:
    pipe, link, large = tmp_path / "pipe", tmp_path / "link", tmp_path / "large"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    for path in (pipe, link, tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_text(path)
    with large.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: it takes no place on the disk
    with pytest.raises(ValueError, match="longer than"):
        read_text(large)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), "\ud800", {"\ud800": 1}, {1, 2}]
)
def test_what_json_cannot_hold(value: object) -> None:
    assert not is_writable({"a": [value]})
    assert is_writable({"a": ["é", 1e308, None]})
