"""Activations of pairs at their last tokens, each distinct token computed once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from austeer.adapters._errors import FitError
from austeer.adapters.activations.layouts import (
    Layout,
    choose_layout,
    lay_out,
)
from austeer.adapters.activations.memory import (
    out_of_memory,
    release_memory,
    token_budget_for,
    too_large,
)
from austeer.adapters.activations.reading import SiteValues, read_sites
from austeer.adapters.sites import Site
from austeer.adapters.tokens import PairTokens, check_vocabulary, plan_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

notice = logging.getLogger("austeer")


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """Activations of one batch of pairs at the last token of each string.

    Attributes:
        pairs: numbers of these pairs in the sequence given to `capture`.
        values: (positive, negative) of each site, each `[P, width]` in the model's dtype.
    """

    pairs: tuple[int, ...]
    values: SiteValues


def capture(
    model: PreTrainedModel,
    tokens: Sequence[PairTokens],
    sites: Sequence[Site],
    *,
    batches: Sequence[Sequence[int]] | None = None,
    layout: Layout = "auto",
    token_budget: int | None = None,
    padding_side: str = "right",
) -> Iterator[Activations]:
    """Yield the activations of every pair once.

    A batch that does not fit in memory is halved, and so are larger ones after it.

    Args:
        model: a supported causal language model; layers after the last site do not run.
        tokens: tokenized pairs.
        sites: where to read.
        batches: numbers of the pairs that run together; `plan_batches` by default.
        layout: `auto` packs all pairs of a batch into one row; where the model does not allow
            that, it gives each pair a row (`tree`), else each string (`plain`), and says so.
        token_budget: tokens of a planned batch; by the free memory by default.
        padding_side: `right` or `left`, where the layout pads.

    Raises:
        FitError: an activation is not finite, naming site and pair; a pair that does not fit
            in memory; a bad option.
        ModelError: unsupported architecture, or tokens outside the model's vocabulary.
    """
    source = Capturer(
        model, sites, layout=layout, token_budget=token_budget, padding_side=padding_side
    )
    yield from source(tokens, batches)


class Capturer:
    """`capture` for pairs that come in several parts.

    Layout and budget are kept: the model is tried once, a refusal said once, and memory that
    ran out is not asked for again. Arguments are those of `capture`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        *,
        layout: Layout = "auto",
        token_budget: int | None = None,
        padding_side: str = "right",
    ) -> None:
        self._model, self._sites, self._padding_side = model, sites, padding_side
        self._layout = layout
        self._token_budget = token_budget
        self._limit: int | None = None

    def __call__(
        self, tokens: Sequence[PairTokens], batches: Sequence[Sequence[int]] | None = None
    ) -> Iterator[Activations]:
        """Yield the activations of every pair of this part once."""
        for pair in tokens:
            check_vocabulary(self._model, pair.where, pair.path())
        self._layout = choose_layout(self._model, tokens, self._layout)
        if batches is None:
            if self._token_budget is None:
                self._token_budget = token_budget_for(self._model)
            batches = plan_batches(tokens, self._token_budget)
        waiting = deque(tuple(batch) for batch in batches)
        while waiting:
            numbers = waiting.popleft()
            pairs = [tokens[number] for number in numbers]
            if self._limit is not None and len(pairs) > 1 and _size(pairs) > self._limit:
                parts = plan_batches(pairs, self._limit)
                waiting.extendleft(tuple(numbers[n] for n in part) for part in parts[::-1])
            elif (values := self._read(pairs)) is not None:
                _check_finite(values, pairs)
                yield Activations(numbers, values)
            else:
                waiting.appendleft(numbers)

    def _read(self, pairs: Sequence[PairTokens]) -> SiteValues | None:
        """Values of one batch; None, and half its size as the limit, where memory ran out."""
        try:
            batch = lay_out(self._model, pairs, self._layout, self._padding_side)
            return read_sites(self._model, batch, self._sites)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Behind the except clause, where the failed pass's frames hold no tensor any more.
        release_memory()
        if len(pairs) == 1:
            raise too_large(pairs[0].where)
        self._limit = _size(pairs) // 2
        notice.warning("out of memory: batches have %d tokens at most from here", self._limit)
        return None


def _size(pairs: Sequence[PairTokens]) -> int:
    return sum(pair.size for pair in pairs)


def _check_finite(values: SiteValues, tokens: Sequence[PairTokens]) -> None:
    first = next(iter(values.values()))[0].device
    # Sums are much cheaper than looking at each value; one may also overflow, which is fine.
    sums = [x.sum(dtype=torch.float32).to(first) for both in values.values() for x in both]
    if torch.stack(sums).isfinite().all():
        return
    finite = torch.stack(
        [torch.isfinite(torch.cat(both, 1)).all(1).to(first) for both in values.values()]
    )
    for site, good in zip(values, finite.tolist(), strict=True):
        for pair, fine in zip(tokens, good, strict=True):
            if not fine:
                raise FitError(
                    f"{site}: activation is not finite for the pair {pair.where}; "
                    "are the weights sound? try --dtype float32"
                )
