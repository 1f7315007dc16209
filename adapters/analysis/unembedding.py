"""Tokens that a unit promotes: what it writes to the residual stream, through the unembedding.

A unit of `attention` or `neuron` scales a column of the projection that reads it (the atomic
unit of arXiv 2602.04428); a unit of `ffn` or `layer` is a coordinate of the residual stream
itself. Later layers also read what is written: this is the direct effect alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import final_modules, find_module
from austeer.adapters.fingerprint import module_reader
from austeer.adapters.sites import Component, Site
from austeer.adapters.steered_site import site_width

_WORD_STARTS = ("▁", "Ġ")


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token, and by how many nats a direction raises its logit.

    Attributes:
        token: its number.
        text: what it stands for, with the space that a word's first piece implies.
        logit: the rise for a residual stream that is the direction alone, at rms 1.
    """

    token: int
    text: str
    logit: float


@torch.no_grad()
def unit_logits(model: PreTrainedModel, site: Site, unit: int) -> Float[Tensor, " vocab"]:
    """Logits that a positive activation of `unit` adds, as far as the unembedding sees it.

    The final norm divides by the size of the whole residual stream, which a token alone
    decides: logits are those of the unit's direction by itself, scaled to rms 1, so that only
    their ratios say something. A cap on the model's logits is left out.

    Args:
        model: the base model.
        site: where the unit is.
        unit: its number.
    """
    row = architecture_of(model.config.model_type)
    direction = written_direction(model, site, unit)
    post = row.post_norm(site.component)
    if post is not None:
        norm = find_module(model, f"{row.layer.format(i=site.layer)}.{post}")
        direction = _response(norm, _at_rms_1(direction))
    direction = _at_rms_1(direction)
    for module in final_modules(model, row):
        direction = _response(module, direction)
    return _response(model.get_output_embeddings(), direction)


@torch.no_grad()
def written_direction(
    model: PreTrainedModel, site: Site, unit: int
) -> Float[Tensor, " hidden"]:
    """What one unit of activation writes: a column of the projection, or a coordinate."""
    row = architecture_of(model.config.model_type)
    width = site_width(site, row, module_reader(model))
    alone = nn.functional.one_hot(torch.tensor(unit), width).float()
    if site.component not in (Component.ATTENTION, Component.NEURON):
        return alone
    return _response(find_module(model, row.projection(site)), alone)


def top_tokens(
    logits: Float[Tensor, " vocab"], tokenizer: PreTrainedTokenizerBase, count: int
) -> tuple[list[TokenScore], list[TokenScore]]:
    """The tokens raised most and lowered most.

    Args:
        logits: a rise of logits; entries beyond the tokenizer's vocabulary are padding.
        tokenizer: names the tokens.
        count: how many of each at most.
    """
    real = logits[: len(tokenizer)]
    count = min(count, len(real))
    highest, lowest = real.topk(count).indices, (-real).topk(count).indices
    return _scores(real, highest, tokenizer), _scores(real, lowest, tokenizer)


def _scores(
    logits: Tensor, chosen: Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[TokenScore]:
    return [
        TokenScore(token, token_text(tokenizer, token), float(logits[token]))
        for token in chosen.tolist()
    ]


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What a token stands for; decoding alone drops the space before a word."""
    piece, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
    if piece.startswith(_WORD_STARTS) and not text.startswith(" "):
        return f" {text.lstrip(''.join(_WORD_STARTS))}"
    # A part of a character decodes to nothing readable; its piece at least names the byte.
    return text if text and "\ufffd" not in text else piece


def _response(module: nn.Module, x: Float[Tensor, " width"]) -> Float[Tensor, " out"]:
    """What a module makes of x, less what it adds to everything (biases)."""
    # Called, not read: weights that accelerate keeps elsewhere come back for the call.
    weight = next(module.parameters())
    device = "cpu" if weight.is_meta else weight.device
    both = torch.stack([x, torch.zeros_like(x)]).to(device, weight.dtype)
    moved, fixed = module(both).float()
    return torch.as_tensor(moved - fixed)


def _at_rms_1(direction: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
    return direction / direction.square().mean().sqrt().clamp(min=1e-30)
