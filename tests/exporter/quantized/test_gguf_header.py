"""GGUF headers: what is read off them, and that no header does more than end in one line."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from austeer.adapters import AusteerError, ModelError
from austeer.exporter.quantized.gguf_file import is_gguf, read_gguf
from austeer.exporter.quantized.gguf_header import read_gguf_header

SETTINGS = {
    "general.name": "ünicode",
    "llama.context_length": 7,
    "tokenizer.ggml.merges": ["a b", "c d"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = {
        "blk.0.ffn_down.weight": (np.ones((4, 64), np.float32), "Q8_0"),
        "blk.1.ffn_down.weight": (np.ones((3, 5), np.float32), "F16"),
        "odd": (np.ones((2, 3, 4), np.float32), "F32"),
    }
    return write_gguf(
        tmp_path_factory.mktemp("gguf") / "a.gguf", "llama", weights, SETTINGS
    ).path


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("gguf") / "broken.gguf"

    def write(data: bytes) -> Path:
        path.write_bytes(data)
        return path

    return write


def test_what_is_read(whole: Path) -> None:
    header = read_gguf_header(whole)
    assert header.settings == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "general.name": "ünicode",
        "llama.context_length": 7,
    }
    assert [(t.number, t.shape) for t in header.tensors] == [
        (8, (4, 64)),
        (1, (3, 5)),
        (0, (2, 3, 4)),
    ]
    file = read_gguf(whole)
    assert (file.architecture, file.layers, file.data_start) == ("llama", 2, header.size)
    found = file.tensors["odd"]
    assert found.kind == "F32" and found.start + found.size <= whole.stat().st_size
    (values,) = found.fields(found.read(whole))
    assert values.shape == (2, 3, 4) and (values == 1).all()


def test_names() -> None:
    assert is_gguf("a/b.GGUF") and is_gguf(Path("b.gguf"))
    assert not is_gguf("a.gguf/model") and not is_gguf("gguf")


def test_every_truncation_is_one_line(whole: Path, broken: Any) -> None:
    data = whole.read_bytes()
    end = read_gguf(whole).tensors["odd"]
    for length in range(end.start + end.size):
        with pytest.raises(ModelError, match="not a whole GGUF file") as caught:
            read_gguf(broken(data[:length]))
        assert "\n" not in str(caught.value)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_header_is_a_traceback(whole: Path, broken: Any, data: st.DataObject) -> None:
    good = whole.read_bytes()
    size = read_gguf_header(whole).size
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, size - 8))
        new = data.draw(st.binary(min_size=1, max_size=8))
        bad[at : at + len(new)] = new
    path = broken(bytes(bad))
    try:
        file = read_gguf(path)
    except AusteerError as error:
        assert "\n" not in str(error)
        return
    places = sorted((t.start, t.start + t.size) for t in file.tensors.values())
    assert all(a[1] <= b[0] for a, b in pairwise(places))
    assert all(file.data_start <= start <= stop <= len(bad) for start, stop in places)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: b"GGML" + d[4:], "does not begin with GGUF"),
        (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "version 1, expected 2 or 3"),
        (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "big-endian"),
        (lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "claims 1152921504606846976"),
        (lambda d: d[:16] + struct.pack("<Q", 1 << 40) + d[24:], "claims 1099511627776"),
        (lambda d: d[:24] + struct.pack("<Q", 1 << 63) + d[32:], "claims 9223372036854775808"),
        (lambda d: d.replace(b"odd", b"o\xffd"), "utf-8"),
        (lambda d: d.replace(b"llama.block_count", b"llama.block_cnunt"), "number of layers"),
        (lambda d: d.replace(b"blk.1", b"blk.0"), "two tensors have one name"),
    ],
)
def test_lies_are_named(whole: Path, broken: Any, change: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read_gguf(broken(change(whole.read_bytes())))


def test_arrays_in_arrays_end(broken: Any) -> None:
    array = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    with pytest.raises(ModelError, match="a value of type 9"):
        read_gguf(broken(head + array + bytes(600)))


def test_tensors_over_each_other_are_refused(tmp_path: Path) -> None:
    weights = {name: (np.ones((4, 32), np.float32), "F32") for name in "ab"}
    path = write_gguf(tmp_path / "a.gguf", "llama", weights).path
    data = bytearray(path.read_bytes())
    at = data.rindex(struct.pack("<Q", 512))  # the second tensor's offset
    data[at : at + 8] = struct.pack("<Q", 32)
    path.write_bytes(data)
    with pytest.raises(ModelError, match="a ends at byte"):
        read_gguf(path)


def test_rows_of_broken_blocks_are_refused(tmp_path: Path) -> None:
    weights = {"a": (np.ones((4, 64), np.float32), "Q8_0")}
    path = write_gguf(tmp_path / "a.gguf", "llama", weights).path
    data = path.read_bytes().replace(struct.pack("<QQ", 64, 4), struct.pack("<QQ", 40, 4))
    path.write_bytes(data)
    with pytest.raises(ModelError, match="no whole Q8_0 blocks"):
        read_gguf(path)


def test_a_file_without_tensors_is_one_line(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "vocabulary.gguf", "llama", {}).path
    with pytest.raises(ModelError, match="expected a model, found no tensors"):
        read_gguf(path)
