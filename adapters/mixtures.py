"""Mixtures of experts, as data: how their tensors are named, and which of them carry a gain.

A mixture adds up what its experts give, y = sum_e r_e * (W_e @ h_e + b_e), with weights r_e
(0 where the router did not choose e) that depend on its input alone, plus what shared experts
give to every token. A gain g on y goes into each part: g * y is the same sum over g[:, None] *
W_e and g * b_e. So it does where a model scales the input of an expert by its weight (Llama 4),
which is within h_e, and where a gate scales a shared expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

from austeer.adapters.sites import Component, Refusal, Site

if TYPE_CHECKING:
    from austeer.adapters.architecture import Architecture

# A hundred times what models have; a header of a hundred bytes can claim any number.
_MAX_EXPERTS = 1 << 16

ShapeOf = Callable[[str], tuple[int, ...] | None]
"""Shape of a tensor by its name in the transformers class, None where there is none."""


@dataclass(frozen=True, slots=True)
class Experts:
    """One way in which the tensors of a mixture are stored; names are below the layer.

    Attributes:
        router: the tensor whose rows are the experts, in the order of their numbers.
        weight: last projection of expert `{e}`; without `{e}`, of all, which the first axis
            counts.
        bias: the same of its bias, None without one.
    """

    router: str
    weight: str
    bias: str | None = None

    @property
    def fused(self) -> bool:
        """Whether one tensor holds all experts."""
        return "{e}" not in self.weight


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a decoder layer has in place of a dense MLP.

    Attributes:
        stored: the ways in which transformers and published checkpoints store it.
        shared: last projection of the experts that see every token, below the layer.
        transposed: the experts' projections are stored `[in, out]`.
    """

    stored: tuple[Experts, ...]
    shared: str | None = None
    transposed: bool = False

    @property
    def well_formed(self) -> bool:
        """Whether every name is a path, and biases are stored as their weights are."""
        names = [(way.router, way.weight, way.bias or way.weight) for way in self.stored]
        once = all(weight.count("{e}") == bias.count("{e}") <= 1 for _, weight, bias in names)
        paths = [path.replace("{e}", "0") for way in names for path in way]
        parts = ".".join([*paths, self.shared or "mlp"]).split(".")
        return bool(names) and once and all(map(_is_name, parts))


def _is_name(part: str) -> bool:
    return part.isidentifier() or part.isdecimal()


@dataclass(frozen=True, slots=True)
class Carrier:
    """A weight or bias whose slices along `axis` belong to the units of a site.

    Attributes:
        module: the projection's name, the same however it is stored.
        kind: what it is of that projection.
        name: name of the tensor, as the transformers class or a checkpoint has it.
        axis: axis that counts units, within the part.
        part: number along the tensor's first axis where one tensor holds all experts.
    """

    module: str
    kind: Literal["weight", "bias"]
    name: str
    axis: int
    part: int | None = None

    @property
    def stored_axis(self) -> int:
        """Axis of the whole tensor that counts units."""
        return self.axis + (self.part is not None)


def projections_of(
    row: Architecture, site: Site, shape: ShapeOf
) -> tuple[Carrier, ...] | Refusal:
    """Weights and biases of the projections that bound `site`, in a model or a checkpoint.

    For `layer` they are the MLP's. A dense weight is named whether it is there or not.

    Args:
        row: the architecture.
        site: the site.
        shape: gives the shapes of what there is.
    """
    stored = stored_experts(row, site.layer, shape)
    if stored and site.component is Component.NEURON:
        return Refusal(
            site,
            "this layer is a mixture of experts, which has no one down_proj input: each "
            "token has those of its own experts; steer ffn (the mixture's output), attention "
            "or layer",
        )
    if stored and site.component is not Component.ATTENTION:
        return _mixture(row, site, stored, shape)
    module = row.projection(site)
    weight = Carrier(module, "weight", f"{module}.weight", row.width_axis(site.component))
    bias = Carrier(module, "bias", f"{module}.bias", 0)
    return (weight, bias) if shape(bias.name) is not None else (weight,)


def carriers(row: Architecture, site: Site, shape: ShapeOf) -> tuple[Carrier, ...] | Refusal:
    """The tensors that absorb a gain at `site`; arguments as `projections_of`."""
    found = projections_of(row, site, shape)
    if isinstance(found, Refusal) or site.component is Component.FFN:
        return found
    # A bias is added behind the input side.
    return tuple(carrier for carrier in found if carrier.kind == "weight")


def stored_experts(row: Architecture, layer: int, shape: ShapeOf) -> tuple[Experts, ...]:
    """The ways in which layer number `layer` stores a mixture; none for a dense layer."""
    if row.mixture is None:
        return ()
    path = row.layer.format(i=layer)
    there = [way for way in row.mixture.stored if shape(f"{path}.{way.router}") is not None]
    first = [way for way in there if shape(f"{path}.{way.weight.format(e=0)}") is not None]
    # A router without experts is a mixture, too: an error that names them comes later.
    return tuple(first or there)


def _mixture(
    row: Architecture, site: Site, stored: tuple[Experts, ...], shape: ShapeOf
) -> tuple[Carrier, ...] | Refusal:
    path = row.layer.format(i=site.layer)
    way = stored[0]
    if len(stored) > 1 and shape(f"{path}.{way.weight.format(e=0)}") is not None:
        return Refusal(
            site,
            f"{path}.{way.weight} stands beside {path}.{stored[1].weight}, the same experts "
            "twice; save the model again with one of them",
        )
    routed = shape(f"{path}.{way.router}")
    count = routed[0] if routed else 0
    if not 0 < count <= _MAX_EXPERTS:
        return Refusal(
            site,
            f"{path}.{way.router} has {count} rows, expected one for each expert (1 to "
            f"{_MAX_EXPERTS}); fetch the base model again",
        )
    found = []
    for carrier in chain(_experts(row, path, way, count), _shared(row, path, shape)):
        there = shape(carrier.name)
        if there is None or not _holds(there, carrier, count):
            return Refusal(
                site,
                f"{carrier.name} {_what_is_there(there, carrier)}, the router has {count} "
                "rows; is it the whole base model, not quantized?",
            )
        found.append(carrier)
    return tuple(found)


def _holds(there: tuple[int, ...], carrier: Carrier, count: int) -> bool:
    """Whether a tensor has the axis of units, and a part for each of `count` experts."""
    whole = carrier.part is None or there[:1] == (count,)
    return whole and len(there) > carrier.stored_axis


def _what_is_there(there: tuple[int, ...] | None, carrier: Carrier) -> str:
    if there is None:
        return "is not there"
    if carrier.part is None or len(there) <= carrier.stored_axis:
        return f"has shape {there}"
    return f"holds {there[0]} experts"


def _experts(row: Architecture, path: str, way: Experts, count: int) -> Iterator[Carrier]:
    assert row.mixture is not None
    axis = int(row.mixture.transposed)
    for number in range(count):
        module = f"{path}.experts.{number}"
        part = number if way.fused else None
        name = f"{path}.{way.weight.format(e=number)}"
        yield Carrier(module, "weight", name, axis, part)
        if way.bias is not None:
            yield Carrier(module, "bias", f"{path}.{way.bias.format(e=number)}", 0, part)


def _shared(row: Architecture, path: str, shape: ShapeOf) -> Iterator[Carrier]:
    if row.mixture is None or row.mixture.shared is None:
        return
    module = f"{path}.{row.mixture.shared}"
    yield Carrier(module, "weight", f"{module}.weight", 0)
    if shape(f"{module}.bias") is not None:
        yield Carrier(module, "bias", f"{module}.bias", 0)
