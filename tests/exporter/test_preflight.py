"""What no product can be made of is refused before the model is loaded, or the fit is paid."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from austeer.adapters import Component, ModelError, OutputError, RouteError
from austeer.exporter import run
from austeer.exporter.preflight import check_files
from austeer.exporter.routes import Route
from austeer.exporter.settings import BaseOptions, RunOptions


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Path:
    return saved_model("llama")


def options(base: Path, *routes: Route) -> RunOptions:
    return RunOptions(
        base=BaseOptions(model=str(base)),
        pairs="pairs.jsonl",
        out=base.parent / "out",
        routes=routes,
        components=(Component.ATTENTION,),
    )


def edit_config(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("route", sorted(set(Route) - {Route.ONNX}))
def test_quantized_weights(base: Path, route: Route) -> None:
    check_files(options(base, route))
    edit_config(base, quantization_config={"quant_method": "gptq"})
    with pytest.raises(RouteError, match="its weights are quantized, fit the unquantized"):
        check_files(options(base, route))
    check_files(options(base, Route.ONNX))


@pytest.mark.parametrize(
    ("route", "refused"),
    [(Route.SAFETENSORS, True), (Route.CODE, True), (Route.LORA, False), (Route.ONNX, False)],
)
def test_links_out_of_the_base(base: Path, route: Route, refused: bool) -> None:
    secret = base.parent / "secret.txt"
    secret.write_text("key")
    (base / "notes.txt").symlink_to(secret)
    if refused:
        with pytest.raises(ModelError, match=r"notes\.txt: is a link out of"):
            check_files(options(base, route))
    else:
        check_files(options(base, route))


def test_no_space(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_bavail=3, f_frsize=1000, f_blocks=10)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(OutputError, match="its filesystem has 3 kB free"):
        check_files(options(base, Route.LORA))


def test_a_run_looks_at_the_files_first(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(run, "load_base", load)
    pairs = base.parent / "pairs.jsonl"
    row = {"prompt": "the sun was", "positive": " happy", "negative": " sad"}
    pairs.write_text(json.dumps(row) + "\n")
    wanted = dataclasses.replace(options(base, Route.SAFETENSORS), pairs=str(pairs))
    with pytest.raises(AssertionError, match="loaded"):
        run.run_job(wanted)
    edit_config(base, quantization_config={"quant_method": "gptq"})
    with pytest.raises(RouteError, match="quantized"):
        run.run_job(wanted)
