"""The module that is traced for ONNX: flat tensors in and out, masks made explicit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from austeer.adapters.architectures import architecture_of, text_config
from austeer.adapters.tokens import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRAPPED = "decoder"
"""Attribute that holds the model; taken off every path after the export."""


class CachedDecoder(nn.Module):
    """The model with flat tensors in and out, and its attention masks made explicit.

    The masks are built here and not in transformers, so that one graph is right for prefill
    and decoding, with padding, and beyond a sliding window, of which the cache keeps all.
    Only a model whose position bias needs to know the real tokens builds its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = model

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B total"],
        position_ids: Int[Tensor, "B T"],
        *past: Float[Tensor, "B heads past _"],
    ) -> tuple[Tensor, ...]:
        """Logits, then keys and values of every layer, those of the past included."""
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.decoder(
            input_ids=input_ids,
            attention_mask=self._masks(input_ids, attention_mask, past[0].dtype),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers = output.past_key_values.layers
        return (
            output.logits,
            *(part for layer in layers for part in (layer.keys, layer.values)),
        )

    def _masks(
        self, input_ids: Tensor, attention_mask: Tensor, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        config = self.decoder.config
        masks = architecture_of(config.model_type).masks
        if masks == "tokens":
            return attention_mask
        keys = torch.arange(attention_mask.shape[1], device=input_ids.device)
        distance = keys[keys.shape[0] - input_ids.shape[1] :, None] - keys
        # A token always sees itself: an empty row is NaN where half precision overflows.
        real = (attention_mask > 0)[:, None, None, :] | (distance == 0)
        full = real & (distance >= 0)
        # 0 is none, too.
        window = getattr(config, "sliding_window", None) or None
        sliding = full if window is None else full & (distance < window)
        if masks == "by_layer_type":
            return {
                "full_attention": _additive(full, dtype),
                "sliding_attention": _additive(sliding, dtype),
            }
        return _additive(sliding, dtype)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)


def _longest(model: PreTrainedModel) -> int | None:
    """Most tokens that an input may hold; None for any number.

    A window or bias that the model cuts out of a table ends with that table.
    """
    context = context_length(model)
    counts = architecture_of(model.config.model_type).counts_places
    return context - 2 if counts and context else None


def example_inputs(model: PreTrainedModel) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Example arguments and their dynamic axes; every dynamic length is distinct and > 1."""
    batch, fresh, past = 2, 3, 4
    device = model.device
    heads, sizes, dtype = _cache_layout(model)
    count = 2 * text_config(model).num_hidden_layers
    arguments = (
        torch.ones(batch, fresh, dtype=torch.long, device=device),
        torch.ones(batch, past + fresh, dtype=torch.long, device=device),
        torch.arange(past, past + fresh, device=device).repeat(batch, 1),
        *(
            torch.zeros(batch, heads, past, sizes[number % 2], dtype=dtype, device=device)
            for number in range(count)
        ),
    )
    b = torch.export.Dim("batch")
    t, p = (torch.export.Dim(name, max=_longest(model)) for name in ("fresh", "past"))
    total = torch.export.Dim.DYNAMIC
    shapes = ({0: b, 1: t}, {0: b, 1: total}, {0: b, 1: t}, ({0: b, 2: p},) * count)
    return arguments, shapes


def _cache_layout(model: PreTrainedModel) -> tuple[int, tuple[int, int], torch.dtype]:
    """Key-value heads, sizes of keys and values, and dtype, read off a one-token run."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    cache = model(input_ids=ids, use_cache=True).past_key_values.layers[0]
    return cache.keys.shape[1], (cache.keys.shape[3], cache.values.shape[3]), cache.keys.dtype
