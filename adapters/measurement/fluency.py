"""How fluent steered text is: its perplexity under the base model against the base's own."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from austeer.adapters._errors import FitError
from austeer.adapters.measurement.evaluate import Steered
from austeer.adapters.measurement.intervals import Measured, bootstrap
from austeer.adapters.measurement.neutral import TokenText, continue_texts
from austeer.adapters.tokens import token_limit

CONTINUATION = 32  # tokens sampled after a prompt to judge fluency


class FluencyProbe:
    """Perplexity, under the base model, of steered continuations against the base's own.

    Args:
        model: the base model, unsteered while this is built.
        prompts: left-padded prompts.
        steps: tokens sampled after each prompt at temperature 1; fewer where the model's
            context ends before.
        samples: continuations at least; prompts are taken several times where they are fewer.
        seed: of the noise, shared by base and steered samples.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: TokenText,
        *,
        steps: int = CONTINUATION,
        samples: int = 128,
        seed: int = 0,
    ) -> None:
        self._model, self._seed = model, seed
        self._different = len(prompts)
        rounds = -(-samples // len(prompts))
        self._prompts = prompts.rows([*range(len(prompts))] * rounds)
        room = token_limit(model) - prompts.input_ids.shape[1]
        self._steps = max(1, min(steps, room))
        self._own = self._surprise(nullcontext)

    def measure(self, steered: Steered) -> Measured:
        """Ratio of perplexities (1: as fluent as the base), interval over prompts."""
        return bootstrap(self._rows(steered), _perplexity_ratio, seed=self._seed)

    def ratio(self, steered: Steered) -> float:
        """Ratio of perplexities (1: as fluent as the base)."""
        return float(_perplexity_ratio(self._rows(steered).mean(axis=0)))

    def _rows(self, steered: Steered) -> Float[np.ndarray, "n 4"]:
        """Per prompt: steered surprise and tokens, own surprise and tokens."""
        rows = np.stack([*self._surprise(steered), *self._own], axis=1)
        return np.asarray(rows.reshape(-1, self._different, 4).sum(axis=0))

    def _surprise(
        self, context: Steered
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """−log p under the base summed over each sampled continuation, and its length."""
        sums, counts = [], []
        for start in range(0, len(self._prompts), 64):
            prompt = self._prompts.rows(slice(start, start + 64))
            with context():
                sample = continue_texts(
                    self._model, prompt, steps=self._steps, seed=self._seed + start
                )
            sums.append(continuation_surprise(self._model, prompt, sample))
            counts.append(sample.valid.sum(1).double().cpu().numpy())
        return np.concatenate(sums), np.concatenate(counts)


def _perplexity_ratio(means: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, ...]:
    return np.asarray(np.exp(means[..., 0] / means[..., 1] - means[..., 2] / means[..., 3]))


def continuation_logits(
    model: PreTrainedModel, prompt: TokenText, sample: TokenText
) -> Float[Tensor, "n length vocab"]:
    """Logits from which each token of a continuation is predicted; differentiable.

    Args:
        model: the model as it is now.
        prompt: left-padded prompts.
        sample: what continues each of them.
    """
    device = model.device
    ids = torch.cat([prompt.input_ids.to(device), sample.input_ids.to(device)], dim=1)
    valid = torch.cat([prompt.valid.to(device), sample.valid.to(device)], dim=1)
    # Logits of the prompts, of which nothing is scored, can be larger than the model.
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=valid.long(),
        position_ids=(valid.long().cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=sample.input_ids.shape[1] + 1,
    ).logits
    return logits[:, :-1]


@torch.no_grad()
def continuation_surprise(
    model: PreTrainedModel, prompt: TokenText, sample: TokenText
) -> Float[np.ndarray, " n"]:
    """−log p(continuation | prompt) in nats under the model as it is now."""
    device = model.device
    log_probs = continuation_logits(model, prompt, sample).float().log_softmax(-1)
    picked = log_probs.gather(-1, sample.input_ids.to(device)[..., None])[..., 0]
    surprise = -(picked * sample.valid.to(device)).sum(1)
    return np.asarray(surprise.double().cpu())


def check_has_text(text: TokenText) -> None:
    """Refuse text in which no token can be predicted from another.

    Raises:
        FitError: no text has a second token.
    """
    if not text.valid[:, 1:].any():
        raise FitError("neutral text: expected a text of two tokens or more, found none")


@torch.no_grad()
def text_perplexity(
    model: PreTrainedModel, text: TokenText, steered: Steered = nullcontext, batch_size: int = 8
) -> float:
    """Perplexity of right-padded text, first tokens given, inside the `steered()` context.

    Raises:
        FitError: no text has a second token, which the first could predict.
    """
    check_has_text(text)
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
