"""Walks along the edges of an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir


def is_standard(node: ir.Node, op_type: str) -> bool:
    """Whether a node is of this type of the default domain."""
    return node.domain == "" and node.op_type == op_type


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads `value`; None where there are several, or none."""
    readers = list(dict.fromkeys(value.consumers()))
    return readers[0] if len(readers) == 1 else None


def values_behind(nodes: Iterable[ir.Node]) -> set[ir.Value]:
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


def downstream(start: ir.Value, inside: set[ir.Node]) -> Iterator[ir.Value]:
    """Every value that the nodes `inside` compute from `start`, one behind the other."""
    seen, queue = {start}, [start]
    while queue:
        for node in queue.pop().consumers():
            for value in node.outputs if node in inside else ():
                if value not in seen:
                    seen.add(value)
                    queue.append(value)
                    yield value


def may_be_activation(value: ir.Value) -> bool:
    """Shapes taken of the result are integers, and products of integers come before floats."""
    if value.dtype is not None:
        return value.dtype.is_floating_point()
    producer = value.producer()
    return producer is None or producer.op_type not in ("Shape", "Size", "MatMulInteger")


def values_leaving(values: Iterable[ir.Value], inside: set[ir.Node]) -> list[ir.Value]:
    """Those values that a node outside reads, or that are outputs of the graph."""
    return [
        value
        for value in values
        if value.is_graph_output() or any(node not in inside for node in value.consumers())
    ]
