"""Tokenized pairs: common prefixes, limits, and the two layouts of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from austeer.adapters import ContrastivePair, PairsError
from austeer.adapters.batches import (
    Branch,
    PairBatch,
    PairTokens,
    plain_batch,
    token_limit,
    tokenize_pairs,
    tree_batch,
)

TOKENS = [
    PairTokens((1, 5, 9), (7, 8), (6,)),
    PairTokens((), (7, 8, 9, 4), (6, 5)),
    PairTokens((1,), (3,), (4, 5, 6, 7, 8)),
]
LAYOUTS: dict[str, Callable[[str], PairBatch]] = {
    "tree": lambda side: tree_batch(TOKENS, padding_side=side),
    "plain": lambda side: plain_batch(TOKENS, padding_side=side),
}
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")

layouts = pytest.mark.parametrize("layout", LAYOUTS)
sides = pytest.mark.parametrize("side", ["left", "right"])


def log_probs(logits: Any, branch: Branch) -> torch.Tensor:
    """Log p(branch | prefix) of each pair, as the docstring of `Branch` says."""
    chosen = logits[branch.row, branch.position].log_softmax(-1)
    scores = chosen.gather(-1, branch.target[:, None])[:, 0]
    return torch.zeros(len(branch.last_row)).index_add(0, branch.pair, scores)


def pair(prompt: str, positive: str, negative: str) -> ContrastivePair:
    return ContrastivePair(prompt, positive, negative, None, "f:3")


def test_longest_common_prefix(tiny_tokenizer: Any) -> None:
    texts = "Tom felt very happy", "Tom felt very sad and so"
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    found = tokenize_pairs(
        [pair("Tom felt", " very happy", " very sad and so")], tiny_tokenizer
    )
    assert found == [PairTokens(tuple(ids[0][:4]), (ids[0][4],), tuple(ids[1][4:]), "f:3")]
    assert found[0].size == 8 and found[0].longest == 7


def test_both_branches_keep_a_token_when_one_text_begins_the_other(tiny_tokenizer: Any) -> None:
    (found,) = tokenize_pairs([pair("Tom", " felt happy", " felt")], tiny_tokenizer)
    ids = tuple(tiny_tokenizer("Tom felt happy")["input_ids"])
    assert (found.prefix, found.positive, found.negative) == (ids[:2], ids[2:], ids[2:3])


def test_empty_prompt(tiny_tokenizer: Any) -> None:
    (found,) = tokenize_pairs([pair("", "happy", "sad")], tiny_tokenizer)
    assert found.prefix == (tiny_tokenizer.bos_token_id,)


def test_messages_are_rendered_first(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} and{% endfor %}"
    turns = ({"role": "user", "content": "Tom felt"},)
    chat = ContrastivePair("", " happy", " sad", turns, "f:3")
    assert tokenize_pairs([chat], tokenizer) == tokenize_pairs(
        [pair("Tom felt and", " happy", " sad")], tokenizer
    )


def test_texts_are_cut_after_the_limit(tiny_tokenizer: Any) -> None:
    (found,) = tokenize_pairs([pair("Tom", " felt very happy", " was sad")], tiny_tokenizer, 4)
    whole = tuple(tiny_tokenizer("Tom felt very happy")["input_ids"])
    assert len(whole) == 5 and found.prefix + found.positive == whole[:4]
    assert len(found.prefix + found.negative) == 4


@pytest.mark.parametrize(("limit", "fits"), [(5, False), (6, False), (7, True)])
def test_prompt_alone_fills_the_limit(tiny_tokenizer: Any, limit: int, fits: bool) -> None:
    prompt = "one day Tom went to"  # 6 tokens with bos
    pairs = [pair("Tom", " happy", " sad"), pair(prompt, " park", " home")]
    if fits:
        assert len(tokenize_pairs(pairs, tiny_tokenizer, limit)) == 2
        return
    with pytest.raises(PairsError, match="f:3: the prompt alone has 6 tokens") as caught:
        tokenize_pairs(pairs, tiny_tokenizer, limit)
    assert "\n" not in str(caught.value)


def test_same_tokens_after_the_cut_or_by_unknown_words(tiny_tokenizer: Any) -> None:
    with pytest.raises(PairsError, match=r"f:3: .*same 3 tokens"):
        tokenize_pairs([pair("Tom", " felt happy", " felt sad")], tiny_tokenizer, 3)
    with pytest.raises(PairsError, match=r"f:3: .*same"):
        tokenize_pairs([pair("Tom", " joyous", " gloomy")], tiny_tokenizer)


def test_no_pairs(tiny_tokenizer: Any) -> None:
    assert tokenize_pairs([], tiny_tokenizer) == []


def test_long_texts_need_no_warning(
    tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.model_max_length = 3
    tokenize_pairs([pair("Tom felt very", " happy", " sad")], tokenizer)
    assert not caplog.records


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_token_limit(tiny_model: Callable[..., Any], model_type: str) -> None:
    name = "n_positions" if model_type == "gpt2" else "max_position_embeddings"
    assert token_limit(tiny_model(model_type, **{name: 100})) == 100
    assert token_limit(tiny_model(model_type, **{name: 2048})) == 512


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
