"""`austeer.json`: true digests, enough to run again, and nothing that changes by itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from austeer.adapters import SteeringAdapter
from austeer.exporter import provenance
from austeer.exporter.cli import cli
from austeer.exporter.merge import merge_checkpoint
from austeer.exporter.provenance import Seal


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Path:
    return saved_model("llama")


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    made = SteeringAdapter.from_units(
        tiny_model("llama"), "attention", layers=[0, 1], units=[3, 5], gamma=[1.0, -0.3]
    )
    return made.save_pretrained(tmp_path / "adapter")


def invoke(*arguments: object) -> None:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def said(folder: Path) -> dict[str, Any]:
    text = (folder / "austeer.json").read_text()
    assert ".partial-" not in text
    values: dict[str, Any] = json.loads(text)
    return values


def test_every_digest_is_that_of_the_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("merge", base, adapter, "-o", out, "--no-verify", "--scale", "0.5")
    values = said(out)
    for name, facts in values["base"]["files"].items():
        assert facts == {"size": (base / name).stat().st_size, "sha256": sha256(base / name)}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        values["base"]["files"]
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert values["adapter"][name] == sha256(adapter / name)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert values["adapter"]["base_model_fingerprint"] == config["base_model_fingerprint"]
    assert values["route"] == "safetensors" and values["options"]["scale"] == 0.5
    assert {"numpy", "python", "safetensors"} <= set(values["versions"])
    assert "torch" not in values["versions"], "no model took part"


def test_a_proved_product_names_what_proved_it(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    invoke("merge", base, adapter, "-o", tmp_path / "out")
    values = said(tmp_path / "out")
    assert {"torch", "transformers"} <= set(values["versions"])
    assert values["torch_threads"] >= 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("-o", "{}"), "-o OUT"),
        (("--out", "{}"), "--out OUT"),
        (("--out={}",), "--out=OUT"),
        (("-o{}",), "-oOUT"),
    ],
)
def test_the_command_is_told_without_its_output(
    base: Path, adapter: Path, tmp_path: Path, given: tuple[str, ...], told: str
) -> None:
    out = tmp_path / "two words"
    invoke("merge", base, adapter, *(part.format(out) for part in given), "--no-verify")
    wanted = f"austeer-export merge {base} {adapter} {told} --no-verify"
    assert said(out)["command"] == wanted


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize("command", [("merge", "--no-verify"), ("merge", "--code"), ("onnx",)])
def test_two_products_are_the_same_files(
    base: Path, adapter: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    trees = []
    for name in ("first", "second"):
        invoke(*command, base, adapter, "-o", tmp_path / name)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        trees.append({p.relative_to(tmp_path / name): p.read_bytes() for p in files})
    assert trees[0] == trees[1]


def test_large_files_are_named_with_their_size_alone(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sorted(path.stat().st_size for path in base.iterdir())
    monkeypatch.setattr(provenance, "_CHEAP", sum(sizes) - 1)
    merge_checkpoint(base, SteeringAdapter.from_pretrained(adapter), tmp_path / "out")
    files = said(tmp_path / "out")["base"]["files"]
    unhashed = [name for name, facts in files.items() if "sha256" not in facts]
    assert unhashed == ["model.safetensors"]
    assert files["model.safetensors"]["size"] == sizes[-1]


def test_a_product_as_base_does_not_speak_for_the_next(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    loaded = SteeringAdapter.from_pretrained(adapter)
    merge_checkpoint(base, loaded, tmp_path / "once", seal=Seal(command="the first"))
    summary = merge_checkpoint(
        tmp_path / "once", loaded, tmp_path / "twice", force=True, seal=Seal(sums=False)
    )
    values = said(tmp_path / "twice")
    assert values["command"] == "" and values["options"]["force"] is True
    assert "austeer.json" not in values["base"]["files"]
    assert sorted(summary.files) == sorted(p.name for p in (tmp_path / "twice").iterdir())
    assert "SHA256SUMS" not in summary.files


def test_a_hub_snapshot_names_its_commit(base: Path, adapter: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    merge_checkpoint(snapshot, SteeringAdapter.from_pretrained(adapter), tmp_path / "out")
    assert said(tmp_path / "out")["base"]["commit"] == "0123abcd"


def test_a_graft_says_what_it_was_made_of(
    tmp_path: Path, exported_base: Callable[..., tuple[Any, Path]]
) -> None:
    model, graph = exported_base("llama")
    made = SteeringAdapter.from_units(model, "attention", [0], [3], [1.0])
    saved = made.save_pretrained(tmp_path / "made")
    out = tmp_path / "out"
    invoke("graft", graph, saved, "-o", out, "--inline")
    values = said(out)
    assert values["base"]["files"] == {
        graph.name: {"size": graph.stat().st_size, "sha256": sha256(graph)}
    }
    assert values["adapters"][0]["adapter_model.safetensors"] == sha256(
        saved / "adapter_model.safetensors"
    )
    assert values["options"]["inline"] is True
    assert (out / "SHA256SUMS").is_file()
    invoke("graft", graph, saved, "-o", tmp_path / "bare", "--no-sums")
    assert not (tmp_path / "bare" / "SHA256SUMS").exists()
