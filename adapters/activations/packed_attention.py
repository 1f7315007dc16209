"""Attention inside the pairs of a packed row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from austeer.adapters._errors import ModelError
from austeer.adapters.activations.batches import padded, tree_mask
from austeer.adapters.tokens import PairTokens


class PackedAttention:
    """Attention inside the pairs of one packed batch.

    Args:
        tokens: the pairs, in the row's order.
        depth: the number of the call from which on nothing but last tokens is read: other
            rows of its result are zeros.
        capped: whether to bound the scores where a model asks for it.

    Attributes:
        calls: how often a model asked for it.
    """

    def __init__(
        self, tokens: Sequence[PairTokens], depth: int | None = None, *, capped: bool = True
    ) -> None:
        self.calls = 0
        self._depth = depth
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
        ends_alone = self.calls == self._depth
        if sliding_window is not None and sliding_window >= self._longest:
            sliding_window = None
        if not self._capped:
            softcap = None
        make = query.new_zeros if ends_alone else query.new_empty
        out = make(1, self._size, query.shape[1], value.shape[-1])
        for group in self._grouped(query.device):
            mask = group.mask(query.dtype, query.device, sliding_window)
            q, k, v = (group.rows(x) for x in (query, key, value))
            if ends_alone:
                q, mask = group.ends(q), group.ends(mask)
            if softcap is not None:
                found = _capped(q, k, v, mask, dropout, scaling, softcap)
            else:
                found = _fused(q, k, v, mask, dropout, scaling)
            group.put(out[0], found, ends_alone)
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
        starts = list(accumulate(sizes, initial=start))[:-1]
        places = [range(first, first + size) for first, size in zip(starts, sizes, strict=True)]
        # Padding repeats the first token: no real token sees it.
        self._index = self._table(places, start)
        self._real = self._table([[1] * size for size in sizes], 0).bool()
        self._ends = torch.tensor([[pair.negative_start - 1, pair.size - 1] for pair in tokens])
        self._end_places = (self._ends + torch.tensor(starts)[:, None]).flatten()

    def rows(self, x: Float[Tensor, "1 H T D"]) -> Float[Tensor, "G H L D"]:
        if self._alike:
            shape = x.shape[1], len(self._tokens), -1, x.shape[-1]
            pairs = x[0, :, self.start : self.stop].view(shape)
        else:
            pairs = x[0, :, self._index.to(x.device)]
        return pairs.transpose(0, 1)

    def ends(self, x: Float[Tensor, "G H L D"]) -> Float[Tensor, "G H 2 D"]:
        """The last tokens of both strings."""
        if self._alike:
            return x[:, :, self._ends[0].to(x.device)]
        ends = self._ends.to(x.device)[:, None, :, None]
        return x.gather(2, ends.expand(-1, x.shape[1], -1, x.shape[-1]))

    def put(
        self, out: Float[Tensor, "T H E"], found: Float[Tensor, "G H _ E"], ends_alone: bool
    ) -> None:
        """Write what was found for all tokens, or for the last ones of both strings."""
        rows = found.transpose(1, 2)
        if ends_alone:
            out[self._end_places.to(out.device)] = rows.flatten(0, 1)
        elif self._alike:
            out[self.start : self.stop].view(rows.shape).copy_(rows)
        else:
            out[self.start : self.stop] = rows[self._real.to(out.device)]

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


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scaling: float | None
) -> Float[Tensor, "G H L E"]:
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
) -> Float[Tensor, "G H L E"]:
    k, v = _repeated(k, q), _repeated(v, q)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (scores / softcap).tanh() * softcap + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return functional.dropout(weights, dropout) @ v


def _repeated(x: Float[Tensor, "G K L D"], q: Float[Tensor, "G H _ _"]) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
