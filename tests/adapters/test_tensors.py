"""Safetensors headers: what is read, and every malformation that must be refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hostile import (
    BOMB,
    attacked,
    changed_bytes,
    changed_json,
    changed_leaf,
    key_twice,
    memory_limit,
    safetensors,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from austeer.adapters import ModelError
from austeer.adapters.tensors import (
    DTYPES,
    read_header,
    read_metadata,
    read_tensors,
    write_tensors,
)
from austeer.adapters.weights import Checkpoint

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2.0, 3.25], dtype=ml_dtypes.bfloat16),
    "c": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float16),
    "scalar": np.array(7, np.int64),
}


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(safetensors(header, data, length))


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_every_dtype_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = Checkpoint(tmp_path)
    assert set(found) == set(TENSORS) and len(found) == len(TENSORS)
    for name, tensor in TENSORS.items():
        read = found[name].read()
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert read.tobytes() == tensor.tobytes()


def test_bfloat16_of_a_torch_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    values = torch.randn(3, 5).to(torch.bfloat16)
    save_torch({"w": values}, tmp_path / "model.safetensors")
    read = Checkpoint(tmp_path)["w"].read()
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read.astype(np.float32), values.float().numpy())


def test_entry_says_where_its_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    found = Checkpoint(tmp_path)["a"]
    assert path.read_bytes()[found.start : found.start + found.size] == TENSORS["a"].tobytes()


def test_find_takes_the_first_name_that_exists(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = Checkpoint(tmp_path)
    first = found.find(("nothing", "b", "a"))
    assert first is not None and first.name == "b"
    assert found.find(("nothing",)) is None


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_truncated_anywhere(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refusal(path)


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes() + b"x")
    refusal(path)


BAD_HEADERS = {
    "not json": (b"{not json", b""),
    "not utf-8": (b"\xff\xfe{}", b""),
    "a list": ([1, 2], b""),
    "entry is a number": ({"a": 5}, b""),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
        b"\0" * 8,
    ),
    "shape of text": ({"a": entry(0, 4, ["x"])}, b"\0" * 4),  # type: ignore[list-item]
    "negative offset": ({"a": entry(-4, 0, [1])}, b""),
    "end before begin": ({"a": entry(8, 4, [1])}, b"\0" * 8),
    "negative shape": ({"a": entry(0, 4, [-1, -1])}, b"\0" * 4),
    "size and shape differ": ({"a": entry(0, 8, [1])}, b"\0" * 8),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12),
    "hole": ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"\0" * 12),
    "beyond the end": ({"a": entry(0, 400, [100])}, b"\0" * 4),
    "offset of text": ({"a": {**entry(0, 4, [1]), "data_offsets": ["0", "4"]}}, b"\0" * 4),
    "fractional offset": ({"a": {**entry(0, 4, [1]), "data_offsets": [0.5, 4]}}, b"\0" * 4),
    "infinite offset": ({"a": {**entry(0, 4, [1]), "data_offsets": [0, 1e999]}}, b"\0" * 4),
    "offset without end": (
        b'{"a":{"dtype":"F8","shape":[1],"data_offsets":[0,' + b"9" * 4300 + b"]}}",
        b"",
    ),
    "offset of 10^5 digits": (
        b'{"a":{"dtype":"F8","shape":[1],"data_offsets":[0,' + b"9" * 100_000 + b"]}}",
        b"",
    ),
    "offset is a flag": ({"a": {**entry(0, 1, [1], "U8"), "data_offsets": [0, True]}}, b"\0"),
    "shape is a flag": ({"a": {**entry(0, 1, [], "U8"), "shape": [True]}}, b"\0"),
    "shape is text": ({"a": {**entry(0, 1, [], "U8"), "shape": "1"}}, b"\0"),
    "shape is an object": ({"a": {**entry(0, 1, [], "U8"), "shape": {"1": 1}}}, b"\0"),
    "too many axes": ({"a": entry(0, 1, [1] * 33, "U8")}, b"\0"),
    "empty, and beyond any address": ({"a": entry(0, 0, [0, 2**62, 2**62])}, b""),
    "a product that never ends": ({"a": entry(0, 4, [10**4000] * 200)}, b"\0" * 4),
    "dtype is a list": ({"a": {**entry(0, 1, [1]), "dtype": ["U8"]}}, b"\0"),
    "dtype is a sentence": ({"a": entry(0, 1, [1], "F32\nerror: all is well")}, b"\0"),
    "key twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
    ),
    "offsets twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,9],"data_offsets":[0,1]}}',
        b"\0",
    ),
    "name with a line break": ({"a\nb": entry(0, 1, [1], "U8")}, b"\0"),
    "name with an escape": ({"\x1b]0;x\x07": entry(0, 1, [1], "U8")}, b"\0"),
    "half a surrogate": ({"\ud800": entry(0, 1, [1], "U8")}, b"\0"),
    "name without end": ({"x" * 10**6: entry(0, 1, [1], "U8")}, b"\0"),
    "utf-16": ('{"a": {}}'.encode("utf-16"), b""),
    "nested": (BOMB.encode(), b""),
    "nested objects": (b'{"a":' * 100_000, b""),
    "nested shape": (b'{"a":{"dtype":"U8","shape":' + BOMB.encode(), b""),
    "many lists": (b"[" + b"[]," * 2_500_000 + b"0]", b""),
    "metadata of a number": ({"__metadata__": {"format": 1}}, b""),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", BAD_HEADERS)
def test_malformed_header(tmp_path: Path, case: str) -> None:
    header, data = BAD_HEADERS[case]
    path = tmp_path / "model.safetensors"
    write_raw(path, header, data)
    with memory_limit(1 << 30):
        refusal(path)


def test_header_longer_than_any(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write((1 << 32).to_bytes(8, "little"))
        stream.truncate(1 << 40)  # sparse
    with memory_limit(1 << 30):
        message = refusal(path)
    assert "at most" in message and "corrupt" not in message


def test_header_of_more_values_than_any(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, b"{" + b'"k":0,' * 1_000_001 + b'"k":0}')
    message = refusal(path)
    assert "a limit of austeer's own" in message and "corrupt" not in message


@pytest.mark.timeout(20)
def test_pipe_or_device_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    refusal(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    refusal(path)


def test_metadata_is_read_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "é": "a\nb"})
    assert read_metadata(path) == {"format": "pt", "é": "a\nb"}
    metadata, tensors = read_tensors(path)
    assert metadata == read_metadata(path) and set(tensors) == set(TENSORS)
    save_file(TENSORS, path)
    assert read_metadata(path) == {}


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    found = read_header(path)
    os.truncate(path, found["a"].start + 3)
    with pytest.raises(ModelError, match="ends within a"):
        found["a"].read()


def test_what_was_read_can_be_written_to(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    tensor = Checkpoint(tmp_path)["a"].read()
    tensor[0, 0] = 9
    assert Checkpoint(tmp_path)["a"].read()[0, 0] == 0


VALID: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": entry(0, 24, [2, 3]),
    "b": entry(24, 30, [3], "BF16"),
    "c": entry(30, 32, [2, 1, 1], "F8_E4M3"),
}


def attack(path: Path) -> None:
    """Either a refusal, or the tensors that the header names, which tile the data."""
    try:
        metadata, entries = read_metadata(path), read_header(path)
    except ModelError as error:
        assert str(error).isprintable()
        return
    assert all(isinstance(value, str) for value in metadata.values())
    raw = path.read_bytes()
    position = start = int.from_bytes(raw[:8], "little") + 8
    header = json.loads(raw[8:start], object_pairs_hook=distinct)
    assert header.pop("__metadata__", {}) == metadata and set(header) == set(entries)
    for found in sorted(entries.values(), key=lambda found: (found.start, found.size)):
        assert found.start == position
        position += found.size
        begin, end = header[found.name]["data_offsets"]
        assert (found.start, found.size) == (start + begin, end - begin)
        assert list(found.shape) == header[found.name]["shape"]
        assert all(type(axis) is int and axis >= 0 for axis in found.shape)
        assert found.dtype == header[found.name]["dtype"]
        assert found.dtype.isascii() and found.dtype.isidentifier() and found.dtype.isupper()
        if found.dtype in DTYPES:
            tensor = found.read()
            assert (tensor.shape, tensor.nbytes) == (found.shape, found.size)
    assert position == len(raw)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@st.composite
def moved_tensors(draw: st.DrawFn) -> dict[str, Any]:
    """A header whose tensors keep their sizes, but lie elsewhere, or one in another's place."""
    header = copy.deepcopy(VALID)
    entries = [found for found in header.values() if "data_offsets" in found]
    if draw(st.booleans()):
        places = draw(st.permutations([found["data_offsets"] for found in entries]))
        for found, place in zip(entries, places, strict=True):
            found["data_offsets"] = place
    for found in entries:
        shift = draw(st.sampled_from([0, 0, 2, -2, 6, -6, 24, -24]))
        found["data_offsets"] = [offset + shift for offset in found["data_offsets"]]
    return header


