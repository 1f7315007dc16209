"""Repetition and variety of sampled continuations, steered against the base's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.adapters.measurement.evaluate import Steered
from austeer.adapters.measurement.fluency import CONTINUATION
from austeer.adapters.measurement.intervals import mean_interval
from austeer.adapters.measurement.neutral import TokenText, continue_texts, encode_prompts
from austeer.adapters.tokens import token_limit

PROMPTS = 64
_BATCH = 32


class TextProbe:
    """Samples continuations of the same prompts with the same noise, base and steered.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        prompts: texts to continue; the first 64 are used.
        seed: of the noise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        seed: int,
    ) -> None:
        self._model, self._seed = model, seed
        room = max(token_limit(model) - CONTINUATION, 1)
        self._prompts: TokenText = encode_prompts(prompts[:PROMPTS], tokenizer, room)
        self._base = self._samples(nullcontext)

    def measure(self, steered: Steered) -> dict[str, Any]:
        """Share of repeated 4-grams, and distinct bigrams relative to the base's samples."""
        theirs, own = self._samples(steered), self._base
        found: dict[str, Any] = {"distinct2": distinct(theirs, 2) / distinct(own, 2)}
        for name, samples in (("repetition", theirs), ("base_repetition", own)):
            shares = np.array([repeated(sample, 4) for sample in samples])
            figure = mean_interval(shares, self._seed)
            found[name], found[f"{name}_ci95"] = figure.value, [figure.low, figure.high]
        return found

    def _samples(self, context: Steered) -> list[list[int]]:
        found = []
        for start in range(0, len(self._prompts), _BATCH):
            prompt = self._prompts.rows(slice(start, start + _BATCH))
            with context():
                text = continue_texts(
                    self._model, prompt, steps=CONTINUATION, seed=self._seed + start
                )
            for ids, valid in zip(text.input_ids, text.valid, strict=True):
                found.append(ids[valid].tolist())
        return found


def repeated(tokens: Sequence[int], n: int) -> float:
    """Share of n-grams that stood in the same text before; 0 without any n-gram."""
    grams = _grams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams of all texts together over their number (distinct-n).

    Pooled, so that saying the same thing after every prompt counts as poor.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / max(len(grams), 1)


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
