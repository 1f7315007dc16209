"""What `fuzz.py` attacks: valid inputs of each reader, changes of them, and their use."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NASTY: tuple[Any, ...] = (
    *(-1, 0, 1, 2**31, 2**63 - 1, 2**63, 10**400, 0.5, float("inf"), float("nan"), True, None),
    *("", "a\nb", "\x1b[2J", "\ud800", "\0", "../x.safetensors", "/etc/passwd", "x" * 300, "٣"),
    *([], {}, [[]], {"": {}}),
)
NUMBERS = b"".join((n).to_bytes(8, "little") for n in (2, 9)) + bytes(8)


@dataclass(frozen=True)
class Reader:
    """One reader under attack.

    Attributes:
        seeds: valid inputs.
        use: write an input into an empty folder, read it, and use what was read.
        change: a change of an input's content that keeps its form.
    """

    seeds: Callable[[], list[bytes]]
    use: Callable[[bytes, Path], None]
    change: Callable[[bytes, random.Random], bytes]


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one place replaced, removed, repeated, nested or moved by one."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        action = rng.randrange(8)
        if action == 0:
            del copy[key]
        elif action == 1 and isinstance(copy, list):
            copy.insert(key, copy[key])
        elif action == 1:
            copy[rng.choice([f"{key}x", *map(str, NASTY)])] = copy[key]
        elif action == 2:
            copy[key] = copy[rng.choice(keys)]
        else:
            copy[key] = changed(copy[key], rng)
        return copy
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-8, -1, 1, 8))
    if rng.random() < 0.1:
        for _ in range(rng.choice((3, 60, 70, 900))):
            value = [value]
        return value
    return rng.choice(NASTY)


def dumped(value: Any, rng: random.Random) -> bytes:
    """JSON, now and then with a key twice."""
    text = json.dumps(value)
    if rng.random() < 0.1 and text.startswith("{"):
        text = "{" + text[1:-1] + ", " + text[1:]
    return text.encode()


def file_of(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def header_of(raw: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def changed_file(raw: bytes, rng: random.Random) -> bytes:
    header, data = header_of(raw)
    return file_of(dumped(changed(header, rng), rng), data)


# Tensors: one safetensors file


def tensor_seeds() -> list[bytes]:
    names = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3")
    first = {
        "__metadata__": {"format": "pt", "b": "a"},
        "a": entry("F32", [2, 3], 0, 24),
        "b": entry("BF16", [3], 24, 30),
    }
    many = {name: entry(name, [0, 4], 0, 0) for name in names}
    return [
        file_of(json.dumps(first).encode(), bytes(30)),
        file_of(json.dumps(many).encode(), b""),
    ]


def use_tensors(raw: bytes, folder: Path) -> None:
    from austeer.adapters import tensors
    from austeer.adapters.weights import SINGLE, Checkpoint

    file = folder / SINGLE
    file.write_bytes(raw)
    checkpoint = Checkpoint(folder)
    metadata = tensors.read_metadata(file)
    json.dumps(metadata, ensure_ascii=False)
    for found in checkpoint.values():
        assert 8 <= found.start <= found.start + found.size <= len(raw)
        assert found.name.isprintable()
        if found.dtype in tensors.DTYPES:
            read = found.read()
            assert (read.shape, read.nbytes) == (found.shape, found.size)


# Index: the JSON that names the shards


def index_seeds() -> list[bytes]:
    shards = {"a": "one.safetensors", "b": "two.safetensors"}
    whole = {"metadata": {"total_size": 8}, "weight_map": shards}
    return [json.dumps(whole).encode(), json.dumps({"weight_map": shards}).encode()]


def use_index(raw: bytes, folder: Path) -> None:
    from austeer.adapters.weights import INDEX, Checkpoint

    for name, tensor in (("one", "a"), ("two", "b"), ("three", "a")):
        header = json.dumps({tensor: entry("F32", [1], 0, 4)}).encode()
        (folder / f"{name}.safetensors").write_bytes(file_of(header, bytes(4)))
    (folder / INDEX).write_bytes(raw)
    found = Checkpoint(folder)
    assert {path.parent for path in found.files} == {folder}
    assert set(found) <= {"a", "b"}


# Adapter: its config and its weights, in one input


def adapter_seeds() -> list[bytes]:
    config = {
        "alpha": None,
        "base_model_fingerprint": "sha256:" + "0" * 64,
        "base_model_name_or_path": "owner/base",
        "components": ["ffn"],
        "fit": {"test": {"kl": 0.1, "kl_ci95": [0.0, 0.2]}, "beta": {"layers.0.ffn": [0, 1]}},
        "format_version": 1,
        "k": 2,
        "model_type": "llama",
        "peft_type": "AUSTEER",
        "rank": 0,
        "revision": None,
        "strength": "fitted",
        "versions": {"austeer": "0.1.0"},
    }
    fitted = {
        "layers.0.ffn.index": entry("I64", [2], 0, 16),
        "layers.0.ffn.gamma": entry("F32", [2], 16, 24),
    }
    predictor = {
        "layers.0.ffn.V": entry("F32", [2, 1], 24, 32),
        "layers.0.ffn.b": entry("F32", [1], 32, 36),
        "layers.0.ffn.U": entry("F32", [1, 2], 36, 44),
    }
    adaptive = config | {"rank": 1, "strength": "adaptive"}
    weights = file_of(json.dumps(fitted | predictor).encode(), NUMBERS + bytes(20))
    return [
        file_of(json.dumps(config).encode(), file_of(json.dumps(fitted).encode(), NUMBERS)),
        file_of(json.dumps(adaptive).encode(), weights),
    ]


def use_adapter(raw: bytes, folder: Path) -> None:
    from austeer.adapters.adapter import WEIGHTS_NAME, SteeringAdapter
    from austeer.exporter.describe import describe_adapter, fact_rows

    length = int.from_bytes(raw[:8], "little")
    (folder / "adapter_config.json").write_bytes(raw[8 : 8 + length])
    (folder / WEIGHTS_NAME).write_bytes(raw[8 + length :])
    adapter = SteeringAdapter.from_pretrained(folder)
    shown = describe_adapter(adapter)
    json.dumps(shown, ensure_ascii=False, allow_nan=False).encode()
    assert all(cell.isprintable() for row in fact_rows(shown) for cell in row)
    adapter.save_pretrained(folder / "again")
    assert SteeringAdapter.from_pretrained(folder / "again").config == adapter.config


def change_adapter(raw: bytes, rng: random.Random) -> bytes:
    config, weights = header_of(raw)
    if rng.random() < 0.5:
        return file_of(dumped(changed(config, rng), rng), weights)
    return file_of(json.dumps(config).encode(), changed_file(weights, rng))


# Pairs: JSON lines after "j", CSV after anything else


def pairs_seeds() -> list[bytes]:
    turns = [{"role": "user", "content": "Tom felt"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "Tom felt", "positive": " happy", "negative": " sad"},
        {"messages": turns, "positive": "a", "negative": "b", "note": [1]},
    ]
    cells = ["prompt", "messages", "positive", "negative"], ["", json.dumps(turns), "a", "b"]
    plain = ["prompt", "positive", "negative"], ["Tom,\nfelt", ' "happy"', "sad"]
    return [
        b"j" + "\n".join(map(json.dumps, rows)).encode(),
        *(b"c" + csv_of(table) for table in (cells, plain)),
    ]


def csv_of(rows: Any) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(row if isinstance(row, list) else [row] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def use_pairs(raw: bytes, folder: Path) -> None:
    from austeer.adapters import pairs, split_pairs

    path = folder / ("pairs.jsonl" if raw[:1] == b"j" else "pairs.csv")
    path.write_bytes(raw[1:])
    found = pairs.read_pairs(path)
    pairs.pairs_digest(found)
    for pair in found:
        (pair.prompt + pair.positive + pair.negative + pair.content).encode()
    if len(found) > 1:
        assert sum(map(len, split_pairs(found, (1.0,)))) == len(found)


def change_pairs(raw: bytes, rng: random.Random) -> bytes:
    if raw[:1] == b"j":
        rows = changed([json.loads(line) for line in raw[1:].splitlines()], rng)
        lines = rows if isinstance(rows, list) else [rows]
        return b"j" + b"\n".join(dumped(line, rng) for line in lines)
    table = list(csv.reader(io.StringIO(raw[1:].decode(), newline="")))
    found = changed(table, rng)
    return b"c" + csv_of(found if isinstance(found, list) else [found])


READERS = {
    "adapter": Reader(adapter_seeds, use_adapter, change_adapter),
    "tensors": Reader(tensor_seeds, use_tensors, changed_file),
    "index": Reader(
        index_seeds, use_index, lambda raw, rng: dumped(changed(json.loads(raw), rng), rng)
    ),
    "pairs": Reader(pairs_seeds, use_pairs, change_pairs),
}
