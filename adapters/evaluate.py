"""What steering does: margins of pairs (effect), KL and fluency (side effects), intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from austeer.adapters._errors import FitError
from austeer.adapters.batches import PairBatch, PairTokens, token_limit
from austeer.adapters.capture import can_share_prompt, make_batch
from austeer.adapters.neutral import TokenText, continue_texts

CONTINUATION = 32  # tokens sampled after a prompt to judge fluency
_CACHE_LIMIT = 1 << 30  # bytes of base log-probabilities kept instead of computed again


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(
    rows: Float[np.ndarray, "n columns"],
    statistic: Callable[[Float[np.ndarray, "... columns"]], Float[np.ndarray, ...]],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> Measured:
    """A statistic of column means, with the percentile interval of resampled rows.

    Rows that do not differ (a single one, or pairs that are all won) give an interval without
    width: it says nothing then about how well the figure is known.

    Args:
        rows: one independent observation a row (a pair, a text).
        statistic: maps column means to the figure.
        seed: of the resampling.
        draws: number of resamples.
    """
    generator = np.random.default_rng(seed)
    n = len(rows)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=draws)
    drawn = statistic(counts @ rows / n)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Measured(float(statistic(rows.mean(axis=0))), float(low), float(high))


def mean_interval(values: Float[np.ndarray, " n"], seed: int = 0) -> Measured:
    """Mean of independent values with its interval."""
    return bootstrap(values[:, None].astype(np.float64), lambda means: means[..., 0], seed=seed)


def ratio_interval(
    above: Float[np.ndarray, " n"], below: Float[np.ndarray, " n"], seed: int = 0
) -> Measured:
    """Σ above / Σ below with its interval over rows."""
    rows = np.stack([above, below], axis=1).astype(np.float64)
    return bootstrap(rows, lambda means: means[..., 0] / means[..., 1], seed=seed)


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
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][rows, positions][None],))
    try:
        yield
    finally:
        handle.remove()


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
    total = torch.zeros(len(batch), device=picked.device)
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
    model: PreTrainedModel, tokens: Sequence[PairTokens], batch_size: int
) -> PairSet:
    """Batch tokenized pairs by length, prompts shared where the model allows it."""
    numbers = sorted(range(len(tokens)), key=lambda number: tokens[number].size)
    order = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    share = can_share_prompt(model, tokens)
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
        size = int(text.valid.sum()) * model.config.vocab_size * 4
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


@dataclass(frozen=True, slots=True)
class FluencyProbe:
    """Perplexity, under the base model, of steered continuations against the base's own.

    Attributes:
        model: the base model.
        prompts: left-padded prompts.
        steps: tokens sampled after each prompt at temperature 1; fewer where the model's
            context ends before.
        seed: of the noise, shared by base and steered samples.
    """

    model: PreTrainedModel
    prompts: TokenText
    steps: int = CONTINUATION
    seed: int = 0

    def measure(self, steered: Steered) -> Measured:
        """Ratio of perplexities (1: as fluent as the base), interval over prompts."""
        own, own_counts = self._surprise(nullcontext)
        theirs, counts = self._surprise(steered)
        rows = np.stack([theirs, counts, own, own_counts], axis=1)

        def ratio(means: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, ...]:
            return np.asarray(
                np.exp(means[..., 0] / means[..., 1] - means[..., 2] / means[..., 3])
            )

        return bootstrap(rows, ratio, seed=self.seed)

    def _surprise(
        self, context: Steered
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """−log p under the base summed over each sampled continuation, and its length."""
        sums, counts = [], []
        room = token_limit(self.model) - self.prompts.input_ids.shape[1]
        steps = max(1, min(self.steps, room))
        for start in range(0, len(self.prompts), 32):
            prompt = self.prompts.rows(slice(start, start + 32))
            with context():
                sample = continue_texts(self.model, prompt, steps=steps, seed=self.seed + start)
            sums.append(continuation_surprise(self.model, prompt, sample))
            counts.append(sample.valid.sum(1).double().cpu().numpy())
        return np.concatenate(sums), np.concatenate(counts)


@torch.no_grad()
def continuation_surprise(
    model: PreTrainedModel, prompt: TokenText, sample: TokenText
) -> Float[np.ndarray, " n"]:
    """−log p(continuation | prompt) in nats under the model as it is now."""
    device = model.device
    ids = torch.cat([prompt.input_ids.to(device), sample.input_ids.to(device)], dim=1)
    valid = torch.cat([prompt.valid.to(device), sample.valid.to(device)], dim=1)
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    # Logits of the prompts, of which nothing is scored, can be larger than the model.
    logits = model(
        input_ids=ids,
        attention_mask=valid.long(),
        position_ids=positions,
        use_cache=False,
        logits_to_keep=sample.input_ids.shape[1] + 1,
    ).logits
    log_probs = logits[:, :-1].float().log_softmax(-1)
    picked = log_probs.gather(-1, sample.input_ids.to(device)[..., None])[..., 0]
    surprise = -(picked * sample.valid.to(device)).sum(1)
    return np.asarray(surprise.double().cpu())


@torch.no_grad()
def text_perplexity(
    model: PreTrainedModel, text: TokenText, steered: Steered = nullcontext, batch_size: int = 8
) -> float:
    """Perplexity of right-padded text, first tokens given, inside the `steered()` context.

    Raises:
        FitError: no text has a second token, which the first could predict.
    """
    if not text.valid[:, 1:].any():
        raise FitError("neutral text: expected a text of two tokens or more, found none")
    total, count = 0.0, 0
    for start in range(0, len(text), batch_size):
        part = text.rows(slice(start, start + batch_size))
        ids, valid = part.input_ids.to(model.device), part.valid.to(model.device)
        with steered():
            logits = model(input_ids=ids, attention_mask=valid.long(), use_cache=False).logits
        log_probs = logits[:, :-1].float().log_softmax(-1)
        picked = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
        total -= float((picked * valid[:, 1:]).sum(dtype=torch.float64))
        count += int(valid[:, 1:].sum())
    return math.exp(total / count)


def _log_probs(model: PreTrainedModel, text: TokenText) -> Float[Tensor, "tokens vocab"]:
    ids, valid = text.input_ids.to(model.device), text.valid.to(model.device)
    logits = model(input_ids=ids, attention_mask=valid.long(), use_cache=False).logits
    scores: Tensor = logits[valid].float().log_softmax(-1)
    return scores
