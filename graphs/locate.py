"""Find a site's activation in an ONNX graph by the module paths that its nodes carry.

`torch.onnx.export(dynamo=True)` writes the path of every enclosing module into each node's
metadata. A site is found by rules on those paths and on the graph's edges, or refused with
the nearest candidates; it is never guessed and never skipped.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from austeer.adapters.architectures import Architecture
from austeer.adapters.sites import Component, Refusal, Site

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key: `['', 'model', …, module path, name of the traced operation]`."""

PROJECTION_OPS = frozenset({"MatMul", "Gemm"})
"""Operators that a projection module becomes; each reads its activation as first input."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a site is in a graph.

    Attributes:
        site: the site.
        value: its activation, `[..., width]`.
        width: length of the activation's last axis.
        readers: the nodes that must read the steered activation; None stands for all of
            them, the graph's outputs included.
        module: full module path in this graph, for the metadata of grafted nodes.
    """

    site: Site
    value: ir.Value
    width: int
    readers: tuple[ir.Node, ...] | None
    module: str


def module_path(node: ir.Node) -> tuple[str, ...]:
    """Paths of the modules around a node, outermost first; empty where it carries none."""
    text = node.metadata_props.get(NAME_SCOPES, "")
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ()
    if not isinstance(scopes, (list, tuple)):
        return ()
    # The last entry names the traced operation, not a module.
    return tuple(str(scope) for scope in scopes[:-1])


class SiteLocator:
    """Locates sites of one graph; the graph must not change between look-ups.

    Args:
        graph: main graph of a model exported by `torch.onnx.export(dynamo=True)`.
        architecture: row of the exported model.
    """

    def __init__(self, graph: ir.Graph, architecture: Architecture) -> None:
        self._architecture = architecture
        self._members: dict[str, list[ir.Node]] = {}
        for node in graph:
            for scope in dict.fromkeys(module_path(node)):
                self._members.setdefault(scope, []).append(node)

    def find(self, site: Site) -> Place | Refusal:
        """The place of `site`, or why it cannot be found."""
        hookpoint = self._architecture.hookpoint(site)
        module = self._module(site, hookpoint.module)
        if isinstance(module, Refusal):
            return module
        members = self._members[module]
        if site.component is Component.LAYER:
            return _layer_output(site, module, members)
        projection = _projection(site, module, members)
        if isinstance(projection, Refusal):
            return projection
        if hookpoint.side == "input":
            return _projection_input(site, module, projection)
        return _projection_output(site, module, members, projection)

    def _module(self, site: Site, path: str) -> str | Refusal:
        # An exported wrapper puts its own attribute name in front of every path.
        found = [name for name in self._members if name == path or name.endswith(f".{path}")]
        if len(found) == 1:
            return found[0]
        if found:
            return Refusal(
                site, f"module {path} is ambiguous in the graph: {', '.join(sorted(found))}"
            )
        if not self._members:
            return Refusal(
                site,
                f"the graph's nodes carry no module paths ({NAME_SCOPES}); export the base "
                "with torch.onnx.export(dynamo=True) and keep its metadata",
            )
        return Refusal(site, f"module {path} is not in the graph; nearest: {self._near(path)}")

    def _near(self, path: str) -> str:
        near = difflib.get_close_matches(path, [n for n in self._members if n], n=3, cutoff=0)
        return ", ".join(near) or "none"


def _projection(site: Site, module: str, members: Sequence[ir.Node]) -> ir.Node | Refusal:
    found = [node for node in members if node.domain == "" and node.op_type in PROJECTION_OPS]
    if len(found) != 1:
        present = ", ".join(sorted({node.op_type for node in members}))
        wanted = " or ".join(sorted(PROJECTION_OPS))
        return Refusal(
            site,
            f"module {module}: expected one {wanted}, found {len(found)} among {present}",
        )
    node = found[0]
    if node.op_type == "Gemm" and node.attributes.get_int("transA", False):
        return Refusal(site, f"module {module}: {node.name} transposes its activation")
    return node


def _projection_input(site: Site, module: str, projection: ir.Node) -> Place | Refusal:
    value = projection.inputs[0]
    if value is None or value.is_initializer():
        return Refusal(
            site, f"module {module}: {projection.name} reads no activation as first input"
        )
    # Other readers of the activation are not part of the site.
    return _place(site, module, value, readers=(projection,))


def _projection_output(
    site: Site, module: str, members: Sequence[ir.Node], projection: ir.Node
) -> Place | Refusal:
    inside = set(members)
    result = projection.outputs[0]
    reached, queue = [result], [result]
    while queue:
        for node in queue.pop().consumers():
            if node in inside:
                fresh = [value for value in node.outputs if value not in reached]
                reached += fresh
                queue += fresh
    # Shapes taken of the result are integers.
    leaving = [v for v in _leaving(reached, inside) if v.dtype == result.dtype]
    return _only(site, module, leaving, f"behind {projection.name}")


def _layer_output(site: Site, module: str, members: Sequence[ir.Node]) -> Place | Refusal:
    own = [node for node in members if module_path(node)[-1] == module]
    sums = [node.outputs[0] for node in own if node.domain == "" and node.op_type == "Add"]
    return _only(site, module, _leaving(sums, set(members)), "among the layer's own sums")


def _leaving(values: Iterable[ir.Value], inside: set[ir.Node]) -> list[ir.Value]:
    """Those values that a node outside reads, or that are outputs of the graph."""
    return [
        value
        for value in values
        if value.is_graph_output() or any(node not in inside for node in value.consumers())
    ]


def _only(site: Site, module: str, values: Sequence[ir.Value], where: str) -> Place | Refusal:
    if len(values) != 1:
        names = ", ".join(str(value.name) for value in values) or "none"
        return Refusal(
            site, f"module {module}: expected one value that leaves it {where}, found {names}"
        )
    return _place(site, module, values[0], readers=None)


def _place(
    site: Site, module: str, value: ir.Value, readers: tuple[ir.Node, ...] | None
) -> Place | Refusal:
    width = value.shape[-1] if value.shape is not None and len(value.shape) else None
    if not isinstance(width, int):
        return Refusal(
            site,
            f"module {module}: the width of {value.name} is not in the graph; "
            "run onnx.shape_inference on the base model",
        )
    return Place(site, value, width, readers, module)
