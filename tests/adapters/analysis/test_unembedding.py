"""Promoted tokens: what a model does when one unit drowns the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import Component, Site
from austeer.adapters.analysis.unembedding import token_text, top_tokens, unit_logits
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import transformed

HUGE = 1e6
IDS = torch.arange(3, 15).reshape(1, 12)


def drowned_logits(model: Any, site: Site, unit: int) -> Any:
    """Logits of a model in which the unit's activation is larger than everything else."""
    hookpoint = architecture_of(model.config.model_type).hookpoint(site)

    def flood(x: Any) -> Any:
        return x + HUGE * torch.nn.functional.one_hot(torch.tensor(unit), x.shape[-1])

    with torch.no_grad(), transformed(model, hookpoint, flood):
        return model(IDS).logits[0, -1]


@pytest.mark.parametrize("component", [*Component])
@pytest.mark.parametrize(
    "model_type",
    ["llama", "qwen2", "phi3", "gpt2", "gpt_neox", "phi", "falcon", "opt", "bloom", "mpt"],
)
def test_logits_are_those_of_a_stream_that_holds_the_unit_alone(
    tiny_model: Callable[..., Any], model_type: str, component: Component
) -> None:
    model = tiny_model(model_type)
    unit = 7
    site = Site(1, component)
    row = architecture_of(model_type)
    found = drowned_logits(model, site, unit)
    # What a norm or head adds whatever it reads is no part of what the unit promotes.
    bias = getattr(model.get_submodule(row.norm), "bias", None)
    if bias is not None:
        if model_type == "opt":
            bias = model.model.decoder.project_out(bias)
        found = found - model.get_output_embeddings()(bias)
    logits = unit_logits(model, site, unit)
    torch.testing.assert_close(logits, found, rtol=2e-3, atol=2e-3)
    assert logits.abs().max() > 0.1


def test_norms_between_a_block_and_the_stream(tiny_model: Callable[..., Any]) -> None:
    """Gemma 2 normalizes a block's output by weights 1 + w before it adds it."""
    model = tiny_model("gemma2")
    layer = model.model.layers[1]
    cases = {
        Component.ATTENTION: (
            layer.self_attn.o_proj.weight[:, 7],
            layer.post_attention_layernorm,
        ),
        Component.NEURON: (layer.mlp.down_proj.weight[:, 7], layer.post_feedforward_layernorm),
        Component.FFN: (torch.eye(32)[7], layer.post_feedforward_layernorm),
        Component.LAYER: (torch.eye(32)[7], None),
    }
    for component, (direction, post) in cases.items():
        direction = direction.double()
        for norm in (post, model.model.norm):
            if norm is not None:
                direction = direction / direction.square().mean().sqrt()
                direction = direction * (1.0 + norm.weight.double())
        wanted = model.lm_head.weight.double() @ direction
        found = unit_logits(model, Site(1, component), 7)
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_a_column_of_zeros_promotes_nothing(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight[:, 3] = 0.0
    assert (unit_logits(model, Site(0, Component.NEURON), 3) == 0.0).all()


def test_bfloat16(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    exact = unit_logits(model, Site(0, Component.ATTENTION), 3)
    rounded = unit_logits(model.bfloat16(), Site(0, Component.ATTENTION), 3)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.1)


def test_top_tokens_skip_what_the_tokenizer_does_not_name(tiny_tokenizer: Any) -> None:
    logits = torch.zeros(40)
    happy, sad = (tiny_tokenizer.convert_tokens_to_ids(f"▁{w}") for w in ("happy", "sad"))
    logits[happy], logits[sad], logits[len(tiny_tokenizer)] = 2.0, -3.0, 9.0
    highest, lowest = top_tokens(logits, tiny_tokenizer, 2)
    assert (highest[0].token, highest[0].text, highest[0].logit) == (happy, " happy", 2.0)
    assert (lowest[0].token, lowest[0].text, lowest[0].logit) == (sad, " sad", -3.0)
    assert len(highest) == len(lowest) == 2
    assert len(top_tokens(logits, tiny_tokenizer, 1000)[0]) == len(tiny_tokenizer)


def test_every_token_has_a_text(tiny_tokenizer: Any) -> None:
    assert all(token_text(tiny_tokenizer, token) for token in range(len(tiny_tokenizer)))
