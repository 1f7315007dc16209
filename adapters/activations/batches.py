"""Batches of tokenized pairs: one tree-masked row a pair, or two plain rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from austeer.adapters.tokens import PairTokens


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """Where one completion of each pair lies in a batch.

    `log p(branch | prefix)` of pair j is the sum, over every t with `pair[t] == j`, of
    `log_softmax(logits[row[t], position[t]])[target[t]]`; see `evaluate.margins`. Without a
    prefix nothing predicts the first token, and it is left out.

    Attributes:
        last_row, last_position: the last token of each pair.
        pair, row, position, target: one entry for each predicted token.
    """

    last_row: Int[Tensor, " P"]
    last_position: Int[Tensor, " P"]
    pair: Int[Tensor, " T"]
    row: Int[Tensor, " T"]
    position: Int[Tensor, " T"]
    target: Int[Tensor, " T"]

    def last(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "P D"]:
        """Values of `x` at the last token of each pair."""
        return x[self.last_row.to(x.device), self.last_position.to(x.device)]


@dataclass(frozen=True, slots=True, eq=False)
class PairBatch:
    """Model inputs of P pairs, and where their completions lie in them.

    Attributes:
        input_ids: `[B, L]`; B = P in a tree batch, 2P in a plain one.
        attention_mask: additive float `[B, 1, L, L]` (tree), or 0/1 `[B, L]` (plain).
        position_ids: `[B, L]`; both branches continue at the prefix's end.
        positive, negative: the completions.
    """

    input_ids: Int[Tensor, "B L"]
    attention_mask: Tensor
    position_ids: Int[Tensor, "B L"]
    positive: Branch
    negative: Branch

    def __len__(self) -> int:
        return len(self.positive.last_row)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


def tree_batch(
    tokens: Sequence[PairTokens],
    pad_id: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    padding_side: str = "right",
) -> PairBatch:
    """One row a pair, [prefix | positive | negative]: a token sees its own ancestors only.

    Args:
        tokens: at least one pair.
        pad_id: any id of the vocabulary; no real token sees it.
        device: where the tensors go.
        dtype: the model's, for the additive mask.
        padding_side: `right` or `left`.
    """
    paths = [pair.path() for pair in tokens]
    before = _left_padding(paths, padding_side)
    ends = [pad + len(pair.prefix) for pad, pair in zip(before, tokens, strict=True)]
    behind = [end + len(pair.positive) for end, pair in zip(ends, tokens, strict=True)]
    rows = range(len(tokens))
    return PairBatch(
        padded(paths, pad_id, before, device),
        tree_mask(padded([pair.segments() for pair in tokens], -1, before, device), dtype),
        padded([pair.positions() for pair in tokens], 0, before, device),
        index_branch([pair.positive for pair in tokens], rows, ends, ends, tokens, device),
        index_branch([pair.negative for pair in tokens], rows, behind, ends, tokens, device),
    )


def plain_batch(
    tokens: Sequence[PairTokens],
    pad_id: int = 0,
    device: torch.device | str = "cpu",
    *,
    padding_side: str = "right",
) -> PairBatch:
    """Two ordinary rows a pair, positives before negatives; arguments as `tree_batch`."""
    paths = [pair.prefix + pair.positive for pair in tokens]
    paths += [pair.prefix + pair.negative for pair in tokens]
    before = _left_padding(paths, padding_side)
    twice = [*tokens, *tokens]
    ends = [pad + len(pair.prefix) for pad, pair in zip(before, twice, strict=True)]
    count = len(tokens)
    first, second = range(count), range(count, 2 * count)
    return PairBatch(
        padded(paths, pad_id, before, device),
        padded([[1] * len(path) for path in paths], 0, before, device),
        padded([range(len(path)) for path in paths], 0, before, device),
        index_branch(
            [p.positive for p in tokens], first, ends[:count], ends[:count], tokens, device
        ),
        index_branch(
            [p.negative for p in tokens], second, ends[count:], ends[count:], tokens, device
        ),
    )


def _left_padding(rows: Sequence[Sequence[int]], padding_side: str) -> list[int]:
    length = max(map(len, rows))
    return [length - len(row) if padding_side == "left" else 0 for row in rows]


def padded(
    rows: Sequence[Sequence[int]],
    value: int,
    before: Sequence[int],
    device: torch.device | str,
) -> Int[Tensor, "B L"]:
    """Rows of unequal length as one table, each after `before` cells of `value`."""
    table = torch.full((len(rows), max(map(len, rows))), value)
    for number, (row, start) in enumerate(zip(rows, before, strict=True)):
        table[number, start : start + len(row)] = torch.tensor(row)
    return table.to(device)


def tree_mask(
    segments: Int[Tensor, "B L"],
    dtype: torch.dtype,
    positions: Int[Tensor, "B L"] | None = None,
    window: int | None = None,
) -> Float[Tensor, "B 1 L L"]:
    """0 where a token may look, the dtype's lowest value elsewhere; segment -1 is padding.

    With a sliding window a token sees itself and `window - 1` positions of its own string.
    """
    seer, seen = segments[:, :, None], segments[:, None, :]
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    allowed = earlier & (seer >= 0) & ((seen == 0) | (seen == seer))
    if positions is not None and window is not None:
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    # A padding row that saw nothing would turn its softmax, and then sums, into NaN.
    allowed |= torch.eye(length, dtype=torch.bool, device=segments.device)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def index_branch(
    branches: Sequence[tuple[int, ...]],
    rows: Sequence[int],
    starts: Sequence[int],
    ends: Sequence[int],
    tokens: Sequence[PairTokens],
    device: torch.device | str,
) -> Branch:
    """Index one completion of each pair: from `starts` on, after a prefix up to `ends`."""
    entries: list[tuple[int, int, int, int]] = []
    for number, (branch, row, start) in enumerate(zip(branches, rows, starts, strict=True)):
        predictors = [ends[number] - 1, *range(start, start + len(branch) - 1)]
        known = list(zip(predictors, branch, strict=True))
        if not tokens[number].prefix:
            known = known[1:]
        entries += [(number, row, position, target) for position, target in known]
    last = [start + len(branch) - 1 for start, branch in zip(starts, branches, strict=True)]
    columns = torch.tensor(entries, dtype=torch.int64, device=device).reshape(-1, 4).unbind(1)
    return Branch(
        torch.tensor(rows, device=device), torch.tensor(last, device=device), *columns
    )
