"""Grafts onto graphs that others wrote: optimum, the onnxruntime-genai builder, quantizers.

What is expected comes from torch where the graph holds the weights as they are, and from the
same graph with standard nodes put in by hand where it holds them quantized.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper
from plain_steering import random_adapter, steer_plainly, width_of
from reference import PATHS

from austeer.adapters import SteeringAdapter
from austeer.exporter.graft import GraftRequest, graft_job
from austeer.exporter.proofs.parity import FLOAT32_BOUND
from austeer.graphs import OnnxCausalLM
from austeer.graphs.custom_op import library_file

pytest.importorskip("onnxruntime")

COMPONENTS = ("attention", "ffn", "neuron", "layer")
PROMPTS = np.random.default_rng(5).integers(3, 40, (3, 7))
NEW_TOKENS = 12
# The builder's attention wants heads of a multiple of 16.
SIZES: dict[str, dict[str, Any]] = {"llama": {"hidden_size": 64, "intermediate_size": 96}}


@dataclass(frozen=True)
class Foreign:
    """A graph of others in a folder, and the live model that it was made of.

    `values` names the value at each `layers.{i}.{component}`; sums that norms hide have none.
    """

    model: Any
    folder: Path
    values: dict[str, str]
    exact: bool

    @property
    def path(self) -> Path:
        return self.folder / "model.onnx"


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any
) -> Callable[[str], tuple[Any, Path]]:
    made: dict[str, tuple[Any, Path]] = {}

    def save(model_type: str) -> tuple[Any, Path]:
        if model_type not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / model_type
            model = tiny_model(model_type, **SIZES.get(model_type, {}))
            model.save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            made[model_type] = model, folder
        return made[model_type]

    return save


# Optimum


def named_values(path: Path, model_type: str) -> dict[str, str]:
    """Values of optimum's float graph, by the names of the nodes around them."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    layer_path, attention, mlp = PATHS[model_type]
    if model_type == "opt":  # of which optimum exports the inner model alone
        layer_path = layer_path.removeprefix("model.")
    found = {}
    for i in (0, 1):
        layer, o, last = (
            "/" + re.sub(r"\.(?!\d)", "/", ".".join(parts))
            for parts in (
                [layer_path.format(i)],
                [layer_path.format(i), attention],
                [layer_path.format(i), mlp],
            )
        )
        for kind, folder in (("attention", o), ("neuron", last)):
            (product,) = [n for n in nodes if n.name in (f"{folder}/MatMul", f"{folder}/Gemm")]
            found[f"layers.{i}.{kind}"] = product.input[0]
        inside = [node for node in nodes if node.name.startswith(f"{last}/")]
        sums = [node for node in nodes if re.fullmatch(rf"{layer}/Add(_\d+)?", node.name)]
        found[f"layers.{i}.ffn"] = inside[-1].output[0]
        found[f"layers.{i}.layer"] = sums[-1].output[0]
    return found


@pytest.fixture(scope="module")
def optimum_graph(
    checkpoint: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Foreign]:
    exporters = pytest.importorskip("optimum.exporters.onnx", exc_type=ImportError)
    made: dict[tuple[str, bool], Foreign] = {}

    def export(model_type: str, int8: bool) -> Foreign:
        if (model_type, int8) in made:
            return made[model_type, int8]
        folder = tmp_path_factory.mktemp("optimum")
        if int8:
            plain = export(model_type, False)
            quantization = pytest.importorskip("onnxruntime.quantization")
            quantization.quantize_dynamic(plain.path, folder / "model.onnx")
            result = Foreign(plain.model, folder, plain.values, exact=False)
        else:
            model, source = checkpoint(model_type)
            with quiet():
                exporters.main_export(
                    str(source),
                    output=folder,
                    task="text-generation-with-past",
                    do_validation=False,
                    no_post_process=True,
                )
            values = named_values(folder / "model.onnx", model_type)
            result = Foreign(model, folder, values, exact=True)
        made[model_type, int8] = result
        return result

    return export


