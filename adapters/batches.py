"""Tokenized pairs and their batches: one tree-masked row a pair, or two plain rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from austeer.adapters._errors import PairsError
from austeer.adapters.pairs import ContrastivePair, render_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class PairTokens:
    """Token ids of one pair: the strings are prefix + positive and prefix + negative.

    Attributes:
        prefix: longest common prefix that leaves both branches at least one token.
        positive: rest of `prompt + positive`.
        negative: rest of `prompt + negative`.
        where: `file:line` for error messages.
    """

    prefix: tuple[int, ...]
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    where: str = ""

    @property
    def size(self) -> int:
        """Tokens to compute when the prefix is shared."""
        return len(self.prefix) + len(self.positive) + len(self.negative)

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two strings."""
        return len(self.prefix) + max(len(self.positive), len(self.negative))


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
        return x[self.last_row, self.last_position]


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


def token_limit(model: PreTrainedModel) -> int:
    """Tokens of a string that are used: 512, or the model's context if that is shorter."""
    config = model.config
    context = getattr(config, "max_position_embeddings", None)
    return min(MAX_TOKENS, context or getattr(config, "n_positions", None) or MAX_TOKENS)


def tokenize_pairs(
    pairs: Sequence[ContrastivePair],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = MAX_TOKENS,
) -> list[PairTokens]:
    """Tokenize `prompt + completion` as one string each, cut after `max_tokens`.

    Raises:
        PairsError: a prompt leaves no room for a completion, or both strings are one after
            tokenization; names file and line.
    """
    pairs = render_pairs(pairs, tokenizer)
    prompts = _encode(tokenizer, [pair.prompt for pair in pairs])
    positives = _encode(tokenizer, [pair.prompt + pair.positive for pair in pairs])
    negatives = _encode(tokenizer, [pair.prompt + pair.negative for pair in pairs])
    for pair, prompt in zip(pairs, prompts, strict=True):
        if len(prompt) >= max_tokens:
            raise PairsError(
                f"{pair.where}: the prompt alone has {len(prompt)} tokens, "
                f"a completion must fit in {max_tokens} with it; shorten the prompt"
            )
    return [
        _branched(pair.where, tuple(positive[:max_tokens]), tuple(negative[:max_tokens]))
        for pair, positive, negative in zip(pairs, positives, negatives, strict=True)
    ]


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
    paths = [[*pair.prefix, *pair.positive, *pair.negative] for pair in tokens]
    positions = [
        [
            *range(len(pair.prefix) + len(pair.positive)),
            *range(len(pair.prefix), len(pair.prefix) + len(pair.negative)),
        ]
        for pair in tokens
    ]
    segments = [
        [0] * len(pair.prefix) + [1] * len(pair.positive) + [2] * len(pair.negative)
        for pair in tokens
    ]
    before = _left_padding(paths, padding_side)
    ends = [pad + len(pair.prefix) for pad, pair in zip(before, tokens, strict=True)]
    behind = [end + len(pair.positive) for end, pair in zip(ends, tokens, strict=True)]
    rows = range(len(tokens))
    return PairBatch(
        _padded(paths, pad_id, before, device),
        _tree_mask(_padded(segments, -1, before, device), dtype),
        _padded(positions, 0, before, device),
        _branch([pair.positive for pair in tokens], rows, ends, ends, tokens, device),
        _branch([pair.negative for pair in tokens], rows, behind, ends, tokens, device),
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
        _padded(paths, pad_id, before, device),
        _padded([[1] * len(path) for path in paths], 0, before, device),
        _padded([range(len(path)) for path in paths], 0, before, device),
        _branch(
            [p.positive for p in tokens], first, ends[:count], ends[:count], tokens, device
        ),
        _branch(
            [p.negative for p in tokens], second, ends[count:], ends[count:], tokens, device
        ),
    )


def _left_padding(rows: Sequence[Sequence[int]], padding_side: str) -> list[int]:
    length = max(map(len, rows))
    return [length - len(row) if padding_side == "left" else 0 for row in rows]


def _padded(
    rows: Sequence[Sequence[int]],
    value: int,
    before: Sequence[int],
    device: torch.device | str,
) -> Int[Tensor, "B L"]:
    table = torch.full((len(rows), max(map(len, rows))), value)
    for number, (row, start) in enumerate(zip(rows, before, strict=True)):
        table[number, start : start + len(row)] = torch.tensor(row)
    return table.to(device)


def _tree_mask(segments: Int[Tensor, "B L"], dtype: torch.dtype) -> Float[Tensor, "B 1 L L"]:
    """0 where a token may look, the dtype's lowest value elsewhere; segment -1 is padding."""
    seer, seen = segments[:, :, None], segments[:, None, :]
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    allowed = earlier & (seer >= 0) & ((seen == 0) | (seen == seer))
    # A padding row that saw nothing would turn its softmax, and then sums, into NaN.
    allowed |= torch.eye(length, dtype=torch.bool, device=segments.device)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def _branch(
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


def _branched(where: str, positive: tuple[int, ...], negative: tuple[int, ...]) -> PairTokens:
    if positive == negative or not positive or not negative:
        raise PairsError(
            f"{where}: positive and negative are the same {len(positive)} tokens once "
            "tokenized and cut; the model cannot tell them apart"
        )
    both = zip(positive[:-1], negative[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], both))
    return PairTokens(positive[:shared], positive[shared:], negative[shared:], where)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: a text longer than the model is cut here, and needs no warning.
    encoded: Any = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    return [list(ids) for ids in encoded]
