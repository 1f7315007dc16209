"""The fold as a user runs it: good input, bad input, and nothing half-written ever."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from austeer.adapters import (
    AdapterError,
    AusteerError,
    ModelError,
    OutputError,
    Predictor,
    RouteError,
    SiteError,
    SteeredSite,
    SteeringAdapter,
    Strength,
)
from austeer.adapters.sites import Component, Site
from austeer.exporter.copying import link_file
from austeer.exporter.merge import merge_checkpoint, write_folded
from austeer.exporter.settings import StoredAs

DOWN = "model.layers.{}.mlp.down_proj.weight"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def hand_made(model: Any, component: str = "ffn", unit: int = 5) -> SteeringAdapter:
    return SteeringAdapter.from_units(model, component, [0, 1], [unit, 7], [0.5, -1.5])


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Path:
    return saved_model("llama")


@pytest.fixture
def adapter(tiny_model: Callable[..., Any]) -> SteeringAdapter:
    return hand_made(tiny_model("llama"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def unchanged(tmp_path: Path, base: Path) -> Iterator[None]:
    """Around a failure: no file or folder appears, the base keeps its bytes."""
    before, inside = sorted(path.name for path in tmp_path.iterdir()), contents(base)
    yield
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert contents(base) == inside


def test_fold_says_what_it_did(base: Path, adapter: SteeringAdapter, out: Path) -> None:
    before = contents(base)
    summary = merge_checkpoint(base, adapter, out)
    assert contents(base) == before, "the base must stay as it was"
    assert summary.path == out
    assert summary.tensors == (DOWN.format(0), DOWN.format(1))
    assert summary.units == 2
    assert summary.values_changed == 2 * 48
    assert sorted(summary.files) == sorted(path.name for path in out.iterdir())
    assert "2 units" in summary.summary() and "\n" not in summary.summary()
    assert json.loads(json.dumps(summary.as_dict()))["values_changed"] == 96


def test_only_the_named_rows_change(base: Path, adapter: SteeringAdapter, out: Path) -> None:
    merge_checkpoint(base, adapter, out)
    old, new = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    for layer, unit, gain in ((0, 5, 1.5), (1, 7, -0.5)):
        weight = old[DOWN.format(layer)].astype(np.float64)
        weight[unit] *= gain
        old[DOWN.format(layer)] = weight.astype(np.float32)
    for name in old:
        assert old[name].tobytes() == new[name].tobytes(), name


def test_everything_else_is_copied_and_the_card_is_new(
    base: Path, adapter: SteeringAdapter, out: Path
) -> None:
    (base / "README.md").write_text("the base's card")
    (base / "LICENSE").write_text("terms")
    merge_checkpoint(base, adapter, out, scale=0.5)
    new = contents(out)
    card = new.pop("README.md").decode()
    for name in ("model.safetensors", "austeer.json", "SHA256SUMS"):
        new.pop(name)
    assert {name: data for name, data in contents(base).items() if name in new} == new
    assert {"config.json", "LICENSE", "tokenizer.json"} <= set(new)
    assert 'base_model_relation: "finetune"' in card and "the base's card" not in card
    assert "0.5 times" in card


def test_scale_is_linear_in_gamma(base: Path, adapter: SteeringAdapter, tmp_path: Path) -> None:
    merge_checkpoint(base, adapter, tmp_path / "a", scale=0.5)
    merge_checkpoint(base, adapter.scaled(0.5), tmp_path / "b")
    read = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(read[0][name].tobytes() == read[1][name].tobytes() for name in read[0])


def test_sharded_and_single_give_the_same_tensors(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, tmp_path: Path
) -> None:
    single = saved_model("llama").rename(tmp_path / "single")
    sharded = saved_model("llama", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for name, base in (("a", single), ("b", sharded)):
        merge_checkpoint(base, adapter, tmp_path / name)
    one = load_file(tmp_path / "a" / "model.safetensors")
    many: dict[str, Any] = {}
    for shard in (tmp_path / "b").glob("*.safetensors"):
        many |= load_file(shard)
    assert one.keys() == many.keys()
    assert all(one[name].tobytes() == many[name].tobytes() for name in one)


def test_gpt2_saved_without_its_prefix(
    tiny_model: Callable[..., Any], tmp_path: Path, out: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("gpt2")
    base = tmp_path / "bare"
    model.transformer.save_pretrained(base)
    names = load_file(base / "model.safetensors").keys()
    assert not any(name.startswith("transformer.") for name in names)
    merge_checkpoint(base, hand_made(model), out)
    folded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), hand_made(model).attached(model):
        expected = model(ids).logits
        torch.testing.assert_close(folded(ids).logits, expected, atol=2e-6, rtol=1e-5)


def test_no_torch_on_this_path(base: Path, adapter: SteeringAdapter, out: Path) -> None:
    adapter.save_pretrained(out.parent / "adapter")
    command = ["merge", str(base), str(out.parent / "adapter"), "-o", str(out), "--no-verify"]
    code = (
        "import sys; from austeer.exporter.cli import cli\n"
        f"cli({command}, standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'onnx'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert (out / "model.safetensors").is_file()


def test_memory_is_that_of_one_tensor(
    saved_model: Callable[..., Path], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = {"intermediate_size": 2048, "hidden_size": 128, "num_hidden_layers": 6}
    base = saved_model("llama", **sizes)
    model = tiny_model("llama", **sizes)
    adapter = SteeringAdapter.from_units(model, "neuron", [0, 5], [9, 9], [0.5, 0.5])
    total, one = (base / "model.safetensors").stat().st_size, 2048 * 128 * 4
    assert total > 15 * one
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    write_folded(base, adapter, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * one, f"{peak} bytes for tensors of {one}"


@pytest.mark.parametrize("scale", [0.0, 1e-9])
def test_a_fold_that_changes_nothing_is_an_error(
    base: Path, adapter: SteeringAdapter, out: Path, scale: float, unchanged: None
) -> None:
    with pytest.raises(RouteError, match="changes no value at scale"):
        merge_checkpoint(base, adapter, out, scale=scale)


def test_overflow_is_an_error(
    saved_model: Callable[..., Path], tiny_model: Callable[..., Any], out: Path
) -> None:
    base = saved_model("mistral")
    adapter = SteeringAdapter.from_units(tiny_model("mistral"), "ffn", [1], [3], [3e38])
    with pytest.raises(RouteError, match=r"down_proj.weight: unit 3 times gain"):
        merge_checkpoint(base, adapter, out, scale=100)
    assert not out.exists()


def test_layer_and_adaptive_are_refused_with_a_way_out(
    base: Path, tiny_model: Callable[..., Any], out: Path, unchanged: None
) -> None:
    model = tiny_model("llama")
    with pytest.raises(RouteError, match=r"layers\.0\.layer, layers\.1\.layer: .*ONNX"):
        merge_checkpoint(base, hand_made(model, "layer"), out)
    ones = np.ones((1, 1), np.float32)
    steered = SteeredSite(
        Site(0, Component.FFN), np.array([5]), ones[0], Predictor(ones, ones[0], ones)
    )
    adaptive = SteeringAdapter.from_sites(model, [steered], Strength.ADAPTIVE)
    with pytest.raises(RouteError, match=r"adaptive .*ONNX") as error:
        merge_checkpoint(base, adaptive, out)
    assert "\n" not in str(error.value)


def test_another_base_shows_both_digests_and_force_works(
    base: Path, tiny_model: Callable[..., Any], out: Path, unchanged: None
) -> None:
    other = hand_made(tiny_model("llama", seed=1))
    own = hand_made(tiny_model("llama"))
    with pytest.raises(AdapterError) as error:
        merge_checkpoint(base, other, out)
    for digest in (own.config.base_model_fingerprint, other.config.base_model_fingerprint):
        assert digest in str(error.value)
    forced = out.parent / "elsewhere" / "forced"
    merge_checkpoint(base, other, forced, force=True)
    assert (forced / "model.safetensors").is_file()
    for path in sorted(forced.parent.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    forced.parent.rmdir()


def test_another_architecture_is_refused(
    base: Path, tiny_model: Callable[..., Any], out: Path, unchanged: None
) -> None:
    with pytest.raises(AdapterError, match=r"for a mistral model, this one is 'llama'"):
        merge_checkpoint(base, hand_made(tiny_model("mistral")), out, force=True)


@pytest.mark.parametrize(
    ("sizes", "layer", "unit", "message"),
    [
        ({"num_hidden_layers": 3}, 2, 5, "layer 2 outside the model's 2 layers"),
        ({"hidden_size": 64}, 1, 40, "unit 40 outside width 32"),
    ],
)
def test_sites_that_the_base_lacks(
    base: Path,
    tiny_model: Callable[..., Any],
    out: Path,
    sizes: dict[str, int],
    layer: int,
    unit: int,
    message: str,
    unchanged: None,
) -> None:
    wide = SteeringAdapter.from_units(
        tiny_model("llama", **sizes), "ffn", [layer], [unit], [0.5]
    )
    with pytest.raises(SiteError, match=message):
        merge_checkpoint(base, wide, out, force=True)


def test_taken_output_is_left_alone(
    base: Path, adapter: SteeringAdapter, out: Path, unchanged: None
) -> None:
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(OutputError, match="not empty"):
        merge_checkpoint(base, adapter, out)
    assert contents(out) == {"precious": b"data"}
    (out / "precious").unlink()
    out.rmdir()


def _truncate(base: Path) -> None:
    os.truncate(sorted(base.glob("*.safetensors"))[-1], 1000)


def _drop_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def _pickle_only(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def _gguf_only(base: Path) -> None:
    (base / "model.safetensors").rename(base / "model-Q8_0.gguf")


def _quantize(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (base / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_truncate, ModelError, "corrupt or truncated"),
        (_drop_weights, ModelError, "found no weights"),
        (_pickle_only, ModelError, "only pickle weights"),
        (_gguf_only, ModelError, r"only GGUF weights; .* name model-Q8_0\.gguf"),
        (_quantize, RouteError, "quantized"),
        (lambda b: (b / "config.json").unlink(), ModelError, "config.json: cannot read it"),
        (lambda b: (b / "config.json").write_text("{"), ModelError, "not valid JSON"),
        (lambda b: (b / "config.json").write_text("[]"), ModelError, "a JSON object"),
        (lambda b: (b / "config.json").write_text("{}"), AdapterError, "this one is None"),
    ],
)
def test_malformed_base(
    base: Path,
    adapter: SteeringAdapter,
    out: Path,
    damage: Callable[[Path], None],
    error: type[AusteerError],
    message: str,
) -> None:
    damage(base)
    with pytest.raises(error, match=message) as caught:
        merge_checkpoint(base, adapter, out)
    assert "\n" not in str(caught.value)
    assert [path.name for path in out.parent.iterdir()] == [base.name]


def test_truncated_shard_is_named(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, out: Path
) -> None:
    base = saved_model("llama", max_shard_size="20KB")
    shard = sorted(base.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ModelError, match=shard.name):
        merge_checkpoint(base, adapter, out)
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        merge_checkpoint(base, adapter, out)
    assert [path.name for path in out.parent.iterdir()] == [base.name]


def test_missing_base(adapter: SteeringAdapter, tmp_path: Path, out: Path) -> None:
    with pytest.raises(ModelError, match="expected a model directory"):
        merge_checkpoint(tmp_path / "nowhere", adapter, out)
    assert not any(tmp_path.iterdir())


def test_disk_that_fills_up_while_it_syncs(
    base: Path,
    adapter: SteeringAdapter,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    unchanged: None,
) -> None:
    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        merge_checkpoint(base, adapter, out)
    monkeypatch.undo()


def test_file_size_limit(
    base: Path, adapter: SteeringAdapter, out: Path, tmp_path: Path, unchanged: None
) -> None:
    import shutil

    adapter.save_pretrained(tmp_path / "adapter")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from austeer.adapters import OutputError, SteeringAdapter\n"
        "from austeer.exporter.merge import merge_checkpoint\n"
        "base, adapter, out = map(Path, sys.argv[1:])\n"
        "adapter = SteeringAdapter.from_pretrained(adapter)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "try:\n    merge_checkpoint(base, adapter, out)\n"
        "except OutputError as error:\n    print(error); sys.exit(7)\n"
    )
    paths = [str(path) for path in (base, tmp_path / "adapter", out)]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    shutil.rmtree(tmp_path / "adapter")
    assert done.returncode == 7, done.stderr
    assert "file too large" in done.stdout and done.stdout.count("\n") == 1


def test_real_full_disk(base: Path, adapter: SteeringAdapter, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root; the other disk-full tests ran")
    try:
        with pytest.raises(OutputError, match="no space left"):
            merge_checkpoint(base, adapter, disk / "out")
        assert not any(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_links_are_made_where_nothing_changes(
    saved_model: Callable[..., Path], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    base = saved_model("llama", max_shard_size="20KB")
    one = SteeringAdapter.from_units(tiny_model("llama"), "ffn", [1], [5], [0.5])
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(base.glob("*.safetensors")):
        # As in a Hub cache: names are links to files that nobody may write to.
        file.rename(blobs / file.name).chmod(0o444)
        file.symlink_to(Path("..", "blobs", file.name))
    before = contents(base)
    merge_checkpoint(base, one, tmp_path / "linked", stored=StoredAs(link=True))
    merge_checkpoint(base, one, tmp_path / "copied")
    assert contents(tmp_path / "linked") == contents(tmp_path / "copied")
    assert contents(base) == before
    shards = sorted((tmp_path / "linked").glob("*.safetensors"))
    same = [file.samefile(blobs / file.name) for file in shards]
    assert len(same) > 2 and same.count(False) == 1
    assert not any(file.is_symlink() for file in shards)
    assert {(blobs / file.name).stat().st_mode & 0o777 for file in shards} == {0o444}
    assert not (tmp_path / "linked" / "config.json").samefile(base / "config.json")


def test_links_that_the_filesystem_refuses_become_copies(
    base: Path,
    adapter: SteeringAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "out").mkdir()
    link_file(base / "model.safetensors", tmp_path / "out" / "model.safetensors")
    copied = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert copied == (base / "model.safetensors").read_bytes()
    assert "cannot hard link it" in caplog.text
