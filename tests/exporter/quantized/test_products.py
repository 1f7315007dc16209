"""Quantized bases on the command line, and in the libraries that load them where those are."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from gguf_models import write_gguf
from quantized_models import (
    dequantized,
    quantize_folder,
    read_safetensors,
    write_safetensors,
)
from requirements import need

from austeer.adapters import (
    OutputError,
    Predictor,
    RouteError,
    SteeringAdapter,
    Strength,
)
from austeer.adapters.attach import steering_hooks
from austeer.exporter.cli import cli
from austeer.exporter.copying import copy_file
from austeer.exporter.merge import merge_checkpoint
from austeer.exporter.products import Base
from austeer.exporter.quantized.products import PROOF, write_quantized
from austeer.exporter.route_steps import write_product
from austeer.exporter.routes import Route
from austeer.exporter.settings import Handling

DOWN = "model.layers.{}.mlp.down_proj"


def adapter_for(model: Any, component: str = "ffn") -> SteeringAdapter:
    return SteeringAdapter.from_units(model, component, [0, 1, 1], [5, 7, 9], [1.5, -2.5, 0.7])


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Path:
    folder = saved_model("llama")
    quantize_folder(folder, "gptq")
    return folder


@pytest.fixture
def adapter(tiny_model: Callable[..., Any], tmp_path: Path) -> Callable[[str], str]:
    def save(component: str = "ffn") -> str:
        made = adapter_for(tiny_model("llama"), component)
        return str(made.save_pretrained(tmp_path / f"adapter-{component}"))

    return save


@pytest.fixture
def gguf_base(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    layers = tiny_model("llama").model.layers
    weights = {
        f"blk.{i}.ffn_down.weight": (
            np.pad(layer.mlp.down_proj.weight, ((0, 0), (0, 16))),
            "Q8_0",
        )
        for i, layer in enumerate(layers)
    }
    weights["token_embd.weight"] = (np.ones((4, 32), np.float32), "F32")
    return write_gguf(tmp_path / "base.gguf", "llama", weights).path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def refused(result: Result, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return str(result.stderr)


def test_merge_and_verify(
    base: Path, adapter: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No runtime of the format is here: a loaded model could only be a mistake.
    monkeypatch.setattr("austeer.exporter.products.load_base", None)
    out = tmp_path / "out"
    saved = adapter("ffn")
    merged = run("merge", base, saved, "-o", out, "--json")
    assert merged.exit_code == 0, merged.output
    row = json.loads(merged.stdout)
    assert row["verified"] and row["route"] == "safetensors" and row["path"] == str(out)
    assert 0 < row["largest_error_in_roundings"] <= 1
    first, second, third = row["notes"]
    assert "weights could not be" in first and "scales: 1;" in second and third == PROOF
    options = (
        "--base",
        base,
        "--adapter",
        adapter("ffn") if False else tmp_path / "adapter-ffn",
    )
    checked = run("verify", out, *options, "--json")
    assert checked.exit_code == 0 and json.loads(checked.stdout)["notes"] == row["notes"]
    shown = run("verify", out, *options)
    assert "Verified" in shown.stdout and shown.stdout.count("note: ") == 3
    assert "not the base times" in refused(run("verify", out, *options, "--scale", "0.5"), 4)


@pytest.mark.parametrize("kind", ["gptq", "gguf"])
def test_a_product_that_differs_is_not_published(
    base: Path,
    gguf_base: Path,
    adapter: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    # The touched tensors are right, another one is not: only the whole check can see it.
    def copy_wrong(source: Path, target: Path, *others: Any, **changes: Any) -> int:
        changed = copy_file(source, target, *others, **changes)
        if source.suffix in (".gguf", ".safetensors"):
            data = bytearray(target.read_bytes())
            data[-1] ^= 1
            target.write_bytes(data)
        return changed

    monkeypatch.setattr("austeer.exporter.checkpoint.copy_file", copy_wrong)
    monkeypatch.setattr("austeer.exporter.quantized.gguf_merge.copy_file", copy_wrong)
    source, out = (
        (base, tmp_path / "out") if kind == "gptq" else (gguf_base, tmp_path / "o.gguf")
    )
    before = sorted(path.name for path in tmp_path.iterdir())
    saved = adapter("ffn")
    text = refused(run("merge", source, saved, "-o", out), 4)
    assert "the adapter does not touch it" in text
    after = {path.name for path in tmp_path.iterdir()} - {"adapter-ffn"}
    assert after == {*before}


def test_without_verification_the_row_says_so(
    base: Path, adapter: Callable[[str], str], tmp_path: Path
) -> None:
    merged = run("merge", base, adapter("ffn"), "-o", tmp_path / "out", "--json", "--no-verify")
    row = json.loads(merged.stdout)
    assert not row["verified"] and PROOF not in row["notes"] and len(row["notes"]) == 2


def with_predictors(adapter: SteeringAdapter, model: Any) -> SteeringAdapter:
    """The same units and γ, which a predictor of its own scales at each site."""
    draw = np.random.default_rng(0).normal
    sites = []
    for site in adapter.sites:
        k = len(site.index)
        predictor = Predictor(draw(size=(k, 1)), np.zeros(1), draw(size=(1, k)))
        sites.append(dataclasses.replace(site, predictor=predictor))
    return SteeringAdapter.from_sites(model, sites, Strength.ADAPTIVE)


@pytest.mark.parametrize("product", ["gptq", "gguf", "half"])
def test_an_adapter_that_cannot_fold_is_in_no_fold(
    product: str,
    gguf_base: Path,
    saved_model: Callable[..., Path],
    adapter: Callable[[str], str],
    tiny_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    base, out = gguf_base, tmp_path / "out.gguf"
    if product != "gguf":
        base, out = saved_model("llama"), tmp_path / "out"
        quantize_folder(base, "gptq", ("proj",) if product == "gptq" else ("q_proj",))
    folded = adapter("ffn")
    assert run("merge", base, folded, "-o", out).exit_code == 0
    assert run("verify", out, "--base", base, "--adapter", folded).exit_code == 0
    behind = adapter_for(tiny_model("llama"), "layer")
    adaptive = with_predictors(adapter_for(tiny_model("llama")), tiny_model("llama"))
    for name, made in (("behind", behind), ("adaptive", adaptive)):
        made.save_pretrained(tmp_path / name)
        text = refused(run("verify", out, "--base", base, "--adapter", tmp_path / name))
        assert "no weight can absorb" in text


def test_a_quantized_base_is_not_compared(base: Path, adapter: Callable[[str], str]) -> None:
    text = refused(run("show", adapter("ffn"), "--base", base))
    assert "weights are quantized" in text and "name the unquantized model" in text


def test_a_tensor_under_two_names_is_refused(
    base: Path, adapter: Callable[[str], str], tmp_path: Path
) -> None:
    tensors = read_safetensors(base / "model.safetensors")
    name = f"{DOWN.format(0)}.scales"
    again = {name.removeprefix("model."): tensors[name]}
    write_safetensors(base / "model.safetensors", {**tensors, **again})
    text = refused(run("merge", base, adapter("ffn"), "-o", tmp_path / "out"))
    assert "a second time" in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("component", ["attention", "neuron"])
def test_input_gains_are_one_line(
    base: Path, adapter: Callable[[str], str], tmp_path: Path, component: str
) -> None:
    text = refused(run("merge", base, adapter(component), "-o", tmp_path / "out"))
    assert "cannot express it" in text and "quantize the result" in text and "graft" in text
    assert not (tmp_path / "out").exists()


def test_a_live_run_is_refused(
    base: Path, adapter: Callable[[str], str], tmp_path: Path
) -> None:
    loaded = SteeringAdapter.from_pretrained(adapter("ffn"))
    with pytest.raises(RouteError, match="fit the unquantized model, then merge"):
        write_product(
            Route.SAFETENSORS,
            Base(None, None, base),  # type: ignore[arg-type]
            loaded,
            tmp_path,
            Handling(),
        )


def test_a_gguf_file_in_and_out(
    gguf_base: Path, adapter: Callable[[str], str], tmp_path: Path
) -> None:
    out, saved = tmp_path / "out.gguf", adapter("ffn")
    merged = run("merge", gguf_base, saved, "-o", out, "--json")
    assert merged.exit_code == 0, merged.output
    row = json.loads(merged.stdout)
    assert row["verified"] and row["route"] == "gguf" and len(row["notes"]) == 3
    options = ("--base", gguf_base, "--adapter", saved)
    assert run("verify", out, *options).exit_code == 0
    assert "not the base times" in refused(run("verify", gguf_base, *options), 4)
    assert "remove it" in refused(run("merge", gguf_base, saved, "-o", out))
    assert "ends in .gguf" in refused(run("merge", gguf_base, saved, "-o", tmp_path / "dir"))
    for text in (
        refused(run("onnx", gguf_base, saved, "-o", tmp_path / "x")),
        refused(run("merge", gguf_base, saved, "-o", tmp_path / "x", "--code")),
        refused(run("peft", saved, gguf_base, "--as", "lora", "-o", tmp_path / "x")),
    ):
        assert "give the checkpoint that it was converted from" in text


def test_gguf_products_need_their_own_base(
    gguf_base: Path, base: Path, adapter: Callable[[str], str], tmp_path: Path
) -> None:
    saved = adapter("ffn")
    wrong = run("verify", gguf_base, "--base", base, "--adapter", saved)
    assert "only one is a GGUF file" in refused(wrong)
    merge_checkpoint(base, SteeringAdapter.from_pretrained(saved), tmp_path / "out")
    wrong = run("verify", tmp_path / "out", "--base", gguf_base, "--adapter", saved)
    assert "only one is a GGUF file" in refused(wrong)


def test_a_missing_or_broken_file_is_one_line(
    adapter: Callable[[str], str], tmp_path: Path
) -> None:
    path, saved = tmp_path / "base.gguf", adapter("ffn")
    assert "found none" in refused(run("merge", path, saved, "-o", tmp_path / "o.gguf"))
    path.write_bytes(b"GGUF")
    assert "ends at byte 4" in refused(run("merge", path, saved, "-o", tmp_path / "o.gguf"))


@pytest.mark.parametrize("method", ["int8", "fp8", "int4", "bitsandbytes"])
def test_the_library_of_the_format_reads_the_steering(
    saved_model: Callable[..., Path],
    tiny_model: Callable[..., Any],
    tmp_path: Path,
    method: str,
) -> None:
    """What the format's own library loads equals the base that it loads, with hooks."""
    need("bitsandbytes" if method == "bitsandbytes" else "compressed_tensors")
    from transformers import AutoModelForCausalLM

    base, out = saved_model("llama"), tmp_path / "out"
    quantize_folder(base, method)
    adapter = adapter_for(tiny_model("llama"))
    merge_checkpoint(base, adapter, out)
    ids = torch.arange(3, 30)[None]
    loaded = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (base, out)]
    with torch.no_grad():
        plain, folded = (model(ids).logits for model in loaded)
        with steering_hooks(loaded[0], adapter.architecture, adapter.sites, 1.0):
            steered = loaded[0](ids).logits
    rounding = {"int8": 2**-8, "int4": 2**-11}.get(method, 2**-20)
    moved = float((steered - plain).abs().max())
    assert float((folded - steered).abs().max()) < rounding * moved < 0.01 * moved
    if method != "bitsandbytes":
        found = loaded[1].model.layers[1].mlp.down_proj.weight.detach().float().numpy()
        stored = read_safetensors(out / "model.safetensors")
        assert found == pytest.approx(dequantized(stored, DOWN.format(1), method), rel=2**-8)