@attacked
@given(header=changed_json(VALID), data=st.sampled_from([32, 32, 31, 0]))
def test_changed_headers(tmp_path: Path, header: Any, data: int) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, header, bytes(range(data)))
    attack(path)


@attacked
@given(header=changed_leaf(VALID))
def test_one_wrong_value(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, header, bytes(32))
    attack(path)


@attacked
@given(header=moved_tensors() | key_twice(VALID))
def test_tensors_elsewhere_and_keys_twice(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, header, bytes(32))
    attack(path)


@attacked
@given(raw=changed_bytes(safetensors(VALID, bytes(32))) | st.binary(max_size=64))
def test_changed_files(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    attack(path)


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1])
def test_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, {}, length=length)
    assert str(length) in refusal(path)


def test_unknown_dtype_is_refused_only_when_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, {"q": entry(0, 4, [4], "F8_E4M3")}, b"\0" * 4)
    found = read_header(path)["q"]
    with pytest.raises(ModelError, match="F8_E4M3"):
        found.read()


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found no weights"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickle_only_is_refused_unopened(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    (tmp_path / name).write_bytes(pickle.dumps(_Touch(str(marker))))
    with pytest.raises(ModelError, match=f"pickle.*{name}"):
        Checkpoint(tmp_path)
    assert not marker.exists()


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def sharded(folder: Path, weight_map: Any) -> None:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    found = Checkpoint(tmp_path)
    assert set(found) == {"a", "b"}
    np.testing.assert_array_equal(found["a"].read(), TENSORS["a"])


