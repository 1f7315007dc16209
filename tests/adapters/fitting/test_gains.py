"""Trainable gains: what is trained is what is saved; pruning keeps what helps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import Component, Site
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import steering_hooks
from austeer.adapters.fitting.gains import TrainableGains, UnitStart

LLAMA = architecture_of("llama")
SITES = (
    Site(0, Component.ATTENTION),
    Site(0, Component.NEURON),
    Site(1, Component.FFN),
    Site(1, Component.LAYER),
)


def gains(rank: int = 0, start: float = 0.0, **options: Any) -> TrainableGains:
    generator = np.random.default_rng(0)
    units = {
        site: UnitStart(
            np.arange(3) * 7 + number,
            np.full(3, start),
            generator.normal(size=3),
            generator.uniform(0.5, 2.0, size=3),
        )
        for number, site in enumerate(SITES)
    }
    return TrainableGains(units, rank=rank, seed=1, **options)


def randomize(trained: TrainableGains) -> None:
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_saved_sites_steer_like_the_trained_parameters(
    rank: int, pruned: bool, tiny_model: Any
) -> None:
    model, trained = tiny_model("llama"), gains(rank)
    randomize(trained)
    if pruned:
        trained.gamma.grad = torch.randn(12, generator=torch.Generator().manual_seed(5))
        trained.observe()
        trained.prune(5)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        base = model(ids).logits
        with trained.attached(model, LLAMA):
            live = model(ids).logits
        with steering_hooks(model, LLAMA, trained.to_sites()):
            saved = model(ids).logits
    assert torch.allclose(live, saved, atol=1e-4, rtol=1e-4)
    assert (live - base).abs().max() > 0.05
    assert sum(len(s.index) for s in trained.to_sites()) == (5 if pruned else 12)


def test_an_untrained_predictor_leaves_gamma_alone(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), torch.arange(1, 20)[None]
    outputs = []
    for rank in (0, 2):
        with torch.no_grad(), gains(rank, start=0.5).attached(model, LLAMA):
            outputs.append(model(ids).logits)
    assert torch.allclose(*outputs, atol=1e-5)


def test_sites_carry_the_right_rows() -> None:
    trained = gains()
    with torch.no_grad():
        trained.gamma.copy_(torch.arange(12.0))
    for number, steered in enumerate(trained.to_sites()):
        assert steered.site == SITES[number]
        assert steered.index.tolist() == [number, number + 7, number + 14]
        assert steered.gamma.tolist() == [3.0 * number, 3.0 * number + 1, 3.0 * number + 2]


def test_pruning_keeps_the_units_whose_removal_costs_most() -> None:
    """A quadratic loss with known costs: −γ ∂L/∂γ is what removing a unit would cost."""
    trained = gains(start=1.0)
    worth = torch.tensor([5.0, -3, 0, 9, 1, 2, -8, 7, 4, 0.5, -1, 3])
    for _ in range(3):
        trained.gamma.grad = None
        (-(worth * trained.gamma).sum()).backward()
        trained.observe()
    trained.prune(4)
    assert trained.kept.nonzero()[:, 0].tolist() == [0, 3, 7, 8]
    trained.prune(2)
    assert trained.kept.nonzero()[:, 0].tolist() == [3, 7]
    assert trained.count == 2


def test_a_pruned_unit_does_not_come_back(tiny_model: Any) -> None:
    trained = gains(start=1.0)
    trained.gamma.grad = -torch.arange(12.0)
    trained.observe()
    trained.prune(3)
    trained.gamma.grad = -100 * torch.ones(12)
    trained.observe()
    trained.prune(8)
    assert trained.kept.nonzero()[:, 0].tolist() == [9, 10, 11]


@pytest.mark.parametrize(("rank", "lowest"), [(0, -1.0), (1, -0.25)])
def test_keep_sign_bounds_gamma_so_that_no_gain_can_be_negative(
    rank: int, lowest: float
) -> None:
    free, kept = (gains(rank, start=-9.0, keep_sign=keep) for keep in (False, True))
    free.constrain()
    kept.constrain()
    assert float(free.gamma.detach().min()) == -9.0
    assert float(kept.gamma.detach().min()) == lowest


def test_a_state_brings_pruning_back() -> None:
    trained = gains(start=1.0)
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    trained.gamma.grad = -torch.arange(12.0)
    trained.observe()
    trained.prune(1)
    trained.shrink(0.5)
    assert (trained.count, float(trained.gamma.detach()[0])) == (1, 0.5)
    trained.load_state_dict(state)
    assert (trained.count, float(trained.gamma.detach()[0])) == (12, 1.0)
