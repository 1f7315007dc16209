"""Config and tensors of a PEFT adapter, from a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from austeer.adapters._errors import RouteError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import Architecture
from austeer.adapters.sites import Component, Site
from austeer.adapters.tensors import Tensors
from austeer.adapters.weights import Checkpoint
from austeer.exporter.peft_plan import PeftPlan, ia3_vector, lora_factors, plan_peft
from austeer.exporter.plan import describe_refusals
from austeer.exporter.routes import Route

NAMES = {Route.LORA: "a LoRA", Route.IA3: "an IA3"}


def peft_content(
    checkpoint: Checkpoint, adapter: SteeringAdapter, route: Route, scale: float
) -> tuple[PeftPlan, dict[str, Any], Tensors]:
    """Plan, config and tensors of the PEFT adapter; arguments as in `convert_peft`.

    Raises:
        RouteError: the adapter cannot take this route.
    """
    plan = plan_peft(adapter, checkpoint, route, scale)
    if not isinstance(plan, PeftPlan):
        raise RouteError(
            f"this adapter cannot become {NAMES[route]}: {describe_refusals(plan)}"
        )
    make = _lora if route is Route.LORA else _ia3
    config, tensors = make(adapter, checkpoint, plan)
    return plan, _common_config(adapter) | config, tensors


def _common_config(adapter: SteeringAdapter) -> dict[str, Any]:
    return {
        "base_model_name_or_path": adapter.config.base_model_name_or_path,
        "fan_in_fan_out": adapter.architecture.transposed,
        "inference_mode": True,
        "modules_to_save": None,
        "revision": adapter.config.revision,
        "task_type": "CAUSAL_LM",
    }


def _lora(
    adapter: SteeringAdapter, checkpoint: Checkpoint, plan: PeftPlan
) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors; modules that the config's short names match besides get zeros."""
    architecture, rank = adapter.architecture, plan.rank
    tensors: Tensors = {}
    for module in _matched(adapter):
        weight = f"{module}.weight"
        entry = checkpoint.find(architecture.disk_names(weight))
        if entry is None:
            raise RouteError(f"{weight} is not in the checkpoint; is it the adapter's base?")
        if module in plan.modules:
            stored = entry.read()
            rows = stored.T if architecture.transposed else stored
            A, B = lora_factors(rows, plan.modules[module], rank)
        else:
            d_in, d_out = entry.shape if architecture.transposed else entry.shape[::-1]
            A = np.zeros((rank, d_in), np.float32)
            B = np.zeros((d_out, rank), np.float32)
        tensors[f"base_model.model.{module}.lora_A.weight"] = A
        tensors[f"base_model.model.{module}.lora_B.weight"] = B
    config = {
        "bias": "none",
        "init_lora_weights": True,
        "layers_to_transform": sorted({steered.site.layer for steered in adapter.sites}),
        # B @ A is the whole difference: its factor lora_alpha / r must be 1.
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(_short_names(adapter)),
        "use_dora": False,
        "use_rslora": False,
    }
    return config, tensors


def _ia3(
    adapter: SteeringAdapter, checkpoint: Checkpoint, plan: PeftPlan
) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors; full names, because an IA3 config cannot choose layers."""
    tensors: Tensors = {}
    for module, gains in plan.modules.items():
        shape = checkpoint[gains.weight].shape
        d_in, d_out = shape if adapter.architecture.transposed else shape[::-1]
        name = f"base_model.model.{module}.ia3_l"
        if gains.input is not None:
            tensors[name] = ia3_vector(d_in, gains.input)[None]
        elif gains.output is not None:
            tensors[name] = ia3_vector(d_out, gains.output)[:, None]
    config = {
        "feedforward_modules": sorted(
            module for module, gains in plan.modules.items() if gains.input is not None
        ),
        "init_ia3_weights": True,
        "peft_type": "IA3",
        "target_modules": sorted(plan.modules),
    }
    return config, tensors


def _short_names(adapter: SteeringAdapter) -> set[str]:
    """Names that match a steered kind of module in every layer, as serving runtimes want them.

    The last part of the path, such as `down_proj`; more of it where both kinds end alike.
    """
    return {_short(adapter.architecture, steered.site.component) for steered in adapter.sites}


def _short(architecture: Architecture, component: Component) -> str:
    paths = (architecture.attention, architecture.mlp)
    own = paths[0] if component is Component.ATTENTION else paths[1]
    last = [path.rpartition(".")[2] for path in paths]
    return own if last[0] == last[1] else own.rpartition(".")[2]


def _matched(adapter: SteeringAdapter) -> Iterator[str]:
    """Every module that the short names match in the steered layers."""
    layers = sorted({steered.site.layer for steered in adapter.sites})
    components = sorted({steered.site.component for steered in adapter.sites})
    modules = (adapter.architecture.projection(Site(i, c)) for i in layers for c in components)
    yield from dict.fromkeys(modules)
