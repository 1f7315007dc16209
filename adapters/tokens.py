"""Tokenized pairs: their common prefix, their limits, and which of them go together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from austeer.adapters._errors import FitError, ModelError, PairsError
from austeer.adapters.architectures import text_config
from austeer.adapters.pairs import ContrastivePair, render_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 512
_TEXTS = 64  # texts tokenized at once
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True, slots=True)
class PairTokens:
    """Token ids of one pair: the strings are prefix + positive and prefix + negative.

    Attributes:
        prefix: longest common prefix that leaves both branches at least one token.
        positive: rest of `prompt + positive`.
        negative: rest of `prompt + negative`.
        where: `file:line` for error messages.
        cut: whether a string was longer than the limit.
    """

    prefix: tuple[int, ...]
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    where: str = ""
    cut: bool = False

    @property
    def size(self) -> int:
        """Tokens to compute when the prefix is shared."""
        return len(self.prefix) + len(self.positive) + len(self.negative)

    @property
    def negative_start(self) -> int:
        """Where the negative begins in `path`."""
        return len(self.prefix) + len(self.positive)

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two strings."""
        return len(self.prefix) + max(len(self.positive), len(self.negative))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Size, and the lengths of prefix, positive and negative."""
        return self.size, len(self.prefix), len(self.positive), len(self.negative)

    def path(self) -> tuple[int, ...]:
        """Ids of the tree: prefix, positive, negative."""
        return self.prefix + self.positive + self.negative

    def positions(self) -> list[int]:
        """Position of every id of `path` in its own string."""
        start = len(self.prefix)
        return [*range(start + len(self.positive)), *range(start, start + len(self.negative))]

    def segments(self) -> list[int]:
        """Which part every id of `path` belongs to: 0 prefix, 1 positive, 2 negative."""
        parts = self.prefix, self.positive, self.negative
        return [number for number, part in enumerate(parts) for _ in part]


def token_limit(model: PreTrainedModel) -> int:
    """Tokens of a string that are used: 512, or the model's context if that is shorter."""
    return min(MAX_TOKENS, context_length(model) or MAX_TOKENS)


def context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model has; None where its config names no limit."""
    for name in _CONTEXT_KEYS:
        found = getattr(text_config(model), name, None)
        if found:
            return int(found)
    return None


def check_vocabulary(model: PreTrainedModel, where: str, ids: Iterable[int]) -> None:
    """Refuse a token that the model has no embedding of.

    Raises:
        ModelError: names `where` it is, and the token.
    """
    size = model.get_input_embeddings().weight.shape[0]
    largest = max(ids, default=0)
    if largest >= size:
        raise ModelError(
            f"{where}: the tokenizer gives id {largest}, the model has {size} embeddings; "
            "do model and tokenizer belong together?"
        )


def tokenize_pairs(
    pairs: Sequence[ContrastivePair],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = MAX_TOKENS,
    *,
    appended: bool = True,
) -> list[PairTokens]:
    """Tokenize `prompt + completion` as one string each, cut after `max_tokens`.

    To a string of `messages` no special tokens are added, as `apply_chat_template` adds none.

    Args:
        pairs: the pairs.
        tokenizer: the model's.
        max_tokens: tokens of a string that are used.
        appended: keep what the tokenizer puts behind every text.

    Raises:
        PairsError: a prompt leaves no room for a completion, or both strings are one after
            tokenization; names file and line.
    """
    pairs = render_pairs(pairs, tokenizer)
    prompts = _encode(tokenizer, pairs, [pair.prompt for pair in pairs])
    positives = _encode(tokenizer, pairs, [pair.prompt + pair.positive for pair in pairs])
    negatives = _encode(tokenizer, pairs, [pair.prompt + pair.negative for pair in pairs])
    if not appended:
        positives, negatives = (
            _without_appended(tokenizer, rows, pairs) for rows in (positives, negatives)
        )
    for pair, prompt in zip(pairs, prompts, strict=True):
        if len(prompt) >= max_tokens:
            raise PairsError(
                f"{pair.place}: the prompt alone has {len(prompt)} tokens, "
                f"a completion must fit in {max_tokens} with it; shorten the prompt"
            )
    return [
        _branched(pair.place, positive, negative, max_tokens)
        for pair, positive, negative in zip(pairs, positives, negatives, strict=True)
    ]


def prompt_ids(
    pairs: Sequence[ContrastivePair], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of each pair's prompt, as they come before a text that goes on.

    Raises:
        PairsError: no chat template for `messages`, or one that refuses them.
    """
    pairs = render_pairs(pairs, tokenizer)
    encoded = _encode(tokenizer, pairs, [pair.prompt for pair in pairs])
    return _without_appended(tokenizer, encoded, pairs)


