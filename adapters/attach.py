"""Hooks that steer a live torch model, and the steering formula itself in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from austeer.adapters._errors import ModelError
from austeer.adapters.architectures import (
    Architecture,
    Hookpoint,
    architecture_of,
    skips_projections,
)
from austeer.adapters.predictor import PHI_MAX, PHI_SHIFT
from austeer.adapters.steered_site import SteeredSite

Steer = Callable[[Tensor], Tensor]


def rescale(
    x: Float[Tensor, "*tokens D"],
    index: Int[Tensor, " k"],
    gain: Callable[[Tensor], Tensor],
) -> Float[Tensor, "*tokens D"]:
    """Multiply x[..., index] by `gain` in float32, rounded once to x's dtype.

    Index and gain may lie on another device: a model may be spread over several.
    """
    index = index.to(x.device)
    selected = x.index_select(-1, index).float()
    return x.index_copy(-1, index, (selected * gain(selected)).to(x.dtype))


def constant_gain(
    gamma: Float[Tensor, " k"], scale: float | Tensor
) -> Callable[[Tensor], Tensor]:
    """gain(x) = 1 + scale · γ."""
    value = 1.0 + scale * gamma
    return lambda selected: value.to(selected.device)


def adaptive_gain(
    gamma: Float[Tensor, " k"],
    V: Float[Tensor, "k r"],
    b: Float[Tensor, " r"],
    U: Float[Tensor, "r k"],
    scale: float | Tensor,
) -> Callable[[Tensor], Tensor]:
    """gain(x) = 1 + scale · γ · φ(x), see `austeer.adapters.predictor`."""
    amount = scale * gamma

    def gain(selected: Tensor) -> Tensor:
        there = selected.device
        t = selected @ V.to(there) + b.to(there)
        phi = PHI_MAX * torch.sigmoid(t @ U.to(there) - PHI_SHIFT)
        return 1.0 + amount.to(there) * phi

    return gain


class SiteSteer:
    """The steering function of one site; moves its tensors to the activation's device."""

    def __init__(self, steered: SteeredSite, scale: float) -> None:
        self._scale = scale
        predictor = steered.predictor
        parts = (predictor.V, predictor.b, predictor.U) if predictor else ()
        self._parts = tuple(
            torch.from_numpy(part.copy()) for part in (steered.index, steered.gamma, *parts)
        )

    def __call__(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens D"]:
        """Steer the activation x."""
        if self._parts[0].device != x.device:
            self._parts = tuple(part.to(x.device) for part in self._parts)
        index, gamma, *predictor = self._parts
        if predictor:
            V, b, U = predictor
            return rescale(x, index, adaptive_gain(gamma, V, b, U, self._scale))
        return rescale(x, index, constant_gain(gamma, self._scale))


@contextmanager
def steering_hooks(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[SteeredSite],
    scale: float = 1.0,
) -> Iterator[None]:
    """Steer `model` at `sites` inside the context.

    Raises:
        ModelError: a module named by the architecture does not exist.
    """
    with ExitStack() as stack:
        for steered in sites:
            hookpoint = architecture.hookpoint(steered.site)
            stack.enter_context(transformed(model, hookpoint, SiteSteer(steered, scale)))
        yield


@contextmanager
def transformed(model: nn.Module, hookpoint: Hookpoint, steer: Steer) -> Iterator[None]:
    """Replace the activation at `hookpoint` by `steer(activation)` inside the context.

    Raises:
        ModelError: the module does not exist, or the model would not call it.
    """
    module = find_module(model, hookpoint.module)
    if skips_projections(partial(getattr, getattr(model, "config", None))):
        raise ModelError(
            f"{hookpoint.module}: with slow_but_exact and pretraining_tp the model computes "
            "its projections without calling them; set config.slow_but_exact to False"
        )
    handle: Any
    if hookpoint.side == "input":
        handle = module.register_forward_pre_hook(partial(_change_input, steer))
    else:
        handle = module.register_forward_hook(partial(_change_output, steer))
        _collect_last(module)
    try:
        yield
    finally:
        handle.remove()


def _collect_last(module: nn.Module) -> None:
    """Run the hooks by which transformers collects hidden states behind those that steer."""
    hooks: Any = module._forward_hooks
    for key in [key for key, hook in hooks.items() if _collects(hook)]:
        hooks.move_to_end(key)


def _collects(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _change_input(steer: Steer, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (steer(args[0]), *args[1:])


def _change_output(steer: Steer, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
    steered = steer(first_output(output))
    return (steered, *output[1:]) if isinstance(output, tuple) else steered


def is_transformed(model: nn.Module) -> bool:
    """Whether hooks of `transformed` are on a module, also on a copy of a steered model."""
    return any(
        getattr(hook, "func", None) in (_change_input, _change_output)
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    )


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward inside the context; its hooks stay in effect."""
    attributes = vars(module)
    own = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        if own is not None:
            attributes["forward"] = own


def first_output(output: Any) -> Any:
    """The hidden states of a layer: older ones return (hidden, ...), newer ones those alone."""
    return output[0] if isinstance(output, tuple) else output


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`.

    Raises:
        ModelError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ModelError(
            f"{type(model).__name__}: has no module {path}; is its Architecture row right?"
        ) from None


def text_decoder(model: Any) -> Any:
    """What a causal language model computes its hidden states with, without the LM head."""
    return find_module(model, architecture_of(model.config.model_type).prefix)


def final_modules(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """What lies between the last layer and the LM head, in order of computation.

    Some models of an architecture have None in place of one of them: it is left out.

    Raises:
        ModelError: a module does not exist.
    """
    found = []
    for path in (architecture.norm, *architecture.tail):
        parent, _, name = path.rpartition(".")
        if getattr(find_module(model, parent), name, path) is not None:
            found.append(find_module(model, path))
    return found
