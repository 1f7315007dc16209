"""ONNX graphs written node by node, with the names and metadata that exporters leave."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from austeer.adapters import Refusal, Site
from austeer.adapters.architectures import architecture_of
from austeer.graphs import Place, SiteLocator

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
MICROSOFT = "com.microsoft"


class PlainGraph:
    """A main graph that grows by one node a call.

    Args:
        opset: version of the default domain.
        named: write module paths into node names, as optimum and the onnxruntime-genai
            builder do; otherwise into metadata, as `torch.onnx.export(dynamo=True)` does.
    """

    def __init__(self, opset: int = 20, named: bool = True) -> None:
        self.named = named
        imports = {"": opset, MICROSOFT: 1}
        self.graph = ir.Graph([], [], nodes=[], opset_imports=imports, name="plain")
        self.model = ir.Model(self.graph, ir_version=10)

    def input(
        self, name: str, shape: Sequence[Any], dtype: ir.DataType = ir.DataType.FLOAT
    ) -> ir.Value:
        value = ir.val(name, dtype, shape)
        self.graph.inputs.append(value)
        return value

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer; one that is there already by that name stays."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.val(name, tensor.dtype, array.shape, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        module: str = "",
        *,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """A node inside `module` (none: it says nothing); its first output.

        Values get no type and no shape, as in most exported files.
        """
        name = f"node_{len(self.graph)}"
        metadata = {}
        if module and self.named:
            folder = re.sub(r"\.(?!\d)", "/", module)
            same = sum(str(node.name).startswith(f"/{folder}/{op}") for node in self.graph)
            name = f"/{folder}/{op}" + (f"_{same}" if same else "")
        elif module:
            metadata[NAME_SCOPES] = str([*scopes_of(module), name])
        fresh = ir.node(
            op,
            inputs,
            attributes,
            domain=domain,
            name=name,
            outputs=[ir.Value(name=o) for o in outputs or [f"{name}/output_0"]],
            metadata_props=metadata,
        )
        self.graph.append(fresh)
        return fresh.outputs[0]

    def output(self, value: ir.Value, shape: Sequence[Any]) -> None:
        value.shape, value.dtype = ir.Shape(shape), ir.DataType.FLOAT
        self.graph.outputs.append(value)

    def find(self, key: str, model_type: str = "llama") -> Place | Refusal:
        return SiteLocator(self.graph, architecture_of(model_type)).find(Site.parse(key))


def scopes_of(module: str) -> list[str]:
    """`'', 'a', 'a.b', 'a.b.c'`: every module around what lies in `a.b.c`."""
    parts = module.split(".")
    return ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]
