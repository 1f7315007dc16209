"""Find a site's activation in an ONNX graph by the module paths that its nodes carry.

A site is found by rules on those paths and on the graph's edges, or refused with the nearest
candidates; it is never guessed and never skipped. `austeer.graphs.locating.scopes` says where
paths come from, `projections` which nodes are projections.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import onnx_ir as ir

from austeer.adapters._errors import GraphError
from austeer.adapters.architectures import Architecture
from austeer.adapters.sites import Component, Refusal, Site
from austeer.graphs.locating.adopted import adopted_members, pathless_projections
from austeer.graphs.locating.edges import (
    downstream,
    is_standard,
    may_be_activation,
    only_reader,
    values_behind,
    values_leaving,
)
from austeer.graphs.locating.places import (
    NORMS,
    Place,
    checked_place,
    hidden_sum,
    only_place,
)
from austeer.graphs.locating.projections import (
    FLOATS,
    Projection,
    is_projection,
    read_projection,
    stored_tensor,
)
from austeer.graphs.locating.scopes import NAME_SCOPES, module_path
from austeer.graphs.locating.skip_norm import added_bias, is_skip_norm
from austeer.graphs.opset import DOMAIN

BUILDER_NAMES = {
    Component.ATTENTION: ("model.layers.{i}.attn.o_proj",),
    Component.FFN: ("model.layers.{i}.mlp.down_proj", "model.layers.{i}.mlp.fc2"),
}
"""Projections as the onnxruntime-genai builder calls them, for every architecture."""


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
            return checked_place(
                site, module, projection.activation, readers, projection, width
            )
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
            if is_skip_norm(node) or node.op_type in NORMS:
                continue
            sources = [value.producer() for value in node.inputs if value is not None]
            if any(source in inside for source in sources):
                inside[node] = None
        given = [value for node in inside for value in node.outputs]
        leaving = [
            value for value in values_leaving(given, {*inside}) if may_be_activation(value)
        ]
        return only_place(site, module, leaving, "as the mixture's output", None)

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
        if not found:
            # optimum exports the inner model of OPT alone, whose paths lack the outer's name.
            inner = {path.partition(".")[2] for path in paths if "." in path}
            found = [name for name in self._members if name in inner]
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
        reached = [result, *downstream(result, inside)]
        leaving = [
            value for value in values_leaving(reached, inside) if may_be_activation(value)
        ]
        for reader in (reader for value in leaving for reader in value.consumers()):
            if is_skip_norm(reader) and added_bias(reader) is not None:
                return Refusal(
                    site,
                    f"module {module}: its bias is added inside {reader.name}; graft before "
                    "onnxruntime's optimizer fuses biases into norms",
                )
        return only_place(site, module, leaving, f"behind {projection.node.name}", projection)

    def _layer(self, site: Site) -> Place | Refusal:
        layer = self._architecture.layer.format(i=site.layer)
        module = self._module(site, list(dict.fromkeys([layer, f"model.layers.{site.layer}"])))
        if isinstance(module, Refusal):
            return module
        projection = None if self._is_mixture(site) else self.projection(site)
        if isinstance(projection, Refusal):
            return projection
        # The sum behind the attention leaves the layer, too, where a fused norm reads it.
        behind = values_behind(self._last_nodes(site, projection))
        leaving = values_leaving(self._sums(module), set(self._members[module]))
        leaving = [value for value in leaving if value in behind]
        # What only a skip norm reads is a part of the sum that the norm computes.
        inner = [v for v in leaving if (node := only_reader(v)) and is_skip_norm(node)]
        if projection is not None and len(leaving) == len(inner):
            start = inner[0] if inner else projection.node.outputs[0]
            hidden = hidden_sum(site, module, projection, start)
            if hidden is not None:
                return hidden
        return only_place(site, module, leaving, "among the layer's own sums", projection)

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
        sums = [node.outputs[0] for node in own if is_standard(node, "Add")]
        shaped = [
            node for node in own if is_standard(node, "Reshape") and node.inputs[0] in sums
        ]
        return [*sums, *(node.outputs[0] for node in shaped)]


def locate_sites(locator: SiteLocator, sites: Sequence[Site]) -> list[Place]:
    """Places of `sites`, in their order.

    Raises:
        GraphError: a site is not found, or cannot be steered here.
    """
    places: list[Place] = []
    for site in sites:
        place = locator.find(site)
        if isinstance(place, Refusal):
            raise GraphError(str(place))
        _check_place(place, places)
        places.append(place)
    return places


def _check_place(place: Place, others: list[Place]) -> None:
    if place.dtype not in FLOATS:
        raise GraphError(
            f"{place.site}: {place.value.name} is {place.dtype or 'of unknown type'}, expected "
            "float, float16 or bfloat16; graft onto a model with floating activations"
        )
    for other in others:
        if other.value is place.value and other.skip_norm is place.skip_norm:
            raise GraphError(
                f"{place.site}: is the same value as {other.site} in this graph "
                f"({place.value.name}); steer only one of them"
            )
