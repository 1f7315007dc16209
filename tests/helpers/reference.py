"""Activations as plain hooks see them, written without the code under test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from austeer.adapters import Component, Site

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")
PLAIN_LLAMAS = ("gemma3_text", "olmo2", "cohere", "granite", "stablelm", "smollm3")
TRANSFORMERS_4 = transformers.__version__.startswith("4.")
# There these two call no attention function of the caller's.
OWN_ATTENTION = ("opt", "stablelm") if TRANSFORMERS_4 else ()
# More of them, each with the best layout of pairs that it can take.
BEST_LAYOUT = {
    **dict.fromkeys((*PLAIN_LLAMAS, "starcoder2", "phi", "opt"), "packed"),
    **dict.fromkeys(OWN_ATTENTION, "tree"),
    **dict.fromkeys(("gptj", "falcon"), "tree"),
    **dict.fromkeys(("bloom", "mpt", "gpt_neo"), "plain"),
}
# Layer, attention and MLP projections.
PATHS = {
    **dict.fromkeys(
        (*MODEL_TYPES, *PLAIN_LLAMAS), ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj")
    ),
    "gpt2": ("transformer.h.{}", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}", "attention.dense", "mlp.dense_4h_to_h"),
    "starcoder2": ("model.layers.{}", "self_attn.o_proj", "mlp.c_proj"),
    "phi": ("model.layers.{}", "self_attn.dense", "mlp.fc2"),
    "opt": ("model.decoder.layers.{}", "self_attn.out_proj", "fc2"),
    "gptj": ("transformer.h.{}", "attn.out_proj", "mlp.fc_out"),
    "gpt_neo": ("transformer.h.{}", "attn.attention.out_proj", "mlp.c_proj"),
    "falcon": ("transformer.h.{}", "self_attention.dense", "mlp.dense_4h_to_h"),
    "bloom": ("transformer.h.{}", "self_attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("transformer.blocks.{}", "attn.out_proj", "ffn.down_proj"),
}


def alone(model: Any, ids: Sequence[int]) -> dict[Site, torch.Tensor]:
    """The last token's activations of one string, by hooks of our own on the whole model."""
    layer_path, attention, mlp = PATHS[model.config.model_type]
    found: dict[Site, torch.Tensor] = {}
    handles = []

    def keep(site: Site, x: Any) -> None:
        x = x[0] if isinstance(x, tuple) else x
        # Copied: Falcon adds to the MLP's output in place. OPT's has one axis less.
        found[site] = x.reshape(-1, x.shape[-1])[-1].clone()

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
