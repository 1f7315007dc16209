"""The objective: each term is the textbook value, and follows the steering."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from austeer.adapters.fitting.objective import Continuations, Objective
from austeer.adapters.measurement.neutral import encode_prompts

PROMPTS = ["one day Tom felt", "Mia was so", "the park"]


@contextmanager
def warmer(model: Any):
    handle = model.lm_head.register_forward_hook(lambda *args: 0.6 * args[-1])
    try:
        yield
    finally:
        handle.remove()


def test_surprise_of_the_base_at_itself_is_about_zero(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama")
    text = Continuations(model, encode_prompts(PROMPTS, tiny_tokenizer, 32))
    values = [float(text.excess(n, text.log_probs(n))) for n in range(len(text))]
    assert sum(values) / len(values) == pytest.approx(0.0, abs=0.15)


def test_excess_is_cross_entropy_above_the_base_own(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """One text at a time, without padding, against the definition."""
    model = tiny_model("gpt_neox")
    prompts = encode_prompts(PROMPTS[:1], tiny_tokenizer, 32)
    text = Continuations(model, prompts)
    head = prompts.input_ids[0][prompts.valid[0]]
    base = text.log_probs(0)
    with torch.no_grad():
        plain = float(text.excess(0, base))
        model.get_output_embeddings().weight.mul_(0.6)
        found = float(text.excess(0, base))
        model.get_output_embeddings().weight.div_(0.6)
    expected, warm, tokens = 0.0, 0.0, 0
    for row in range(8):
        tail = text._text.input_ids[row][text._text.valid[row]]
        ids = torch.cat([head, tail])[None]
        with torch.no_grad():
            logits = model(ids).logits[0, len(head) - 1 : -1].double()
        log_p = logits.log_softmax(-1)
        expected -= float((log_p.exp() * log_p).sum())
        warm -= float(((0.6 * logits).softmax(-1) * log_p).sum())
        tokens += len(tail)
    assert found - plain == pytest.approx((warm - expected) / tokens, abs=1e-4)
    assert found - plain > 0.05


def test_refreshed_text_follows_the_steering(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    text = Continuations(model, encode_prompts(PROMPTS, tiny_tokenizer, 32))

    def surprise() -> float:
        """Of the base at the text itself, not at the distribution."""
        total, count = 0.0, 0
        for number in range(len(text)):
            rows = slice(number * 8, number * 8 + 8)
            part = text._text.rows(rows)
            picked = text.log_probs(number).gather(-1, part.input_ids[part.valid][:, None])
            total, count = total - float(picked.sum()), count + len(picked)
        return total / count

    before = surprise()
    text.refresh(lambda: warmer(model), seed=3)
    assert surprise() > before + 0.05
    assert math.isfinite(before)


@pytest.mark.parametrize(("margin", "scale"), [(-3.0, 4.0), (12.0, 6.0), (90.0, 10.0)])
def test_the_scale_of_the_loss_follows_the_margins(
    margin: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the mean margin, between 4 and 10 nats, reached over many steps."""

    class Nothing(list[Any]):
        """Stands for pairs and neutral text, of which only the number is asked."""

    values = torch.full((6,), margin, requires_grad=True)
    monkeypatch.setattr("austeer.adapters.fitting.objective.margins", lambda *_: values)
    objective = Objective(None, Nothing([None]), Nothing([None]), 0.1)  # type: ignore[arg-type]
    first = float(objective.loss(0).detach())
    for _ in range(200):
        loss = objective.loss(0)
    expected = scale / 4 * math.log1p(math.exp(-margin / scale))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, values)
    # What a nat is worth at margin 0 does not depend on the scale.
    assert float(gradient.sum()) == pytest.approx(-0.25 / (1 + math.exp(margin / scale)), 1e-4)
    objective.prepare(1, lambda: torch.no_grad())
    assert float(objective.loss(0).detach()) == pytest.approx(first, rel=1e-6)
