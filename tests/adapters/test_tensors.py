"""Safetensors headers: what is read, and every malformation that must be refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from austeer.adapters import ModelError
from austeer.adapters.tensors import Checkpoint, read_header, read_tensors, write_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2.0, 3.25], dtype=ml_dtypes.bfloat16),
    "c": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float16),
    "scalar": np.array(7, np.int64),
}


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)


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
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_malformed_header(tmp_path: Path, case: str) -> None:
    header, data = BAD_HEADERS[case]
    path = tmp_path / "model.safetensors"
    write_raw(path, header, data)
    refusal(path)


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


def test_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelError, match=r"two\.safetensors is missing"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../two.safetensors", "/etc/passwd", "sub/x", "..", "", 3])
def test_shard_outside_the_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    sharded(folder, {"b": name})
    with pytest.raises(ModelError, match=r"index\.json"):
        Checkpoint(folder)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": TENSORS["a"]}, tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match="two shards"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', "\udc80"])
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
    with pytest.raises(ModelError, match="w ends 10 bytes early"):
        entry.read()
