"""What one rounding of the touched weights can do to logits: measured, never guessed.

A fold in bfloat16 or float16 rounds each touched weight once, by half an epsilon at most.
The allowance is twice the largest logit change that random errors of exactly that size, on
exactly those weights, cause in the float32 reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.fingerprint import checkpoint_reader, module_reader
from austeer.adapters.steered_site import touched_tensors
from austeer.adapters.weights import Checkpoint
from austeer.exporter.proofs.reference import Prompt, steered_logits
from austeer.exporter.proofs.values import rounding_errors

SAFETY = 2.0
_DRAWS = 3


def fold_rounding(folder: Path, model: Any, adapter: SteeringAdapter) -> tuple[float, float]:
    """Largest relative and largest absolute (subnormal) error of a touched weight.

    The product is compared in the live model's dtype: where that differs from the stored
    one, both sides round once more.
    """
    checkpoint = Checkpoint(folder)
    read = checkpoint_reader(adapter.architecture, checkpoint)
    names = {name for name, _, _ in touched_tensors(adapter.sites, adapter.architecture, read)}
    entries = [checkpoint.find(adapter.architecture.disk_names(name)) for name in names]
    stored = [rounding_errors(entry.numpy_dtype) for entry in entries if entry is not None]
    unit, spacing = (max(errors) for errors in zip((0.0, 0.0), *stored, strict=True))
    live = torch.finfo(model.dtype)
    if live.eps / 2 > unit:
        unit += live.eps
    return unit, max(spacing, live.tiny * live.eps)


def rounding_allowance(
    model: Any,
    adapter: SteeringAdapter,
    scale: float,
    prompts: Sequence[Prompt],
    unit: float,
    spacing: float,
) -> float:
    """Twice the largest logit change that errors of a fold's size cause in `model`.

    Args:
        model: a float32 model; its touched weights change during the call only.
        adapter: names the touched weights.
        scale: factor on every γ.
        prompts: where to look.
        unit: relative error of each touched weight, its sign random.
        spacing: least absolute error.
    """
    steered = steered_logits(model, adapter, scale)
    worst = 0.0
    for ids in prompts:
        exact = steered(ids)
        for seed in range(_DRAWS):
            with _perturbed(model, adapter, unit, spacing, seed):
                worst = max(worst, float(np.abs(steered(ids) - exact).max()))
    return SAFETY * worst


@contextmanager
def _perturbed(
    model: Any, adapter: SteeringAdapter, unit: float, spacing: float, seed: int
) -> Iterator[None]:
    """Give every touched weight and bias element a relative error of ±`unit` inside."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), ExitStack() as stack:
        for parameter, axis, index in _touched(model, adapter):
            before = parameter.index_select(axis, index)
            signs = torch.randint(0, 2, before.shape, generator=generator).to(before) * 2 - 1
            error = signs * (before.abs() * unit).clamp_min(spacing)
            parameter.index_copy_(axis, index, before + error)
            stack.callback(parameter.index_copy_, axis, index, before)
        yield


def _touched(model: Any, adapter: SteeringAdapter) -> Iterator[tuple[Tensor, int, Tensor]]:
    for name, axis, index in touched_tensors(
        adapter.sites, adapter.architecture, module_reader(model)
    ):
        parameter = model.get_parameter(name)
        yield parameter, axis, torch.from_numpy(index).to(parameter.device)
