"""What training minimizes and keeps: margins of pairs, KL on neutral text, fluency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from austeer.adapters.activations.batches import PairBatch
from austeer.adapters.measurement.evaluate import KLMeter, Steered, margins
from austeer.adapters.measurement.fluency import (
    CONTINUATION,
    continuation_logits,
    continuation_surprise,
)
from austeer.adapters.measurement.neutral import TokenText, continue_texts
from austeer.adapters.tokens import token_limit

LEAST_SCALE = 4.0  # nats at which a pair counts as mostly won
_LARGEST_SCALE = 10.0  # some 30 nats are as won as a pair can be
_SCALE_SHARE = 0.5  # of the mean margin
_REFRESH = 10  # steps after which steered continuations are sampled again
_SAMPLES = 32  # steered continuations in each sample
_BATCH = 8


class Objective:
    """Loss and constraints on the training data.

    Args:
        model: base model.
        pairs: batches of training pairs.
        neutral: KL on the training share of the neutral text.
        kl_target: mean KL per token to keep, nats.
        continuations: keeps steered text fluent; None for no such constraint.
        fluency_target: ratio of perplexities to keep.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pairs: Sequence[PairBatch],
        neutral: KLMeter,
        kl_target: float,
        continuations: Continuations | None = None,
        fluency_target: float = math.inf,
    ) -> None:
        self._model, self._pairs, self._neutral = model, pairs, neutral
        self._continuations = continuations
        self._scale = LEAST_SCALE
        self.targets = {"KL": kl_target}
        self.sizes = {"pairs": len(pairs), "KL": len(neutral)}
        if continuations is not None:
            self.targets["surprise"] = math.log(fluency_target)
            self.sizes["surprise"] = len(continuations)

    def prepare(self, step: int, steered: Steered) -> None:
        """Bring what depends on the present steering up to date; step 1 starts afresh."""
        if step == 1:
            self._scale = LEAST_SCALE
        if self._continuations is not None and step % _REFRESH == 1:
            self._continuations.refresh(steered, seed=step)

    def loss(self, number: int) -> Float[Tensor, ""]:
        """(scale / 4 nats) · mean −log sigmoid(margin / scale) over one batch of pairs.

        The scale follows the margins: it is half of their mean, between 4 and 10 nats. With 4
        throughout, the loss of an easy behaviour is won long before the budget is used.
        """
        values = margins(self._model, self._pairs[number])
        aim = _SCALE_SHARE * float(values.detach().mean())
        aim = min(max(aim, LEAST_SCALE), _LARGEST_SCALE)
        self._scale += 0.1 * (aim - self._scale)
        loss = -nn.functional.logsigmoid(values / self._scale).mean()
        return loss * (self._scale / LEAST_SCALE)

    def base_of(self, name: str, number: int) -> Tensor | None:
        """What a constraint needs of the unsteered model; call it unsteered."""
        if name == "KL":
            return self._neutral.base_of(number)
        assert self._continuations is not None
        return self._continuations.log_probs(number)

    def constraint(self, name: str, number: int, base: Tensor | None) -> Float[Tensor, ""]:
        """Value of a constraint on one batch, in nats per token; call it steered."""
        if name == "KL":
            return self._neutral.batch_kl(number, base).mean()
        assert self._continuations is not None and base is not None
        return self._continuations.excess(number, base)


class Continuations:
    """Steered continuations of training prompts, sampled again as the steering changes.

    Args:
        model: the base model, unsteered while this is built.
        prompts: left-padded prompts.
        seed: of the samples.
    """

    def __init__(self, model: PreTrainedModel, prompts: TokenText, seed: int = 0) -> None:
        self._model, self._seed = model, seed
        self._prompts = prompts.rows([n % len(prompts) for n in range(_SAMPLES)])
        room = token_limit(model) - self._prompts.input_ids.shape[1]
        self._steps = max(1, min(CONTINUATION, room))
        sample = self._sample(nullcontext, seed)
        surprise = continuation_surprise(model, self._prompts, sample)
        self._own = float(surprise.sum() / int(sample.valid.sum()))
        self._text = sample

    def __len__(self) -> int:
        return -(-_SAMPLES // _BATCH)

    def refresh(self, steered: Steered, seed: int) -> None:
        """Sample with the present steering; call it unsteered."""
        self._text = self._sample(steered, self._seed + seed)

    @torch.no_grad()
    def log_probs(self, number: int) -> Float[Tensor, "tokens vocab"]:
        """Log-probabilities after every token before a sampled one; call it unsteered."""
        return self._logits(number).float().log_softmax(-1)

    def excess(self, number: int, base: Float[Tensor, "tokens vocab"]) -> Float[Tensor, ""]:
        """Surprise of the base at what the steered model says next, above its own; nats.

        Σ_v p(v | steered) · (−log p(v | base)) at every token of the continuations: its mean
        over tokens, less the base's surprise at its own text, is the logarithm of the fluency
        ratio. Differentiable in what steers the model, the text taken as given.
        """
        steered = self._logits(number).float().softmax(-1)
        values = -(steered * base).sum(-1)
        return values.mean() - self._own

    def _sample(self, context: Steered, seed: int) -> TokenText:
        with context():
            return continue_texts(self._model, self._prompts, steps=self._steps, seed=seed)

    def _logits(self, number: int) -> Float[Tensor, "tokens vocab"]:
        rows = slice(number * _BATCH, (number + 1) * _BATCH)
        prompt, sample = self._prompts.rows(rows), self._text.rows(rows)
        logits = continuation_logits(self._model, prompt, sample)
        return logits[sample.valid.to(logits.device)]
