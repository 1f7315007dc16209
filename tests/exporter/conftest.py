"""Fixtures: exported bases as folders on disk, plain or quantized, and adapters for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plain_steering import random_adapter


@pytest.fixture(scope="session")
def base_folder(
    exported_base: Callable[..., tuple[Any, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, Path]]:
    """Live model and a folder with its graph and config: `base_folder("llama", int8=True)`.

    Shared by all tests: copy it before anything is written into it.
    """
    made: dict[tuple[str, bool], tuple[Any, Path]] = {}

    def build(model_type: str = "llama", *, int8: bool = False) -> tuple[Any, Path]:
        if (model_type, int8) not in made:
            model, graph = exported_base(model_type)
            folder = tmp_path_factory.mktemp(f"base-{model_type}")
            if int8:
                quantization = pytest.importorskip("onnxruntime.quantization")
                quantization.quantize_dynamic(graph, folder / "model.onnx")
            else:
                shutil.copyfile(graph, folder / "model.onnx")
            config = json.loads(model.config.to_json_string())
            (folder / "config.json").write_text(json.dumps(config))
            made[model_type, int8] = model, folder
        return made[model_type, int8]

    return build


@pytest.fixture(scope="session")
def adapter_folder(
    tmp_path_factory: pytest.TempPathFactory, exported_base: Callable[..., tuple[Any, Path]]
) -> Callable[..., Path]:
    """Adapter on disk: `adapter_folder("llama", "ffn", rank=1, seed=0)`."""
    made: dict[tuple[Any, ...], Path] = {}

    def build(
        model_type: str = "llama", component: str = "attention", rank: int = 0, seed: int = 0
    ) -> Path:
        key = (model_type, component, rank, seed)
        if key not in made:
            model, _ = exported_base(model_type)
            adapter = random_adapter(model, component, rank, seed)
            name = f"{component}-{rank}-{seed}"
            made[key] = adapter.save_pretrained(tmp_path_factory.mktemp("adapters") / name)
        return made[key]

    return build


@pytest.fixture
def traced_before(
    exported_base: Callable[..., tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny llama's graph is read, not traced again: for tests of what is done with it."""
    import onnx_ir as ir
    import torch

    from austeer.exporter import onnx_export

    known, path = exported_base("llama")
    weights, trace = known.state_dict(), onnx_export.export_graph

    def export_graph(model: Any) -> ir.Model:
        found = model.state_dict()
        same = found.keys() == weights.keys() and all(
            torch.equal(found[name], weights[name]) for name in weights
        )
        return ir.load(path) if same and model.dtype == known.dtype else trace(model)

    monkeypatch.setattr(onnx_export, "export_graph", export_graph)


@pytest.fixture
def file_size_limit() -> Any:
    """No file may grow beyond 2 kB: the kernel itself refuses the write."""
    import resource
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)
