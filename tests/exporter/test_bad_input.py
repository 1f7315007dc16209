"""Bad input through the command line: one clear line, a non-zero exit, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from austeer.adapters import SteeringAdapter, localize, read_pairs
from austeer.exporter.cli import cli

PAIRS = [
    {
        "prompt": f"{who} went to the {place}",
        "positive": f" {mood} happy",
        "negative": " sad so",
    }
    for who in ("Tom", "Mia", "it")
    for place in ("park", "home", "sun")
    for mood in ("very", "so", "and", "then")
]


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Path:
    return saved_model("llama")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    made = SteeringAdapter.from_units(
        tiny_model("llama"), "attention", layers=[0, 1], units=[3, 5], gamma=[1.0, -0.5]
    )
    return made.save_pretrained(tmp_path / "adapter")


def write_rows(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def tree(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): path.stat().st_size if path.is_file() else -1
        for path in sorted(root.rglob("*"))
    }


def refused(root: Path, *arguments: object, says: tuple[str, ...]) -> Result:
    """Run a command that must fail in one clear line and leave `root` as it is."""
    before = tree(root)
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code != 0
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    assert "bug" not in lines[0]
    for words in says:
        assert words in lines[0]
    assert result.stdout == ""
    assert tree(root) == before
    return result


def run(model: object, pairs: object, tmp_path: Path, *more: object) -> list[object]:
    component = () if "--component" in more else ("--component", "attention")
    return ["run", model, pairs, "-o", tmp_path / "out", *component, *more]


# The model directory


def test_missing_model(tmp_path: Path, pairs: Path) -> None:
    missing = tmp_path / "nowhere"
    refused(tmp_path, *run(missing, pairs, tmp_path), says=(str(missing), "check the path"))


def test_config_that_is_not_json(tmp_path: Path, base: Path, pairs: Path) -> None:
    (base / "config.json").write_text("{not json")
    refused(tmp_path, *run(base, pairs, tmp_path), says=("config.json", "not valid JSON"))


def test_directory_without_a_config(tmp_path: Path, base: Path, pairs: Path) -> None:
    (base / "config.json").unlink()
    refused(tmp_path, *run(base, pairs, tmp_path), says=("config.json",))


def test_unsupported_architecture(tmp_path: Path, base: Path, pairs: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    says = ("'mamba'", "not supported", "architectures.py")
    refused(tmp_path, *run(base, pairs, tmp_path), says=says)


def test_config_without_weights(tmp_path: Path, base: Path, pairs: Path) -> None:
    (base / "model.safetensors").unlink()
    refused(tmp_path, *run(base, pairs, tmp_path), says=(str(base), "no weights"))


def test_pickle_only_weights(tmp_path: Path, base: Path, pairs: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused(tmp_path, *run(base, pairs, tmp_path), says=("pickle", "pytorch_model.bin"))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(tmp_path: Path, base: Path, pairs: Path, keep: int) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(tmp_path, *run(base, pairs, tmp_path), says=("model.safetensors", "truncated"))


def test_corrupt_weights(tmp_path: Path, base: Path, pairs: Path, adapter: Path) -> None:
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[8:40] = os.urandom(32)
    weights.write_bytes(bytes(data))
    says = ("model.safetensors", "corrupt")
    refused(tmp_path, *run(base, pairs, tmp_path), says=says)
    refused(tmp_path, "merge", base, adapter, "-o", tmp_path / "out", says=says)


def test_missing_shard(
    tmp_path: Path, saved_model: Callable[..., Path], pairs: Path, adapter: Path
) -> None:
    base = saved_model("llama", max_shard_size="20KB")
    shard = sorted(base.glob("model-*.safetensors"))[0]
    shard.unlink()
    refused(tmp_path, *run(base, pairs, tmp_path), says=(shard.name, "missing"))


# Pairs


def test_missing_pairs(tmp_path: Path, base: Path) -> None:
    refused(tmp_path, *run(base, tmp_path / "no.jsonl", tmp_path), says=("no.jsonl",))


def test_empty_pairs(tmp_path: Path, base: Path) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    refused(tmp_path, *run(base, empty, tmp_path), says=("empty.jsonl", "no pairs"))


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_empty_completion(tmp_path: Path, base: Path, side: str) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [PAIRS[0], PAIRS[1] | {side: ""}])
    refused(tmp_path, *run(base, bad, tmp_path), says=("bad.jsonl:2", side))


def test_row_that_is_not_json(tmp_path: Path, base: Path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [PAIRS[0], "{oops"])
    refused(tmp_path, *run(base, bad, tmp_path), says=("bad.jsonl:2", "JSON"))


def test_duplicate_pairs(tmp_path: Path, base: Path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [*PAIRS, PAIRS[3]])
    says = (f"bad.jsonl:{len(PAIRS) + 1}", "bad.jsonl:4")
    refused(tmp_path, *run(base, bad, tmp_path), says=says)


def test_prompt_that_exceeds_the_context(tmp_path: Path, base: Path) -> None:
    long = PAIRS[0] | {"prompt": "Tom went home " * 200}
    bad = write_rows(tmp_path / "bad.jsonl", [*PAIRS[1:], long])
    refused(tmp_path, *run(base, bad, tmp_path), says=(f"bad.jsonl:{len(PAIRS)}", "128"))


def test_too_few_pairs(tmp_path: Path, base: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", PAIRS[:1])
    refused(tmp_path, *run(base, few, tmp_path), says=("1",))


def test_test_pair_that_is_also_a_training_pair(
    tmp_path: Path, base: Path, pairs: Path
) -> None:
    test = write_rows(tmp_path / "test.jsonl", [PAIRS[2]])
    arguments = run(base, pairs, tmp_path, "--test-pairs", test)
    refused(tmp_path, *arguments, says=("test.jsonl:1",))


# The model's numbers


def test_non_finite_activations(tmp_path: Path, base: Path, pairs: Path) -> None:
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.down_proj.weight"))
    weights[name][:] = np.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, *run(base, pairs, tmp_path, "--component", "ffn"), says=("finite",))


def test_too_few_pairs_to_choose_by(tmp_path: Path, base: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", PAIRS[:12])
    refused(tmp_path, *run(base, few, tmp_path), says=("left for validation", "at least 5"))


def test_ranking_of_another_base(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any, base: Path, pairs: Path
) -> None:
    other = tiny_model("llama", seed=7)
    made = localize(other, tiny_tokenizer, read_pairs(pairs), components=["attention"])
    ranking = made.save(tmp_path / "other.safetensors")
    arguments = run(base, pairs, tmp_path, "--ranking", ranking)
    refused(tmp_path, *arguments, says=("ranking for another base model", "localize again"))


def test_more_units_than_exist(tmp_path: Path, base: Path, pairs: Path) -> None:
    arguments = run(base, pairs, tmp_path, "--max-units", 100_000)
    refused(tmp_path, *arguments, says=("100000", "attention has 64"))


# The adapter


@pytest.mark.parametrize("command", ["merge", "onnx"])
def test_adapter_for_another_base(
    tmp_path: Path, tiny_model: Callable[..., Any], base: Path, command: str
) -> None:
    other = tiny_model("llama", seed=7)
    made = SteeringAdapter.from_units(other, "attention", [0], [3], [1.0])
    adapter = made.save_pretrained(tmp_path / "other")
    says = ("another base", made.config.base_model_fingerprint, "--force")
    refused(tmp_path, command, base, adapter, "-o", tmp_path / "out", says=says)
    refused(tmp_path, "show", adapter, "--base", base, says=says[:2])


def change_config(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name.replace("__", "."): v for name, v in values.items()}, path)


def test_adapter_with_unknown_key(tmp_path: Path, base: Path, adapter: Path) -> None:
    change_config(adapter, surprise=1)
    refused(tmp_path, "merge", base, adapter, "-o", tmp_path / "out", says=("'surprise'",))


def test_adapter_with_unknown_version(tmp_path: Path, base: Path, adapter: Path) -> None:
    change_config(adapter, format_version=99)
    says = ("format_version 99", "update austeer")
    refused(tmp_path, "merge", base, adapter, "-o", tmp_path / "out", says=says)


HOSTILE_FITS = (
    {"test": 5, "beta": 5, "combined": 5},
    {"test": {"kl": "x", "accuracy": [1], "margin": 10**400, "a|b\n": 0.5}},
    {"beta": {"layers.0.attention": "low", "layers.1.attention": [1]}},
    {"beta": {"layers.0.attention": {"0": 1}, "layers.1.attention": ["a", "b"]}},
    {"combined": {"adapters": [{"name": "\x1b[2J", "weight": 1}, {"name": 1}, 3]}},
    {"combined": {"adapters": [{"name": "a", "weight": 10**400}]}},
)


@pytest.mark.parametrize("fit", HOSTILE_FITS, ids=range(len(HOSTILE_FITS)))
def test_what_a_stranger_wrote_about_the_fit_is_left_out(
    tmp_path: Path, base: Path, adapter: Path, fit: Any
) -> None:
    change_config(adapter, fit=fit)
    for arguments in (
        ("show", adapter),
        ("show", adapter, "--json"),
        ("merge", base, adapter, "-o", tmp_path / "out", "--no-verify"),
    ):
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.output


def test_names_that_are_no_text_do_no_harm(tmp_path: Path, base: Path, adapter: Path) -> None:
    import os

    odd = tmp_path / os.fsdecode(b"b\xe9se")
    base.rename(odd)
    (odd / os.fsdecode(b"caf\xe9.json")).write_text("{}")
    out = tmp_path / "out"
    arguments = ("merge", odd, adapter, "-o", out, "--no-verify")
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "b\\udce9se" in json.loads((out / "austeer.json").read_text())["base"]["model"]
    assert (out / os.fsdecode(b"caf\xe9.json")).is_file()


def test_a_link_out_of_the_base_is_not_published(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (base / "notes.txt").symlink_to(secret)
    says = ("notes.txt", "link out of the model's directory", str(secret))
    refused(tmp_path, "merge", base, adapter, "-o", tmp_path / "out", says=says)
    (base / "config.json").unlink()
    (base / "config.json").symlink_to("/dev/zero")
    says = ("config.json", "not a regular file")
    refused(tmp_path, "merge", base, adapter, "-o", tmp_path / "out", says=says)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", ["merge", "onnx", "show"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_files_that_are_pipes(
    tmp_path: Path, base: Path, adapter: Path, command: str, name: str
) -> None:
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    arguments = [adapter] if command == "show" else [base, adapter, "-o", tmp_path / "out"]
    refused(tmp_path, command, *arguments, says=(name,))


def test_gains_that_leave_the_range_of_the_weights(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    change_tensors(adapter, layers__0__attention__gamma=np.array([3e38], np.float32))
    weights = load_file(base / "model.safetensors")
    arguments = ("merge", base, adapter, "-o", tmp_path / "out", "--scale", 1000)
    assert all(np.isfinite(tensor).all() for tensor in weights.values())
    refused(tmp_path, *arguments, says=("unit 3", "leaves the range of float32"))


def test_config_with_nan_takes_no_code(tmp_path: Path, base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"note": float("nan")}))
    arguments = ("merge", base, adapter, "-o", tmp_path / "out", "--code")
    refused(tmp_path, *arguments, says=("config.json", "NaN"))


@pytest.mark.parametrize("more", [["--json"], []])
def test_paths_that_are_not_utf8(
    tmp_path: Path, base: Path, adapter: Path, more: list[str]
) -> None:
    out = tmp_path / os.fsdecode(b"out-\xff")
    command = ["merge", base, adapter, "-o", out, "--no-verify", *more]
    for wanted in (0, 2):
        done = subprocess.run(
            [sys.executable, "-m", "austeer.exporter", *map(str, command)],
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == wanted, done.stderr
        assert b"Traceback" not in done.stderr
        assert (out / "model.safetensors").is_file()


def test_units_out_of_range(tmp_path: Path, base: Path, adapter: Path) -> None:
    change_tensors(adapter, layers__0__attention__index=np.array([4096]))
    says = ("layers.0.attention", "4096", "width 32")
    refused(tmp_path, "merge", base, adapter, "-o", tmp_path / "out", says=says)


def test_duplicate_units(tmp_path: Path, base: Path, adapter: Path) -> None:
    change_tensors(
        adapter,
        layers__0__attention__index=np.array([3, 3]),
        layers__0__attention__gamma=np.array([1.0, 2.0], np.float32),
    )
    says = ("layers.0.attention", "unit 3", "2 times")
    refused(tmp_path, "show", adapter, says=says)
    refused(tmp_path, "merge", base, adapter, "-o", tmp_path / "out", says=says)


def test_directory_that_is_no_adapter(tmp_path: Path, base: Path) -> None:
    says = ("adapter_config.json",)
    refused(tmp_path, "merge", base, base, "-o", tmp_path / "out", says=says)


# The output


@pytest.mark.parametrize("command", ["run", "fit", "merge", "onnx"])
def test_output_directory_that_is_not_empty(
    tmp_path: Path, base: Path, pairs: Path, adapter: Path, command: str
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("precious")
    second = pairs if command in ("run", "fit") else adapter
    refused(tmp_path, command, base, second, "-o", taken, says=(str(taken), "not empty"))


def test_output_file_that_exists(tmp_path: Path, base: Path, pairs: Path) -> None:
    taken = tmp_path / "ranking.safetensors"
    taken.write_text("precious")
    says = (str(taken), "expected a new file name", "existing file")
    refused(tmp_path, "localize", base, pairs, "-o", taken, says=says)


def test_ranking_into_a_directory_is_refused_before_the_model(
    tmp_path: Path, pairs: Path
) -> None:
    out = tmp_path / "folder"
    out.mkdir()
    arguments = ("localize", tmp_path / "no-model", pairs, "-o", out)
    refused(tmp_path, *arguments, says=(str(out), "expected a file name"))


def test_output_below_a_file(tmp_path: Path, base: Path, adapter: Path) -> None:
    out = base / "config.json" / "out"
    refused(
        tmp_path, "merge", base, adapter, "-o", out, says=(str(out), "a file is in the way")
    )


def test_disk_full_while_syncing(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    says = ("no space left", "nothing was left behind")
    refused(tmp_path, "merge", base, adapter, "-o", tmp_path / "out", says=says)


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize("command", ["merge", "onnx"])
def test_write_that_the_kernel_refuses(
    tmp_path: Path, base: Path, adapter: Path, command: str, file_size_limit: None
) -> None:
    out = tmp_path / "out"
    refused(tmp_path, command, base, adapter, "-o", out, says=("out", "file too large"))


def test_disk_full_at_the_end_of_a_run(
    tmp_path: Path, base: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # Whether this run helps or not, its report must be written.
    monkeypatch.setattr("austeer.exporter.run.write_report", full)
    arguments = run(base, pairs, tmp_path, "--strength", "oriented", "--max-units", 4)
    refused(tmp_path, *arguments, says=("no space left",))


def test_parent_that_may_not_be_written(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by mode bits: they do not bind root, as which many pipelines run.
    def forbidden(**options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out")

    monkeypatch.setattr("tempfile.mkdtemp", forbidden)
    out = tmp_path / "out"
    refused(tmp_path, "merge", base, adapter, "-o", out, says=(str(out), "permission denied"))


def test_product_that_lost_its_file(tmp_path: Path, base: Path, adapter: Path) -> None:
    empty = tmp_path / "product"
    empty.mkdir()
    arguments = ("verify", empty, "--base", base, "--adapter", adapter)
    refused(tmp_path, *arguments, says=("*.onnx or model.safetensors",))


def test_product_that_is_not_there(tmp_path: Path, base: Path, adapter: Path) -> None:
    arguments = ("verify", tmp_path / "no", "--base", base, "--adapter", adapter)
    refused(tmp_path, *arguments, says=("found nothing there",))


@pytest.mark.parametrize("name", ["ranking.safetensors", "adapter_model.safetensors"])
def test_verify_of_what_is_no_product(
    tmp_path: Path, base: Path, adapter: Path, name: str
) -> None:
    folder = tmp_path / "whole-run"
    folder.mkdir()
    (folder / name).write_bytes(b"anything")
    arguments = ("verify", folder, "--base", base, "--adapter", adapter)
    refused(tmp_path, *arguments, says=("name the product directory itself",))


@pytest.mark.parametrize("scale", ["nan", "inf"])
@pytest.mark.parametrize("command", ["merge", "onnx"])
def test_scale_that_is_no_number(
    tmp_path: Path, base: Path, adapter: Path, command: str, scale: str
) -> None:
    arguments = (command, base, adapter, "-o", tmp_path / "out", "--scale", scale)
    refused(tmp_path, *arguments, "--no-verify", says=(f"finite number, got {scale}",))


def test_failure_names_the_product_and_not_its_temporary(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from austeer.exporter.proofs import parity

    monkeypatch.setattr(parity, "FLOAT32_BOUND", -1.0)  # which nothing keeps
    out = tmp_path / "out"
    result = refused(tmp_path, "merge", base, adapter, "-o", out, says=(str(out), "published"))
    assert "partial" not in result.stderr


def test_product_that_is_not_steered(tmp_path: Path, base: Path, adapter: Path) -> None:
    copy = tmp_path / "product"
    shutil.copytree(base, copy)
    arguments = ("verify", copy, "--base", base, "--adapter", adapter)
    assert refused(tmp_path, *arguments, says=()).exit_code == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("onnx", "--strength-input", "--scale", "0.5"), "the caller gives it"),
        (("onnx", "--scale", "0", "--no-verify"), "nothing is steered at scale 0"),
        (("onnx", "--scale", "1e39", "--no-verify"), "more than float32 holds"),
        (("merge", "--code", "--scale", "1e39", "--no-verify"), "more than float32 holds"),
    ],
)
def test_strengths_that_cannot_be(
    tmp_path: Path, base: Path, adapter: Path, arguments: tuple[str, ...], says: str
) -> None:
    command, *options = arguments
    refused(
        tmp_path, command, base, adapter, "-o", tmp_path / "a" / "b", *options, says=(says,)
    )


@pytest.mark.parametrize("minutes", ["inf", "nan", "1e9"])
def test_a_timeout_that_is_none(tmp_path: Path, base: Path, pairs: Path, minutes: str) -> None:
    for command in ("localize", "run"):
        arguments = (command, base, pairs, "-o", tmp_path / "out", "--process-timeout", minutes)
        refused(tmp_path, *arguments, says=("process timeout: expected minutes",))


@pytest.mark.parametrize(
    ("route", "changes", "says"),
    [
        ("onnx", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("code", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "brings code of its own"),
    ],
)
def test_a_base_that_no_product_can_be_made_of_costs_no_fit(
    tmp_path: Path,
    base: Path,
    pairs: Path,
    route: str,
    changes: dict[str, Any],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = base / "config.json"
    known = json.loads(config.read_text())
    known.pop("rope_parameters", None)
    config.write_text(json.dumps(known | changes))
    monkeypatch.setattr(
        "austeer.exporter.run.localize", lambda *_, **__: pytest.fail("too late")
    )
    refused(tmp_path, *run(base, pairs, tmp_path, "--to", route), says=(says,))


def test_a_state_folder_of_ones_own_stays(tmp_path: Path, base: Path, pairs: Path) -> None:
    ranking, folder = tmp_path / "ranking", tmp_path / "out.state"
    # The second is of a run without a ranking that was stopped.
    files = [folder / "mine.safetensors", folder / "0-0123abcd.safetensors"]
    folder.mkdir()
    for file in files:
        file.write_text("precious")
    for arguments in (
        ("localize", base, pairs, "-o", ranking, "--restart"),
        ("fit", base, pairs, "-o", tmp_path / "out", "--ranking", ranking, "--restart",
         "--strength", "oriented", "--kl-budget", "5"),
    ):  # fmt: skip
        CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert ranking.is_file() and (tmp_path / "out").is_dir()
    assert [file.read_text() for file in files] == ["precious"] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "BASE", "ADAPTER", "-o", "OUT", "--no-verify", "--pairs", "PAIRS"),
        ("merge", "BASE", "ADAPTER", "-o", "OUT", "--no-verify", "--code",
         "--dtype", "float32"),
        ("peft", "ADAPTER", "BASE", "--as", "lora", "-o", "OUT", "--no-verify",
         "--device", "cpu"),
        ("verify", "BASE", "--base", "BASE", "--adapter", "ADAPTER", "--structure-only",
         "--pairs", "PAIRS"),
        ("show", "ADAPTER", "--dtype", "float32"),
    ],
)  # fmt: skip
def test_options_without_effect(
    tmp_path: Path, base: Path, adapter: Path, pairs: Path, arguments: tuple[str, ...]
) -> None:
    known = {"BASE": base, "ADAPTER": adapter, "OUT": tmp_path / "out", "PAIRS": pairs}
    result = CliRunner().invoke(cli, [str(known.get(word, word)) for word in arguments])
    assert result.exit_code == 2 and "Usage:" in result.stderr
    assert "choose one" in result.stderr or "--base" in result.stderr
    assert not (tmp_path / "out").exists()
