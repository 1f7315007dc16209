"""Projections that a tool rewrote and left without a module path, given their module back.

Quantizers make new nodes, without the metadata in which `torch.onnx.export(dynamo=True)`
keeps module paths. What lies around them still says where they are: the last projection of a
block reads what the block makes and is read by what lies outside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from austeer.graphs.locating.projections import is_projection, read_projection
from austeer.graphs.locating.scopes import module_path


def pathless_projections(graph: ir.Graph) -> list[ir.Node]:
    """The projections of a graph that no module path names."""
    return [node for node in graph if is_projection(node) and not module_path(node)]


def adopted_members(pathless: Iterable[ir.Node], module: str) -> list[ir.Node]:
    """The pathless projection that must be `module`, with the pathless nodes behind it.

    Args:
        pathless: the graph's projections without a path.
        module: path of a projection that is the last one of its block, the parent module.

    Returns:
        Empty unless exactly one projection fits.
    """
    block = module.rpartition(".")[0]
    found = [node for node in pathless if _fits(node, module, block)]
    if len(found) != 1:
        return []
    return [found[0], *_pathless_behind(found[0])]


def _fits(node: ir.Node, module: str, block: str) -> bool:
    projection = read_projection(node)
    if isinstance(projection, str):
        return False
    maker = projection.activation.producer()
    if maker is None or not _inside(maker, block):
        return False
    behind = [node, *_pathless_behind(node)]
    readers = [r for part in behind for value in part.outputs for r in value.consumers()]
    known = [reader for reader in readers if module_path(reader)]
    return bool(known) and all(_inside(r, module) or not _inside(r, block) for r in known)


def _pathless_behind(node: ir.Node) -> Iterator[ir.Node]:
    seen, queue = {node}, [node]
    while queue:
        for value in queue.pop().outputs:
            for reader in value.consumers():
                if reader in seen or module_path(reader) or not _finishes_product(reader):
                    continue
                seen.add(reader)
                queue.append(reader)
                yield reader


def _finishes_product(node: ir.Node) -> bool:
    """Whether a node only scales or shifts, as quantizers do behind a product of integers."""
    if node.op_type == "Cast":
        return True
    return node.op_type in ("Mul", "Add") and any(_is_factor(value) for value in node.inputs)


def _is_factor(value: ir.Value | None) -> bool:
    """Whether a value holds scales or a bias, and no activation."""
    if value is None or value.const_value is not None:
        return value is not None
    maker = value.producer()
    if maker is None or maker.op_type == "DynamicQuantizeLinear":
        return maker is not None
    return maker.op_type in ("Mul", "Cast") and all(_is_factor(part) for part in maker.inputs)


def _inside(node: ir.Node, module: str) -> bool:
    return any(path == module or path.endswith(f".{module}") for path in module_path(node))
