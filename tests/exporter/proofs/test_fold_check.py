"""The structural check accepts the fold and nothing near it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import SteeringAdapter, VerificationError
from austeer.adapters.weights import Checkpoint
from austeer.exporter.merge import write_folded
from austeer.exporter.proofs.fold_check import verify_fold_structure

ROW = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def folded(
    saved_model: Callable[..., Path], tiny_model: Callable[..., Any], tmp_path: Path
) -> tuple[Path, Path, SteeringAdapter]:
    """Base, folded copy and adapter: rows 5 and 9 of layer 0's down_proj."""
    base, out = saved_model("llama"), tmp_path / "out"
    out.mkdir()
    adapter = SteeringAdapter.from_units(
        tiny_model("llama"), "ffn", [0, 0], [5, 9], [0.5, -0.3]
    )
    write_folded(base, adapter, out)
    return base, out, adapter


def poke(folder: Path, name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> None:
    """Change one stored tensor behind everybody's back."""
    entry = Checkpoint(folder)[name]
    values = entry.read()
    change(values)
    with entry.file.open("r+b") as stream:
        stream.seek(entry.start)
        stream.write(values.tobytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "qwen3"])
def test_accepts_a_fold_within_one_rounding(
    tiny_model: Callable[..., Any], tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    model = tiny_model(model_type).to(dtype)
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    for component in ("attention", "ffn", "neuron"):
        adapter = SteeringAdapter.from_units(model, component, [0, 1], [3, 4], [0.7, -2.0])
        folder = tmp_path / component
        folder.mkdir()
        write_folded(base, adapter, folder, scale=0.5)
        report = verify_fold_structure(base, folder, adapter, 0.5)
        assert 0 < report.worst_error <= 1
        assert len(report.touched) == (4 if component == "ffn" and "gpt" in model_type else 2)
        assert report.identical + len(report.touched) == len(Checkpoint(base))
    assert not out.exists()


def test_a_site_without_an_effect_is_the_same_bytes(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    adapter = SteeringAdapter.from_units(model, "attention", [0, 1], [3, 4], [0.0, -2.0])
    (tmp_path / "out").mkdir()
    write_folded(tmp_path / "base", adapter, tmp_path / "out")
    report = verify_fold_structure(
        tmp_path / "base", tmp_path / "out", adapter, touched_only=True
    )
    assert len(report.touched) == 2 and report.identical == 0


def test_another_scale_is_seen(folded: tuple[Path, Path, SteeringAdapter]) -> None:
    base, out, adapter = folded
    with pytest.raises(VerificationError, match=f"{ROW} is not the base times its gains"):
        verify_fold_structure(base, out, adapter, 1.001)


def test_the_base_itself_is_no_fold(folded: tuple[Path, Path, SteeringAdapter]) -> None:
    base, _, adapter = folded
    with pytest.raises(VerificationError, match="is not the base times its gains"):
        verify_fold_structure(base, base, adapter)


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        (ROW, (5, 0), "is not the base times its gains"),
        (ROW, (6, 0), "differs where no unit is steered"),
        ("model.norm.weight", (3,), "the adapter does not touch it"),
        ("model.embed_tokens.weight", (39, 31), "the adapter does not touch it"),
    ],
)
def test_one_changed_value_is_seen(
    folded: tuple[Path, Path, SteeringAdapter], name: str, place: tuple[int, ...], message: str
) -> None:
    base, out, adapter = folded
    poke(out, name, lambda values: values.__setitem__(place, values[place] * 1.001))
    with pytest.raises(VerificationError, match=message):
        verify_fold_structure(base, out, adapter)


def test_nan_is_seen(folded: tuple[Path, Path, SteeringAdapter]) -> None:
    base, out, adapter = folded
    poke(out, ROW, lambda values: values.__setitem__((5, 0), np.nan))
    with pytest.raises(VerificationError, match="off by nan"):
        verify_fold_structure(base, out, adapter)


def test_changed_config_is_seen(folded: tuple[Path, Path, SteeringAdapter]) -> None:
    base, out, adapter = folded
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(VerificationError, match=r"config\.json: differs"):
        verify_fold_structure(base, out, adapter)


def test_other_tensors_are_seen(
    folded: tuple[Path, Path, SteeringAdapter],
    tiny_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    base, _, adapter = folded
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    with pytest.raises(VerificationError, match=r"model\.layers\.2.*is it a fold of this base"):
        verify_fold_structure(base, tmp_path / "deeper", adapter)


def test_a_value_that_is_no_number_is_found(
    folded: tuple[Path, Path, SteeringAdapter],
) -> None:
    base, out, adapter = folded

    def spoil(values: np.ndarray[Any, Any]) -> None:
        values[9, 3] = np.nan

    poke(out, ROW, spoil)
    with pytest.raises(VerificationError, match="not the base times its gains"):
        verify_fold_structure(base, out, adapter)
