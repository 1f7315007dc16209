"""Gradient checkpointing: the same gradients from less memory, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from austeer.adapters import Component, ModelError, Site
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import transformed
from austeer.adapters.fitting.checkpointing import gradient_checkpointing

MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox"),
    *("phi", "falcon", "opt", "bloom", "gptj", "gpt_neo", "mpt"),
)
IDS = torch.arange(1, 33).reshape(2, 16)


def ramp(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Not the same gain for every unit, which a norm behind it would cancel."""
    return x * (1 + gain * torch.linspace(0, 1, x.shape[-1]))


def gradient(model: Any, *, enabled: bool) -> tuple[torch.Tensor, int]:
    """Gradient of a loss in gains of every layer, and the bytes kept for it."""
    row = architecture_of(model.config.model_type)
    gain = torch.full((2,), 1.5, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    first = row.hookpoint(Site(0, Component.FFN))
    last = row.hookpoint(Site(model.config.num_hidden_layers - 1, Component.NEURON))
    with (
        gradient_checkpointing(model, row, enabled=enabled),
        transformed(model, first, lambda x: ramp(x, gain[0])),
        transformed(model, last, lambda x: ramp(x, gain[1])),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        loss = model(IDS, use_cache=False).logits.log_softmax(-1)[..., 3].mean()
        before = sum(kept)
        loss.backward()
    assert gain.grad is not None
    return gain.grad, before


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_are_the_same(model_type: str, tiny_model: Any) -> None:
    model = tiny_model(model_type)
    plain, _ = gradient(model, enabled=False)
    saving, _ = gradient(model, enabled=True)
    assert torch.allclose(plain, saving, rtol=1e-5, atol=1e-8)
    assert plain.abs().min() > 1e-6


def test_memory_is_saved_and_forwards_come_back(tiny_model: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    _, plain = gradient(model, enabled=False)
    _, saving = gradient(model, enabled=True)
    assert saving < 0.4 * plain
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_forwards_come_back_after_an_exception(tiny_model: Any) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(KeyError), gradient_checkpointing(model, architecture_of("gpt2")):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_missing_layer_is_named(tiny_model: Any) -> None:
    model = tiny_model("llama")
    with (
        pytest.raises(ModelError, match=r"transformer\.h\.0"),
        gradient_checkpointing(model, architecture_of("gpt2")),
    ):
        pass
