"""Margins, KL, perplexities and intervals against references written out by hand."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters.measurement.evaluate import KLMeter, batch_pairs
from austeer.adapters.measurement.neutral import encode_texts, sample_neutral
from austeer.adapters.pairs import ContrastivePair
from austeer.adapters.tokens import tokenize_pairs

ALL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")
PAIRS = [
    ContrastivePair("one day Tom felt", " happy and so very happy", " sad", where="p:1"),
    ContrastivePair("Mia was", " happy !", " sad .", where="p:2"),
    ContrastivePair("the sun and the rain", " so happy", " very sad then", where="p:3"),
]


def log_prob(model: Any, ids: list[int]) -> float:
    """log p of a whole string given its first token, one forward, nothing shared."""
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(scores[t, ids[t + 1]] for t in range(len(ids) - 1)))


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_margin_is_the_difference_of_whole_string_log_probs(
    model_type: str, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model(model_type)
    found = batch_pairs(model, tokenize_pairs(PAIRS, tiny_tokenizer), 2).margins(model)
    for pair, value in zip(PAIRS, found, strict=True):
        sides = [
            log_prob(model, tiny_tokenizer(pair.prompt + side)["input_ids"])
            for side in (pair.positive, pair.negative)
        ]
        assert value == pytest.approx(sides[0] - sides[1], abs=2e-4)
    assert np.abs(found).max() > 0.01


def test_soft_capped_logits_are_scored_as_the_model_gives_them(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """A cap this low changes every score, so skipping it would show."""
    tokens = tokenize_pairs(PAIRS, tiny_tokenizer)
    values = []
    for cap in (0.5, 30.0):
        model = tiny_model("gemma2", final_logit_softcapping=cap)
        values.append(batch_pairs(model, tokens, 3).margins(model))
    assert np.abs(values[0] - values[1]).max() > 0.01


@contextmanager
def doubled_first_unit(model: Any):
    """Doubles unit 0 of layer 0's MLP output."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[..., 0] *= 4.0
        return changed

    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_kl_is_the_textbook_sum_over_real_tokens(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    text = encode_texts(["one day Tom", "Mia was happy and so"], tiny_tokenizer, 64)
    expected, count = 0.0, 0
    for row in range(2):
        ids = text.input_ids[row][text.valid[row]][None]
        with torch.no_grad():
            p = model(ids).logits[0].double().softmax(-1)
            with doubled_first_unit(model):
                q = model(ids).logits[0].double().softmax(-1)
        expected += float((p * (p / q).log()).sum())
        count += ids.shape[1]
    for batch_size in (1, 2):
        meter = KLMeter(model, text, batch_size)
        steered = meter.measure(lambda: doubled_first_unit(model))
        assert steered.value == pytest.approx(expected / count, rel=1e-3)
        assert steered.value > 1e-4


def test_kl_of_the_model_with_itself_is_zero(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    meter = KLMeter(model, sample_neutral(model, tiny_tokenizer, sequences=3, length=7), 2)
    assert meter.mean(lambda: torch.no_grad()) == pytest.approx(0.0, abs=1e-9)


def test_kl_without_kept_base_side_is_the_same(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    text = sample_neutral(model, tiny_tokenizer, sequences=4, length=9)
    kept = KLMeter(model, text, 2).mean(lambda: doubled_first_unit(model))
    monkeypatch.setattr("austeer.adapters.measurement.evaluate._CACHE_LIMIT", 0)
    again = KLMeter(model, text, 2).mean(lambda: doubled_first_unit(model))
    assert kept == pytest.approx(again, rel=1e-6)
    assert kept > 1e-4
