"""Several behaviours in one adapter: `combine` checks, merges and describes them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from austeer.adapters._errors import AdapterError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import text_config
from austeer.adapters.composition.contributions import (
    Overlap,
    checked_weights,
    contributions,
    merged_sites,
    overlaps,
)
from austeer.adapters.config import AdapterConfig, Strength, library_versions
from austeer.adapters.fingerprint import ReadTensor, fingerprint, module_reader
from austeer.adapters.steered_site import SteeredSite, check_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnOverlap = Literal["sum", "strongest", "refuse"]


def combine(
    adapters: Sequence[SteeringAdapter],
    weights: Sequence[float] | None = None,
    *,
    model: PreTrainedModel | None = None,
    read: ReadTensor | None = None,
    on_overlap: OnOverlap = "sum",
    names: Sequence[str] | None = None,
) -> SteeringAdapter:
    """One adapter that steers several behaviours at once.

    Where no unit is steered twice, it does what the adapters attached together would.
    `config.fit["combined"]` tells what went in, and every unit that several adapters steer.

    Args:
        adapters: adapters of one base model.
        weights: factor on every γ of each adapter, negative to steer away; None for 1.
        model: the base model. Without it or `read`, adapters that touch different projections
            cannot be shown to belong together, and are refused.
        read: reads the base's tensors, from its files say; None for `model`'s own, which were
            rounded where it was loaded in another dtype.
        on_overlap: what to do with a unit that several adapters steer. "sum" adds constant
            gains, and refuses a unit that a predictor is among; "strongest" leaves such a unit
            to the largest |w · γ| instead; "refuse" refuses every unit steered twice.
        names: what messages call the adapters.

    Raises:
        AdapterError: no adapters, other bases, the same adapter twice, weights that are not one
            finite number an adapter, or an overlap that `on_overlap` refuses.
        SiteError: the model has not every steered unit, or a weighted γ is not finite.
    """
    check_adapters(adapters)
    names = _names(adapters, names)
    factors = checked_weights(weights, len(adapters))
    if on_overlap not in get_args(OnOverlap):
        raise AdapterError(
            f"on_overlap {on_overlap!r}: expected one of {', '.join(get_args(OnOverlap))}"
        )
    _check_distinct(adapters, names)
    if model is not None:
        # Here, because torch is not loaded where files alone are combined.
        from austeer.adapters.live_model import check_module

        check_module(model, "combine")
        read = read or module_reader(model)
    _check_one_base(adapters, names, model, read)
    shared = overlaps(adapters, factors)
    _check_overlaps(shared, on_overlap, names)
    sites = merged_sites(contributions(adapters, factors))
    return SteeringAdapter(_config(adapters, factors, names, sites, shared, read), sites)


def _config(
    adapters: Sequence[SteeringAdapter],
    weights: Sequence[float],
    names: Sequence[str],
    sites: Sequence[SteeredSite],
    shared: Sequence[Overlap],
    read: ReadTensor | None,
) -> AdapterConfig:
    first = adapters[0].config
    digest = first.base_model_fingerprint
    if read is not None:
        where = [steered.site for steered in sites]
        digest = fingerprint(adapters[0].architecture, where, read)
    revisions = {adapter.config.revision for adapter in adapters}
    rank = sites[0].predictor.rank if sites[0].predictor else 0
    combined = {
        "adapters": [
            {"name": name, "weight": weight, "strength": adapter.config.strength.value}
            for name, weight, adapter in zip(names, weights, adapters, strict=True)
        ],
        "overlaps": [overlap.as_dict() for overlap in shared],
        "conflicts": sum(overlap.conflict for overlap in shared),
    }
    return dataclasses.replace(
        first,
        base_model_fingerprint=digest,
        revision=first.revision if len(revisions) == 1 else None,
        components=tuple(sorted({steered.site.component for steered in sites})),
        strength=_strength(adapters),
        alpha=None,
        k=sum(len(steered.index) for steered in sites),
        rank=rank,
        fit={"combined": combined},
        versions=library_versions(),
    )


def _strength(adapters: Sequence[SteeringAdapter]) -> Strength:
    kinds = {adapter.config.strength for adapter in adapters}
    if Strength.ADAPTIVE in kinds:
        return Strength.ADAPTIVE
    return kinds.pop() if len(kinds) == 1 else Strength.FITTED


def check_adapters(adapters: Sequence[SteeringAdapter]) -> None:
    """Refuse what is no list of adapters, or an empty one.

    Raises:
        AdapterError: as said.
    """
    listed = isinstance(adapters, Sequence) and not isinstance(adapters, str)
    others = [one for one in adapters if not isinstance(one, SteeringAdapter)] if listed else []
    if not listed or others:
        found = type(others[0] if others else adapters).__name__
        raise AdapterError(f"combine: expected a list of SteeringAdapter objects, got {found}")
    if not adapters:
        raise AdapterError("combine: expected at least one adapter, got none")


def _names(adapters: Sequence[SteeringAdapter], names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(f"adapter {number + 1}" for number in range(len(adapters)))
    if len(names) != len(adapters):
        raise AdapterError(f"combine: got {len(names)} names for {len(adapters)} adapters")
    return tuple(names)


def _check_distinct(adapters: Sequence[SteeringAdapter], names: Sequence[str]) -> None:
    known: dict[bytes, str] = {}
    for name, adapter in zip(names, adapters, strict=True):
        content = hashlib.sha256(adapter.config.base_model_fingerprint.encode())
        for key, tensor in sorted(adapter.tensors().items()):
            content.update(key.encode() + tensor.tobytes())
        earlier = known.get(content.digest())
        if earlier is not None:
            raise AdapterError(
                f"{name} is the same adapter as {earlier}; give it once, with a weight"
            )
        known[content.digest()] = name


def _check_one_base(
    adapters: Sequence[SteeringAdapter],
    names: Sequence[str],
    model: PreTrainedModel | None,
    read: ReadTensor | None,
) -> None:
    first = adapters[0]
    for name, adapter in zip(names, adapters, strict=True):
        if adapter.config.model_type != first.config.model_type:
            raise AdapterError(
                f"{name} is for a {adapter.config.model_type} model, {names[0]} for a "
                f"{first.config.model_type} one; combine adapters of one base"
            )
        if model is not None:
            check_base(adapter, model, name, read)
        elif read is not None:
            check_fingerprint(adapter, read, name)
        elif _projections(adapter) != _projections(first):
            raise AdapterError(
                f"{name} and {names[0]} touch different weights, which do not show whether "
                "their base is the same; pass it as model="
            )
        elif adapter.config.base_model_fingerprint != first.config.base_model_fingerprint:
            raise _other_base(name, adapter, names[0], first.config.base_model_fingerprint)


def check_base(
    adapter: SteeringAdapter, model: PreTrainedModel, name: str, read: ReadTensor | None = None
) -> None:
    """Refuse a live model that is not the base of `adapter`.

    Args:
        adapter: the adapter.
        model: the model.
        name: what the message calls the adapter.
        read: reads the base's tensors; None for those of `model`.

    Raises:
        AdapterError: another model type, or other weights.
        SiteError: a site or unit that the model does not have.
    """
    if model.config.model_type != adapter.config.model_type:
        raise AdapterError(
            f"{name} is for a {adapter.config.model_type} model, this one is "
            f"{model.config.model_type}; use the right base"
        )
    read = read or module_reader(model)
    check_sites(adapter.sites, adapter.architecture, text_config(model).num_hidden_layers, read)
    check_fingerprint(adapter, read, name)


def check_fingerprint(adapter: SteeringAdapter, read: ReadTensor, name: str) -> None:
    """Refuse weights that `adapter` was not made for.

    Args:
        adapter: the adapter.
        read: gives the base model's tensors by module name.
        name: what the message calls the adapter.

    Raises:
        AdapterError: fingerprints differ; the message shows both.
    """
    found = fingerprint(adapter.architecture, [steered.site for steered in adapter.sites], read)
    if found != adapter.config.base_model_fingerprint:
        raise _other_base(name, adapter, "this model", found)


def _other_base(name: str, adapter: SteeringAdapter, other: str, found: str) -> AdapterError:
    return AdapterError(
        f"{name} was made for another base model, {adapter.config.base_model_name_or_path!r} "
        f"with fingerprint {adapter.config.base_model_fingerprint}; {other} has "
        f"{found}; use the right base"
    )


def _projections(adapter: SteeringAdapter) -> set[str]:
    return {adapter.architecture.projection(steered.site) for steered in adapter.sites}


def _check_overlaps(
    shared: Sequence[Overlap], on_overlap: OnOverlap, names: Sequence[str]
) -> None:
    refused = [
        overlap
        for overlap in shared
        if on_overlap == "refuse" or (on_overlap == "sum" and not overlap.summable)
    ]
    if not refused:
        return
    worst = refused[0]
    who = " and ".join(
        name for name, value in zip(names, worst.gamma, strict=True) if value is not None
    )
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    remedy = (
        "choose other units"
        if on_overlap == "refuse"
        else "gains that read the input have no sum; on_overlap strongest keeps the larger"
    )
    raise AdapterError(f"{worst.site}: unit {worst.unit}{more} is steered by {who}: {remedy}")
