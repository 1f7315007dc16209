"""Compile an adapter into edits of a quantized checkpoint's scales, or into reasons against it.

Pure, as `austeer.exporter.plan`. A projection that the quantization left alone folds as in any
other checkpoint; of a quantized one, the output side folds into the scales of its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import Architecture
from austeer.adapters.sites import Component, Refusal, Site
from austeer.adapters.steered_site import SteeredSite
from austeer.adapters.tensors import TensorEntry
from austeer.exporter.plan import (
    FOLDABLE_DTYPES,
    FoldPlan,
    TensorEdit,
    gain_of,
    plan_fold,
    stored_names,
    stored_shape,
)
from austeer.exporter.quantized.formats import REMEDY, Quantization, RowScales, row_scales

Shared = Mapping[str, tuple[str, ...]]

INPUT_SIDE = (
    "an input gain crosses the scales of every output row, scales cannot express it; "
    f"{REMEDY}, or graft the adapter onto an ONNX model that was quantized"
)
UNCOMPARED = (
    "the base holds its weights quantized or rounded, not as the adapter was made for them: "
    "model type, layers and units were compared, weights could not be"
)
TURNED = (
    "units with a gain below 0, which turns the sign of their scales: {}; right by the format, "
    "wrong in kernels that take scales as unsigned (vLLM's Marlin with int8 activations does)"
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class QuantizedSites:
    """Which of an adapter's sites read a quantized projection, and where its scales are.

    Attributes:
        plain: the sites at projections that are stored unquantized, as an adapter; None
            where there are none.
        scales: the others, each with its scales or the reason why they cannot be used.
    """

    plain: SteeringAdapter | None
    scales: tuple[tuple[SteeredSite, RowScales | str], ...]


def locate_sites(
    adapter: SteeringAdapter, tensors: Mapping[str, TensorEntry], quantization: Quantization
) -> QuantizedSites:
    """Tell the sites of an adapter apart by how their projection is stored."""
    found = [
        (steered, _scales_of(adapter.architecture, steered.site, tensors, quantization))
        for steered in adapter.sites
    ]
    plain = [steered for steered, scales in found if scales is None]
    stored = tuple((steered, scales) for steered, scales in found if scales is not None)
    return QuantizedSites(_part(adapter, plain) if plain else None, stored)


def plan_quantized(
    adapter: SteeringAdapter,
    tensors: Mapping[str, TensorEntry],
    quantization: Quantization,
    shared: Shared | None = None,
    scale: float = 1.0,
) -> FoldPlan | tuple[Refusal, ...]:
    """Compile `adapter` for the fold into a quantized checkpoint.

    Args:
        adapter: what to fold.
        tensors: the base checkpoint's tensors by stored name.
        quantization: how it is quantized.
        shared: partners of each tensor that other names stand for, too.
        scale: factor on every γ.

    Returns:
        The plan, or every reason against it.

    Raises:
        SiteError: a unit that the base does not have.
    """
    folds = adapter.config.strength.foldable
    if not folds or any(not steered.site.component.foldable for steered in adapter.sites):
        return plan_fold(adapter, tensors, shared, scale)  # the reasons are those of any base
    if not any(name.endswith(quantization.endings) for name in tensors):
        reason = f"config.json says quantized with {quantization.method}, no tensor is"
        return (Refusal(None, f"{reason}; fetch the model again"),)
    sites = locate_sites(adapter, tensors, quantization)
    refusals: list[Refusal] = []
    edits: list[TensorEdit] = []
    if sites.plain is not None:
        planned = plan_fold(sites.plain, tensors, shared, scale)
        if isinstance(planned, FoldPlan):
            edits.extend(planned.edits)
        else:
            refusals.extend(planned)
    for steered, scales in sites.scales:
        made = _site_edits(adapter, steered, scales, tensors, shared or {}, scale)
        if isinstance(made, Refusal):
            refusals.append(made)
        else:
            edits.extend(made)
    if refusals:
        return tuple(refusals)
    names = (scales.entry.name for _, scales in sites.scales if isinstance(scales, RowScales))
    return FoldPlan(tuple(edits), frozenset(names))


def quantized_notes(
    adapter: SteeringAdapter,
    tensors: Mapping[str, TensorEntry],
    quantization: Quantization,
    scale: float = 1.0,
) -> tuple[str, ...]:
    """What the reader of a fold into a quantized checkpoint should know."""
    stored = [steered for steered, _ in locate_sites(adapter, tensors, quantization).scales]
    return notes_on(stored, stored, scale)


def notes_on(
    uncompared: Sequence[SteeredSite], scaled: Sequence[SteeredSite], scale: float
) -> tuple[str, ...]:
    """What was not compared, and what scales below zero ask of a kernel.

    Args:
        uncompared: sites whose weights are not those that the adapter was made for.
        scaled: sites whose gains go into scales.
        scale: factor on every γ.
    """
    below = sum(int((1.0 + scale * steered.gamma < 0.0).sum()) for steered in scaled)
    turned = (TURNED.format(below),) if below else ()
    return ((UNCOMPARED,) if uncompared else ()) + turned


def bias_entry(
    adapter: SteeringAdapter, steered: SteeredSite, tensors: Mapping[str, TensorEntry]
) -> TensorEntry | None:
    """The bias of a site's projection, None where it has none."""
    name = f"{adapter.architecture.projection(steered.site)}.bias"
    names = stored_names(adapter.architecture, name, tensors)
    return tensors[names[0]] if names else None


