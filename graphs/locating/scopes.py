"""Module paths of a graph's nodes, as each exporter leaves them.

`torch.onnx.export(dynamo=True)` writes the path of every enclosing module into a node's
metadata. The older exporter (optimum) and the onnxruntime-genai builder write it into the
node's name, `/model/layers.3/mlp/down_proj/MatMul`, and quantizers keep that name with a
suffix. A node that says nothing belongs to no module.
"""

from __future__ import annotations

import ast
import itertools

import onnx_ir as ir

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key: `['', 'model', …, module path, name of the traced operation]`."""


def module_path(node: ir.Node) -> tuple[str, ...]:
    """Paths of the modules around a node, outermost first; empty where it carries none."""
    text = node.metadata_props.get(NAME_SCOPES)
    return _from_name(node.name or "") if text is None else _from_metadata(text)


def _from_metadata(text: str) -> tuple[str, ...]:
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ()
    if not isinstance(scopes, (list, tuple)):
        return ()
    # The last entry names the traced operation, not a module.
    return tuple(str(scope) for scope in scopes[:-1])


def _from_name(name: str) -> tuple[str, ...]:
    if not name.startswith("/"):
        return ()
    parts = name.split("/")[1:-1]
    return ("", *itertools.accumulate(parts, "{}.{}".format))
