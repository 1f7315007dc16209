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
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from austeer.adapters._errors import ModelError
from austeer.adapters.activations.batches import Branch, index_branch, padded, tree_mask
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
def packed_attention(model: PreTrainedModel, batch: PackedBatch) -> Iterator[PackedAttention]:
    """Let `model` attend inside the pairs of `batch`; its own attention comes back afterwards.

    Nothing tells from outside whether the model asks for it: look at `calls` of what this
    yields, which a forward pass must raise by one a layer.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    config = text_decoder(model).config
    own = config._attn_implementation
    # The sdpa of transformers 4.57 drops the cap in silence, and so it must be dropped here.
    attention = PackedAttention(batch.tokens, capped=own != "sdpa")
    outer = _active.set(attention)
    try:
        config._attn_implementation = ATTENTION
        yield attention
    finally:
        config._attn_implementation = own
        _active.reset(outer)


class PackedAttention:
    """Attention inside the pairs of one packed batch.

    Args:
        tokens: the pairs, in the row's order.
        capped: whether to bound the scores where a model asks for it.

    Attributes:
        calls: how often a model asked for it.
    """

    def __init__(self, tokens: Sequence[PairTokens], *, capped: bool = True) -> None:
        self.calls = 0
        self._capped = capped
        self._longest = max(pair.longest for pair in tokens)
        self._size = sum(pair.size for pair in tokens)
        self._tokens = tokens
        self._groups: dict[bool, list[_Group]] = {}

    def __call__(
        self,
        query: Float[Tensor, "1 H T D"],
        key: Float[Tensor, "1 K T D"],
        value: Float[Tensor, "1 K T E"],
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
    ) -> Float[Tensor, "1 T H E"]:
        """Attend; a window counts positions of a string, not places in the row.

        Args:
            query: one row.
            key: the same, of K heads; H is a multiple of K.
            value: as `key`, of a width of its own.
            dropout: of attention weights.
            scaling: of the scores; 1/√D by default.
            softcap: bound on the scores, through tanh.
            sliding_window: positions that a token sees, itself included.
        """
        if query.shape[2] != self._size or key.shape[2] != self._size:
            raise ModelError(
                f"packed attention: expected {self._size} queries and keys, "
                f"got {query.shape[2]} and {key.shape[2]}"
            )
        self.calls += 1
        if sliding_window is not None and sliding_window >= self._longest:
            sliding_window = None
        out = query.new_empty(1, self._size, query.shape[1], value.shape[-1])
        for group in self._grouped(query.device):
            mask = group.mask(query.dtype, query.device, sliding_window)
            q, k, v = (group.rows(x) for x in (query, key, value))
            if softcap is None or not self._capped:
                found = _fused(q, k, v, mask, dropout, scaling)
            else:
                found = _capped(q, k, v, mask, dropout, scaling, softcap)
            out[0, group.start : group.stop] = group.flat(found.transpose(1, 2))
        return out

    @staticmethod
    def _one_group(device: torch.device) -> bool:
        """Elsewhere than on a CPU a call costs more than padding for it."""
        return device.type != "cpu"

    def _grouped(self, device: torch.device) -> list[_Group]:
        whole = self._one_group(device)
        if whole not in self._groups:
            runs = groupby(self._tokens, key=lambda pair: whole or pair.shape)
            self._groups[whole] = groups = []
            start = 0
            for _, run in runs:
                groups.append(_Group(start, tuple(run)))
                start = groups[-1].stop
        return self._groups[whole]


class _Group:
    """Neighbours in the row that one attention call takes, padded where shapes differ."""

    def __init__(self, start: int, tokens: tuple[PairTokens, ...]) -> None:
        sizes = [pair.size for pair in tokens]
        self.start, self.stop = start, start + sum(sizes)
        self._tokens = tokens
        self._alike = len({pair.shape for pair in tokens}) == 1
        self._masks: dict[tuple[torch.dtype, torch.device, int | None], Tensor] = {}
        starts = accumulate(sizes, initial=start)
        places = [
            range(first, first + size) for first, size in zip(starts, sizes, strict=False)
        ]
        # Padding repeats the first token: no real token sees it.
        self._index = self._table(places, start)
        self._real = self._table([[1] * size for size in sizes], 0).bool()

    def rows(self, x: Float[Tensor, "1 H T D"]) -> Float[Tensor, "G H L D"]:
        if self._alike:
            shape = x.shape[1], len(self._tokens), -1, x.shape[-1]
            pairs = x[0, :, self.start : self.stop].view(shape)
        else:
            pairs = x[0, :, self._index.to(x.device)]
        return pairs.transpose(0, 1)

    def flat(self, x: Float[Tensor, "G L H D"]) -> Float[Tensor, "t H D"]:
        return x.flatten(0, 1) if self._alike else x[self._real.to(x.device)]

    def mask(
        self, dtype: torch.dtype, device: torch.device, window: int | None
    ) -> Float[Tensor, "G 1 L L"]:
        key = dtype, device, window
        if key not in self._masks:
            # One mask does for all pairs of the same shape.
            tokens = self._tokens[:1] if self._alike else self._tokens
            segments = self._table([pair.segments() for pair in tokens], -1).to(device)
            positions = self._table([pair.positions() for pair in tokens], 0).to(device)
            self._masks[key] = tree_mask(segments, dtype, positions, window)
        return self._masks[key]

    @staticmethod
    def _table(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "G L"]:
        return padded(rows, value, [0] * len(rows), "cpu")


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


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scaling: float | None
) -> Float[Tensor, "G H L D"]:
    # Only the CPU kernel takes a mask and grouped queries together.
    grouped = q.device.type == "cpu"
    if not grouped:
        k, v = _repeated(k, q), _repeated(v, q)
    return functional.scaled_dot_product_attention(
        q, k, v, mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Float[Tensor, "G H L D"]:
    k, v = _repeated(k, q), _repeated(v, q)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (scores / softcap).tanh() * softcap + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return functional.dropout(weights, dropout) @ v


def _repeated(x: Float[Tensor, "G K L D"], q: Float[Tensor, "G H L D"]) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
