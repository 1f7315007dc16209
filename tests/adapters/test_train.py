"""Training gains: what is trained is what is saved, and the constraint is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import Component, Site, UnitTable
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import steering_hooks
from austeer.adapters.batches import tokenize_pairs
from austeer.adapters.evaluate import KLMeter, batch_pairs
from austeer.adapters.neutral import sample_neutral
from austeer.adapters.pairs import ContrastivePair
from austeer.adapters.train import Judgement, TrainableGains, TrainOptions, train_gains

PAIRS = [
    ContrastivePair(f"one day {name} {verb}", " happy", " sad", where=f"p:{number}")
    for number, (name, verb) in enumerate(
        (name, verb) for name in ("Tom", "Mia", "the park") for verb in ("felt", "was so")
    )
]
LLAMA = architecture_of("llama")


def table(k: int = 12) -> UnitTable:
    layer, unit = np.divmod(np.arange(k) * 5, 32)
    return UnitTable(Component.ATTENTION, layer, unit, np.ones(k))


def gains(k: int = 12, rank: int = 0, start: float = 0.0) -> TrainableGains:
    generator = np.random.default_rng(0)
    mean, std = generator.normal(size=k), generator.uniform(0.5, 2.0, size=k)
    return TrainableGains(table(k), np.full(k, start), mean, std, rank=rank, seed=1)


def run(model: Any, tokenizer: Any, trained: TrainableGains, **options: Any) -> tuple[Any, Any]:
    pairs = batch_pairs(model, tokenize_pairs(PAIRS, tokenizer), 3)
    meter = KLMeter(model, sample_neutral(model, tokenizer, sequences=8, length=12), 4)

    def judge() -> Judgement:
        with torch.no_grad(), trained.attached(model, LLAMA):
            margin = float(pairs.margins(model).mean())
        return Judgement(margin, meter.mean(lambda: trained.attached(model, LLAMA)))

    base = judge()
    found = train_gains(
        model, LLAMA, trained, pairs.batches, meter, judge, options["limit"],
        TrainOptions(steps=60, kl_target=options["limit"] * 0.9, judge_every=5,
                     keep_sign=options.get("keep_sign", False)),
    )  # fmt: skip
    return base, found


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_saved_sites_steer_like_the_trained_parameters(rank: int, tiny_model: Any) -> None:
    model = tiny_model("llama")
    trained = gains(rank=rank)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        base = model(ids).logits
        with trained.attached(model, LLAMA):
            live = model(ids).logits
        with steering_hooks(model, LLAMA, trained.to_sites()):
            saved = model(ids).logits
    assert torch.allclose(live, saved, atol=1e-4, rtol=1e-4)
    assert (live - base).abs().max() > 0.05


def test_an_untrained_predictor_leaves_gamma_alone(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), torch.arange(1, 20)[None]
    outputs = []
    for rank in (0, 2):
        with torch.no_grad(), gains(rank=rank, start=0.5).attached(model, LLAMA):
            outputs.append(model(ids).logits)
    assert torch.allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_training_raises_the_margin_within_the_budget(
    rank: int, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama").requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = gains(rank=rank)
    base, found = run(model, tiny_tokenizer, trained, limit=0.02)
    assert found.within
    assert found.judgement.kl <= 0.02
    assert found.judgement.margin > base.margin + 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_best_judged_state_is_left_in_place(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model, trained = tiny_model("llama"), gains()
    _, found = run(model, tiny_tokenizer, trained, limit=0.02)
    pairs = batch_pairs(model, tokenize_pairs(PAIRS, tiny_tokenizer), 3)
    with torch.no_grad(), trained.attached(model, LLAMA):
        margin = float(pairs.margins(model).mean())
    assert margin == pytest.approx(found.judgement.margin, abs=1e-5)


@pytest.mark.parametrize(("rank", "lowest"), [(0, -1.0), (1, -0.25)])
def test_keep_sign_bounds_every_gain(
    rank: int, lowest: float, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    free, kept = gains(rank=rank), gains(rank=rank)
    model = tiny_model("llama")
    run(model, tiny_tokenizer, free, limit=5.0)
    run(model, tiny_tokenizer, kept, limit=5.0, keep_sign=True)
    assert float(free.gamma.detach().min()) < lowest
    assert float(kept.gamma.detach().min()) >= lowest


def test_sites_carry_the_right_rows() -> None:
    trained = gains(k=12)
    with torch.no_grad():
        trained.gamma.copy_(torch.arange(12.0))
    found = {
        s.site: dict(zip(s.index.tolist(), s.gamma.tolist(), strict=True))
        for s in trained.to_sites()
    }
    rows = table(12)
    for number in range(12):
        site = Site(int(rows.layer[number]), Component.ATTENTION)
        assert found[site][int(rows.unit[number])] == float(number)
