"""Graphs that onnxruntime fused are steered where torch's hooks steer the model."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from plain_graphs import NAME_SCOPES
from reference import MIXTURES, PATHS, TRANSFORMERS_4

from austeer.adapters import SteeringAdapter
from austeer.graphs import OnnxCausalLM, graft_file, load_model

onnxruntime = pytest.importorskip("onnxruntime")

PROMPTS = np.random.default_rng(5).integers(3, 40, (2, 7))
WIDTH = 32
CASES = [
    # LayerNorm: a session fuses the last sum of a model, or every sum.
    *(("gpt2", "layer", how) for how in ("no", "BASIC", "EXTENDED", "ALL")),
    *(("stablelm", "layer", how) for how in ("EXTENDED", "ALL")),
    # RMSNorm: the offline optimizer alone fuses sums, and not those behind OLMo's norms.
    *(("olmo2", "layer", how) for how in ("ALL", "offline")),
    *(("qwen2_moe", "ffn", how) for how in ("ALL", "offline")),
]

Optimize = Callable[[str, str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def optimized(exported_base: Any, tmp_path_factory: pytest.TempPathFactory) -> Optimize:
    """A tiny model, and its graph with module paths in node names, as optimum writes it."""
    folder = tmp_path_factory.mktemp("optimized")

    def optimize(model_type: str, how: str) -> tuple[Any, Path]:
        if TRANSFORMERS_4 and model_type in MIXTURES:
            pytest.skip("of a mixture in transformers 4 there is no graph")
        model, base = exported_base(model_type)
        plain, path = folder / f"{model_type}.onnx", folder / f"{model_type}-{how}.onnx"
        name_by_path(base, plain)
        with silence():
            if how == "no":
                return model, plain
            if how == "offline":
                optimize_offline(plain, path)
            else:
                optimize_by_session(plain, path, how)
        return model, path

    return optimize


def name_by_path(source: Path, target: Path) -> None:
    proto = onnx.load(source)
    for number, node in enumerate(proto.graph.node):
        text = {entry.key: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(text.get(NAME_SCOPES, "[]"))
        # Optimum's way: the layer's number behind a dot, and nothing where nothing is known.
        folders = ["", *re.split(r"\.(?!\d)", scopes[-2])] if any(scopes[:-1]) else [""]
        node.name = "/".join([*folders, node.op_type]) if scopes else node.op_type
        node.name += f"_{number}"
        del node.metadata_props[:]
    onnx.save(proto, target)


def optimize_by_session(source: Path, target: Path, level: str) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}"
    )
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def optimize_offline(source: Path, target: Path) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    found = optimizer.optimize_model(
        str(source), model_type="gpt2", num_heads=4, hidden_size=WIDTH, opt_level=0
    )
    found.save_model_to_file(str(target))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def hooked_logits(model: Any, component: str, gains: np.ndarray) -> np.ndarray:
    """Logits of the live model with the outputs of two layers, or of their blocks, rescaled."""
    layer, _, mlp = PATHS[model.config.model_type]
    block, dense = MIXTURES.get(model.config.model_type, ("", 2))
    handles = []
    for number, gain in enumerate(torch.from_numpy(gains)):
        module = model.get_submodule(layer.format(number))
        if component == "ffn":
            module = module.get_submodule(mlp if number < dense else block)

        def rescale(_module: Any, _inputs: Any, found: Any, gain: Any = gain) -> Any:
            if isinstance(found, tuple):
                return (found[0] * gain, *found[1:])
            return found * gain

        handles.append(module.register_forward_hook(rescale))
    with torch.no_grad():
        logits = model(torch.from_numpy(PROMPTS)).logits.numpy()
    for handle in handles:
        handle.remove()
    return np.asarray(logits)


@pytest.mark.parametrize(("model_type", "component", "how"), CASES)
def test_the_site_of_a_fused_graph_is_that_of_the_model(
    model_type: str, component: str, how: str, optimized: Optimize, tmp_path: Path
) -> None:
    model, path = optimized(model_type, how)
    gamma = np.array([2.0, -1.5, 3.0, 1.0], np.float32)
    adapter = SteeringAdapter.from_units(model, component, [0, 0, 1, 1], [3, 7, 0, 5], gamma)
    gains = np.ones((2, WIDTH), np.float32)
    gains[[0, 0, 1, 1], [3, 7, 0, 5]] += gamma
    graft_file(path, adapter, tmp_path / "steered.onnx")
    steered = OnnxCausalLM(tmp_path / "steered.onnx", threads=1).logits(PROMPTS)
    expected = hooked_logits(model, component, gains)
    base = hooked_logits(model, component, np.ones_like(gains))
    assert np.abs(expected - base).max() > 0.1
    assert np.abs(steered - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("model_type", "how"), [("gpt2", "EXTENDED"), ("stablelm", "ALL"), ("qwen2_moe", "offline")]
)
def test_these_optimizers_fuse_sums_into_norms_without_a_name(
    model_type: str, how: str, optimized: Optimize
) -> None:
    """Otherwise the test above says nothing about them."""
    nodes = load_model(optimized(model_type, how)[1]).graph
    fused = [node for node in nodes if node.op_type.startswith("Skip")]
    assert any(not str(node.name).startswith("/") for node in fused)