@contextlib.contextmanager
def quiet() -> Any:
    """Warnings of exporters are about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# The onnxruntime-genai builder


@pytest.fixture(scope="module")
def built_graph(
    checkpoint: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Foreign]:
    pytest.importorskip("onnxruntime_genai", exc_type=ImportError)
    made: dict[str, Foreign] = {}

    def build(precision: str) -> Foreign:
        if precision not in made:
            model, source = checkpoint("llama")
            folder = tmp_path_factory.mktemp("genai")
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
            options = ["-i", source, "-o", folder, "-p", precision, "-e", "cpu"]
            cache = ["-c", tmp_path_factory.mktemp("cache")]
            done = subprocess.run(
                [str(part) for part in (*command, *options, *cache)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            values = {}
            for i in (0, 1):
                at = f"/model/layers.{i}"
                values |= {
                    f"layers.{i}.attention": f"{at}/attn/GroupQueryAttention/output_0",
                    f"layers.{i}.neuron": f"{at}/mlp/Mul/output_0",
                    f"layers.{i}.ffn": f"{at}/mlp/down_proj/MatMul/output_0",
                }
            made[precision] = Foreign(model, folder, values, exact=precision == "fp32")
        return made[precision]

    return build


def show_sum(proto: onnx.ModelProto, added: str) -> str:
    """Compute the sum of which `added` is a part in front of its norm: its value's name.

    The norm stays as it is: it adds the sum and zeros.
    """
    ((position, norm),) = [
        (position, node)
        for position, node in enumerate(proto.graph.node)
        if node.op_type.startswith("Skip") and added in list(node.input)[:2]
    ]
    total, zeros = f"{added}.sum", f"{added}.zeros"
    nodes = [
        helper.make_node("Add", list(norm.input)[:2], [total], name=total),
        helper.make_node("Mul", [total, f"{zeros}.zero"], [zeros], name=zeros),
    ]
    zero = numpy_helper.from_array(np.zeros(1, np.float32), f"{zeros}.zero")
    proto.graph.initializer.append(zero)
    norm.input[0], norm.input[1] = total, zeros
    for offset, node in enumerate(nodes):
        proto.graph.node.insert(position + offset, node)
    return total


# What every graph must do


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(ids)).logits.numpy())


def torch_greedy(model: Any, ids: np.ndarray) -> np.ndarray:
    for _ in range(NEW_TOKENS):
        best = torch_logits(model, ids)[:, -1].argmax(-1)
        ids = np.concatenate([ids, best[:, None]], axis=1)
    return ids


def expected_of(
    foreign: Foreign, adapter: SteeringAdapter, folder: Path
) -> tuple[np.ndarray, np.ndarray, float]:
    """Logits and greedy tokens as they must be, and how far logits may be off."""
    if foreign.exact:
        with adapter.attached(foreign.model):
            logits = torch_logits(foreign.model, PROMPTS)
            tokens = torch_greedy(foreign.model, PROMPTS)
        return logits, tokens, FLOAT32_BOUND * max(1.0, float(np.abs(logits).max()))
    proto = onnx.load(foreign.path)
    sites = {}
    for steered in adapter.sites:
        key = steered.site.key
        value = foreign.values.get(key)
        if value is None:
            value = show_sum(proto, foreign.values[f"layers.{steered.site.layer}.ffn"])
        sites[value] = steered, width_of(foreign.model, steered.site.component)
    steer_plainly(proto, sites)
    folder.mkdir()
    onnx.save(proto, folder / "model.onnx")
    for path in foreign.folder.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    model = OnnxCausalLM(folder, threads=1)
    logits = model.logits(PROMPTS)
    return logits, model.generate(PROMPTS, NEW_TOKENS), 1e-5 * float(np.abs(logits).max())


def check_graft(foreign: Foreign, component: str, rank: int, tmp_path: Path) -> None:
    adapter = random_adapter(foreign.model, component, rank)
    adapter.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    row = graft_job(
        GraftRequest(
            base=foreign.folder, adapters=(str(tmp_path / "adapter"),), out=out, copy_data=True
        )
    )
    assert row["verified"]
    assert row["base_weights"] == ("equal" if foreign.exact else "not comparable")
    logits, tokens, bound = expected_of(foreign, adapter, tmp_path / "reference")
    base = OnnxCausalLM(foreign.folder, threads=1)
    assert np.abs(logits - base.logits(PROMPTS)).max() > 100 * bound
    for kernels in [False, True] if library_file() else [False]:
        steered = OnnxCausalLM(out, threads=1, kernels=kernels)
        assert np.abs(steered.logits(PROMPTS) - logits).max() <= bound
        assert np.array_equal(steered.generate(PROMPTS, NEW_TOKENS), tokens)
    assert not np.array_equal(base.generate(PROMPTS, NEW_TOKENS), tokens)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_graphs_of_optimum(
    model_type: str, int8: bool, component: str, rank: int, optimum_graph: Any, tmp_path: Path
) -> None:
    check_graft(optimum_graph(model_type, int8), component, rank, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_graphs_of_the_genai_builder(
    precision: str, component: str, rank: int, built_graph: Any, tmp_path: Path
) -> None:
    check_graft(built_graph(precision), component, rank, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_built_graph_switches_adapters(
    precision: str, built_graph: Any, tmp_path: Path
) -> None:
    foreign = built_graph(precision)
    names = []
    for component, rank in (("attention", 0), ("layer", 1)):
        names.append(str(tmp_path / component))
        random_adapter(foreign.model, component, rank).save_pretrained(names[-1])
    request = GraftRequest(
        base=foreign.folder, adapters=tuple(names), out=tmp_path / "out",
        as_adapter=True, copy_data=True,
    )  # fmt: skip
    files = [tmp_path / "out" / name for name in graft_job(request)["adapter_files"]]
    model = OnnxCausalLM(tmp_path / "out", threads=1)
    base = OnnxCausalLM(foreign.folder, threads=1).logits(PROMPTS)
    results = []
    for file, name in zip(files, names, strict=True):
        model.active = [file]
        results.append(model.logits(PROMPTS))
        adapter = SteeringAdapter.from_pretrained(name)
        folder = tmp_path / f"reference-{Path(name).name}"
        logits, _, bound = expected_of(foreign, adapter, folder)
        assert np.abs(results[-1] - logits).max() <= bound
    assert np.abs(results[0] - results[1]).max() > 0.01
    model.active = []
    # A sum taken out of its norm is added up in another order.
    assert np.abs(model.logits(PROMPTS) - base).max() <= 1e-5 * np.abs(base).max()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_genai_generates_what_we_do(precision: str, built_graph: Any, tmp_path: Path) -> None:
    """The runtime that the graph was built for loads the graft, its files and its cache."""
    import onnxruntime_genai

    foreign = built_graph(precision)
    random_adapter(foreign.model, "layer", 1).save_pretrained(tmp_path / "mood")
    request = GraftRequest(
        base=foreign.folder, adapters=(str(tmp_path / "mood"),), out=tmp_path / "out",
        as_adapter=True, copy_data=True,
    )  # fmt: skip
    (name,) = graft_job(request)["adapter_files"]
    ours, wanted, ids = OnnxCausalLM(tmp_path / "out", threads=1), [], PROMPTS[:1]
    for ours.active in ([], [tmp_path / "out" / name]):
        wanted.append(ours.generate(ids, NEW_TOKENS)[0].tolist())
    assert wanted[0] != wanted[1]
    end_with_none_of(wanted, tmp_path / "out" / "genai_config.json")
    model = onnxruntime_genai.Model(str(tmp_path / "out"))
    adapters = onnxruntime_genai.Adapters(model)
    adapters.load(str(tmp_path / "out" / name), "mood")
    for active in (False, True):
        settings = onnxruntime_genai.GeneratorParams(model)
        settings.set_search_options(max_length=ids.shape[1] + NEW_TOKENS, do_sample=False)
        generator = onnxruntime_genai.Generator(model, settings)
        if active:
            generator.set_active_adapter(adapters, "mood")
        generator.append_tokens(ids[0].astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.get_sequence(0).tolist() == wanted[active]


def end_with_none_of(texts: list[list[int]], config: Path) -> None:
    """Make a token the end of text that no text has."""
    values = json.loads(config.read_text())
    values["model"]["eos_token_id"] = min(set(range(40)) - {t for text in texts for t in text})
    config.write_text(json.dumps(values))


def test_the_builders_names_are_those_that_the_locator_knows(built_graph: Any) -> None:
    """A newer builder that renames its modules must fail here, and not at a user's."""
    names = {node.name for node in ir.load(built_graph("fp32").path).graph}
    for i in (0, 1):
        for module in ("attn/o_proj", "mlp/down_proj"):
            assert f"/model/layers.{i}/{module}/MatMul" in names
