"""Model cards state figures of what they describe, and of nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from austeer.adapters import AdapterConfig, SteeringAdapter
from austeer.adapters.card import adapter_card, model_card

FIGURES = {"accuracy": 0.96, "margin": 4.0756, "accuracy_ci95": [0.9, 1.0]}


@pytest.fixture
def config(tiny_model: Callable[..., Any]) -> AdapterConfig:
    made = SteeringAdapter.from_units(tiny_model("llama"), "ffn", [0, 1], [1, 2], [0.5, -1.0])
    return dataclasses.replace(
        made.config, base_model_name_or_path="owner/model", fit={"test": FIGURES}
    )


def test_the_figures_say_what_they_were_measured_on(config: AdapterConfig) -> None:
    for card in (adapter_card(config), model_card(config, "finetune", "onnx", "Load it.")):
        assert "| accuracy | 0.96 |\n| margin | 4.076 |" in card
        assert "attached at its fitted strength to the model that it was fitted on" in card
        assert 'base_model: "owner/model"' in card
        assert "2 activation units of `owner/model` rescaled" in card


@pytest.mark.parametrize("scale", [0.5, -1.0, 0.0])
def test_another_strength_has_no_figures(config: AdapterConfig, scale: float) -> None:
    card = model_card(config, "finetune", "transformers", "Load it.", scale=scale)
    assert "4.076" not in card and "figures" not in card
    assert "units of `owner/model` rescaled" in card


def test_another_base_is_not_called_the_adapters(config: AdapterConfig) -> None:
    card = model_card(config, "finetune", "transformers", "Load it.", own_base=False)
    assert "4.076" not in card and "figures" not in card
    assert "base_model:" not in card
    assert "units of another model than `owner/model`" in card
