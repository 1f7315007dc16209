"""Trained baselines: an additive vector, IA3 and rank-1 LoRA, by the project's own trainer.

Loss, data, steps, budgets and judge are those of `fitted` and `adaptive`: every baseline is a
`Trainable`. Places, then learning rates at the best place, are compared on validation data with
a fifth of the steps; what won is then trained in full.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from austeer.adapters import Component, Site
from austeer.adapters.architectures import Architecture
from austeer.adapters.attach import transformed
from austeer.adapters.fitting.trained import Trainer

_PROBE_SHARE = 0.2
# The first rate of each compares the places.
_VECTOR_RATES = (0.05, 0.1)
_IA3_RATES = (0.1, 0.05, 0.2)
_LORA_RATES = (0.005, 0.01, 0.02)
_LORA_TARGETS = {
    "q,v": ["q_proj", "v_proj"],
    "o,down": ["o_proj", "down_proj"],
    "all linear": "all-linear",
}


class TrainedVector(nn.Module):
    """A vector that is added to one site's activation at every token.

    Args:
        site: where.
        width: of the site.
        device: where the vector lives.
    """

    def __init__(self, site: Site, width: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self._site = site
        self.vector = nn.Parameter(torch.zeros(width, device=device))

    @contextmanager
    def attached(self, model: PreTrainedModel, architecture: Architecture) -> Iterator[None]:
        """Steer `model` inside the context, differentiably."""
        with transformed(
            model, architecture.hookpoint(self._site), lambda x: x + self.vector.to(x.dtype)
        ):
            yield

    def constrain(self) -> None:
        """Any vector is allowed."""

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Scale the vector."""
        self.vector.mul_(factor)

    @property
    def touched(self) -> int:
        """Activations changed per token."""
        return self.vector.numel()

    def remove(self) -> None:
        """Nothing of it is in the model."""


class PeftSteering:
    """A stock peft adapter inside the model, disabled except in `attached`.

    Args:
        model: the base model; holds the adapter's modules until `remove`.
        config: of the adapter, which must start as the identity.
        seed: of its random start.
    """

    def __init__(self, model: PreTrainedModel, config: Any, seed: int = 0) -> None:
        from peft import get_peft_model

        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft warns of its own choices (fan_in_fan_out) and of tied embeddings.
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            self._peft = get_peft_model(model, config)
        model.eval()
        # Disabled layers freeze their weights, so the list is taken before.
        self._named = {n: p for n, p in self._peft.named_parameters() if p.requires_grad}
        self._peft.base_model.disable_adapter_layers()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's weights."""
        return iter(self._named.values())

    @contextmanager
    def attached(self, model: PreTrainedModel, architecture: Architecture) -> Iterator[None]:  # noqa: ARG002
        """Enable the adapter inside the context."""
        self._peft.base_model.enable_adapter_layers()
        try:
            yield
        finally:
            self._peft.base_model.disable_adapter_layers()

    def constrain(self) -> None:
        """Any weights are allowed."""

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Scale what the adapter adds: LoRA's B, IA3's distance from 1."""
        for name, weight in self._named.items():
            if "ia3_l" in name:
                weight.sub_(1.0).mul_(factor).add_(1.0)
            elif "lora_B" in name:
                weight.mul_(factor)

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's weights by name."""
        return {name: weight.detach() for name, weight in self._named.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Bring weights back."""
        for name, weight in self._named.items():
            weight.copy_(state[name])

    @property
    def touched(self) -> int:
        """Activations changed per token: IA3's scaled ones, LoRA's outputs."""
        return sum(
            weight.shape[0] if "lora_B" in name else weight.numel()
            for name, weight in self._named.items()
            if "lora_A" not in name
        )

    def remove(self) -> None:
        """Take the adapter's modules out of the model."""
        self._peft.unload()


Steering = TrainedVector | PeftSteering


@dataclass(frozen=True, slots=True)
class Baseline:
    """A trained baseline: where it may sit, and the learning rates it may have.

    Attributes:
        places: makers of fresh steering by the name of the place.
        rates: learning rates of Adam.
    """

    places: dict[str, Callable[[], Steering]]
    rates: tuple[float, ...]


def vector_baseline(model: PreTrainedModel) -> Baseline:
    """An additive vector at one layer's output."""
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    sites = [Site(layer, Component.LAYER) for layer in range(layers)]
    places = {
        f"layer {site.layer}": partial(TrainedVector, site, width, model.device)
        for site in sites
    }
    return Baseline(places, _VECTOR_RATES)


def ia3_baseline(model: PreTrainedModel, seed: int) -> Baseline:
    """IA3 where peft puts it by default: k_proj, v_proj, and the input of down_proj."""
    from peft import IA3Config

    config = IA3Config(task_type="CAUSAL_LM")
    return Baseline({"k,v,down": partial(PeftSteering, model, config, seed)}, _IA3_RATES)


def lora_baseline(model: PreTrainedModel, seed: int) -> Baseline:
    """LoRA of rank 1 at peft's default targets, at o_proj and down_proj, and everywhere."""
    from peft import LoraConfig

    configs = {
        name: LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=targets)
        for name, targets in _LORA_TARGETS.items()
    }
    places = {
        name: partial(PeftSteering, model, config, seed) for name, config in configs.items()
    }
    return Baseline(places, _LORA_RATES)


def choose(trainer: Trainer, baseline: Baseline, steps: int) -> tuple[str, float]:
    """Place and learning rate with the best validation margin after a fifth of `steps`."""
    short = max(1, round(steps * _PROBE_SHARE))

    def worth(choice: tuple[str, float]) -> tuple[bool, float]:
        steering = baseline.places[choice[0]]()
        try:
            trained = trainer.run(steering, steps=short, learning_rate=choice[1])
        finally:
            steering.remove()
        return trained.within, trained.judgement.margin

    first, *others = baseline.rates
    found = {(place, first): worth((place, first)) for place in baseline.places}
    place = max(found, key=lambda choice: found[choice])[0]
    found |= {(place, rate): worth((place, rate)) for rate in others}
    return max(found, key=lambda choice: found[choice])
