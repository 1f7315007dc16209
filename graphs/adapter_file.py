"""`.onnx_adapter` files: what makes one adapter active in a switchable graft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from austeer.adapters._errors import GraphError
from austeer.graphs.graft_plan import Array
from austeer.graphs.runtime import onnxruntime_module

_VERSION = 1


def write_adapter_file(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write graph inputs as an adapter that onnxruntime and onnxruntime-genai load.

    Args:
        path: new file, by convention `*.onnx_adapter`.
        tensors: values by the graph's input names.

    Raises:
        GraphError: onnxruntime is not installed, or older than 1.20.
    """
    runtime = onnxruntime_module()
    if not hasattr(runtime, "AdapterFormat"):
        raise GraphError(
            f"onnxruntime {runtime.__version__} has no adapter files; 1.20 or newer has them"
        )
    adapter = runtime.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(_VERSION)
    create = runtime.OrtValue.ortvalue_from_numpy
    adapter.set_parameters(
        {name: create(np.ascontiguousarray(array)) for name, array in sorted(tensors.items())}
    )
    adapter.export_adapter(str(path))
