"""Fluency: perplexity of continuations under the base model."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from austeer.adapters import FitError
from austeer.adapters.measurement.fluency import (
    FluencyProbe,
    continuation_surprise,
    text_perplexity,
)
from austeer.adapters.measurement.neutral import encode_prompts, encode_texts

PROMPTS = ["one day Tom felt", "Mia was so", "the park"]


def log_prob(model: Any, ids: list[int]) -> float:
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(scores[t, ids[t + 1]] for t in range(len(ids) - 1)))


def test_continuation_surprise_and_text_perplexity(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model("qwen2")
    prompt = encode_prompts(["one day", "Tom felt very"], tiny_tokenizer, 64)
    sample = encode_texts(["happy and so", "sad then it"], tiny_tokenizer, 64)
    found = continuation_surprise(model, prompt, sample)
    for row in range(2):
        head = prompt.input_ids[row][prompt.valid[row]].tolist()
        tail = sample.input_ids[row][sample.valid[row]].tolist()
        expected = log_prob(model, head) - log_prob(model, head + tail)
        assert found[row] == pytest.approx(expected, abs=2e-4)
    texts = ["one day Tom felt", "Mia"]
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    total = -sum(log_prob(model, row) for row in ids)
    expected = math.exp(total / sum(len(row) - 1 for row in ids))
    encoded = encode_texts(texts, tiny_tokenizer, 64)
    assert text_perplexity(model, encoded) == pytest.approx(expected, rel=1e-4)


def test_fluency_of_the_base_is_one_and_of_noise_is_not(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama")
    prompts = encode_prompts(PROMPTS, tiny_tokenizer, 32)
    probe = FluencyProbe(model, prompts, steps=12)
    same = probe.measure(lambda: torch.no_grad())
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)

    @contextmanager
    def noisy():
        handle = model.lm_head.register_forward_hook(lambda *args: -args[-1])
        try:
            yield
        finally:
            handle.remove()

    assert probe.measure(noisy).value > 1.2


def test_fluency_stays_within_the_models_context(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """GPT-2 has no position beyond its context, and fails at one."""
    model = tiny_model("gpt2", n_positions=16)
    prompts = encode_prompts(PROMPTS, tiny_tokenizer, 10)
    probe = FluencyProbe(model, prompts, steps=32)
    assert probe.measure(lambda: torch.no_grad()).value == 1.0


def test_perplexity_of_no_prediction_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(FitError, match="neutral text: expected a text of two tokens"):
        text_perplexity(tiny_model("llama"), encode_texts([""], tiny_tokenizer, 8))


def test_few_prompts_are_sampled_often_enough(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Two looks with other noise agree far better with many samples than with few."""
    model = tiny_model("llama")
    prompts = encode_prompts(PROMPTS[:2], tiny_tokenizer, 32)

    @contextmanager
    def warmer():
        handle = model.lm_head.register_forward_hook(lambda *args: 0.7 * args[-1])
        try:
            yield
        finally:
            handle.remove()

    def spread(samples: int) -> float:
        found = [
            FluencyProbe(model, prompts, steps=8, samples=samples, seed=seed).ratio(warmer)
            for seed in range(6)
        ]
        return max(found) - min(found)

    assert spread(256) < 0.5 * spread(2)
