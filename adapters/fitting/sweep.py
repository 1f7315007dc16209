"""Evaluation of many candidates at once: what candidates share is computed once.

Candidates form a trie over the places where a decoder can be steered, in the order in which
they are computed: two candidates share all that comes before the first place at which they
differ, the layers below the first steered one among it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from austeer.adapters.activations.reading import evaluating
from austeer.adapters.architectures import architecture_of, text_config
from austeer.adapters.attach import steering_hooks
from austeer.adapters.fitting.resumable import PLACES, ResumableDecoder, depth_of
from austeer.adapters.measurement.evaluate import PairSet, margins, selected_logits
from austeer.adapters.measurement.neutral import TokenText
from austeer.adapters.steered_site import SteeredSite

Steering = Sequence[SteeredSite]
"""The steered sites of one candidate; none for the base model."""

T = TypeVar("T")

_Place = tuple[tuple[Any, ...], ...]  # what is steered at one depth of the trie


@torch.no_grad()
def measure_each(
    model: PreTrainedModel, candidates: Sequence[Steering], measure: Callable[[], T]
) -> list[T]:
    """Call `measure` under each candidate's steering, without running a shared layer twice.

    Equal to `with steering_hooks(model, ..., candidate): measure()` for each candidate.
    Candidates are visited depth first, so that an activation is held at most once a place,
    and only where a later candidate starts from it.

    Args:
        model: base model; what is attached to it already stays in effect.
        candidates: steered sites of each candidate.
        measure: runs the model once, without a cache, on the same inputs at every call, and
            returns a figure of its output. Not called again for a candidate equal to another.

    Returns:
        The figures, in the candidates' order.

    Raises:
        ValueError: `measure` does not run the model exactly once.
        ModelError: unsupported architecture.
    """
    architecture = architecture_of(model.config.model_type)
    end = text_config(model).num_hidden_layers * len(PLACES)
    keys = [_trie_key(steering, end) for steering in candidates]
    order = sorted(range(len(candidates)), key=keys.__getitem__)
    starts = [_common(keys[a], keys[b]) for a, b in pairwise(order)]
    found: dict[int, T] = {}
    with evaluating(model), ResumableDecoder(model, set(starts) - {end}).recording() as decoder:
        for place, number in enumerate(order):
            start = starts[place - 1] if place else None
            if start == end:
                found[number] = found[order[place - 1]]
                continue
            with ExitStack() as stack:
                stack.enter_context(steering_hooks(model, architecture, candidates[number]))
                if start is not None:
                    stack.enter_context(decoder.resumed(start, candidates[number]))
                found[number] = decoder.once(measure)
    return [found[number] for number in range(len(candidates))]


def sweep_margins(
    model: PreTrainedModel, pairs: PairSet, candidates: Sequence[Steering]
) -> Float[np.ndarray, "C n"]:
    """Margin of every pair under each candidate, nats; see `measure_each`."""
    values = np.empty((len(candidates), sum(map(len, pairs.order))))
    for batch, numbers in zip(pairs.batches, pairs.order, strict=True):
        found = measure_each(model, candidates, partial(margins, model, batch))
        values[:, numbers] = torch.stack(found).double().cpu().numpy()
    return values


@torch.no_grad()
def sweep_kl(
    model: PreTrainedModel,
    text: TokenText,
    candidates: Sequence[Steering],
    batch_size: int = 16,
) -> tuple[Float[np.ndarray, "C n"], Float[np.ndarray, " n"]]:
    """KL(base ‖ steered) of every text under each candidate, see `measure_each`.

    Args:
        model: the base model, unsteered.
        text: the texts.
        candidates: steered sites of each candidate.
        batch_size: texts per forward pass.

    Returns:
        Nats summed over each text's tokens, and the number of those tokens.
    """
    sums = np.empty((len(candidates), len(text)))
    for start in range(0, len(text), batch_size):
        part = text.rows(slice(start, start + batch_size))
        divergence = _Divergence(model, part)
        found = torch.stack(measure_each(model, candidates, divergence)).double().cpu()
        rows = part.valid.cpu().nonzero()[:, 0]
        total = torch.zeros(len(candidates), len(part), dtype=torch.float64)
        sums[:, start : start + batch_size] = total.index_add(1, rows, found).numpy()
    return sums, text.valid.sum(1).double().cpu().numpy()


class _Divergence:
    """KL(base ‖ the model as it is when called) after every real token of a text.

    Σ p (log p − log q) with log q = z − logsumexp(z): of the steered side only the logits z
    are ever held.
    """

    def __init__(self, model: PreTrainedModel, text: TokenText) -> None:
        self._model = model
        self._ids, self._valid = text.input_ids.to(model.device), text.valid.to(model.device)
        log_probs = self._logits().log_softmax(-1)
        self._base = log_probs.exp()
        self._negative_entropy = (self._base * log_probs).sum(-1)

    def __call__(self) -> Float[Tensor, " tokens"]:
        logits = self._logits()
        expected = torch.linalg.vecdot(self._base, logits)
        found: Tensor = self._negative_entropy - expected + logits.logsumexp(-1)
        return found

    def _logits(self) -> Float[Tensor, "tokens vocab"]:
        rows, positions = self._valid.nonzero().unbind(1)
        mask = self._valid.long()
        with selected_logits(self._model, rows, positions):
            output = self._model(input_ids=self._ids, attention_mask=mask, use_cache=False)
        found: Tensor = output.logits[0].float()
        return found


def _trie_key(steering: Steering, end: int) -> tuple[_Place, ...]:
    """What is steered at each depth, comparable."""
    places: list[list[tuple[Any, ...]]] = [[] for _ in range(end)]
    for steered in steering:
        places[depth_of(steered.site)].append(_site_key(steered))
    return tuple(map(tuple, places))


def _site_key(steered: SteeredSite) -> tuple[Any, ...]:
    predictor = steered.predictor
    parts = (predictor.V, predictor.b, predictor.U) if predictor else ()
    values = (steered.index, steered.gamma, *parts)
    shapes = tuple(value.shape for value in values)
    return (shapes, *(value.tobytes() for value in values))


def _common(left: tuple[_Place, ...], right: tuple[_Place, ...]) -> int:
    both = enumerate(zip(left, right, strict=True))
    return next((depth for depth, (a, b) in both if a != b), len(left))
