"""`Place`: where a site is in an ONNX graph, and what a graph must say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from austeer.adapters.sites import Refusal, Site
from austeer.graphs.locating.edges import only_reader
from austeer.graphs.locating.projections import Projection, element_type
from austeer.graphs.locating.scopes import module_path
from austeer.graphs.locating.skip_norm import is_skip_norm, norm_width

NORMS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"})
_ON_THE_WAY = NORMS | {"Cast"}
"""What may lie between a projection and the residual sum that a skip norm computes."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a site is in a graph.

    Attributes:
        site: the site.
        value: its activation, `[..., width]`; for a sum that a fused norm hides, one of the
            two values added.
        width: length of the activation's last axis.
        readers: the nodes that must read the steered activation; None stands for all of
            them, the graph's outputs included.
        module: full module path in this graph, for the metadata of grafted nodes.
        dtype: element type of the activation; None where the graph is silent.
        skip_norm: the fused norm that hides the site's sum; None where `value` is the site.
    """

    site: Site
    value: ir.Value
    width: int
    readers: tuple[ir.Node, ...] | None
    module: str
    dtype: ir.DataType | None = None
    skip_norm: ir.Node | None = None


def hidden_sum(
    site: Site, module: str, projection: Projection, value: ir.Value
) -> Place | None:
    """The sum of a decoder layer that the next norm computes, found from a part of it."""
    for _ in range(8):
        node = only_reader(value)
        if node is None:
            return None
        if is_skip_norm(node) and value in node.inputs[:2]:
            width = norm_width(node) or projection.out_width
            if width is None:
                return None
            dtype = element_type(value, projection)
            return Place(site, value, width, None, module, dtype, node)
        inside = module_path(node)[-1:] == module_path(projection.node)[-1:]
        if not inside and node.op_type not in _ON_THE_WAY:
            return None
        value = node.outputs[0]
    return None


def only_place(
    site: Site,
    module: str,
    values: Sequence[ir.Value],
    where: str,
    projection: Projection | None,
) -> Place | Refusal:
    """The place of the one value that leaves a module; a refusal for none, or several.

    Args:
        site: the site.
        module: the module's path in the graph.
        values: what leaves it.
        where: where in the module that was looked for, for the message.
        projection: the module's projection, where it has one.
    """
    if len(values) != 1:
        names = ", ".join(str(value.name) for value in values) or "none"
        return Refusal(
            site, f"module {module}: expected one value that leaves it {where}, found {names}"
        )
    for reader in values[0].consumers():
        if reader.op_type == "QuantizeLinear":
            return Refusal(
                site,
                f"module {module}: {reader.name} clips {values[0].name} to a range that was "
                "fixed without steering; graft onto the float model, or one quantized "
                "dynamically",
            )
    width = None if projection is None else projection.out_width
    return checked_place(site, module, values[0], None, projection, width)


def checked_place(
    site: Site,
    module: str,
    value: ir.Value,
    readers: tuple[ir.Node, ...] | None,
    projection: Projection | None,
    width: int | None,
) -> Place | Refusal:
    """The place, with what its own value says before what the projection says."""
    own = value.shape[-1] if value.shape is not None and len(value.shape) else None
    width = own if isinstance(own, int) else width
    if width is None:
        return Refusal(
            site,
            f"module {module}: the width of {value.name} is not in the graph; "
            "run onnx.shape_inference on the base model",
        )
    reads = projection is not None and value is projection.activation
    dtype = projection.dtype if projection and reads else element_type(value, projection)
    return Place(site, value, width, readers, module, dtype)
