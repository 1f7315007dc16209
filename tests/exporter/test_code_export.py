"""The steered checkpoint with code as a user makes it, checks it, and loads it without us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from plain_steering import random_adapter

from austeer.adapters import (
    AdapterError,
    AusteerError,
    Component,
    OutputError,
    RouteError,
    SteeringAdapter,
    Strength,
    VerificationError,
    load_steered,
    load_tokenizer,
)
from austeer.adapters.steered_format import CODE_NAME, STEERING_NAME
from austeer.adapters.tensors import TensorEntry
from austeer.adapters.weights import INDEX, Checkpoint
from austeer.exporter import Route, code_export
from austeer.exporter.cli import cli
from austeer.exporter.code_export import export_code
from austeer.exporter.proofs.code_check import private_code_cache, verify_code_structure
from austeer.exporter.proofs.code_parity import verify_code
from austeer.exporter.routes import candidate_components, resolve_strength, route_of

PROMPTS = ("one day Tom felt happy and went to the park .", "Mia was sad")
IDS = torch.tensor([[1, 5, 9, 7, 20, 11]])


def invoke(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def raw(entry: TensorEntry) -> bytes:
    return entry.read().tobytes()


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Path:
    return saved_model("llama")


@pytest.fixture
def adapter(tiny_model: Callable[..., Any]) -> SteeringAdapter:
    return random_adapter(tiny_model("llama"), "layer", rank=1)


@pytest.fixture
def saved_adapter(tmp_path: Path, adapter: SteeringAdapter) -> Path:
    return adapter.save_pretrained(tmp_path / "adapter")


def test_merge_with_code_and_verify(tmp_path: Path, base: Path, saved_adapter: Path) -> None:
    out, product = tmp_path / "out", ("--base", base, "--adapter", saved_adapter, "--json")
    made = json.loads(
        invoke("merge", base, saved_adapter, "-o", out, "--code", "--json").stdout
    )
    assert made["route"] == "code" and made["verified"] and made["path"] == str(out)
    assert made["greedy_agreement"] == 1.0 and made["steered_vs_base"] > 0.05
    again = json.loads(invoke("verify", out, *product).stdout)
    assert again["max_logit_difference"] == made["max_logit_difference"] < 1e-5
    says = invoke("verify", out, *product, "--scale", "0.5", exit_code=4).stderr
    assert "steering_scale is not what" in says and says.count("\n") == 1
    assert route_of(out) is Route.CODE
    assert {path.name for path in out.iterdir()} == {
        *(path.name for path in base.iterdir() if path.suffix == ".json"),
        *("README.md", CODE_NAME, STEERING_NAME, INDEX, "model-00001-of-00001.safetensors"),
        *("austeer.json", "SHA256SUMS"),
    }
    assert "trust_remote_code=True" in (out / "README.md").read_text()


def test_without_code_the_refusal_names_it(
    tmp_path: Path, base: Path, saved_adapter: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    result = invoke("merge", base, saved_adapter, "-o", tmp_path / "out", exit_code=2)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "merge --code" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_constant_gains_at_another_scale_in_half_precision(
    tmp_path: Path, base: Path, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("llama")
    adapter = random_adapter(model, "attention")
    saved, out = adapter.save_pretrained(tmp_path / "adapter"), tmp_path / "out"
    invoke("merge", base, saved, "-o", out, "--code", "--scale", "0.5", "--dtype", "float16")
    steered = load_steered(out)
    assert steered.steering_scale == 0.5
    with adapter.attached(model, 0.5):
        assert torch.equal(logits(steered), logits(model))


def test_unverified_says_so_and_loads_no_model(
    tmp_path: Path, base: Path, saved_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "austeer.adapters.loading.load_model", lambda *_, **__: pytest.fail("loaded")
    )
    arguments = ("merge", base, saved_adapter, "-o", tmp_path / "out", "--code", "--no-verify")
    assert not json.loads(invoke(*arguments, "--json").stdout)["verified"]
    assert (tmp_path / "out" / CODE_NAME).is_file()


def test_linked_weights_are_the_bases_files(
    tmp_path: Path, base: Path, saved_adapter: Path
) -> None:
    arguments = ("merge", base, saved_adapter, "--code", "--link", "--json")
    assert json.loads(invoke(*arguments, "-o", tmp_path / "out").stdout)["verified"]
    weights = tmp_path / "out" / "model-00001-of-00001.safetensors"
    assert weights.samefile(base / "model.safetensors")
    assert not (tmp_path / "out" / "config.json").samefile(base / "config.json")
    refused = (*arguments, "-o", tmp_path / "other", "--max-shard-size", "1MB")
    assert "--max-shard-size: with --code" in invoke(*refused, exit_code=2).stderr


def test_loads_in_a_process_that_cannot_import_us(
    tmp_path: Path, base: Path, adapter: SteeringAdapter, tiny_model: Callable[..., Any]
) -> None:
    export_code(base, adapter, tmp_path / "out")
    program = """
