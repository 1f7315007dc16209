"""Every route's product says of itself what is true of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from austeer.adapters import SteeringAdapter
from austeer.exporter.products import Base, check_base
from austeer.exporter.route_steps import write_product
from austeer.exporter.routes import Route
from austeer.exporter.settings import Handling

pytestmark = pytest.mark.usefixtures("traced_before")
MARGIN = "| margin | 4.076 |"


@pytest.fixture
def written(
    saved_model: Callable[..., Path],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> Callable[..., str]:
    """Card of a product of some adapter with figures."""
    base = Base(tiny_model("llama"), tiny_tokenizer, saved_model("llama"))
    made = SteeringAdapter.from_units(base.model, "attention", [0, 1], [1, 2], [0.5, -1.0])
    fit = {"test": {"margin": 4.0756}}
    adapter = SteeringAdapter(dataclasses.replace(made.config, fit=fit), made.sites)

    def write(route: Route, *, other: bool = False, half: bool = False, **how: Any) -> str:
        if other:
            tiny_model("llama", seed=1).save_pretrained(base.folder)
        model = base.model.to(torch.bfloat16) if half else base.model
        out = tmp_path / "out"
        out.mkdir()
        write_product(
            route, dataclasses.replace(base, model=model), adapter, out, Handling(**how)
        )
        return (out / "README.md").read_text()

    return write


@pytest.mark.parametrize("route", Route)
def test_figures_are_of_the_fitted_strength(route: Route, written: Callable[..., str]) -> None:
    assert MARGIN not in written(route, scale=0.5)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("route", Route)
def test_figures_of_the_adapters_own_base(
    route: Route, force: bool, written: Callable[..., str]
) -> None:
    assert MARGIN in written(route, force=force)


@pytest.mark.parametrize("route", Route)
def test_another_base_has_no_figures(route: Route, written: Callable[..., str]) -> None:
    card = written(route, other=True, force=True)
    assert MARGIN not in card
    assert "another model than" in card


def test_the_files_decide_not_the_live_dtype(written: Callable[..., str]) -> None:
    assert MARGIN in written(Route.ONNX, half=True, force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("route", Route)
def test_what_the_adapter_touches_is_read_once(
    route: Route,
    force: bool,
    saved_model: Callable[..., Path],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a base of many gigabytes that takes as long as a part of the copy."""
    base = Base(tiny_model("llama"), tiny_tokenizer, saved_model("llama"))
    adapter = SteeringAdapter.from_units(base.model, "attention", [0, 1], [1, 2], [0.5, -1.0])
    read, counted = SteeringAdapter._fingerprint_of, []

    def count(self: SteeringAdapter, *arguments: Any) -> str:
        counted.append(self)
        return read(self, *arguments)

    monkeypatch.setattr(SteeringAdapter, "_fingerprint_of", count)
    handling = check_base(base, adapter, Handling(force=force))
    (tmp_path / "out").mkdir()
    write_product(route, base, adapter, tmp_path / "out", handling)
    assert len(counted) == 1
