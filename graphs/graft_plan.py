"""What a graft inserts: steering nodes, their constants, and what a run may set anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from austeer.adapters._errors import GraphError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import Architecture
from austeer.adapters.sites import Site
from austeer.adapters.steered_site import SteeredSite
from austeer.graphs.opset import (
    MAX_RANK,
    SCALE_INPUT,
    STEER_AU,
    STEER_AU_ADAPTIVE,
    SteerOp,
    initializer_name,
    node_name,
)

Array = np.ndarray[Any, np.dtype[Any]]


class ScaleAs(StrEnum):
    """What the strength factor is in the graph."""

    CONSTANT = "constant"
    """The initializer `austeer.scale`."""
    REQUIRED = "required"
    """The graph input `steering_scale`, to be fed at each run."""
    OPTIONAL = "optional"
    """The graph input `steering_scale` with a default, which onnxruntime's C, C++, C# and
    Python interfaces can set and all others leave alone."""


@dataclass(frozen=True, slots=True, eq=False)
class SteeringNode:
    """One node of a graft.

    Attributes:
        site: what it steers.
        op: its operator.
        slot: number of the slot it belongs to; nodes of later slots follow at the same site.
        tensors: its constants by input name; of a switchable node, what holds when no
            adapter is active.
        switchable: whether its constants are graph inputs with a default.
    """

    site: Site
    op: SteerOp
    slot: int
    tensors: Mapping[str, Array]
    switchable: bool

    @property
    def name(self) -> str:
        """Graph name of the node."""
        return node_name(self.site.key, self.slot)

    def constant_name(self, tensor: str) -> str:
        """Graph name of one of its constants."""
        return initializer_name(self.site.key, tensor, self.slot)

    def named(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """`tensors` by the names that they have in the graph."""
        return {self.constant_name(name): array for name, array in tensors.items()}


@dataclass(frozen=True, slots=True, eq=False)
class GraftPlan:
    """All that a graft inserts.

    Attributes:
        architecture: row of the base model.
        nodes: the nodes, in the order in which they are inserted.
        scale: strength factor, or its default.
        scale_as: what the factor is in the graph.
        switched: of each adapter of a switchable graft, the values of the graph inputs that
            make it active; empty for a fixed one.
    """

    architecture: Architecture
    nodes: tuple[SteeringNode, ...]
    scale: float = 1.0
    scale_as: ScaleAs = ScaleAs.CONSTANT
    switched: tuple[Mapping[str, Array], ...] = ()


def plan_graft(
    adapter: SteeringAdapter, scale: float = 1.0, scale_as: ScaleAs = ScaleAs.CONSTANT
) -> GraftPlan:
    """A graft that steers by one adapter, always.

    Raises:
        GraphError: a predictor of a rank that the compiled kernels do not take.
    """
    nodes = [
        SteeringNode(steered.site, op, 0, _tensors(steered, op), switchable=False)
        for steered in adapter.sites
        for op in [_operator([steered])]
    ]
    return GraftPlan(adapter.architecture, tuple(nodes), scale, scale_as)


def plan_switchable_graft(
    adapters: Sequence[SteeringAdapter],
    scale: float = 1.0,
    scale_as: ScaleAs = ScaleAs.CONSTANT,
    *,
    together: bool = False,
) -> GraftPlan:
    """A graft of empty sites, which a run fills with the values of one of the adapters.

    Args:
        adapters: for one base model.
        scale: strength factor; part of the values unless it is an input of its own.
        scale_as: what the factor is in the graph.
        together: give each adapter sites of its own, one behind the other, so that several
            can be active in one run; their gains multiply where they share a unit.

    Raises:
        GraphError: no adapter, adapters for different architectures, or a predictor of a
            rank that the compiled kernels do not take.
    """
    if not adapters:
        raise GraphError("graft: expected at least one adapter, got none")
    architecture = adapters[0].architecture
    for adapter in adapters:
        if adapter.architecture is not architecture:
            raise GraphError(
                f"graft: adapters for {architecture.model_type} and "
                f"{adapter.architecture.model_type} models; graft those of one base model"
            )
    slots = [[adapter] for adapter in adapters] if together else [list(adapters)]
    nodes, values = [], []
    for number, members in enumerate(slots):
        own = _slot_nodes(members, number)
        nodes += own
        values += [_values(adapter, own) for adapter in members]
    if scale_as is ScaleAs.CONSTANT:
        # An adapter that is not active has gains of 1 at any scale: one input serves all.
        factor = {SCALE_INPUT: np.array([scale], np.float32)}
        scale_as = ScaleAs.OPTIONAL
        values = [own if together else own | factor for own in values]
    return GraftPlan(architecture, tuple(nodes), scale, scale_as, tuple(values))


def _slot_nodes(adapters: Sequence[SteeringAdapter], slot: int) -> list[SteeringNode]:
    sites: dict[Site, list[SteeredSite]] = {}
    for adapter in adapters:
        for steered in adapter.sites:
            sites.setdefault(steered.site, []).append(steered)
    return [
        SteeringNode(site, op, slot, _empty(op), switchable=True)
        for site, members in sorted(sites.items())
        for op in [_operator(members)]
    ]


def _values(adapter: SteeringAdapter, nodes: Sequence[SteeringNode]) -> dict[str, Array]:
    own = {steered.site: steered for steered in adapter.sites}
    found: dict[str, Array] = {}
    for node in nodes:
        if node.site in own:
            found |= node.named(_tensors(own[node.site], node.op))
    return found


def _operator(members: Sequence[SteeredSite]) -> SteerOp:
    constant = all(steered.predictor is None for steered in members)
    return STEER_AU if constant else STEER_AU_ADAPTIVE


def _tensors(steered: SteeredSite, op: SteerOp) -> dict[str, Array]:
    tensors: dict[str, Array] = {"idx": steered.index, "gamma": steered.gamma}
    predictor = steered.predictor
    if predictor is not None:
        if (rank := predictor.V.shape[1]) > MAX_RANK:
            raise GraphError(
                f"{steered.site}: its predictor has rank {rank}, the compiled kernels take up "
                f"to {MAX_RANK}; fit it with a --rank up to that"
            )
        parts = {"V": predictor.V, "b": predictor.b, "U": predictor.U}
        tensors |= {k: np.ascontiguousarray(v, np.float32) for k, v in parts.items()}
    elif op is STEER_AU_ADAPTIVE:
        tensors |= _predict_one(len(steered.index))
    return {name: tensors[name] for name in op.tensors}


def _empty(op: SteerOp) -> dict[str, Array]:
    """One unit with a gain of 1: no runtime handles tensors without elements everywhere."""
    tensors: dict[str, Array] = {"idx": np.zeros(1, np.int64), "gamma": np.zeros(1, np.float32)}
    tensors |= _predict_one(1)
    return {name: tensors[name] for name in op.tensors}


def _predict_one(k: int) -> dict[str, Array]:
    """A predictor that says φ = 1 for every token."""
    shapes = {"V": (k, 1), "b": (1,), "U": (1, k)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
