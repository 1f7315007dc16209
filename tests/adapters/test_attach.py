"""Hooks: what they do to activations, and that they go away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import (
    Component,
    ModelError,
    Predictor,
    Site,
    SteeredSite,
    SteeringAdapter,
)
from austeer.adapters.architectures import Hookpoint, architecture_of
from austeer.adapters.attach import rescale, steering_hooks, transformed

INDEX = np.array([1, 6, 20], np.int64)
GAMMA = np.array([0.5, -2.0, 1.25], np.float32)


def steered(component: str, predictor: Predictor | None = None, layer: int = 1) -> SteeredSite:
    return SteeredSite(Site(layer, Component(component)), INDEX, GAMMA, predictor)


def hook_count(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def record(model: Any, component: str) -> tuple[list[Any], Any]:
    """Activations seen at the site of layer 1, after any hook installed before."""
    point = architecture_of(model.config.model_type).hookpoint(Site(1, Component(component)))
    module, seen = model.get_submodule(point.module), []

    def first(value: Any) -> Any:
        return (value[0] if isinstance(value, tuple) else value).clone()

    if point.side == "input":
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(first(args)))
    else:
        handle = module.register_forward_hook(lambda _, args, out: seen.append(first(out)))
    return seen, handle


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("component", Component)
def test_selected_units_are_scaled_and_others_untouched(
    tiny_model: Callable[..., Any], model_type: str, component: Component
) -> None:
    model, ids = tiny_model(model_type), torch.arange(3, 15).reshape(2, 6)
    row = architecture_of(model_type)
    seen, handle = record(model, component)
    model(ids)
    handle.remove()
    with steering_hooks(model, row, [steered(component)], 0.5):
        after, handle = record(model, component)
        model(ids)
        handle.remove()
    gain = np.ones(seen[0].shape[-1], np.float32)
    gain[INDEX] = 1 + 0.5 * GAMMA
    torch.testing.assert_close(after[0], seen[0] * torch.from_numpy(gain), rtol=1e-6, atol=0)
    others = np.setdiff1d(np.arange(len(gain)), INDEX)
    assert torch.equal(after[0][..., others], seen[0][..., others])


def test_adaptive_gain_is_the_predictors(tiny_model: Callable[..., Any]) -> None:
    model, ids = tiny_model("llama"), torch.arange(3, 15).reshape(2, 6)
    rng = np.random.default_rng(0)
    parts = (rng.normal(size=s).astype(np.float32) for s in ((3, 2), (2,), (2, 3)))
    predictor = Predictor(*parts)
    seen, handle = record(model, "ffn")
    model(ids)
    handle.remove()
    with steering_hooks(model, architecture_of("llama"), [steered("ffn", predictor)], 0.7):
        after, handle = record(model, "ffn")
        model(ids)
        handle.remove()
    x = seen[0][..., INDEX].numpy()
    expected = x * (1 + 0.7 * GAMMA * predictor.phi(x))
    np.testing.assert_allclose(after[0][..., INDEX].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    gain = torch.tensor([1.1, -0.3])
    got = rescale(x, torch.tensor([2, 5]), lambda selected: gain)
    assert got.dtype == dtype
    assert torch.equal(got[:, [2, 5]], (x[:, [2, 5]].float() * gain).to(dtype))


def test_hooks_are_gone_after_the_context_and_after_exceptions(
    tiny_model: Callable[..., Any],
) -> None:
    model, ids = tiny_model("llama"), torch.arange(3, 9)[None]
    row, sites = architecture_of("llama"), [steered("ffn"), steered("layer"), steered("neuron")]
    plain = model(ids).logits
    with steering_hooks(model, row, sites):
        assert hook_count(model) == 3
        assert not torch.equal(model(ids).logits, plain)
    assert hook_count(model) == 0
    with pytest.raises(KeyboardInterrupt), steering_hooks(model, row, sites):
        raise KeyboardInterrupt
    assert hook_count(model) == 0
    assert torch.equal(model(ids).logits, plain)


def test_missing_module_leaves_no_hook_behind(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    sites = [steered("ffn"), steered("ffn", layer=7)]
    row, wanted = architecture_of("llama"), r"no module model\.layers\.7\.mlp\.down_proj"
    with pytest.raises(ModelError, match=wanted), steering_hooks(model, row, sites):
        pytest.fail("the body must not run")
    assert hook_count(model) == 0


def test_layers_that_return_tuples_keep_the_rest() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x, "cache"

    net = torch.nn.ModuleDict({"layer": Layer()})
    with transformed(net, Hookpoint("layer", "output"), lambda x: x * 2):
        hidden, rest = net["layer"](torch.ones(2))
    assert hidden.tolist() == [2, 2] and rest == "cache"


def test_a_model_that_passes_its_projections_by_is_refused(
    tiny_model: Callable[..., Any],
) -> None:
    """BLOOM's exact sums take the weights alone: steering would do nothing, unsaid."""
    model = tiny_model("bloom", slow_but_exact=True, pretraining_tp=2)
    adapter = SteeringAdapter.from_units(model, "attention", [0], [1], [2.0])
    with pytest.raises(ModelError, match="slow_but_exact"), adapter.attached(model):
        pass
    assert hook_count(model) == 0
    model.config.slow_but_exact = False
    with adapter.attached(model):
        assert hook_count(model) == 1
