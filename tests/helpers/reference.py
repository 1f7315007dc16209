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
# There these call no attention function of the caller's.
OWN_ATTENTION = ("opt", "stablelm", "qwen2_moe") if TRANSFORMERS_4 else ()
# More of them, each with the best layout of pairs that it can take.
BEST_LAYOUT = {
    **dict.fromkeys((*PLAIN_LLAMAS, "starcoder2", "phi", "opt", "gemma3"), "packed"),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"), "packed"),
    **dict.fromkeys(("gptj", "falcon", "gpt_oss", *OWN_ATTENTION), "tree"),
    **dict.fromkeys(("bloom", "mpt", "gpt_neo", "llama4_text"), "plain"),
}
# Mixtures of experts: the block below a layer, and the number of layers at the start that
# are dense; the others have no neuron.
MIXTURES = {
    "mixtral": ("block_sparse_moe" if TRANSFORMERS_4 else "mlp", 0),
    **dict.fromkeys(("qwen2_moe", "deepseek_v3"), ("mlp", 1)),
    **dict.fromkeys(("qwen3_moe", "gpt_oss"), ("mlp", 0)),
    "llama4_text": ("feed_forward", 1),
}
# Layer, attention and MLP projections.
PATHS = {
    **dict.fromkeys(
        (*MODEL_TYPES, *PLAIN_LLAMAS), ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj")
    ),
    "gemma3": ("model.language_model.layers.{}", "self_attn.o_proj", "mlp.down_proj"),
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
    **{
        name: ("model.layers.{}", "self_attn.o_proj", f"{block}.down_proj")
        for name, (block, _) in MIXTURES.items()
    },
}


def sites_of(model_type: str) -> list[Site]:
    """Every site of a tiny model of two layers."""
    dense = MIXTURES.get(model_type, ("", 2))[1]
    return [
        Site(layer, component)
        for layer in range(2)
        for component in Component
        if layer < dense or component is not Component.NEURON
    ]


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
            layer.register_forward_hook(lambda _, __, x, site=out: keep(site, x)),
        ]
        block, dense = MIXTURES.get(model.config.model_type, ("", 2))
        last = layer.get_submodule(mlp if number < dense else block)
        handles.append(last.register_forward_hook(lambda _, __, x, site=ffn: keep(site, x)))
        if number < dense:
            handles.append(
                last.register_forward_pre_hook(lambda _, x, site=neuron: keep(site, x))
            )
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found
