"""`.onnx_adapter` files: what makes one adapter active in a switchable graft."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from austeer.adapters._errors import GraphError
from austeer.adapters.adapter import SteeringAdapter
from austeer.graphs.graft_plan import Array, plan_graft
from austeer.graphs.opset import PREFIX, SCALE_INPUT, initializer_name
from austeer.graphs.runtime import failure_reason, onnxruntime_module

_VERSION = 1
_INDEX = re.compile(rf"{PREFIX}\.(?:(\d+)\.)?layers\..*\.index")


def write_adapter_file(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write graph inputs as an adapter that onnxruntime and onnxruntime-genai load.

    Args:
        path: new file, by convention `*.onnx_adapter`.
        tensors: values by the graph's input names.

    Raises:
        GraphError: onnxruntime is not installed, or older than 1.20.
    """
    runtime = _runtime_with_adapters()
    adapter = runtime.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(_VERSION)
    create = runtime.OrtValue.ortvalue_from_numpy
    adapter.set_parameters(
        {name: create(np.ascontiguousarray(array)) for name, array in sorted(tensors.items())}
    )
    adapter.export_adapter(str(path))


def read_adapter_file(path: Path) -> dict[str, Array]:
    """The graph inputs that an adapter file sets, by name.

    Raises:
        GraphError: not such a file; onnxruntime is not installed, or older than 1.20.
    """
    runtime = _runtime_with_adapters()
    try:
        held = runtime.AdapterFormat.read_adapter(str(path))
        return {name: np.array(value.numpy()) for name, value in held.get_parameters().items()}
    except Exception as error:
        # onnxruntime's errors have no common class outside its C extension.
        raise GraphError(
            f"{path}: cannot read the adapter file ({failure_reason(error)}); graft again"
        ) from error


def holds_adapter(tensors: Mapping[str, Array], adapter: SteeringAdapter) -> bool:
    """Whether the inputs that a file sets are what makes `adapter` active, and it alone."""
    slots = [int(found[1] or 0) for name in tensors if (found := _INDEX.fullmatch(name))]
    nodes = plan_graft(adapter).nodes
    if len(slots) != len(nodes):
        return False
    wanted = {
        initializer_name(node.site.key, tensor, slots[0]): array
        for node in nodes
        for tensor, array in node.tensors.items()
    }
    # Beside adaptive ones, a constant γ has a predictor of zeros.
    neutral = tensors.keys() - wanted.keys() - {SCALE_INPUT}
    return not any(tensors[name].any() for name in neutral) and all(
        name in tensors and np.array_equal(tensors[name], array)
        for name, array in wanted.items()
    )


def _runtime_with_adapters() -> Any:
    runtime = onnxruntime_module()
    if not hasattr(runtime, "AdapterFormat"):
        raise GraphError(
            f"onnxruntime {runtime.__version__} has no adapter files; 1.20 or newer has them"
        )
    return runtime
