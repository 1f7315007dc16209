"""What stands on a live model besides its weights: adapters, and code compiled of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from austeer.adapters._errors import AdapterError, ModelError

if TYPE_CHECKING:
    from austeer.adapters.adapter import SteeringAdapter

_attached: WeakKeyDictionary[nn.Module, list[SteeringAdapter]] = WeakKeyDictionary()


@contextmanager
def attachment(model: nn.Module, adapter: SteeringAdapter, scale: object) -> Iterator[None]:
    """Keep `adapter` on the list of those on `model` inside the context.

    Raises:
        AdapterError: it is there already, or `scale` is no finite number.
        ModelError: the model was copied while steered, so that it stays so.
    """
    if not (isinstance(scale, Real) and math.isfinite(scale)):
        raise AdapterError(f"attached: scale {scale!r}: expected a finite number")
    _refuse_copy(model, "attached")
    present = _attached.setdefault(_original(model), [])
    if any(one is adapter or _same_gains(one, adapter) for one in present):
        raise AdapterError(
            "this adapter is attached to the model already, and its gains would multiply; use "
            "one context, with the scale that you want"
        )
    present.append(adapter)
    _forget_compiled()
    try:
        yield
    finally:
        _forget_compiled()
        present.remove(adapter)


def check_bare(model: nn.Module, purpose: str) -> None:
    """Refuse a model that does not show its own activations to hooks.

    Args:
        model: what was handed in.
        purpose: what for, as the message calls it.

    Raises:
        ModelError: it is no model, an adapter is attached to it, it is steered in code, layers
            or prompts of peft are in it, or it is compiled.
    """
    check_module(model, purpose)
    if hasattr(model, "steering_scale"):
        raise ModelError(
            f"{purpose}: the model is steered in code, and its activations are not the base's; "
            "load its base"
        )
    _refuse_copy(model, purpose)
    if _attached.get(_original(model)):
        raise ModelError(
            f"{purpose}: an adapter is attached to the model, which would be taken for its "
            "base; leave that context first"
        )
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ModelError(
            f"{purpose}: peft stands between the model's layers, and its weights are not the "
            "base's; call merge_and_unload() first, and save what comes out: that is the base"
        )
    if hasattr(model, "prompt_encoder"):
        raise ModelError(
            f"{purpose}: peft puts learned prompts before every text, which no checkpoint "
            "holds; hand in the model without them"
        )
    if any(getattr(module, "_compiled_call_impl", None) for module in model.modules()):
        raise ModelError(f"{purpose}: the model is compiled; compile it afterwards")
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            f"{purpose}: expected a model, got what torch.compile made of it; hand in the first"
        )


def _refuse_copy(model: nn.Module, purpose: str) -> None:
    from austeer.adapters.attach import is_transformed

    if is_transformed(model) and not _attached.get(_original(model)):
        raise ModelError(
            f"{purpose}: the model was copied while an adapter was attached, and stays "
            "steered; copy it outside of that context"
        )


def check_module(model: object, purpose: str) -> None:
    """Refuse what is no model, such as the name of one.

    Raises:
        ModelError: as said.
    """
    if not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise ModelError(
            f"{purpose}: expected a model of transformers, got {type(model).__name__}; "
            "load one with load_model"
        )


def check_tokenizer(tokenizer: object, purpose: str) -> None:
    """Refuse what is no tokenizer, such as the name of one.

    Raises:
        ModelError: as said.
    """
    if not (callable(tokenizer) and hasattr(tokenizer, "bos_token_id")):
        raise ModelError(
            f"{purpose}: expected a tokenizer of transformers, got {type(tokenizer).__name__}; "
            "load one with load_tokenizer"
        )


def _same_gains(one: SteeringAdapter, other: SteeringAdapter) -> bool:
    """Whether two adapters steer alike, as one does that was loaded twice."""
    first, second = one.tensors(), other.tensors()
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first
    )


def _original(model: nn.Module) -> nn.Module:
    """The model behind what torch.compile made of it: both share their modules."""
    return getattr(model, "_orig_mod", model)


def _forget_compiled() -> None:
    """Make compiled models see hooks that come and go: torch.compile does not look for them."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
