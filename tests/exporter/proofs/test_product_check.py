"""`verify` of a finished directory: sums first, then structure, then logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from austeer.adapters import SteeringAdapter
from austeer.adapters.weights import Checkpoint
from austeer.exporter.cli import cli


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Path:
    return saved_model("llama")


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    made = SteeringAdapter.from_units(
        tiny_model("llama"), "attention", layers=[0, 1], units=[3, 5], gamma=[1.0, -0.3]
    )
    return made.save_pretrained(tmp_path / "adapter")


@pytest.fixture
def product(tmp_path: Path, base: Path, adapter: Path) -> Callable[..., Path]:
    """A product by a command, its options, and where it is."""

    def make(command: str, *options: str) -> Path:
        out = tmp_path / "product"
        first = (adapter, base) if command == "peft" else (base, adapter)
        result = invoke(command, *first, "-o", out, "--no-verify", *options)
        assert result.exit_code == 0, result.output
        return out

    return make


@pytest.fixture
def verify(base: Path, adapter: Path) -> Callable[..., Result]:
    def run(folder: Path, *options: str) -> Result:
        return invoke("verify", folder, "--base", base, "--adapter", adapter, *options)

    return run


def test_what_is_as_published_passes(product: Any, verify: Any) -> None:
    out = product("merge")
    result = verify(out)
    assert result.exit_code == 0, result.output
    count = len((out / "SHA256SUMS").read_text().splitlines())
    assert f"All {count} files are those that SHA256SUMS lists" in result.stdout
    assert json.loads(verify(out, "--json").stdout)["files_checked"] == count


def test_sums_come_before_everything_else(
    product: Any, verify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = product("merge")
    (out / "README.md").write_text("my own words")
    (out / "notes.txt").write_text("x")
    (out / "config.json").unlink()
    for name in ("load_base", "prove_structure"):
        monkeypatch.setattr(
            f"austeer.exporter.proofs.product_check.{name}", lambda *_: pytest.fail("too late")
        )
    result = verify(out)
    assert result.exit_code == 4 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[:3] == [
        "changed: README.md (the model card: text for people, no runtime reads it)",
        "missing: config.json",
        "extra: notes.txt",
    ]
    assert len(lines) == 4 and lines[3].startswith("error: ")
    assert "--accept-changes" in lines[3]


def test_edits_can_be_accepted_where_all_else_holds(product: Any, verify: Any) -> None:
    out = product("merge")
    (out / "README.md").write_text("my own words")
    before = (out / "SHA256SUMS").read_text()
    assert verify(out, "--accept-changes", "--structure-only").exit_code == 0
    assert (out / "SHA256SUMS").read_text() != before
    assert verify(out, "--structure-only").exit_code == 0


def test_a_changed_weight_is_never_accepted(product: Any, verify: Any) -> None:
    out = product("merge")
    before = (out / "SHA256SUMS").read_text()
    entry = Checkpoint(out)["model.norm.weight"]
    with entry.file.open("r+b") as stream:
        stream.seek(entry.start)
        stream.write((entry.read() * 2).tobytes())
    for option in ("--structure-only", "--json"):
        result = verify(out, "--accept-changes", option)
        assert result.exit_code == 4 and "model.norm.weight" in result.stderr
    assert (out / "SHA256SUMS").read_text() == before


def test_without_sums_it_says_so(product: Any, verify: Any) -> None:
    out = product("merge", "--no-sums")
    assert not (out / "SHA256SUMS").exists() and (out / "austeer.json").exists()
    result = verify(out)
    assert result.exit_code == 0 and "has no SHA256SUMS" in result.stdout


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("merge",), "2 steered weights agree"),
        (("merge", "--code"), "tensors are the base's"),
        (("peft", "--as", "lora"), "2 steered weights agree"),
        (("peft", "--as", "ia3"), "2 steered weights agree"),
    ],
)
def test_structure_alone_loads_no_model(
    product: Any,
    verify: Any,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    says: str,
) -> None:
    out = product(*command)
    monkeypatch.setattr(
        "austeer.exporter.proofs.product_check.load_base", lambda *_: pytest.fail("a model")
    )
    result = verify(out, "--structure-only")
    assert result.exit_code == 0, result.output
    assert says in result.stdout and "no model was run" in result.stdout


def test_structure_alone_refuses_another_base(
    product: Any, verify: Any, base: Path, tiny_model: Callable[..., Any]
) -> None:
    out = product("merge")
    tiny_model("llama", seed=5).save_pretrained(base)
    result = verify(out, "--structure-only")
    assert result.exit_code == 2 and "another base" in result.stderr
