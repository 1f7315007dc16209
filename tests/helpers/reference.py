"""Activations as plain hooks see them, written without the code under test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from austeer.adapters import Component, Site

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")
# Layer, attention and MLP projections.
PATHS = {
    **dict.fromkeys(MODEL_TYPES, ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj")),
    "gpt2": ("transformer.h.{}", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}", "attention.dense", "mlp.dense_4h_to_h"),
}


def alone(model: Any, ids: Sequence[int]) -> dict[Site, torch.Tensor]:
    """The last token's activations of one string, by hooks of our own on the whole model."""
    layer_path, attention, mlp = PATHS[model.config.model_type]
    found: dict[Site, torch.Tensor] = {}
    handles = []

    def keep(site: Site, x: Any) -> None:
        found[site] = (x[0] if isinstance(x, tuple) else x)[0, -1]

    for number in range(2):
        layer = model.get_submodule(layer_path.format(number))
        attention_in, ffn, neuron, out = (Site(number, component) for component in Component)
        handles += [
            layer.get_submodule(attention).register_forward_pre_hook(
                lambda _, x, site=attention_in: keep(site, x)
            ),
            layer.get_submodule(mlp).register_forward_pre_hook(
                lambda _, x, site=neuron: keep(site, x)
            ),
            layer.get_submodule(mlp).register_forward_hook(
                lambda _, __, x, site=ffn: keep(site, x)
            ),
            layer.register_forward_hook(lambda _, __, x, site=out: keep(site, x)),
        ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found
