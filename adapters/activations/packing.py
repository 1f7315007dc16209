"""Packed batches: every pair of a batch in one row, with attention of its own.

The row is prefix | positive | negative of one pair after the other, without padding: each
distinct token is computed once, and no matrix product is spent on padding. Attention runs pair
by pair through transformers' `AttentionInterface`, under a name that a model's config holds
only inside `packed_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from austeer.adapters._errors import ModelError
from austeer.adapters.activations.batches import Branch, index_branch
from austeer.adapters.activations.packed_attention import PackedAttention
from austeer.adapters.attach import text_decoder
from austeer.adapters.tokens import PairTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "austeer_packed"
# Arguments of attention functions that a tree of segments cannot honour.
_UNSUPPORTED = ("position_bias", "s_aux", "head_mask", "cache")


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Model inputs of P pairs in one row, and where their completions lie in it.

    Attributes:
        input_ids, position_ids: `[1, T]`; both branches continue at their prefix's end.
        positive, negative: the completions.
        tokens: the pairs, in the row's order.
    """

    input_ids: Int[Tensor, "1 T"]
    position_ids: Int[Tensor, "1 T"]
    positive: Branch
    negative: Branch
    tokens: tuple[PairTokens, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward, inside `packed_attention`."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}


def packed_batch(
    tokens: Sequence[PairTokens], device: torch.device | str = "cpu"
) -> PackedBatch:
    """Lay pairs out in one row; pairs of equal lengths side by side are the cheapest.

    Args:
        tokens: at least one pair.
        device: where the tensors go.
    """
    starts = [0, *accumulate(pair.size for pair in tokens)][:-1]
    ends = [start + len(pair.prefix) for start, pair in zip(starts, tokens, strict=True)]
    behind = [end + len(pair.positive) for end, pair in zip(ends, tokens, strict=True)]
    row = [0] * len(tokens)
    ids = [token for pair in tokens for token in pair.path()]
    positions = [position for pair in tokens for position in pair.positions()]
    return PackedBatch(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        index_branch([pair.positive for pair in tokens], row, ends, ends, tokens, device),
        index_branch([pair.negative for pair in tokens], row, behind, ends, tokens, device),
        tuple(tokens),
    )


@contextmanager
def packed_attention(
    model: PreTrainedModel, batch: PackedBatch, depth: int | None = None
) -> Iterator[PackedAttention]:
    """Let `model` attend inside the pairs of `batch`; its own attention comes back afterwards.

    Nothing tells from outside whether the model asks for it: look at `calls` of what this
    yields, which a forward pass must raise by one a layer.

    Args:
        model: what will run.
        batch: on what.
        depth: layers that run, if of the last one only last tokens are read.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    config = text_decoder(model).config
    own = config._attn_implementation
    # The sdpa of transformers 4.57 drops the cap in silence, and so it must be dropped here.
    attention = PackedAttention(batch.tokens, depth, capped=own != "sdpa")
    outer = _active.set(attention)
    try:
        config._attn_implementation = ATTENTION
        yield attention
    finally:
        config._attn_implementation = own
        _active.reset(outer)


_active: ContextVar[PackedAttention | None] = ContextVar("austeer_packed", default=None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' sense; `others` are what the model passes through."""
    attention = _active.get()
    if attention is None:
        raise ModelError(f"attention {ATTENTION!r}: used outside packed_attention()")
    if attention_mask is not None:
        raise ModelError("packed attention: the model adds a mask or position bias of its own")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if asked or not causal:
        raise ModelError(
            f"packed attention: expected causal attention alone, got {asked or 'no causality'}"
        )
    out = attention(
        query,
        key,
        value,
        dropout=dropout,
        scaling=scaling,
        softcap=softcap,
        sliding_window=sliding_window,
    )
    return out, None
