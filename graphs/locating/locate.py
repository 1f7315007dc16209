"""Find a site's activation in an ONNX graph by the module paths that its nodes carry.

A site is found by rules on those paths and on the graph's edges, or refused with the nearest
candidates; it is never guessed and never skipped. `austeer.graphs.locating.scopes` says where
paths come from, `projections` which nodes are projections.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from austeer.adapters.architectures import Architecture
from austeer.adapters.sites import Component, Refusal, Site
from austeer.graphs.locating.adopted import adopted_members, pathless_projections
from austeer.graphs.locating.projections import (
    Projection,
    element_type,
    is_projection,
    read_projection,
    stored_tensor,
)
from austeer.graphs.locating.scopes import NAME_SCOPES, module_path
from austeer.graphs.locating.skip_norm import added_bias, is_skip_norm, norm_width
from austeer.graphs.opset import DOMAIN

BUILDER_NAMES = {
    Component.ATTENTION: ("model.layers.{i}.attn.o_proj",),
    Component.FFN: ("model.layers.{i}.mlp.down_proj", "model.layers.{i}.mlp.fc2"),
}
"""Projections as the onnxruntime-genai builder calls them, for every architecture."""

_NORMS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"})
_ON_THE_WAY = _NORMS | {"Cast"}
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


class SiteLocator:
    """Locates sites of one graph; the graph must not change between look-ups.

    Args:
        graph: main graph of a model from `torch.onnx`, optimum or the onnxruntime-genai
            builder, quantized or not.
        architecture: row of the exported model.
    """

    def __init__(self, graph: ir.Graph, architecture: Architecture) -> None:
        self._branches = any(node.op_type == "If" for node in graph)
        self._pathless = pathless_projections(graph)
        self._architecture = architecture
        self._members: dict[str, list[ir.Node]] = {}
        self._nameless: list[ir.Node] = []
        for node in graph:
            if node.domain == DOMAIN:
                continue
            path = module_path(node)
            if not path:
                self._nameless.append(node)
            for scope in dict.fromkeys(path):
                self._members.setdefault(scope, []).append(node)

    def find(self, site: Site) -> Place | Refusal:
        """The place of `site`, or why it cannot be found."""
        if site.component is Component.LAYER:
            return self._layer(site)
        if site.component is Component.FFN and self._is_mixture(site):
            return self._block(site)
        module, projection = self._projection(site)
        if isinstance(projection, Refusal):
            return projection
        if self._architecture.hookpoint(site).side == "input":
            # Other readers of the activation are not part of the site.
            readers, width = (projection.reader,), projection.in_width
            return _place(site, module, projection.activation, readers, projection, width)
        return self._output(site, module, projection)

    def _is_mixture(self, site: Site) -> bool:
        """Whether the layer's MLP has nodes, and none that are its one last projection."""
        row = self._architecture
        if row.mixture is None:
            return False
        paths = row.block(site.layer), row.projection(Site(site.layer, Component.FFN))
        block, last = (self._module(site, [path]) for path in paths)
        return isinstance(block, str) and isinstance(last, Refusal)

    def _block(self, site: Site) -> Place | Refusal:
        """What leaves the block of a mixture of experts: routing stays inside."""
        module = self._module(site, [self._architecture.block(site.layer)])
        if isinstance(module, Refusal):
            return module
        inside = dict.fromkeys(self._members[module])
        for node in self._nameless:
            # What an exporter puts between two nodes, such as the halves of a projection. The
            # next norm has lost its name where an optimizer fused the residual sum into it.
            if is_skip_norm(node) or node.op_type in _NORMS:
                continue
            sources = [value.producer() for value in node.inputs if value is not None]
            if any(source in inside for source in sources):
                inside[node] = None
        given = [value for node in inside for value in node.outputs]
        leaving = [value for value in _leaving(given, {*inside}) if _may_be_activation(value)]
        return _only(site, module, leaving, "as the mixture's output", None)

    def projection(self, site: Site) -> Projection | Refusal:
        """The projection whose weight bounds `site` (for `layer`: the MLP's last)."""
        return self._projection(site)[1]

    def bias(self, site: Site) -> ir.TensorProtocol | None:
        """The stored vector that the module of `site`'s projection adds; None without one."""
        module, projection = self._projection(site)
        if isinstance(projection, Refusal):
            return None
        adding = [node for node in self._members[module] if node.op_type in ("Add", "Gemm")]
        added = [value for node in adding for value in node.inputs]
        for node in [projection.node, *adding]:
            for reader in node.outputs[0].consumers():
                added += [added_bias(reader)] if is_skip_norm(reader) else []
        behind = [stored_tensor(value) for value in added]
        vectors = [found[0] for found in behind if found and len(found[0].shape) == 1]
        return vectors[0] if len(vectors) == 1 else None

    def _projection(self, site: Site) -> tuple[str, Projection | Refusal]:
        paths = self._projection_paths(site)
        module = self._module(site, paths)
        if isinstance(module, Refusal) and self._adopt(paths[0]):
            module = paths[0]
        if isinstance(module, Refusal):
            return "", module
        members = self._members[module]
        found = [node for node in members if is_projection(node)]
        if not found and self._adopt(module):
            return self._projection(site)
        if len(found) != 1:
            present = ", ".join(sorted({node.op_type for node in members}))
            refusal = Refusal(
                site,
                f"module {module}: expected one matrix product, found {len(found)} among "
                f"{present}",
            )
            return module, refusal
        projection = read_projection(found[0])
        if isinstance(projection, str):
            return module, Refusal(site, f"module {module}: {projection}")
        return module, projection

    def _projection_paths(self, site: Site) -> list[str]:
        attention = site.component is Component.ATTENTION
        built = BUILDER_NAMES[Component.ATTENTION if attention else Component.FFN]
        ours = self._architecture.projection(site)
        return list(dict.fromkeys([ours, *(path.format(i=site.layer) for path in built)]))

    def _module(self, site: Site, paths: Sequence[str]) -> str | Refusal:
        # An exported wrapper puts its own attribute name in front of every path.
        found = [
            name
            for name in self._members
            if any(name == path or name.endswith(f".{path}") for path in paths)
        ]
        if len(found) == 1:
            return found[0]
        if found:
            return Refusal(
                site, f"module {paths[0]} is ambiguous in the graph: {', '.join(sorted(found))}"
            )
        if not self._members and self._branches:
            return Refusal(
                site,
                "the decoder layers are in the branches of an If node (a merged model); graft "
                "onto the model before it was merged",
            )
        if not self._members:
            return Refusal(
                site,
                "the graph's nodes carry no module paths, neither in their names nor under "
                f"{NAME_SCOPES}; export the base with optimum, with the onnxruntime-genai "
                "builder, or with torch.onnx.export(dynamo=True)",
            )
        return Refusal(
            site, f"module {paths[0]} is not in the graph; nearest: {self._near(paths[0])}"
        )

    def _adopt(self, module: str) -> bool:
        adopted = adopted_members(self._pathless, module)
        self._members.setdefault(module, []).extend(adopted)
        if not self._members[module]:
            del self._members[module]
        return bool(adopted)

    def _near(self, path: str) -> str:
        near = difflib.get_close_matches(path, [n for n in self._members if n], n=3, cutoff=0)
        return ", ".join(near) or "none"

    def _output(self, site: Site, module: str, projection: Projection) -> Place | Refusal:
        result = projection.node.outputs[0]
        inside = set(self._members[module])
        reached = [result, *_downstream(result, inside)]
        leaving = [value for value in _leaving(reached, inside) if _may_be_activation(value)]
        for reader in (reader for value in leaving for reader in value.consumers()):
            if is_skip_norm(reader) and added_bias(reader) is not None:
                return Refusal(
                    site,
                    f"module {module}: its bias is added inside {reader.name}; graft before "
                    "onnxruntime's optimizer fuses biases into norms",
                )
        return _only(site, module, leaving, f"behind {projection.node.name}", projection)

    def _layer(self, site: Site) -> Place | Refusal:
        layer = self._architecture.layer.format(i=site.layer)
        module = self._module(site, list(dict.fromkeys([layer, f"model.layers.{site.layer}"])))
        if isinstance(module, Refusal):
            return module
        projection = None if self._is_mixture(site) else self.projection(site)
        if isinstance(projection, Refusal):
            return projection
        # The sum behind the attention leaves the layer, too, where a fused norm reads it.
        behind = _behind(self._last_nodes(site, projection))
        leaving = _leaving(self._sums(module), set(self._members[module]))
        leaving = [value for value in leaving if value in behind]
        # What only a skip norm reads is a part of the sum that the norm computes.
        inner = [v for v in leaving if (node := _only_reader(v)) and is_skip_norm(node)]
        if projection is not None and len(leaving) == len(inner):
            start = inner[0] if inner else projection.node.outputs[0]
            hidden = _hidden_sum(site, module, projection, start)
            if hidden is not None:
                return hidden
        return _only(site, module, leaving, "among the layer's own sums", projection)

    def _last_nodes(self, site: Site, projection: Projection | None) -> list[ir.Node]:
        """What the layer's own output comes behind: its last projection, or its mixture."""
        if projection is not None:
            return [projection.node]
        block = self._module(site, [self._architecture.block(site.layer)])
        return [] if isinstance(block, Refusal) else self._members[block]

    def _sums(self, layer: str) -> list[ir.Value]:
        """The sums that the layer itself computes, and those brought into another shape."""
        own = self._members[layer]
        if self._architecture.own_blocks:
            own = [node for node in own if module_path(node)[-1] == layer]
        sums = [node.outputs[0] for node in own if _standard(node, "Add")]
        shaped = [node for node in own if _standard(node, "Reshape") and node.inputs[0] in sums]
        return [*sums, *(node.outputs[0] for node in shaped)]