def text_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, without what the tokenizer puts behind it."""
    return _without_appended(tokenizer, [list(tokenizer(text)["input_ids"]) for text in texts])


def plan_batches(tokens: Sequence[PairTokens], token_budget: int) -> list[tuple[int, ...]]:
    """Split pairs into batches of similar size, the largest first.

    Args:
        tokens: tokenized pairs; nothing else decides the result.
        token_budget: most tokens of a batch, each prefix counted once; a larger pair comes
            alone.

    Returns:
        Numbers of the pairs of each batch; every pair once.

    Raises:
        FitError: the budget is below one token.
    """
    if token_budget < 1:
        raise FitError(f"token budget: expected at least 1, got {token_budget}")
    # Whatever does not fit in memory fails at once; equal shapes end up side by side.
    order = sorted(range(len(tokens)), key=lambda number: tokens[number].shape, reverse=True)
    batches: list[list[int]] = []
    used = token_budget
    for number in order:
        used += tokens[number].size
        if used > token_budget:
            batches.append([])
            used = tokens[number].size
        batches[-1].append(number)
    return [tuple(batch) for batch in batches]


def appended_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that the tokenizer puts behind every text, such as an end token; mostly none."""
    whole: Any = tokenizer("a")["input_ids"]
    text: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    for end in range(len(whole), len(text) - 1, -1):
        if list(whole[end - len(text) : end]) == list(text):
            return tuple(whole[end:])
    return ()


def _branched(
    where: str, whole_positive: Sequence[int], whole_negative: Sequence[int], limit: int
) -> PairTokens:
    positive, negative = tuple(whole_positive[:limit]), tuple(whole_negative[:limit])
    cut = max(len(whole_positive), len(whole_negative)) > limit
    if positive == negative or not positive or not negative:
        raise PairsError(
            f"{where}: positive and negative are the same {len(positive)} tokens once "
            "tokenized and cut; the model cannot tell them apart"
        )
    both = zip(positive[:-1], negative[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], both))
    return PairTokens(positive[:shared], positive[shared:], negative[shared:], where, cut)


def _encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ContrastivePair], texts: Sequence[str]
) -> list[list[int]]:
    """Ids of a text for each pair."""
    found: list[list[int]] = [[] for _ in texts]
    for chat in (False, True):
        numbers = [number for number, pair in enumerate(pairs) if pair.is_chat is chat]
        # A tokenizer keeps many times the memory of the ids until it returns.
        for start in range(0, len(numbers), _TEXTS):
            some = numbers[start : start + _TEXTS]
            encoded: Any = tokenizer(
                [texts[number] for number in some],
                add_special_tokens=not chat,
                # A text longer than the model is cut here, and needs no warning.
                verbose=False,
            )
            for number, ids in zip(some, encoded["input_ids"], strict=True):
                found[number] = list(ids)
    return found


def _without_appended(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    pairs: Sequence[ContrastivePair] = (),
) -> list[list[int]]:
    """Rows without what the tokenizer appends; to those of chat `pairs` it appends nothing."""
    tail = list(appended_tokens(tokenizer))
    chat = [pair.is_chat for pair in pairs] or [False] * len(rows)
    return [
        row[: -len(tail)] if tail and not whole and row[-len(tail) :] == tail else row
        for row, whole in zip(rows, chat, strict=True)
    ]