def test_an_index_that_swaps_shards(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    with pytest.raises(ModelError, match=r"tensor a is in two\.safetensors, it is in one\."):
        Checkpoint(tmp_path)


def test_an_index_with_a_name_that_no_shard_has(tmp_path: Path) -> None:
    """Converters that drop the second name of a shared tensor leave it in the index."""
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    assert set(Checkpoint(tmp_path)) == {"a", "b"}


def test_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelError, match=r"two\.safetensors is missing"):
        Checkpoint(tmp_path)


BAD_SHARDS = (
    *(
        "../two.safetensors",
        "/etc/passwd",
        "sub/x",
        "..",
        ".",
        "",
        3,
        None,
        ["one.safetensors"],
    ),
    *("model.safetensors.index.json", "config.json", "one.bin", "a\nb.safetensors"),
    *("\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", ".safetensors/.."),
)


@pytest.mark.parametrize("name", BAD_SHARDS, ids=repr)
def test_shard_outside_the_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    sharded(folder, {"a": "one.safetensors", "b": name})
    with pytest.raises(ModelError, match=r"index\.json: shard .* refused"):
        Checkpoint(folder)


def test_shard_that_is_no_file(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "three.safetensors"})
    shard = tmp_path / "three.safetensors"
    shard.mkdir()
    with pytest.raises(ModelError, match="missing"):
        Checkpoint(tmp_path)
    shard.rmdir()
    shard.symlink_to(shard)
    with pytest.raises(ModelError, match="missing"):
        Checkpoint(tmp_path)


INDEX = {
    "metadata": {"total_size": 30},
    "weight_map": {"a": "one.safetensors", "b": "two.safetensors"},
}


@attacked
@given(index=changed_json(INDEX))
def test_changed_indexes(tmp_path: Path, index: Any) -> None:
    sharded(tmp_path, {})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        found = Checkpoint(tmp_path)
    except ModelError as error:
        assert str(error).isprintable() and "index.json" in str(error)
    else:
        assert {path.parent for path in found.files} == {tmp_path}
        named = index["weight_map"].items()
        assert all(found[name].file.name == shard for name, shard in named if name in found)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": TENSORS["a"]}, tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match="two shards"):
        Checkpoint(tmp_path)


BAD_INDEXES = (
    *(
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        "\udc80",
        '{"weight_map": {}}',
        '{"weight_map": []}',
    ),
    *(BOMB, '{"weight_map": ' + BOMB, "9" * 5000),
)


@pytest.mark.parametrize("text", BAD_INDEXES, ids=lambda text: repr(text[:30]))
def test_malformed_index(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"index\.json"):
        Checkpoint(tmp_path)


def test_metadata_is_written_in_one_order(tmp_path: Path) -> None:
    # safetensors itself writes it in any order, another one each time.
    metadata = {"format": "x", "info": '{"γ": 1}', "version": "1", "digest": "2", "a": "3"}
    values = {"one": np.arange(6, dtype=np.float32).reshape(2, 3), "two": np.ones(3, np.int64)}
    written = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        write_tensors(path, values, dict(sorted(metadata.items(), key=lambda _: number)))
        written.add(path.read_bytes())
        found, tensors = read_tensors(path)
        assert found == metadata
        assert all(np.array_equal(tensors[name], values[name]) for name in values)
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert len(written) == 1


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"w": np.ones((4, 4), np.float32)}, {})
    entry = read_header(path)["w"]
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(ModelError, match="it ends within w"):
        entry.read()