@pytest.mark.parametrize("option", [("--dtype", "float16"), ("--max-shard-size", "1MB")])
def test_quantized_weights_keep_their_files(
    base: Path,
    gguf_base: Path,
    adapter: Callable[[str], str],
    tmp_path: Path,
    option: tuple[str, str],
) -> None:
    saved = adapter("ffn")
    text = refused(run("merge", base, saved, "-o", tmp_path / "out", *option))
    assert "its weights are quantized" in text
    text = refused(run("merge", gguf_base, saved, "-o", tmp_path / "o.gguf", *option))
    assert "one GGUF file of the same types" in text


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (("--revision", "main"), "revision"),
        (("--device", "cuda"), "device"),
        (("--trust-remote-code",), "trust_remote_code"),
    ],
)
def test_a_gguf_file_is_not_loaded(
    gguf_base: Path,
    adapter: Callable[[str], str],
    tmp_path: Path,
    option: tuple[str, ...],
    name: str,
) -> None:
    out = tmp_path / "o.gguf"
    text = refused(run("merge", gguf_base, adapter("ffn"), "-o", out, *option))
    assert f"leave out {name}" in text and not out.exists()


@pytest.mark.parametrize("options", [(), ("--no-verify",)])
def test_a_full_disk_is_said_before_anything_is_written(
    gguf_base: Path,
    adapter: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    saved, full = adapter("ffn"), SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=1)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    monkeypatch.setattr("austeer.exporter.free_space._shares_blocks", lambda *_: False)
    text = refused(run("merge", gguf_base, saved, "-o", tmp_path / "o.gguf", *options))
    assert "nothing was written" in text


def test_a_gguf_output_of_a_quicker_run_stays(
    gguf_base: Path,
    adapter: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, loaded = tmp_path / "o.gguf", SteeringAdapter.from_pretrained(adapter("ffn"))

    def late(*_: Any) -> None:
        out.write_bytes(b"theirs")

    monkeypatch.setattr("austeer.exporter.quantized.products.verify_gguf_structure", late)
    with pytest.raises(OutputError, match="expected a new file"):
        write_quantized(gguf_base, loaded, out, Handling())
    assert out.read_bytes() == b"theirs"
