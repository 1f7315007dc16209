"""Compile an adapter into the modules of a PEFT LoRA or IA3, or into reasons why it cannot be.

Pure, as `austeer.exporter.plan`, whose edits it regroups: one projection y = W @ x + b each,
steered to y' = g_out * (W @ (g_in * x) + b). The tensors of a module follow from its gains
and, for a LoRA, from its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from austeer.adapters._errors import RouteError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import Architecture
from austeer.adapters.mixtures import stored_experts
from austeer.adapters.sites import Component, Refusal
from austeer.adapters.tensors import TensorEntry
from austeer.exporter.fold import round_once
from austeer.exporter.plan import FoldPlan, TensorEdit, plan_fold, stored_shape
from austeer.exporter.routes import Route

MIXTURE_REFUSAL = (
    "its experts are parts of larger parameters, not modules that peft can extend; leave ffn "
    "out, or take route safetensors, or merge --code"
)

Factor = Float[np.ndarray, "rows columns"]


@dataclass(frozen=True, slots=True, eq=False)
class ModuleGains:
    """The steered units on both sides of one projection.

    Attributes:
        module: its path in the transformers class.
        weight: name of its weight in the checkpoint.
        input: gains of what it reads, None without any.
        output: gains of what it gives, None without any.
        bias: name of a bias that is steered with the output, None without one.
    """

    module: str
    weight: str
    input: TensorEdit | None = None
    output: TensorEdit | None = None
    bias: str | None = None

    @property
    def rank(self) -> int:
        """Rank of the LoRA: each unit is one."""
        return sum(len(edit.index) for edit in (self.input, self.output) if edit is not None)


@dataclass(frozen=True, slots=True, eq=False)
class PeftPlan:
    """Every steered module by its path."""

    modules: Mapping[str, ModuleGains]

    @property
    def rank(self) -> int:
        """Largest rank of a module."""
        return max(gains.rank for gains in self.modules.values())


def plan_peft(
    adapter: SteeringAdapter,
    tensors: Mapping[str, TensorEntry],
    route: Route,
    scale: float = 1.0,
) -> PeftPlan | tuple[Refusal, ...]:
    """Compile `adapter` for route `lora` or `ia3`.

    Weights that share their values with others are no obstacle here: the base keeps its own.

    Args:
        adapter: what to convert.
        tensors: the base checkpoint's tensors by stored name.
        route: `lora` or `ia3`.
        scale: factor on every γ.

    Returns:
        The plan, or every reason against it.
    """
    mixed = tuple(_mixture_refusals(adapter, tensors, route))
    if mixed:
        return mixed
    plan = plan_fold(adapter, tensors, scale=scale)
    if not isinstance(plan, FoldPlan):
        return plan
    modules = {gains.module: gains for gains in _by_module(adapter.architecture, plan)}
    refuse = _lora_refusal if route is Route.LORA else _ia3_refusal
    refusals = [refuse(gains) for gains in modules.values()]
    refused = tuple(refusal for refusal in refusals if refusal is not None)
    return refused or PeftPlan(modules)


def lora_factors(
    weight: Float[np.ndarray, "d_out d_in"], gains: ModuleGains, rank: int
) -> tuple[Factor, Factor]:
    """A [rank, d_in] and B [d_out, rank], float32: B @ A == diag(g_out) W diag(g_in) - W.

    Args:
        weight: W, rows are outputs.
        gains: of that module.
        rank: number of rows of A; those beyond the module's own rank are zero.

    Raises:
        RouteError: a value leaves the range of float32; names tensor and unit.
    """
    A, B = np.zeros((rank, weight.shape[1])), np.zeros((weight.shape[0], rank))
    read, given = gains.input, gains.output
    split = 0 if read is None else len(read.index)
    if read is not None:
        A[np.arange(split), read.index] = 1.0
        B[:, :split] = weight[:, read.index].astype(np.float64) * (read.gain - 1.0)
    if given is not None:
        rows = weight[given.index].astype(np.float64)
        if read is not None:
            # Where a steered row crosses a steered column both gains apply.
            rows[:, read.index] *= read.gain
        A[split : gains.rank] = rows
        B[given.index, np.arange(split, gains.rank)] = given.gain - 1.0
    return _narrow(A, gains), _narrow(B, gains)


def ia3_vector(width: int, edit: TensorEdit) -> Float[np.ndarray, " width"]:
    """The gain of every unit of one side in float32, 1 where nothing is steered.

    Raises:
        RouteError: a gain leaves the range of float32.
    """
    dense = np.ones(width)
    dense[edit.index] = edit.gain
    vector = round_once(dense, np.dtype(np.float32))
    if not np.isfinite(vector).all():
        unit = int(np.argmin(np.isfinite(vector)))
        raise RouteError(
            f"{edit.name}: the gain of unit {unit} is {dense[unit]:g}, outside the range of "
            "float32; lower the scale"
        )
    return vector


def _narrow(wide: Factor, gains: ModuleGains) -> Any:
    narrow = round_once(wide, np.dtype(np.float32))
    left = np.isfinite(wide) & ~np.isfinite(narrow)
    if left.any():
        row, column = np.argwhere(left)[0]
        raise RouteError(
            f"{gains.weight}: {wide[row, column]:g} leaves the range of float32, in which a "
            "LoRA is stored; lower the scale"
        )
    return narrow


def _by_module(architecture: Architecture, plan: FoldPlan) -> Iterator[ModuleGains]:
    grouped: dict[str, dict[str, Any]] = {}
    for edit in plan.edits:
        site = edit.sites[0]
        found = grouped.setdefault(architecture.projection(site), {})
        if edit.name.endswith(".bias"):
            found["bias"] = edit.name
        else:
            side = "output" if site.component is Component.FFN else "input"
            found |= {side: edit, "weight": edit.name}
    for module, found in grouped.items():
        yield ModuleGains(module, **found)


def _mixture_refusals(
    adapter: SteeringAdapter, tensors: Mapping[str, TensorEntry], route: Route
) -> Iterator[Refusal]:
    row = adapter.architecture
    if row.mixture is None:
        return
    shape = partial(stored_shape, row, tensors)
    for steered in adapter.sites:
        site = steered.site
        if site.component is Component.FFN and stored_experts(row, site.layer, shape):
            yield Refusal(site, MIXTURE_REFUSAL)
        elif site.component is not Component.ATTENTION and route is Route.LORA:
            yield Refusal(
                site,
                f"peft takes a LoRA of a {row.model_type} model's {row.mlp} for one of all its "
                "experts, too; take route ia3 or safetensors",
            )


def _lora_refusal(gains: ModuleGains) -> Refusal | None:
    if gains.bias is None or gains.output is None:
        return None
    return Refusal(
        gains.output.sites[0],
        "its projection adds a bias, which the gain must scale and a LoRA cannot; "
        "take route ia3 or safetensors",
    )


def _ia3_refusal(gains: ModuleGains) -> Refusal | None:
    if gains.input is None or gains.output is None:
        return None
    return Refusal(
        gains.output.sites[0],
        "an IA3 scales the input or the output of a module, and neuron is steered there, too; "
        "take route lora or safetensors",
    )
