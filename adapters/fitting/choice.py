"""The choice among many candidates on pairs and neutral text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from austeer.adapters.activations.layouts import can_share_prompt
from austeer.adapters.fitting.halving import Choice, successive_halving
from austeer.adapters.fitting.sweep import Steering, sweep_kl, sweep_margins
from austeer.adapters.measurement.evaluate import batch_pairs
from austeer.adapters.measurement.neutral import TokenText
from austeer.adapters.tokens import PairTokens


def choose(
    model: PreTrainedModel,
    candidates: Sequence[Steering],
    tokens: Sequence[PairTokens],
    text: TokenText | None = None,
    limit: float = float("inf"),
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> Choice:
    """Choose the candidate with the largest mean margin, see `successive_halving`.

    What candidates share is computed once: prompts within a pair, and the layers below the
    first that steers differently (`measure_each`).

    Args:
        model: the base model, unsteered.
        candidates: steered sites of each.
        tokens: the pairs to choose on.
        text: independent neutral texts for the limit; None to choose by margin alone.
        limit: largest mean KL allowed, nats per token.
        batch_size: pairs or texts per forward pass.
        seed: of the order in which pairs are seen.

    Returns:
        The choice; its margins in the order of `tokens`.
    """
    order = np.random.default_rng(seed).permutation(len(tokens))
    shuffled = [tokens[number] for number in order]
    share = can_share_prompt(model, shuffled)

    def margins_of(chosen: Sequence[int], part: slice) -> Float[np.ndarray, "c n"]:
        pairs = batch_pairs(model, shuffled[part], batch_size, share)
        return sweep_margins(model, pairs, [candidates[number] for number in chosen])

    def kl_of(
        chosen: Sequence[int], part: slice
    ) -> tuple[Float[np.ndarray, "c n"], Float[np.ndarray, " n"]]:
        assert text is not None
        steerings = [candidates[number] for number in chosen]
        return sweep_kl(model, text.rows(part), steerings, batch_size)

    choice = successive_halving(
        len(candidates),
        margins_of,
        len(tokens),
        kl_of if text is not None else None,
        len(text) if text is not None else 0,
        limit,
    )
    margins = np.empty_like(choice.margins)
    margins[:, order] = choice.margins
    return replace(choice, margins=margins)
