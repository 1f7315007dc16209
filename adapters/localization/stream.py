"""Pairs a window at a time: tokenized, planned into batches, shared between processes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from austeer.adapters.localization.distributed import Processes
from austeer.adapters.pairs import ContrastivePair, render_pairs
from austeer.adapters.tokens import (
    PairTokens,
    appended_tokens,
    plan_batches,
    tokenize_pairs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

notice = logging.getLogger("austeer")

WINDOW = 1024
# Pairs whose tokens stand for those of all.
_SAMPLE = 64
# Tokens that a tokenizer may add to a text.
_SPECIAL = 16


@dataclass(frozen=True, slots=True)
class Window:
    """Successive pairs, tokenized, and the batches of them that this process takes.

    Attributes:
        start: number of the first pair.
        tokens: all pairs of the window.
        batches: pairs by their place in `tokens`; none of them done.
        pending: pairs that are not done, those of other processes included.
    """

    start: int
    tokens: list[PairTokens]
    batches: list[list[int]]
    pending: int


class PairStream:
    """Pairs in a fixed order, of which only one window's tokens are in memory.

    Args:
        pairs: contrastive pairs.
        tokenizer: makes tokens of them.
        max_tokens: tokens of a string that are used.
        window: pairs of a window.
    """

    def __init__(
        self,
        pairs: Sequence[ContrastivePair],
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        window: int = WINDOW,
    ) -> None:
        self._pairs, self._tokenizer = pairs, tokenizer
        self._max_tokens, self._window = max_tokens, window

    def check_lengths(self) -> None:
        """Refuse a pair that does not fit now, instead of hours later in its window.

        Only what can be too long is tokenized for it: tokens are rarely shorter than a byte.
        How many completions are cut is logged.

        Raises:
            PairsError: a prompt leaves no room for a completion, or a cut leaves both the same.
        """
        suspects = [
            pair
            for pair in render_pairs(self._pairs, self._tokenizer)
            if _bytes(pair) + _SPECIAL > self._max_tokens
        ]
        cut = 0
        for start in range(0, len(suspects), self._window):
            tokens = self._tokens(suspects[start : start + self._window])
            cut += sum(pair.cut for pair in tokens)
        if cut:
            notice.warning(
                "%d of %d pairs are longer than %d tokens: they are cut there, and read at the "
                "last token that is left",
                cut,
                len(self._pairs),
                self._max_tokens,
            )
        self._warn_of_a_second_start()
        plain = not all(pair.is_chat for pair in self._pairs)
        if plain and appended_tokens(self._tokenizer):
            notice.warning(
                "the tokenizer appends a token to every text: activations are read at that one"
            )

    def _warn_of_a_second_start(self) -> None:
        start = self._tokenizer.bos_token
        if not start or list(self._tokenizer("")["input_ids"])[:1] != [
            self._tokenizer.bos_token_id
        ]:
            return
        twice = [p for p in self._pairs if not p.is_chat and p.prompt.startswith(start)]
        if twice:
            notice.warning(
                "%s: the prompt begins with %s, which the tokenizer adds as well: the model "
                "sees it twice (%d of %d pairs); leave it out, or give chat turns as messages",
                twice[0].place,
                start,
                len(twice),
                len(self._pairs),
            )

    @cached_property
    def sample(self) -> list[PairTokens]:
        """The first few pairs."""
        return self._tokens(self._pairs[:_SAMPLE])

    def digest(self) -> str:
        """`sha256:` digest of the pairs in their order, the vocabulary and some tokens."""
        total = hashlib.sha256()
        for token, number in sorted(self._tokenizer.get_vocab().items()):
            total.update(f"{number} {token}\0".encode("utf-8", "surrogatepass"))
        for pair in self._pairs:
            total.update(hashlib.sha256(pair.content.encode()).digest())
        for tokens in self.sample:
            total.update(repr((tokens.prefix, tokens.positive, tokens.negative)).encode())
        return f"sha256:{total.hexdigest()}"

    def windows(
        self,
        done: Bool[np.ndarray, " N"],
        token_budget: int,
        batch_size: int | None,
        group: Processes,
    ) -> Iterator[Window]:
        """Every window with something left to do; every so many-th batch is this process's.

        Args:
            done: pairs to leave out.
            token_budget: most tokens of a batch.
            batch_size: most pairs of a batch, None for any number.
            group: the processes that share the batches.

        Raises:
            PairsError: a pair does not fit the model.
        """
        turn = 0
        for start in range(0, len(self._pairs), self._window):
            finished = done[start : start + self._window]
            if finished.all():
                continue
            tokens = self._tokens(self._pairs[start : start + self._window])
            # Planned as if none were done: the same batches round to the same bits.
            planned = _capped(plan_batches(tokens, token_budget), batch_size)
            left = [[number for number in batch if not finished[number]] for batch in planned]
            pending = [batch for batch in left if batch]
            mine = pending[(group.rank - turn) % group.size :: group.size]
            turn += len(pending)
            yield Window(start, tokens, mine, int((~finished).sum()))

    def _tokens(self, pairs: Sequence[ContrastivePair]) -> list[PairTokens]:
        return tokenize_pairs(pairs, self._tokenizer, self._max_tokens)


def _capped(batches: Sequence[Sequence[int]], most: int | None) -> Iterator[Sequence[int]]:
    for batch in batches:
        size = most or len(batch)
        for first in range(0, len(batch), size):
            yield batch[first : first + size]


def _bytes(pair: ContrastivePair) -> int:
    longest = max(pair.positive, pair.negative, key=len)
    return len(pair.prompt.encode()) + len(longest.encode())
