"""`show` and `combine` on the command line: what they print, write and refuse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from austeer.adapters import SteeringAdapter, load_model
from austeer.exporter.cli import cli

IDS = torch.arange(3, 15).reshape(2, 6)


def invoke(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result


def as_json(result: Result) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def refused(tmp_path: Path, *arguments: object, says: tuple[str, ...]) -> None:
    before = sorted(tmp_path.rglob("*"))
    lines = invoke(*arguments, exit_code=2).stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ") and "bug" not in lines[0]
    assert "--force" not in lines[0]
    for words in says:
        assert words in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Path:
    return saved_model("llama")


@pytest.fixture
def save(tmp_path: Path, tiny_model: Callable[..., Any]) -> Callable[..., Path]:
    def make(name: str, component: str, *units: tuple[int, int, float], seed: int = 0) -> Path:
        layers, numbers, gamma = zip(*units, strict=True)
        model = tiny_model("llama", seed=seed)
        made = SteeringAdapter.from_units(model, component, layers, numbers, gamma)
        return made.save_pretrained(tmp_path / name)

    return make


@pytest.fixture
def calm(save: Callable[..., Path]) -> Path:
    return save("calm", "ffn", (0, 3, 1.0), (1, 5, -0.5), (1, 6, 0.25))


@pytest.fixture
def formal(save: Callable[..., Path]) -> Path:
    return save("formal", "ffn", (1, 5, 2.0), (1, 6, 1.0), (1, 7, -1.0))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"{who} felt", "positive": " happy", "negative": " sad"}
        for who in ("Tom", "Mia", "the sun", "rain")
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("command", ["show", "combine"])
def test_commands_explain_themselves(command: str) -> None:
    assert "Usage:" in invoke(command, "--help").stdout


def test_show_says_what_units_do(base: Path, calm: Path) -> None:
    command = ("show", calm, "--base", base, "--units", 2)
    values = as_json(invoke(*command, "--json"))
    assert values["base_matches"]
    units = values["analysis"]["units"]
    assert [(unit["site"], unit["unit"], unit["gamma"]) for unit in units] == [
        ("layers.0.ffn", 3, 1.0),
        ("layers.1.ffn", 5, -0.5),
    ]
    (zero, there), (back, also_zero) = values["analysis"]["kl"]
    assert zero == also_zero == 0.0
    assert there > 0 < back and there != back
    text = invoke(*command).stdout
    for words in (
        "Strongest units",
        repr(units[0]["promotes"][0]["text"]),
        "KL (row ‖ column)",
    ):
        assert words in text
    assert f"{there:.1e}".replace("e-0", "e-") in text


def test_show_only_checks_the_base(
    base: Path, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("no model is needed")

    monkeypatch.setattr("austeer.exporter.products.load_base", loaded)
    values = as_json(invoke("show", calm, "--base", base, "--units", 0, "--json"))
    assert values["base_matches"] and "analysis" not in values
    assert "analysis" not in as_json(invoke("show", calm, "--json"))
    assert (
        "matches the fingerprint" in invoke("show", calm, "--base", base, "--units", 0).stdout
    )


def test_show_names_an_option_without_effect(calm: Path) -> None:
    says = invoke("show", calm, "--units", 3, exit_code=2).stderr
    assert "--units: is about the base model; name it with --base" in says


def test_show_refuses_another_base(
    tmp_path: Path, base: Path, save: Callable[..., Path]
) -> None:
    other = save("other", "ffn", (0, 3, 1.0), seed=7)
    says = (str(other), "another base", "sha256:", "use the right base")
    refused(tmp_path, "show", other, "--base", base, says=says)
    says = ("nowhere", "check the path")
    refused(tmp_path, "show", other, "--base", tmp_path / "nowhere", says=says)


def test_combine_writes_an_adapter_and_says_what_overlaps(
    tmp_path: Path, base: Path, calm: Path, formal: Path, pairs: Path
) -> None:
    out = tmp_path / "both"
    command = ("combine", calm, formal, "--base", base, "--weight", 1, "--weight", 0.5)
    more = ("--kl-budget", "inf", "--pairs", pairs)
    report = as_json(invoke(*command, *more, "-o", out, "--json"))
    assert (report["factor"], report["units"], report["conflicts"]) == (1.0, 4, 1)
    assert report["path"] == str(out)
    assert [row["weight"] for row in report["adapters"]] == [1.0, 0.5]
    assert report["behaviours"][str(pairs)]["pairs"] == 4
    model = load_model(base)
    made = SteeringAdapter.from_pretrained(out)
    by_hand = SteeringAdapter.from_units(
        model, "ffn", [0, 1, 1, 1], [3, 5, 6, 7], [1.0, 0.5, 0.75, -0.5]
    )
    with made.attached(model):
        found = model(IDS).logits
    with by_hand.attached(model):
        assert torch.equal(model(IDS).logits, found)
    text = invoke(*command, *more, "-o", tmp_path / "again").stdout
    for words in ("Steered twice", "opposite", "the sum", "1 of them in opposite", "Margins"):
        assert words in text
    assert f"{calm} × 1" in invoke("show", out).stdout.replace("\n", "")


def test_combine_tells_how_to_do_it_again(
    tmp_path: Path, base: Path, calm: Path, formal: Path, pairs: Path
) -> None:
    command = ("combine", calm, formal, "--base", base, "--kl-budget", "inf", "--seed", 3)
    command = (*command, "--pairs", pairs)
    outs = [tmp_path / "both", tmp_path / "again"]
    for out in outs:
        invoke(*command, "-o", out)
    found = json.loads((outs[0] / "austeer.json").read_text())
    assert found["command"].endswith(f"--pairs {pairs} -o OUT")
    assert (found["seed"], found["options"]["kl_budget"]) == (3, None)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest = hashlib.sha256((calm / name).read_bytes()).hexdigest()
        assert found["parts"][str(calm)][name] == digest
    assert found["parts"].keys() == {str(calm), str(formal)}
    assert found["data"][str(pairs)]["count"] == 4
    assert found["base"]["files"].keys() >= {"config.json", "model.safetensors"}
    names = sorted(path.name for path in outs[0].iterdir())
    assert "SHA256SUMS" in names
    for name in names:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    invoke(*command, "-o", tmp_path / "bare", "--no-sums")
    assert not (tmp_path / "bare" / "SHA256SUMS").exists()


def test_the_files_of_the_base_decide_not_the_dtype_it_runs_in(
    tmp_path: Path, base: Path, calm: Path, save: Callable[..., Path]
) -> None:
    other = save("other", "ffn", (1, 2, 0.5))
    command = ("combine", calm, other, "--base", base, "--kl-budget", 10)
    invoke(*command, "-o", tmp_path / "wide")
    invoke(*command, "--dtype", "float16", "-o", tmp_path / "half")
    wide, half = (
        SteeringAdapter.from_pretrained(tmp_path / name).config for name in ("wide", "half")
    )
    assert half.base_model_fingerprint == wide.base_model_fingerprint
    invoke("show", tmp_path / "half", "--base", base, "--dtype", "float16")


def test_combine_keeps_the_budget(
    tmp_path: Path, base: Path, save: Callable[..., Path]
) -> None:
    first = save("first", "ffn", (0, 3, 9.0), (1, 5, -8.0))
    second = save("second", "attention", (0, 3, 9.0), (1, 5, -8.0))
    command = ("combine", first, second, "--base", base, "--kl-budget", 0.02)
    report = as_json(invoke(*command, "-o", tmp_path / "out", "--json"))
    assert report["factor"] < 1 and report["kl"] < 0.022 < report["kl_unscaled"]
    text = invoke(*command, "-o", tmp_path / "again").stdout
    assert "all weights × " in text and "at a budget of 0.02" in text
    assert "KL alone" in text
    made = SteeringAdapter.from_pretrained(tmp_path / "out")
    assert made.config.fit["combined"]["kl"] == report["kl"]


def test_combine_refuses(
    tmp_path: Path, base: Path, calm: Path, formal: Path, save: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    other = save("other", "ffn", (0, 3, 1.0), seed=7)
    taken = tmp_path / "calm"

    def no(*arguments: object, says: tuple[str, ...]) -> None:
        refused(tmp_path, "combine", *arguments, "--base", base, says=says)

    no(calm, other, "-o", out, says=(str(other), "another base"))
    # Said before any model is opened.
    command = ("combine", calm, formal, "--base", tmp_path / "nowhere", "-o", taken)
    refused(tmp_path, *command, says=("calm", "not empty"))
    no(calm, formal, "-o", out, "--weight", 2, says=("one weight for each of 2", "got 1"))
    weights = ("--weight", "nan", "--weight", 1)
    no(calm, formal, "-o", out, *weights, says=("weight nan", "finite"))
    no(calm, calm, "-o", out, says=("same adapter", "with a weight"))
    no(calm, formal, "-o", out, "--kl-budget", 0, says=("kl_budget", "above 0"))
    no(calm, formal, "-o", out, "--on-overlap", "refuse", says=("unit 5", "calm", "formal"))
    no(calm, tmp_path / "nowhere", "-o", out, says=("nowhere", "adapter directory"))
    no(calm, "-o", out, "--pairs", tmp_path / "none.jsonl", says=("none.jsonl",))


def test_many_overlaps_are_cut_and_conflicts_come_first(
    tmp_path: Path, base: Path, save: Callable[..., Path]
) -> None:
    first = save("first", "ffn", *((0, unit, 0.01) for unit in range(30)))
    last = [(0, unit, -0.02 if unit == 29 else 0.02) for unit in range(30)]
    second = save("second", "ffn", *last)
    command = ("combine", first, second, "--base", base, "-o", tmp_path / "out")
    text = invoke(*command).stdout
    lines = [line for line in text.splitlines() if "layers.0.ffn" in line]
    assert len(lines) == 20
    assert "opposite" in lines[0] and " 29 " in lines[0]
    assert "30 units are steered by several adapters, 1 of them" in text
