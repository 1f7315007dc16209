"""JSON from strangers: what is read, and each bound that keeps it small."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hostile import BOMB, attacked, json_values, memory_limit
from hypothesis import given
from hypothesis import strategies as st

from austeer.adapters._json import MAX_BYTES, TooLargeError, is_writable, parse_json, read_text


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
    "many keys": "{" + '"k":0,' * 1_000_001 + '"k":0}',
    "many values": "[" + "0," * 2_000_001 + "0]",
    "wide": '"é' + " " * (1 << 25) + '"',
    "wide once read": r'"\ud83d' + " " * (1 << 25) + '"',
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


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True])
def test_the_largest_text_stays_below_a_gigabyte(tmp_path: Path, wide: bool) -> None:
    """The most memory that was found: many keys, as long as allowed, with values of text."""
    count, first = 999_000, "\U0001f600" if wide else "a"
    rest = "x" * (3 if wide else 40)
    path = tmp_path / "large.json"
    pairs = (
        f'"{first}{number:06}{rest}":"{first}{number:06}{rest}"' for number in range(count)
    )
    path.write_text("{" + ",".join(pairs) + "}", encoding="utf-8")
    with memory_limit(1 << 30):
        assert len(parse_json(read_text(path), unique=True)) == count
    if wide:
        path.write_text(first + " " * (MAX_BYTES - 8), encoding="utf-8")
        with memory_limit(1 << 30), pytest.raises(TooLargeError, match="not plain ASCII"):
            parse_json(read_text(path))


def test_the_index_of_a_very_large_model_is_read() -> None:
    """64 layers of 256 experts, quantized by bitsandbytes: a little beyond the largest."""
    states = ("absmax", "nested_absmax", "nested_quant_map", "quant_map")
    parts = ("", *(f".{state}" for state in states), ".quant_state.bitsandbytes__nf4")
    names = (
        f"language_model.model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight{part}"
        for layer in range(64)
        for expert in range(256)
        for kind in ("gate", "up", "down")
        for part in parts
    )
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00163.safetensors")}
    text = json.dumps(index, indent=2)
    assert len(text) > 1 << 25
    assert parse_json(text) == index


@pytest.mark.parametrize("name", ["many lists", "many keys", "many values", "long", "wide"])
def test_limits_of_size_are_called_ours(name: str) -> None:
    with pytest.raises(TooLargeError, match=r", a limit of austeer's own$"):
        parse_json(BOMBS[name])


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
