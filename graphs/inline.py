"""Plain operators in place of model-local functions, for runtimes that know none (OpenVINO)."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from austeer.graphs.opset import DOMAIN


def inline_functions(model: ir.Model) -> None:
    """Replace every call of a model-local function by its body, in place.

    Inputs, outputs and the values around a call keep their names.
    """
    InlinePass()(model)
    model.functions.clear()
    if not any(node.domain == DOMAIN for node in model.graph.all_nodes()):
        model.opset_imports.pop(DOMAIN, None)
