"""`fit` and `run`: twice the same bytes, on from where a kill was, and under a launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from austeer.adapters import Ranking, localize
from austeer.adapters.localization.run_state import RunState
from austeer.exporter import run as run_module
from austeer.exporter.cli import cli

# Random weights need not be steerable, and these tests are not about steering.
ALWAYS_STEERED = """
from functools import partial
from austeer.adapters.fitting import fit
from austeer.exporter import run
from austeer.exporter.cli import cli
fit.no_effect_reason = lambda *_: None
run.fit_strength = partial(fit.fit_strength, steps=20)
cli()
"""
FAST = ("--strength", "oriented", "--component", "attention", "--kl-budget", "5")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    prompts = [
        f"{who} {verb} {rest}"
        for who in ("Tom", "Mia", "the sun", "rain") for verb in ("felt", "was")
        for rest in ("very", "so", "so very", "and so", "then")
    ]  # fmt: skip
    ends = {"positive": " happy", "negative": " sad"}
    path.write_text("".join(json.dumps({"prompt": p, **ends}) + "\n" for p in prompts))
    return path


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("strength", ["oriented", "fitted"])
def test_two_runs_with_one_seed_give_the_same_bytes(
    tmp_path: Path, saved_model: Callable[..., Path], pairs: Path, strength: str
) -> None:
    base, trees = saved_model("llama"), []
    routes = ("safetensors", "code", "lora", *(["onnx"] if strength == "oriented" else []))
    options = [part for route in routes for part in ("--to", route)]
    options += ["--component", "attention", "--kl-budget", "5", "--max-units", "4"]
    # Processes of their own, with other hash seeds: the order of sets is one of the traps.
    for number in ("1", "2"):
        out = tmp_path / f"out{number}"
        arguments = ["run", base, pairs, "-o", out, "--strength", strength, *options]
        done = subprocess.run(
            [sys.executable, "-c", ALWAYS_STEERED, *map(str, arguments)],
            env={**os.environ, "PYTHONHASHSEED": number},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "seconds: " in done.stdout
        trees.append(tree(out))
    assert {name.split("/")[0] for name in trees[0]} >= {*routes, "adapter", "austeer.json"}
    different = [name for name in trees[0] if trees[0][name] != trees[1].get(name)]
    assert different == [] and trees[0].keys() == trees[1].keys()
    if shutil.which("sha256sum"):
        check = ["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"]
        for folder in (out, *(out / route for route in routes)):
            assert subprocess.run(check, cwd=folder, check=False).returncode == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_localization(
    tmp_path: Path,
    saved_model: Callable[..., Path],
    pairs: Path,
    fork: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("austeer.adapters.fitting.fit.no_effect_reason", lambda *_: None)
    monkeypatch.setattr(run_module, "localize", partial(localize, state_every=0.0))
    base, counted = saved_model("llama"), []
    real = RunState.add

    def add(self: RunState, numbers: Any, values: Any) -> None:
        counted.extend(numbers)
        real(self, numbers, values)

    monkeypatch.setattr(RunState, "add", add)

    def invoke(out: Path) -> None:
        arguments = ("run", base, pairs, "-o", out, *FAST, "--batch-size", "4")
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output

    def killed() -> None:
        def die(*_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "fit_strength", die)
            invoke(tmp_path / "out")

    invoke(tmp_path / "undisturbed")
    assert len(counted) == 24 and not (tmp_path / "undisturbed.state").exists()
    assert fork(killed).end() == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / "out.state").is_dir()
    counted.clear()
    invoke(tmp_path / "out")
    assert counted == [], "every pair was counted before the kill"
    assert not (tmp_path / "out.state").exists()
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


@pytest.mark.slow
def test_the_state_of_another_run_is_refused_and_discarded_when_told(
    tmp_path: Path,
    saved_model: Callable[..., Path],
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("austeer.adapters.fitting.fit.no_effect_reason", lambda *_: None)
    monkeypatch.setattr(run_module, "localize", partial(localize, state_every=0.0))
    base, out = saved_model("llama"), tmp_path / "out"

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["fit", str(base), str(pairs), "-o", str(out), *FAST]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "fit_strength", stop)
        result = CliRunner().invoke(cli, [*arguments, "--batch-size", "4"])
    assert result.exit_code == 130 and (tmp_path / "out.state").is_dir()
    assert "the same command goes on with" in result.stderr
    other = [*arguments, "--seed", "1"]
    result = CliRunner().invoke(cli, other)
    assert result.exit_code == 2 and "--restart" in result.stderr
    result = CliRunner().invoke(cli, [*other, "--restart"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out.state").exists()


@pytest.mark.slow
def test_processes_share_the_localization_of_a_run(
    tmp_path: Path,
    saved_model: Callable[..., Path],
    pairs: Path,
    launch: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("austeer.adapters.fitting.fit.no_effect_reason", lambda *_: None)
    base = saved_model("llama")

    def invoke(out: Path) -> Any:
        arguments = ("run", base, pairs, "-o", out, *FAST, "--json")
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    def work(rank: int) -> dict[str, Any]:
        result = invoke(tmp_path / "together")
        return {"code": result.exit_code, "says": result.stdout, "errors": result.stderr}

    alone = invoke(tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    first, second = launch(work)
    assert first.end() == second.end() == 0
    assert {name: str(text) for name, text in second.result().items()} == {
        "code": "0", "says": "", "errors": ""
    }  # fmt: skip
    assert json.loads(str(first.result()["says"]))["test"] == json.loads(alone.stdout)["test"]
    mine, theirs = (
        Ranking.load(tmp_path / name / "ranking.safetensors") for name in ("alone", "together")
    )
    np.testing.assert_array_equal(mine.beta("attention"), theirs.beta("attention"))
    adapters = [
        (tmp_path / name / "adapter" / "adapter_config.json").read_text()
        for name in ("alone", "together")
    ]
    assert json.loads(adapters[0])["alpha"] == json.loads(adapters[1])["alpha"]
