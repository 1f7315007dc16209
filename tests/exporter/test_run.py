"""`fit` and `run` under a launcher: the first process goes on alone, with the same result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from austeer.adapters import Ranking
from austeer.exporter.cli import cli


@pytest.mark.slow
def test_processes_share_the_localization_of_a_run(
    tmp_path: Path,
    saved_model: Callable[..., Path],
    launch: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Random weights need not be steerable, and this is not about steering.
    monkeypatch.setattr("austeer.adapters.fitting.fit.no_effect_reason", lambda *_: None)
    pairs = tmp_path / "pairs.jsonl"
    prompts = [
        f"{who} {verb} {rest}"
        for who in ("Tom", "Mia", "the sun", "rain") for verb in ("felt", "was")
        for rest in ("very", "so", "so very", "and so", "then")
    ]  # fmt: skip
    ends = {"positive": " happy", "negative": " sad"}
    pairs.write_text("".join(json.dumps({"prompt": p, **ends}) + "\n" for p in prompts))
    base = saved_model("llama")

    def invoke(out: Path) -> Any:
        options = ("--strength", "oriented", "--component", "attention", "--kl-budget", "5")
        arguments = ("run", base, pairs, "-o", out, *options, "--json")
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