import sys
sys.modules["austeer"] = None
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, found = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("one day Tom felt", return_tensors="pt")
text = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"],
                      max_new_tokens=8, do_sample=False, eos_token_id=None)
with torch.no_grad():
    numpy.savez(found, ids=text.numpy(), logits=model(text).logits.numpy())
model.save_pretrained(folder + "-again")
assert not any(name.startswith("austeer.") for name in sys.modules)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", program, tmp_path / "out", tmp_path / "found.npz"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "found.npz")
    model = tiny_model("llama")
    with torch.no_grad(), adapter.attached(model):
        expected = model(torch.from_numpy(found["ids"])).logits.numpy()
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=1e-5)
    assert len(found["ids"][0]) == 5 + 8
    with adapter.attached(model):
        assert torch.equal(logits(load_steered(f"{tmp_path}/out-again")), logits(model))


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_the_weights_are_the_bases(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, tmp_path: Path, shard: str
) -> None:
    base = saved_model("llama", max_shard_size=shard)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    export_code(base, adapter, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    old, new = Checkpoint(base), Checkpoint(tmp_path / "out")
    assert all(raw(new[name]) == raw(entry) for name, entry in old.items())
    tensors = {f"model.austeer.{name}": t.tobytes() for name, t in adapter.tensors().items()}
    assert {name: raw(new[name]) for name in set(new) - set(old)} == tensors
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(entry.size for entry in new.values())
    assert index["weight_map"].keys() == set(new)


def test_gpt2_as_it_is_on_the_hub(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    # Names without the prefix, and a tokenizer whose class only the model type tells.
    model, base = tiny_model("gpt2"), tmp_path / "bare"
    model.transformer.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    (base / "tokenizer_config.json").write_text("{}")
    adapter = random_adapter(model, "neuron", rank=1)
    export_code(base, adapter, tmp_path / "out")
    with adapter.attached(model):
        assert torch.equal(logits(load_steered(tmp_path / "out")), logits(model))
    stated = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert stated == {"tokenizer_class": "GPT2Tokenizer"}
    tokenizers = [load_tokenizer(folder) for folder in (base, tmp_path / "out")]
    assert type(tokenizers[0]) is type(tokenizers[1])


def test_the_route_takes_everything() -> None:
    assert resolve_strength("auto", [Route.CODE]) is Strength.ADAPTIVE
    assert candidate_components((), [Route.CODE]) == tuple(Component)
    assert candidate_components((), [Route.CODE, Route.SAFETENSORS]) != tuple(Component)


def _in_config(name: str, value: Any) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, name: value}))

    return change


@pytest.mark.parametrize(
    ("change", "scale", "error", "message"),
    [
        (_in_config("quantization_config", {"bits": 4}), 1.0, RouteError, "quantized"),
        (
            lambda folder: (
                _in_config("slow_but_exact", True)(folder),
                _in_config("pretraining_tp", 2)(folder),
            ),
            1.0,
            RouteError,
            "no hook runs",
        ),
        (_in_config("auto_map", {"AutoConfig": "a.B"}), 1.0, RouteError, "code of its own"),
        (_in_config("model_type", "mistral"), 1.0, AdapterError, "for a llama model"),
        (lambda base: None, 0.0, RouteError, "nothing is steered at scale 0"),
        (lambda base: (base / "model.safetensors").unlink(), 1.0, AusteerError, "no weights"),
    ],
)
def test_refusals_leave_nothing_behind(
    base: Path,
    adapter: SteeringAdapter,
    tmp_path: Path,
    change: Callable[[Path], None],
    scale: float,
    error: type[AusteerError],
    message: str,
) -> None:
    change(base)
    with pytest.raises(error, match=message) as caught:
        export_code(base, adapter, tmp_path / "out", scale=scale)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [base.name]


