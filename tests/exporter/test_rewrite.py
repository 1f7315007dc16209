"""Other dtypes and shards: the base converted by torch, and folded then."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from austeer.adapters import ModelError, RouteError, SteeringAdapter, VerificationError
from austeer.adapters.weights import Checkpoint
from austeer.exporter.cli import cli
from austeer.exporter.commands._options import parse_size
from austeer.exporter.merge import merge_checkpoint
from austeer.exporter.proofs.fold_check import verify_fold_structure
from austeer.exporter.rewrite import rewrite_checkpoint
from austeer.exporter.settings import StoredAs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZE = 20_000


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.fixture
def adapter(tiny_model: Callable[..., Any]) -> SteeringAdapter:
    return SteeringAdapter.from_units(
        tiny_model("llama"), "attention", [0, 0, 1], [5, 7, 3], [0.7, -1.5, 2.0]
    )


def expected(
    base: Path, dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Converted by torch, as it is and folded by hand."""
    plain = {name: t if dtype is None else t.to(dtype) for name, t in tensors(base).items()}
    folded = {name: tensor.clone() for name, tensor in plain.items()}
    for layer, unit, gain in ((0, 5, 1.7), (0, 7, -0.5), (1, 3, 3.0)):
        weight = folded[f"model.layers.{layer}.self_attn.o_proj.weight"]
        # As the adapter's float32 holds it.
        gain = 1.0 + float(np.float32(gain - 1.0))
        weight[:, unit] = (weight[:, unit].double() * gain).to(weight.dtype)
    return plain, folded


@pytest.mark.parametrize("size", [None, SIZE, 10**9])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("shards", [None, "30KB"])
def test_the_base_converted_and_folded(
    saved_model: Callable[..., Path],
    adapter: SteeringAdapter,
    tmp_path: Path,
    shards: str | None,
    dtype: str | None,
    size: int | None,
) -> None:
    base = saved_model("llama", **({"max_shard_size": shards} if shards else {}))
    out, stored = tmp_path / "out", StoredAs(dtype=dtype, max_shard_size=size)
    summary = merge_checkpoint(base, adapter, out, stored=stored)
    plain, folded = expected(base, None if dtype is None else DTYPES[dtype])
    found = tensors(out)
    assert found.keys() == folded.keys()
    for name, tensor in folded.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert summary.values_changed == sum(
        int((folded[name] != plain[name]).sum()) for name in folded
    )
    assert sorted(summary.files) == sorted(path.name for path in out.iterdir())
    verify_fold_structure(base, out, adapter)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == (DTYPES[dtype] if dtype else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tensors_are_compared_row_by_row(
    saved_model: Callable[..., Path],
    adapter: SteeringAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    monkeypatch.setattr("austeer.adapters.tensors._BLOCK", 100)
    out = tmp_path / "out"
    merge_checkpoint(saved_model("llama"), adapter, out, stored=StoredAs(dtype=dtype))
    verify_fold_structure(saved_model("llama"), out, adapter)


def test_a_single_file_of_an_index_keeps_it(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, tmp_path: Path
) -> None:
    base = saved_model("llama")
    only = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / only)
    index = {"metadata": "none", "weight_map": dict.fromkeys(tensors(base), only)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    merge_checkpoint(base, adapter, tmp_path / "out", stored=StoredAs(dtype="bfloat16"))
    assert len(Checkpoint(tmp_path / "out")) == len(Checkpoint(base))


def test_a_config_that_names_the_wrong_dtype_is_put_right(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, tmp_path: Path
) -> None:
    base = saved_model("llama")
    config = json.loads((base / "config.json").read_text())
    key = next(key for key in ("dtype", "torch_dtype") if key in config)
    (base / "config.json").write_text(json.dumps(config | {key: "float16"}))
    merge_checkpoint(base, adapter, tmp_path / "plain")
    merge_checkpoint(base, adapter, tmp_path / "out", stored=StoredAs(dtype="float32"))
    assert json.loads((tmp_path / "plain" / "config.json").read_text())[key] == "float16"
    assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == "float32"
    wrong = json.dumps(config | {key: "bfloat16"})
    (tmp_path / "out" / "config.json").write_text(wrong)
    with pytest.raises(VerificationError, match="differs from the base's"):
        verify_fold_structure(base, tmp_path / "out", adapter)


def test_what_json_cannot_write_is_named(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, tmp_path: Path
) -> None:
    base = saved_model("llama")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"limit": float("inf")}))
    with pytest.raises(ModelError, match=r"config\.json: holds NaN"):
        merge_checkpoint(base, adapter, tmp_path / "out", stored=StoredAs(dtype="float16"))