def _scales_of(
    row: Architecture,
    site: Site,
    tensors: Mapping[str, TensorEntry],
    quantization: Quantization,
) -> RowScales | str | None:
    """As `row_scales`, of what bounds a site; quantized experts are a reason against it."""
    if site.component is Component.FFN:
        for module in _expert_modules(row, site.layer, tensors):
            if row_scales(quantization, row, module, tensors) is not None:
                return f"its experts are quantized ({module})"
    return row_scales(quantization, row, row.projection(site), tensors)


def _expert_modules(
    row: Architecture, layer: int, tensors: Mapping[str, TensorEntry]
) -> Iterator[str]:
    """Every name that a last projection of a layer's experts may have; none if it is dense."""
    if row.mixture is None:
        return
    path = row.layer.format(i=layer)
    if row.mixture.shared is not None:
        yield f"{path}.{row.mixture.shared}"
    for way in row.mixture.stored:
        # A quantized router has no weight of that name: one expert must tell then.
        routed = stored_shape(row, tensors, f"{path}.{way.router}") or (1,)
        weight = f"{path}.{way.weight.removesuffix('.weight')}"
        # Quantizers take experts apart that the class keeps in one tensor.
        apart = weight.replace("experts.", "experts.{e}.") if way.fused else weight
        yield from (apart.format(e=number) for number in range(routed[0]))
        if way.fused:
            yield weight


def _site_edits(
    adapter: SteeringAdapter,
    steered: SteeredSite,
    scales: RowScales | str,
    tensors: Mapping[str, TensorEntry],
    shared: Shared,
    scale: float,
) -> list[TensorEdit] | Refusal:
    site = steered.site
    if site.component is not Component.FFN:
        return Refusal(site, INPUT_SIDE)
    if isinstance(scales, str):
        return Refusal(site, f"{scales}; {REMEDY}")
    steered.check_width(scales.rows)
    targets = [(scales.entry, scales.axis)]
    bias = bias_entry(adapter, steered, tensors)
    if bias is not None:
        targets.append((bias, 0))
    gain = gain_of(steered, scale)
    for entry, axis in targets:
        if entry.name in shared:
            return Refusal(
                site, f"{entry.name} shares its values with {shared[entry.name][0]}; {REMEDY}"
            )
        along = entry.shape[axis : axis + 1]  # none for a scalar
        if entry.dtype not in FOLDABLE_DTYPES or along != (scales.rows,) or 0 in entry.shape:
            return Refusal(
                site, f"{entry.name} is {entry.dtype} of shape {entry.shape}; {REMEDY}"
            )
    return [
        TensorEdit(entry.name, axis, steered.index, gain, (site,)) for entry, axis in targets
    ]


def _part(adapter: SteeringAdapter, sites: Sequence[SteeredSite]) -> SteeringAdapter:
    """The adapter of some of its sites."""
    config = dataclasses.replace(
        adapter.config,
        components=tuple(sorted({steered.site.component for steered in sites})),
        k=sum(len(steered.index) for steered in sites),
    )
    return SteeringAdapter(config, tuple(sites))
