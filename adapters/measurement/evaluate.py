"""What steering does: margins of pairs (its effect), KL on neutral text (its side effect)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from austeer.adapters.activations.batches import PairBatch
from austeer.adapters.activations.layouts import can_share_prompt, make_batch
from austeer.adapters.architectures import text_config
from austeer.adapters.measurement.intervals import Measured, ratio_interval
from austeer.adapters.measurement.neutral import TokenText
from austeer.adapters.tokens import PairTokens

_CACHE_LIMIT = 1 << 30  # bytes of base log-probabilities kept instead of computed again


Steered = Callable[[], AbstractContextManager[None]]
"""Makes the context in which the model is steered."""


@contextmanager
def selected_logits(
    model: PreTrainedModel, rows: Int[Tensor, " m"], positions: Int[Tensor, " m"]
) -> Iterator[None]:
    """Make the model compute logits [1, m, vocab] at m places only.

    The selection sits before the output embedding, so that whatever a model does to its
    logits afterwards (soft caps, scales) still happens.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (_at(args[0], rows, positions),))
    try:
        yield
    finally:
        handle.remove()


def _at(
    hidden: Float[Tensor, "B L D"], rows: Int[Tensor, " m"], positions: Int[Tensor, " m"]
) -> Float[Tensor, "1 m D"]:
    """On the device of the hidden states: a model may be spread over several."""
    return hidden[rows.to(hidden.device), positions.to(hidden.device)][None]


def margins(model: PreTrainedModel, batch: PairBatch) -> Float[Tensor, " P"]:
    """Compute log p(positive | prompt) − log p(negative | prompt) of each pair, in nats.

    Tokens that both sides share cancel, so only the branches after the longest common token
    prefix are scored. Differentiable in what steers the model.
    """
    good, bad = batch.positive, batch.negative
    rows = torch.cat([good.row, bad.row])
    positions = torch.cat([good.position, bad.position])
    with selected_logits(model, rows, positions):
        logits = model(**batch.inputs(), use_cache=False).logits[0]
    targets = torch.cat([good.target, bad.target])
    picked = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    signed = torch.cat([picked[: len(good.row)], -picked[len(good.row) :]])
    total = torch.zeros(len(batch), dtype=picked.dtype, device=picked.device)
    return total.index_add(0, torch.cat([good.pair, bad.pair]), signed)


@dataclass(frozen=True, slots=True, eq=False)
class PairSet:
    """Batches of similar length, and which pairs each holds.

    Attributes:
        batches: the batches.
        order: per batch, the numbers of its pairs.
    """

    batches: list[PairBatch]
    order: list[list[int]]

    @torch.no_grad()
    def margins(self, model: PreTrainedModel) -> Float[np.ndarray, " n"]:
        """Margins of every pair by the model as it is now, in the pairs' own order."""
        values = np.empty(sum(map(len, self.order)))
        for batch, numbers in zip(self.batches, self.order, strict=True):
            values[numbers] = margins(model, batch).double().cpu().numpy()
        return values


def batch_pairs(
    model: PreTrainedModel,
    tokens: Sequence[PairTokens],
    batch_size: int,
    share: bool | None = None,
) -> PairSet:
    """Batch tokenized pairs by length, prompts shared where the model allows it.

    Args:
        model: the model.
        tokens: the pairs.
        batch_size: pairs per forward pass.
        share: whether prompts are shared; None to try it on the model.
    """
    numbers = sorted(range(len(tokens)), key=lambda number: tokens[number].size)
    order = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    share = can_share_prompt(model, tokens) if share is None else share
    batches = [make_batch(model, [tokens[n] for n in part], share=share) for part in order]
    return PairSet(batches, order)


class KLMeter:
    """KL(base ‖ steered) per token on fixed text; keeps the base's side where it is small.

    Args:
        model: the base model, unsteered while this is built.
        text: the text.
        batch_size: sequences per forward pass.
    """

    def __init__(self, model: PreTrainedModel, text: TokenText, batch_size: int = 16) -> None:
        self._model = model
        self._batches = [
            text.rows(slice(i, i + batch_size)) for i in range(0, len(text), batch_size)
        ]
        size = int(text.valid.sum()) * text_config(model).vocab_size * 4
        self._base = (
            [self.log_probs(part) for part in self._batches] if size <= _CACHE_LIMIT else None
        )

    def __len__(self) -> int:
        return len(self._batches)

    @torch.no_grad()
    def log_probs(self, text: TokenText) -> Float[Tensor, "tokens vocab"]:
        """Log-probabilities after every real token, by the model as it is now."""
        return _log_probs(self._model, text)

    def batch_kl(self, number: int, base: Tensor | None = None) -> Float[Tensor, " tokens"]:
        """KL after every real token of one batch; differentiable in what steers the model.

        Args:
            number: which batch.
            base: base log-probabilities of that batch, for text whose base side is not kept.
        """
        reference = self._base[number] if self._base is not None else base
        if reference is None:
            raise ValueError("the base side of this text is not kept; pass it")
        steered = _log_probs(self._model, self._batches[number])
        return (reference.exp() * (reference - steered)).sum(-1)

    def base_of(self, number: int) -> Tensor | None:
        """Base log-probabilities of one batch if they must be passed; call it unsteered."""
        return None if self._base is not None else self.log_probs(self._batches[number])

    def measure(self, steered: Steered, seed: int = 0) -> Measured:
        """Mean KL in nats per token inside the `steered()` context, interval over texts."""
        sums, counts = self._row_sums(steered)
        return ratio_interval(sums, counts, seed)

    def mean(self, steered: Steered) -> float:
        """Mean KL in nats per token inside the `steered()` context."""
        sums, counts = self._row_sums(steered)
        return float(sums.sum() / counts.sum())

    @torch.no_grad()
    def _row_sums(
        self, steered: Steered
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        sums, counts = [], []
        for number, part in enumerate(self._batches):
            base = self.base_of(number)
            with steered():
                values = self.batch_kl(number, base).double().cpu()
            rows = part.valid.cpu().nonzero()[:, 0]
            sums.append(torch.zeros(len(part), dtype=torch.float64).index_add(0, rows, values))
            counts.append(part.valid.cpu().sum(1).double())
        return torch.cat(sums).numpy(), torch.cat(counts).numpy()


def _log_probs(model: PreTrainedModel, text: TokenText) -> Float[Tensor, "tokens vocab"]:
    ids, valid = text.input_ids.to(model.device), text.valid.to(model.device)
    logits = model(input_ids=ids, attention_mask=valid.long(), use_cache=False).logits
    scores: Tensor = logits[valid].float().log_softmax(-1)
    return scores