def test_shards_hold_what_was_asked_for(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge_checkpoint(saved_model("llama"), adapter, out, stored=StoredAs(max_shard_size=SIZE))
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    checkpoint = Checkpoint(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: e.file.name for name, e in checkpoint.items()}
    assert index["metadata"]["total_size"] == sum(e.size for e in checkpoint.values())
    for shard in shards:
        sizes = [entry.size for entry in checkpoint.values() if entry.file == shard]
        assert sum(sizes) <= SIZE or len(sizes) == 1
    fuller = [
        sum(e.size for e in checkpoint.values() if e.file in pair) for pair in pairwise(shards)
    ]
    assert min(fuller) > SIZE, "two files would have been one"


def test_config_names_the_new_dtype(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, tmp_path: Path
) -> None:
    base = saved_model("llama")
    config = json.loads((base / "config.json").read_text())
    config |= {"torch_dtype": "float32", "text_config": {"dtype": "float32", "width": 3}}
    (base / "config.json").write_text(json.dumps(config))
    merge_checkpoint(base, adapter, tmp_path / "out", stored=StoredAs(dtype="bfloat16"))
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["torch_dtype"] == "bfloat16"
    assert found["text_config"] == {"dtype": "bfloat16", "width": 3}
    assert set(found) == set(config)


def test_other_dtypes_keep_their_bytes_and_notes(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    values = {
        "ids": np.arange(5, dtype=np.int64),
        "mask": np.array([True, False, True]),
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "w": np.ones((3, 3), np.float16),
    }
    save_file(values, base / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    (base / "config.json").write_text('{"model_type": "llama"}')
    rewrite_checkpoint(Checkpoint(base), out, {}, StoredAs(dtype="bfloat16"))
    found, before = Checkpoint(out), Checkpoint(base)
    assert {name: entry.dtype for name, entry in found.items()} == {
        "ids": "I64", "mask": "BOOL", "scalar": "BF16", "empty": "BF16", "w": "BF16",
    }  # fmt: skip
    for name in ("ids", "mask"):
        assert found[name].read().tobytes() == before[name].read().tobytes()
    assert float(found["scalar"].read()) == 1.5 and found["scalar"].shape == ()
    assert found["empty"].shape == (0, 3)
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}


def test_a_value_out_of_range_is_named(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, tmp_path: Path
) -> None:
    base = saved_model("llama")
    values = load_file(base / "model.safetensors")
    values["model.norm.weight"][3] = 1e5
    from safetensors.torch import save_file as save

    save(values, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RouteError, match=r"model\.norm\.weight: a value leaves the range of F16"
    ):
        merge_checkpoint(base, adapter, tmp_path / "out", stored=StoredAs(dtype="float16"))
    assert not (tmp_path / "out").exists()


def test_a_truncated_base_leaves_nothing(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, tmp_path: Path
) -> None:
    base = saved_model("llama")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="corrupt or truncated"):
        merge_checkpoint(base, adapter, tmp_path / "out", stored=StoredAs(max_shard_size=SIZE))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        ({"max_shard_size": 0}, "max_shard_size: expected 1 or more, got 0"),
        ({"link": True, "dtype": "float16"}, "link: a new dtype or shard size"),
        ({"link": True, "max_shard_size": 5}, "link: a new dtype or shard size"),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(RouteError, match=error):
        StoredAs(**arguments)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("300", 300), ("2k", 2000), ("1TB", 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "5 XB", "0.1", "nan", "9" * 400])
def test_sizes_that_are_none(text: str) -> None:
    import click

    with pytest.raises(click.BadParameter, match="expected a size such as 5GB"):
        parse_size(text)


def test_command_converts_proves_and_verifies(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, tmp_path: Path
) -> None:
    base, out = saved_model("llama"), tmp_path / "out"
    adapter.save_pretrained(tmp_path / "adapter")
    options = ["--dtype", "bfloat16", "--json"]
    arguments = ["merge", str(base), str(tmp_path / "adapter"), "-o", str(out), *options]
    made = CliRunner().invoke(cli, [*arguments, "--max-shard-size", "20kB"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["verified"]
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.bfloat16}
    again = ["verify", str(out), "--base", str(base), "--adapter", str(tmp_path / "adapter")]
    for given in (options, options[2:], ["--structure-only", "--json"]):
        checked = CliRunner().invoke(cli, [*again, *given])
        assert checked.exit_code == 0, checked.output
        assert json.loads(checked.stdout)["verified"]
