"""Adapters on a live model: once each, also where it is compiled, and never under a fit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import (
    AdapterError,
    ContrastivePair,
    ModelError,
    PairsError,
    SteeringAdapter,
    fit_strength,
    localize,
)
from austeer.adapters.live_model import check_bare

TinyModel = Callable[..., Any]
IDS = torch.arange(3, 15).reshape(2, 6)


def some_adapter(model: Any, gamma: float = 0.8) -> SteeringAdapter:
    return SteeringAdapter.from_units(model, "attention", [0, 1], [1, 2], [gamma, -gamma])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.clone()


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_model_compiled_and_run_before_is_steered(tiny_model: TinyModel, how: str) -> None:
    """torch.compile puts no guard on hooks: without care the first graph would stay in use."""
    model = tiny_model("llama")
    adapter = some_adapter(model)
    base = logits(model)
    with adapter.attached(model):
        steered = logits(model)
    assert (steered - base).abs().max() > 1e-3
    compiled = model
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    torch.testing.assert_close(logits(compiled), base)
    for _ in range(2):
        with adapter.attached(model):
            torch.testing.assert_close(logits(compiled), steered)
        torch.testing.assert_close(logits(compiled), base)


def test_one_adapter_is_attached_once(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    adapter, other = some_adapter(model), some_adapter(model, 0.1)
    base = logits(model)
    with adapter.attached(model):
        steered = logits(model)
        with (
            pytest.raises(AdapterError, match="attached to the model already"),
            adapter.attached(model),
        ):
            pass
        with (
            pytest.raises(AdapterError, match="attached to the model already"),
            adapter.attached(torch.compile(model, backend="eager")),
        ):
            pass
        with (
            pytest.raises(AdapterError, match="attached to the model already"),
            some_adapter(tiny_model("llama")).attached(model),  # as one loaded twice
        ):
            pass
        torch.testing.assert_close(logits(model), steered)
        with other.attached(model):
            assert not torch.equal(logits(model), steered)
        with adapter.attached(tiny_model("llama", seed=1), force=True):
            pass
    assert torch.equal(logits(model), base)
    with adapter.attached(model, 0.5):
        pass


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None])
def test_a_scale_is_a_finite_number(tiny_model: TinyModel, scale: Any) -> None:
    model = tiny_model("llama")
    adapter, base = some_adapter(model), logits(model)
    with (
        pytest.raises(AdapterError, match="expected a finite number"),
        adapter.attached(model, scale),
    ):
        pass
    assert torch.equal(logits(model), base)


def test_a_steered_or_compiled_model_is_no_base(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with some_adapter(model).attached(model):
        for work in (localize, fit_strength):
            with pytest.raises(ModelError, match="adapter is attached"):
                work(model, None, [])
    check_bare(model, "fit")
    with pytest.raises(ModelError, match=r"torch\.compile made of it"):
        check_bare(torch.compile(model, backend="eager"), "fit")
    model.compile(backend="eager")
    with pytest.raises(ModelError, match="fit: the model is compiled"):
        fit_strength(model, None, [])


@pytest.mark.parametrize("no_model", ["stories260K", torch.nn.Linear(2, 2), None])
def test_the_name_of_a_model_is_no_model(tiny_model: TinyModel, no_model: Any) -> None:
    says = f"expected a model of transformers, got {type(no_model).__name__}; load one"
    with (
        pytest.raises(ModelError, match=says),
        some_adapter(tiny_model("llama")).attached(no_model),
    ):
        pytest.fail("the body must not run")
    for work in (localize, fit_strength):
        with pytest.raises(ModelError, match=says):
            work(no_model, None, [])


@pytest.mark.parametrize("pairs", ["pairs.jsonl", [{"prompt": "Tom"}], [("a", "b", "c")]])
@pytest.mark.parametrize("work", [localize, fit_strength])
def test_pairs_are_no_file_name(tiny_model: TinyModel, work: Any, pairs: Any) -> None:
    with pytest.raises(PairsError, match=r"read_pairs\(file\) gives them"):
        work(tiny_model("llama"), None, pairs)


def test_a_model_under_peft_is_no_base(tiny_model: TinyModel) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_model("llama"), config)
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(ModelError, match=r"fit: peft stands between .*merge_and_unload"):
            check_bare(model, "fit")
    check_bare(wrapped.merge_and_unload(), "fit")


def test_learned_prompts_of_peft_are_in_no_base(tiny_model: TinyModel) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ModelError, match="fit: peft puts learned prompts before every text"):
        check_bare(peft.get_peft_model(model, config), "fit")
    check_bare(model, "fit")


def test_a_copy_made_while_steered_is_no_base(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with some_adapter(model).attached(model):
        steered = copy.deepcopy(model)
    check_bare(model, "fit")
    with pytest.raises(ModelError, match="copied while an adapter was attached"):
        check_bare(steered, "fit")
    with (
        pytest.raises(ModelError, match="attached: the model was copied while"),
        some_adapter(model).attached(steered),
    ):
        pass
    with some_adapter(model).attached(model), some_adapter(model, 0.25).attached(model):
        pass


def test_a_model_steered_in_code_is_no_base(tiny_model: TinyModel, tmp_path: Path) -> None:
    from austeer.adapters import load_steered
    from austeer.exporter.code_export import export_code

    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    export_code(tmp_path / "base", some_adapter(model), tmp_path / "steered")
    with pytest.raises(ModelError, match="localize: the model is steered in code"):
        check_bare(load_steered(tmp_path / "steered"), "localize")


def test_autocast_changes_no_score(tiny_model: TinyModel, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    pairs = [ContrastivePair(f"{name} was", " happy", " sad") for name in ("Tom", "Mia", "it")]
    wanted = localize(model, tiny_tokenizer, pairs, "ffn").counts("ffn")
    with torch.autocast("cpu", torch.bfloat16):
        found = localize(model, tiny_tokenizer, pairs, "ffn").counts("ffn")
    for mine, theirs in zip(vars_of(found), vars_of(wanted), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def vars_of(counts: Any) -> list[Any]:
    return [getattr(counts, item.name) for item in dataclasses.fields(counts)]
