"""The table of architectures against the real transformers classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from austeer.adapters import Component, ModelError, Site
from austeer.adapters.architectures import ARCHITECTURES, architecture_of


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_paths_exist_and_widths_fit(tiny_model: Callable[..., Any], model_type: str) -> None:
    model = tiny_model(model_type)
    row = architecture_of(model_type)
    config = model.config
    heads = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    widths = {
        Component.ATTENTION: heads * config.num_attention_heads,
        Component.FFN: config.hidden_size,
        Component.NEURON: inner,
    }
    for layer in range(2):
        for component, width in widths.items():
            site = Site(layer, component)
            weight = model.get_submodule(row.projection(site)).weight
            assert weight.shape[row.width_axis(component)] == width
            side = "output" if component is Component.FFN else "input"
            assert row.hookpoint(site).side == side
        point = row.hookpoint(Site(layer, Component.LAYER))
        assert point.side == "output"
        assert type(model.get_submodule(point.module)).__name__.endswith(("Layer", "Block"))
    assert model.get_submodule(row.embedding) is model.get_input_embeddings()
    model.get_submodule(row.norm)
    assert row.num_layers(config.to_dict()) == 2
    assert model.base_model_prefix == row.prefix


@pytest.mark.parametrize("model_type", ["bert", "", None])
def test_unknown_architecture_is_named_with_what_to_add(model_type: str | None) -> None:
    with pytest.raises(ModelError) as error:
        architecture_of(model_type)
    assert repr(model_type) in str(error.value)
    assert "adapters/architectures.py" in str(error.value) and "llama" in str(error.value)


def test_names_on_disk_with_and_without_prefix() -> None:
    gpt2 = architecture_of("gpt2")
    assert gpt2.disk_names("transformer.h.0.x") == ("transformer.h.0.x", "h.0.x")
    assert gpt2.disk_names("lm_head.weight") == ("lm_head.weight",)


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 0}, {"num_hidden_layers": "2"}])
def test_number_of_layers_must_be_there(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="num_hidden_layers or n_layer"):
        architecture_of("llama").num_layers(config)