def test_other_weights_and_taken_output(
    base: Path, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    other = random_adapter(tiny_model("llama", seed=1), "layer", rank=1)
    with pytest.raises(AdapterError, match="another base model"):
        export_code(base, other, tmp_path / "out")
    export_code(base, other, tmp_path / "out", force=True)
    with pytest.raises(OutputError, match="not empty"):
        export_code(base, other, tmp_path / "out", force=True)


def test_a_steered_product_is_no_base(
    base: Path, adapter: SteeringAdapter, tmp_path: Path
) -> None:
    export_code(base, adapter, tmp_path / "out")
    with pytest.raises(RouteError, match="code of its own"):
        export_code(tmp_path / "out", adapter, tmp_path / "twice")


def _poke(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        entry = Checkpoint(folder)[name]
        with entry.file.open("r+b") as stream:
            stream.seek(entry.start)
            first = stream.read(1)
            stream.seek(entry.start)
            stream.write(bytes([first[0] ^ 1]))

    return damage


def _append_code(folder: Path) -> None:
    with (folder / CODE_NAME).open("a") as stream:
        stream.write("raise RuntimeError('ran')\n")


def _plant_generate(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise RuntimeError('ran')\n")


def _name_tokenizer_code(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": []}})
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_plant_generate, "generate.py: is not ours, nothing was run"),
        (_name_tokenizer_code, "names code"),
        (_poke("model.norm.weight"), "model.norm.weight differs from the base's"),
        (_poke("model.austeer.layers.1.layer.U"), "U differs from the adapter's"),
        (_append_code, "was not run"),
        (lambda folder: (folder / CODE_NAME).unlink(), "was not run"),
        (_in_config("auto_map", {"AutoConfig": "else/where--a.B"}), "auto_map is not what"),
        (_in_config("model_type", "llama"), "model_type is not what"),
        (_in_config("extra", 1), "extra is not what"),
    ],
)
def test_files_that_are_not_ours_are_named_and_not_run(
    base: Path, adapter: SteeringAdapter, tmp_path: Path, damage: Any, message: str
) -> None:
    export_code(base, adapter, tmp_path / "out")
    verify_code_structure(base, tmp_path / "out", adapter)
    damage(tmp_path / "out")
    with pytest.raises(VerificationError, match=message):
        verify_code_structure(base, tmp_path / "out", adapter)
    adapter.save_pretrained(tmp_path / "adapter")
    product = ("verify", tmp_path / "out", "--base", base, "--adapter", tmp_path / "adapter")
    assert "RuntimeError" not in invoke(*product, exit_code=4).stderr


def test_missing_steering_is_named(
    base: Path, adapter: SteeringAdapter, tmp_path: Path
) -> None:
    export_code(base, adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    del index["weight_map"]["model.austeer.layers.0.layer.b"]
    (tmp_path / "out" / STEERING_NAME).unlink()
    names = {name for name, file in index["weight_map"].items() if file != STEERING_NAME}
    index["weight_map"] = {name: index["weight_map"][name] for name in names}
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    with pytest.raises(VerificationError, match="the adapter's, found otherwise"):
        verify_code_structure(base, tmp_path / "out", adapter)


def test_what_a_run_of_the_product_tells(
    base: Path,
    adapter: SteeringAdapter,
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    export_code(base, adapter, out)
    before, path = set(sys.modules), list(sys.path)

    def report() -> Any:
        return verify_code(out, model, tiny_tokenizer, adapter, PROMPTS)

    report().require()
    assert sys.path == path and not {
        m for m in set(sys.modules) - before if "modeling_aus" in m
    }
    code = (out / CODE_NAME).read_text()
    for wrong in ("math.log(2.9)", "math.log(3.0) + 0 * U.sum() * float('nan')"):
        (out / CODE_NAME).write_text(code.replace("math.log(3.0)", wrong))
        assert report().max_logit_difference != pytest.approx(0, abs=1e-3)
        assert not report().passed
    (out / CODE_NAME).write_text(code.replace("1.0 + self._amount(selected)", "1.0"))
    with pytest.raises(VerificationError, match=r"code product out: .*steering has no effect"):
        report().require()
    (out / CODE_NAME).write_text("raise ValueError('broken')")
    with pytest.raises(VerificationError, match=r"cannot load it \(ValueError: broken\)"):
        report()
    (out / CODE_NAME).write_text(code)
    words = json.loads((out / "tokenizer.json").read_text())
    words["post_processor"] = None
    (out / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(VerificationError, match="tokenizer differs"):
        report()


def test_product_that_fails_is_not_published(
    tmp_path: Path, base: Path, saved_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Code with a wrong constant on both sides: only the comparison with the model can tell.
    wrong = tmp_path.parent / f"{tmp_path.name}-{CODE_NAME}"
    wrong.write_text(code_export.code_file().read_text().replace("4.0 * torch", "3.0 * torch"))
    monkeypatch.setattr(code_export, "code_file", lambda: wrong)
    monkeypatch.setattr("austeer.exporter.proofs.code_check.code_file", lambda: wrong)
    before = sorted(tmp_path.iterdir())
    arguments = ("merge", base, saved_adapter, "-o", tmp_path / "out", "--code")
    result = invoke(*arguments, exit_code=4)
    assert result.stderr.startswith(f"error: code product {tmp_path / 'out'}: logits differ")
    assert sorted(tmp_path.iterdir()) == before


def test_private_cache_ends_with_an_error(tmp_path: Path) -> None:
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.HF_MODULES_CACHE
    with pytest.raises(KeyError), private_code_cache():
        inside = Path(dynamic_module_utils.HF_MODULES_CACHE)
        assert inside.is_dir() and str(inside) != before
        raise KeyError
    assert before == dynamic_module_utils.HF_MODULES_CACHE
    assert not inside.exists()
