"""Batches of pairs: one tree-masked row a pair, or two plain rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from austeer.adapters.activations.batches import (
    Branch,
    PairBatch,
    plain_batch,
    tree_batch,
    tree_mask,
)
from austeer.adapters.tokens import PairTokens

TOKENS = [
    PairTokens((1, 5, 9), (7, 8), (6,)),
    PairTokens((), (7, 8, 9, 4), (6, 5)),
    PairTokens((1,), (3,), (4, 5, 6, 7, 8)),
]
LAYOUTS: dict[str, Callable[[str], PairBatch]] = {
    "tree": lambda side: tree_batch(TOKENS, padding_side=side),
    "plain": lambda side: plain_batch(TOKENS, padding_side=side),
}

layouts = pytest.mark.parametrize("layout", LAYOUTS)
sides = pytest.mark.parametrize("side", ["left", "right"])


def log_probs(logits: Any, branch: Branch) -> torch.Tensor:
    """Log p(branch | prefix) of each pair, as the docstring of `Branch` says."""
    chosen = logits[branch.row, branch.position].log_softmax(-1)
    scores = chosen.gather(-1, branch.target[:, None])[:, 0]
    return torch.zeros(len(branch.last_row)).index_add(0, branch.pair, scores)


def paths(batch: PairBatch, branch: Branch) -> list[list[tuple[int, int]]]:
    """(id, position) of every token that the last token of each pair sees, by the mask."""
    found = []
    for row, last in zip(branch.last_row.tolist(), branch.last_position.tolist(), strict=True):
        if batch.attention_mask.ndim == 4:
            seen = (batch.attention_mask[row, 0, last] == 0).nonzero()[:, 0]
        else:
            seen = batch.attention_mask[row, : last + 1].nonzero()[:, 0]
        ids, positions = batch.input_ids[row, seen], batch.position_ids[row, seen]
        found.append(list(zip(ids.tolist(), positions.tolist(), strict=True)))
    return found


@layouts
@sides
def test_the_last_token_sees_its_own_string_at_its_own_positions(
    layout: str, side: str
) -> None:
    batch = LAYOUTS[layout](side)
    assert len(batch) == 3
    for branch, name in ((batch.positive, "positive"), (batch.negative, "negative")):
        wanted = [tokens.prefix + getattr(tokens, name) for tokens in TOKENS]
        assert paths(batch, branch) == [
            [(token, position) for position, token in enumerate(path)] for path in wanted
        ]


@sides
def test_tree_mask_against_ancestors_found_one_by_one(side: str) -> None:
    batch = tree_batch(TOKENS, 0, "cpu", torch.float16, padding_side=side)
    length = max(tokens.size for tokens in TOKENS)
    assert batch.attention_mask.shape == (3, 1, length, length)
    assert batch.attention_mask.dtype == torch.float16
    for row, tokens in enumerate(TOKENS):
        p, n, m = len(tokens.prefix), len(tokens.positive), len(tokens.negative)
        start = length - (p + n + m) if side == "left" else 0
        wanted = torch.eye(length, dtype=torch.bool)
        for j in range(p + n):
            wanted[start + j, start : start + j + 1] = True
        for j in range(m):
            wanted[start + p + n + j, start : start + p] = True
            wanted[start + p + n + j, start + p + n : start + p + n + j + 1] = True
        mask = batch.attention_mask[row, 0]
        assert torch.equal(mask == 0, wanted)
        assert (mask[~wanted] == torch.finfo(torch.float16).min).all()


@pytest.mark.parametrize("window", [1, 3, 6])
def test_window_counts_positions_of_a_string(window: int) -> None:
    """Three pairs with padding; row and string differ on the negative branch."""
    batch = tree_batch(TOKENS)
    segments = torch.full(batch.input_ids.shape, -1)
    for row, tokens in enumerate(TOKENS):
        segments[row, : tokens.size] = torch.tensor(tokens.segments())
    mask = tree_mask(segments, torch.float32, batch.position_ids, window)[:, 0] == 0
    for row, tokens in enumerate(TOKENS):
        positions = tokens.positions()
        for seer in range(tokens.size):
            before = (batch.attention_mask[row, 0, seer] == 0).nonzero()[:, 0].tolist()
            near = [seen for seen in before if positions[seer] - positions[seen] < window]
            assert mask[row, seer].nonzero()[:, 0].tolist() == near


@sides
def test_pad_id_fills_the_rest(side: str) -> None:
    batch = tree_batch(TOKENS, 39, padding_side=side)
    row = [1, 5, 9, 7, 8, 6]
    assert batch.input_ids[0].tolist() == ([39, *row] if side == "left" else [*row, 39])


@layouts
@sides
def test_targets_are_the_branch_tokens(layout: str, side: str) -> None:
    batch = LAYOUTS[layout](side)
    for branch, name in ((batch.positive, "positive"), (batch.negative, "negative")):
        for number, tokens in enumerate(TOKENS):
            mine = branch.pair == number
            wanted = getattr(tokens, name)
            # Nothing predicts the first token of a string.
            assert branch.target[mine].tolist() == list(wanted if tokens.prefix else wanted[1:])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@layouts
@sides
def test_log_probs_equal_those_of_each_string_alone(
    tiny_model: Callable[..., Any], model_type: str, layout: str, side: str
) -> None:
    model = tiny_model(model_type)
    batch = LAYOUTS[layout](side)
    logits = model(**batch.inputs(), use_cache=False).logits
    for branch, name in ((batch.positive, "positive"), (batch.negative, "negative")):
        wanted = []
        for tokens in TOKENS:
            path = tokens.prefix + getattr(tokens, name)
            alone = model(torch.tensor([path])).logits[0].log_softmax(-1)
            first = max(len(tokens.prefix), 1)
            wanted.append(sum(alone[j - 1, path[j]] for j in range(first, len(path))))
        found = log_probs(logits, branch)
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-5)


def test_a_branch_without_any_prediction_scores_zero() -> None:
    batch = tree_batch([PairTokens((), (3,), (4,))])
    assert len(batch.positive.target) == 0
    assert log_probs(torch.randn(1, 2, 40), batch.positive).tolist() == [0.0]