def _standard(node: ir.Node, op_type: str) -> bool:
    return node.domain == "" and node.op_type == op_type


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = list(dict.fromkeys(value.consumers()))
    return readers[0] if len(readers) == 1 else None


def _hidden_sum(
    site: Site, module: str, projection: Projection, value: ir.Value
) -> Place | None:
    """The sum of a decoder layer that the next norm computes, found from a part of it."""
    for _ in range(8):
        node = _only_reader(value)
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


def _behind(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    """Every value that is computed from what these nodes make."""
    seen, queue = set(nodes), list(nodes)
    found: set[ir.Value] = set()
    while queue:
        for value in queue.pop().outputs:
            found.add(value)
            fresh = set(value.consumers()) - seen
            seen |= fresh
            queue += fresh
    return found


def _downstream(start: ir.Value, inside: set[ir.Node]) -> Iterator[ir.Value]:
    seen, queue = {start}, [start]
    while queue:
        for node in queue.pop().consumers():
            for value in node.outputs if node in inside else ():
                if value not in seen:
                    seen.add(value)
                    queue.append(value)
                    yield value


def _may_be_activation(value: ir.Value) -> bool:
    """Shapes taken of the result are integers, and products of integers come before floats."""
    if value.dtype is not None:
        return value.dtype.is_floating_point()
    producer = value.producer()
    return producer is None or producer.op_type not in ("Shape", "Size", "MatMulInteger")


def _leaving(values: Iterable[ir.Value], inside: set[ir.Node]) -> list[ir.Value]:
    """Those values that a node outside reads, or that are outputs of the graph."""
    return [
        value
        for value in values
        if value.is_graph_output() or any(node not in inside for node in value.consumers())
    ]


def _only(
    site: Site,
    module: str,
    values: Sequence[ir.Value],
    where: str,
    projection: Projection | None,
) -> Place | Refusal:
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
    return _place(site, module, values[0], None, projection, width)


def _place(
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
