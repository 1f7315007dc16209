"""The resumable decoder: each place computes no more than what comes behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import Component, Site
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import steering_hooks
from austeer.adapters.fitting.resumable import PLACES, ResumableDecoder, depth_of
from austeer.adapters.steered_site import SteeredSite

IDS = torch.tensor([[1, 7, 8, 9, 10], [1, 20, 21, 5, 6]])


def steering(place: str, gamma: float) -> list[SteeredSite]:
    below = SteeredSite(Site(0, Component.LAYER), np.array([2, 5]), np.array([0.5, -0.4]))
    own = SteeredSite(Site(1, Component(place)), np.array([0, 3, 4]), np.full(3, gamma))
    return [below, own]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def counted(model: Any, names: tuple[str, ...], run: Callable[[], None]) -> Counter[str]:
    """How often the modules of the second layer run."""
    counts: Counter[str] = Counter()
    layer = model.model.layers[1]
    handles = [
        layer.get_submodule(name).register_forward_hook(
            lambda *_, name=name: counts.update([name])
        )
        for name in names
    ]
    run()
    for handle in handles:
        handle.remove()
    return counts


def test_places_are_in_the_order_of_computation() -> None:
    assert set(PLACES) == set(Component)
    sites = [Site(layer, place) for layer in range(3) for place in PLACES]
    assert [depth_of(site) for site in sites] == list(range(12))


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("place", [place.value for place in PLACES])
def test_a_resumed_run_is_a_whole_one(
    place: str, model_type: str, eager: bool, tiny_model: Callable[..., Any]
) -> None:
    """In eager attention a block returns more than its output."""
    model = tiny_model(model_type)
    if eager:
        model.set_attn_implementation("eager")
    architecture = architecture_of(model_type)
    first, second = steering(place, 0.3), steering(place, -2.0)
    with steering_hooks(model, architecture, second):
        wanted = logits(model)
    start = depth_of(Site(1, Component(place)))
    with ResumableDecoder(model, {start}).recording() as decoder:
        with steering_hooks(model, architecture, first):
            other = logits(model)
        with steering_hooks(model, architecture, second), decoder.resumed(start, second):
            found = logits(model)
        assert torch.equal(found, wanted)
    assert (found - other).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("place", "runs"),
    [
        ("attention", {"self_attn.o_proj": 1, "mlp.gate_proj": 1, "mlp.down_proj": 1}),
        ("neuron", {"mlp.down_proj": 1}),
        ("ffn", {"mlp.down_proj": 1}),
        ("layer", {}),
    ],
)
def test_what_comes_before_the_place_is_not_computed(
    place: str, runs: dict[str, int], tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("llama")
    start = depth_of(Site(1, Component(place)))
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    with ResumableDecoder(model, {start}).recording() as decoder:
        logits(model)

        def resume() -> None:
            with decoder.resumed(start, []):
                logits(model)

        assert counted(model, names, resume) == runs
