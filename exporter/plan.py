"""Compile an adapter into the weight edits of a fold, or into reasons why it cannot fold.

Pure: looks at names, shapes and dtypes of tensors, opens nothing. The algebra is
W @ (g * x) == (W * g) @ x on the input side of a projection, and
g * (W @ x + b) == (g[:, None] * W) @ x + g * b on its output side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int

from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import Architecture
from austeer.adapters.mixtures import carriers
from austeer.adapters.sites import Refusal, Site
from austeer.adapters.steered_site import SteeredSite
from austeer.adapters.tensors import TensorEntry

FOLDABLE_DTYPES = ("F64", "F32", "F16", "BF16")
_AXES = {1: "one axis", 2: "two axes", 3: "three axes"}


@dataclass(frozen=True, slots=True, eq=False)
class TensorEdit:
    """Slices `index` along `axis` of one stored tensor, each times its gain.

    Attributes:
        name: the tensor's name in the checkpoint.
        axis: axis that counts units.
        index: slice numbers, unique.
        gain: factor of each slice, 1 + scale · γ in float64.
        sites: the steered sites behind the edit.
    """

    name: str
    axis: int
    index: Int[np.ndarray, " k"]
    gain: Float[np.ndarray, " k"]
    sites: tuple[Site, ...]


@dataclass(frozen=True, slots=True, eq=False)
class FoldPlan:
    """Every edit that absorbs an adapter into a checkpoint; at most one per tensor and axis.

    Attributes:
        edits: the edits.
        scales: names of touched tensors that are the scales of quantized weights.
    """

    edits: tuple[TensorEdit, ...]
    scales: frozenset[str] = frozenset()

    def by_tensor(self) -> dict[str, tuple[TensorEdit, ...]]:
        """The edits of each touched tensor, in plan order."""
        grouped: dict[str, list[TensorEdit]] = {}
        for edit in self.edits:
            grouped.setdefault(edit.name, []).append(edit)
        return {name: tuple(edits) for name, edits in grouped.items()}


def plan_fold(
    adapter: SteeringAdapter,
    tensors: Mapping[str, TensorEntry],
    shared: Mapping[str, tuple[str, ...]] | None = None,
    scale: float = 1.0,
) -> FoldPlan | tuple[Refusal, ...]:
    """Compile `adapter` for the fold route.

    Args:
        adapter: what to fold.
        tensors: the base checkpoint's tensors by stored name.
        shared: partners of each tensor that other names stand for, too.
        scale: factor on every γ.

    Returns:
        The plan, or every reason against it.
    """
    refusals = tuple(_route_refusals(adapter))
    if refusals:
        return refusals
    results = [
        _site_edits(adapter.architecture, steered, tensors, shared or {}, scale)
        for steered in adapter.sites
    ]
    refused = tuple(result for result in results if isinstance(result, Refusal))
    if refused:
        return refused
    return FoldPlan(
        tuple(edit for edits in results if not isinstance(edits, Refusal) for edit in edits)
    )


def gain_of(steered: SteeredSite, scale: float) -> Float[np.ndarray, " k"]:
    """Factor of each steered unit, 1 + scale · γ in float64."""
    return 1.0 + float(scale) * steered.gamma.astype(np.float64)


def describe_refusals(refusals: Sequence[Refusal]) -> str:
    """All refusals in one line, sites with the same reason together."""
    grouped: dict[str, list[str]] = {}
    for refusal in refusals:
        sites = grouped.setdefault(refusal.reason, [])
        if refusal.site is not None:
            sites.append(refusal.site.key)
    return "; ".join(
        f"{_shorten(sites)}: {reason}" if sites else reason for reason, sites in grouped.items()
    )


def _shorten(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _route_refusals(adapter: SteeringAdapter) -> Iterator[Refusal]:
    if not adapter.config.strength.foldable:
        yield Refusal(
            None,
            f"strength {adapter.config.strength} sets its gains anew at every token, weights "
            "are constants; merge it with --code, export it to ONNX or attach it to the live "
            "model, or fit with strength fitted or oriented",
        )
    for steered in adapter.sites:
        if not steered.site.component.foldable:
            yield Refusal(
                steered.site,
                "a layer's output goes on through the residual stream, no single weight can "
                "absorb a gain there; merge it with --code, export it to ONNX or attach it to "
                "the live model",
            )


def _site_edits(
    architecture: Architecture,
    steered: SteeredSite,
    tensors: Mapping[str, TensorEntry],
    shared: Mapping[str, tuple[str, ...]],
    scale: float,
) -> list[TensorEdit] | Refusal:
    site = steered.site
    targets = carriers(architecture, site, partial(stored_shape, architecture, tensors))
    if isinstance(targets, Refusal):
        return targets
    gain = gain_of(steered, scale)
    edits: dict[str, TensorEdit] = {}
    for target in targets:
        # All experts in one tensor are one edit.
        if target.name in edits:
            continue
        found = _find(architecture, target.name, tensors, shared)
        if isinstance(found, str):
            return Refusal(site, found)
        axis = target.stored_axis
        axes = (axis - target.axis) + (1 if target.kind == "bias" else 2)
        if len(found.shape) != axes or found.shape[axis] <= steered.index.max():
            return Refusal(
                site,
                f"{found.name} has shape {found.shape}, expected {_AXES[axes]} and more than "
                f"{steered.index.max()} units along axis {axis}; is it the adapter's base "
                "model?",
            )
        edits[target.name] = TensorEdit(found.name, axis, steered.index, gain, (site,))
    return list(edits.values())


def stored_shape(
    architecture: Architecture, tensors: Mapping[str, TensorEntry], name: str
) -> tuple[int, ...] | None:
    """Shape of the module tensor `name` in a checkpoint, None where it is not stored."""
    names = stored_names(architecture, name, tensors)
    return tensors[names[0]].shape if names else None


def stored_names(
    architecture: Architecture, name: str, tensors: Mapping[str, TensorEntry]
) -> list[str]:
    """The names under which a checkpoint holds the tensor `name`: one, if all is well."""
    return [stored for stored in architecture.disk_names(name) if stored in tensors]


def stands_twice(names: Sequence[str]) -> str:
    """Why a tensor of several names must not be edited: a loader takes one of them."""
    return (
        f"{names[0]} stands in the checkpoint a second time as {names[1]}; "
        "save the model again with one of them"
    )


def _find(
    architecture: Architecture,
    name: str,
    tensors: Mapping[str, TensorEntry],
    shared: Mapping[str, tuple[str, ...]],
) -> TensorEntry | str:
    """The stored tensor of `name`, or why it must not be edited."""
    names = stored_names(architecture, name, tensors)
    candidates = names or architecture.disk_names(name)
    partners = sorted({other for stored in candidates for other in shared.get(stored, ())})
    if partners:
        return (
            f"{candidates[0]} shares its values with {_shorten(partners)}, a fold would "
            "steer both; merge it with --code, export it to ONNX or attach it to the live model"
        )
    if not names:
        return f"{name} is not in the checkpoint; is it the adapter's base model?"
    if len(names) > 1:
        return stands_twice(names)
    if tensors[names[0]].dtype not in FOLDABLE_DTYPES:
        return (
            f"{names[0]} is stored as {tensors[names[0]].dtype}, a fold needs one of "
            f"{', '.join(FOLDABLE_DTYPES)}; fold the unquantized model and quantize the result"
        )
    return tensors[names[0]]
