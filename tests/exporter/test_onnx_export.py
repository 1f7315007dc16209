"""Exported and grafted graphs against torch with hooks written here, for every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from austeer.adapters import (
    AdapterError,
    Component,
    ModelError,
    Predictor,
    RouteError,
    Site,
    SteeredSite,
    SteeringAdapter,
    Strength,
)
from austeer.exporter.onnx_export import export_base, export_graph, write_onnx
from austeer.graphs import OnnxCausalLM, graft_file, load_model
from austeer.graphs.custom_op import library_file

pytest.importorskip("onnxruntime")

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")
# Layer, attention output projection, last projection of the MLP: stated again on purpose.
# They make positions, masks or biases of their own.
BIASED = ("opt", "bloom", "gpt_neo", "mpt")
MODULES = dict.fromkeys(MODEL_TYPES, ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj"))
MODULES["gpt2"] = ("transformer.h.{}", "attn.c_proj", "mlp.c_proj")
MODULES["gpt_neox"] = ("gpt_neox.layers.{}", "attention.dense", "mlp.dense_4h_to_h")
MODULES["opt"] = ("model.decoder.layers.{}", "self_attn.out_proj", "fc2")
MODULES["bloom"] = ("transformer.h.{}", "self_attention.dense", "mlp.dense_4h_to_h")
MODULES["gpt_neo"] = ("transformer.h.{}", "attn.attention.out_proj", "mlp.c_proj")
MODULES["mpt"] = ("transformer.blocks.{}", "attn.out_proj", "ffn.down_proj")

NEW_TOKENS = 16
PROMPTS = np.random.default_rng(5).integers(3, 40, (3, 7))


@pytest.fixture(scope="session")
def bases(exported_base: Callable[..., tuple[Any, Path]]) -> Callable[..., tuple[Any, Path]]:
    return exported_base


def width_of(model: Any, component: Component) -> int:
    layer, attention, mlp = MODULES[model.config.model_type]
    below = attention if component is Component.ATTENTION else mlp
    weight = model.get_submodule(f"{layer.format(0)}.{below}").weight
    reads_input = component in (Component.ATTENTION, Component.NEURON)
    return int(weight.shape[1 if reads_input != (model.config.model_type == "gpt2") else 0])


def make_adapter(model: Any, component: Component, rank: int) -> SteeringAdapter:
    rng = np.random.default_rng(11)
    sites = []
    for layer in range(model.config.num_hidden_layers):
        index = np.sort(rng.choice(width_of(model, component), 6, replace=False))
        parts = [rng.normal(size=s).astype(np.float32) for s in (6, (6, rank), rank, (rank, 6))]
        predictor = Predictor(*parts[1:]) if rank else None
        sites.append(SteeredSite(Site(layer, component), index, parts[0], predictor))
    return SteeringAdapter.from_sites(
        model, sites, Strength.ADAPTIVE if rank else Strength.FITTED
    )


@contextmanager
def hooked(model: Any, adapter: SteeringAdapter) -> Iterator[None]:
    """x·(1 + γ) or x·(1 + γ·φ(x)) at the adapter's sites, in torch, written from DESIGN §4."""
    layer, attention, mlp = MODULES[model.config.model_type]
    handles = []
    for site in adapter.sites:
        index, gamma = torch.from_numpy(site.index), torch.from_numpy(site.gamma)
        p = site.predictor

        def steer(
            x: Tensor, index: Tensor = index, gamma: Tensor = gamma, p: Any = p
        ) -> Tensor:
            out, selected = x.clone(), x[..., index]
            gain = gamma
            if p is not None:
                V, b, U = (torch.from_numpy(part) for part in (p.V, p.b, p.U))
                odds = torch.exp((selected @ V + b) @ U) / 3
                gain = gamma * 4 * odds / (1 + odds)
            out[..., index] = selected * (1 + gain)
            return out

        path = layer.format(site.site.layer)
        kind = site.site.component
        if kind is Component.ATTENTION:
            path = f"{path}.{attention}"
        elif kind is not Component.LAYER:
            path = f"{path}.{mlp}"
        module = model.get_submodule(path)
        if kind in (Component.ATTENTION, Component.NEURON):
            handle = module.register_forward_pre_hook(lambda _, a, s=steer: (s(a[0]), *a[1:]))
        else:
            # Decoder layers of transformers 4.57 may return a tuple.
            handle = module.register_forward_hook(
                lambda _, a, out, s=steer: (
                    (s(out[0]), *out[1:]) if isinstance(out, tuple) else s(out)
                )
            )
        handles.append(handle)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(ids)).logits.numpy())


def torch_greedy(model: Any, ids: np.ndarray, new: int) -> np.ndarray:
    """Greedy tokens without a cache: every step computes the whole text again."""
    for _ in range(new):
        best = torch_logits(model, ids)[:, -1].argmax(-1)
        ids = np.concatenate([ids, best[:, None]], axis=1)
    return ids


def check_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.all(np.abs(found - expected) <= 1e-4 * np.maximum(1.0, np.abs(expected)))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("component", list(Component))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_grafted_graph_is_the_hooked_model(
    model_type: str, component: Component, rank: int, bases: Any, tmp_path: Path
) -> None:
    model, base = bases(model_type)
    adapter = make_adapter(model, component, rank)
    graft_file(base, adapter, tmp_path / "steered.onnx")
    with hooked(model, adapter):
        expected = torch_logits(model, PROMPTS)
        tokens = torch_greedy(model, PROMPTS, NEW_TOKENS)
    plain = torch_logits(model, PROMPTS)
    for kernels in [False, True] if library_file() else [False]:
        steered = OnnxCausalLM(tmp_path / "steered.onnx", threads=1, kernels=kernels)
        found = steered.logits(PROMPTS)
        check_close(found, expected)
        assert np.abs(found - plain).max() > 1e-2
        assert np.array_equal(steered.generate(PROMPTS, NEW_TOKENS), tokens)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", (*MODEL_TYPES, *BIASED))
def test_padding_on_the_left_changes_nothing(
    model_type: str, bases: Any, tmp_path: Path
) -> None:
    model, base = bases(model_type)
    adapter = make_adapter(model, Component.ATTENTION, 1)
    graft_file(base, adapter, tmp_path / "steered.onnx")
    steered = OnnxCausalLM(tmp_path / "steered.onnx", threads=1)
    lengths = (7, 4, 1)
    mask = np.array([[0] * (7 - length) + [1] * length for length in lengths])
    ids = PROMPTS * mask
    logits = steered.logits(ids, mask)
    tokens = steered.generate(ids, NEW_TOKENS, attention_mask=mask)
    assert np.isfinite(logits).all()
    with hooked(model, adapter):
        for row, length in enumerate(lengths):
            alone = PROMPTS[row : row + 1, 7 - length :]
            check_close(logits[row, 7 - length :], torch_logits(model, alone)[0])
            expected = torch_greedy(model, alone, NEW_TOKENS)[0, length:]
            assert np.array_equal(tokens[row, 7:], expected)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_base_graph(model_type: str, bases: Any) -> None:
    model, path = bases(model_type)
    base = OnnxCausalLM(path, threads=1)
    for ids in (PROMPTS, PROMPTS[:1], PROMPTS[:, :1], PROMPTS[:1, :1]):
        check_close(base.logits(ids), torch_logits(model, ids))
    graph = load_model(path)
    names = [value.name for value in graph.graph.inputs]
    past = [f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")]
    assert names == ["input_ids", "attention_mask", "position_ids", *past]
    outputs = [value.name for value in graph.graph.outputs]
    assert outputs == ["logits", *(name.replace("past_key_values", "present") for name in past)]
    shapes = [[str(dim) for dim in value.shape] for value in graph.graph.inputs[:4]]
    assert shapes[:3] == [
        ["batch_size", "sequence_length"],
        ["batch_size", "total_sequence_length"],
        ["batch_size", "sequence_length"],
    ]
    assert shapes[3][2] == "past_sequence_length"
    presents = {str(value.shape[2]) for value in graph.graph.outputs[1:]}
    assert presents == {"total_sequence_length"}


WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4, "num_hidden_layers": 1},
    "gemma2": {"sliding_window": 4},
    "qwen2": {
        "sliding_window": 4,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WINDOWS)
def test_texts_longer_than_the_sliding_window(
    model_type: str, bases: Any, tiny_model: Any
) -> None:
    model, path = bases(model_type, **WINDOWS[model_type])
    base = OnnxCausalLM(path, threads=1)
    expected = torch_logits(model, PROMPTS)
    check_close(base.logits(PROMPTS), expected)
    tokens = torch_greedy(model, PROMPTS, NEW_TOKENS)
    assert np.array_equal(base.generate(PROMPTS, NEW_TOKENS), tokens)
    unlimited = tiny_model(model_type, **{**WINDOWS[model_type], "sliding_window": 99})
    assert np.abs(expected - torch_logits(unlimited, PROMPTS)).max() > 1e-3


@pytest.mark.slow
def test_half_precision(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1).half()
    adapter = make_adapter(model, Component.LAYER, 1)
    export_base(model, tmp_path / "base.onnx")
    graft_file(tmp_path / "base.onnx", adapter, tmp_path / "steered.onnx")
    found = OnnxCausalLM(tmp_path / "steered.onnx", threads=1).logits(PROMPTS)
    model.float()
    with hooked(model, adapter):
        truth = torch_logits(model, PROMPTS)
    assert np.abs(found - truth).max() <= 2e-2 * np.abs(truth).max()


@pytest.mark.slow
def test_bfloat16_keeps_its_type_and_says_where_it_runs(
    tiny_model: Any, tmp_path: Path
) -> None:
    from austeer.adapters import GraphError

    model = tiny_model("llama", num_hidden_layers=1).bfloat16()
    export_base(model, tmp_path / "base.onnx")
    graph = load_model(tmp_path / "base.onnx").graph
    assert graph.inputs[3].dtype == ir.DataType.BFLOAT16
    with pytest.raises(GraphError, match="float32, or run on a GPU"):
        OnnxCausalLM(tmp_path / "base.onnx")


def state_of(model: Any) -> dict[str, Any]:
    """What an export must leave as it was."""
    tensors = [*model.state_dict().items(), *model.named_buffers()]
    return {
        "values": {name: tensor.numpy().tobytes() for name, tensor in tensors},
        "identity": [id(p) for p in model.parameters()],
        "gradients": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "config": model.config.to_json_string(),
        "attention": model.config._attn_implementation,
    }


@pytest.mark.slow
def test_export_is_silent_and_leaves_the_model_alone(
    tiny_model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("gpt2", n_layer=1, attn_pdrop=0.5, resid_pdrop=0.5)
    expected = torch_logits(model, PROMPTS)
    model.train()
    model.transformer.ln_f.eval()
    model.config._attn_implementation = "flex_attention"
    before = state_of(model)
    export_base(model, tmp_path / "base.onnx")
    assert state_of(model) == before
    assert capfd.readouterr() == ("", "")
    check_close(OnnxCausalLM(tmp_path / "base.onnx").logits(PROMPTS), expected)


@pytest.mark.slow
def test_equal_models_give_equal_bytes_without_local_paths(
    tiny_model: Any, tmp_path: Path
) -> None:
    for name in ("a.onnx", "b.onnx"):
        export_base(tiny_model("gpt2", n_layer=1), tmp_path / name)
    content = (tmp_path / "a.onnx").read_bytes()
    assert content == (tmp_path / "b.onnx").read_bytes()
    for trace in (b"site-packages", b"stack_trace", b"/tests/", b".py", b"decoder"):
        assert trace not in content


@pytest.mark.slow
def test_written_folder(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    adapter = make_adapter(model, Component.FFN, 0)
    path = write_onnx(model, tiny_tokenizer, adapter, tmp_path, scale=0.5)
    assert path == tmp_path / "model.onnx"
    names = {item.name for item in tmp_path.iterdir()}
    assert {"model.onnx", "config.json", "generation_config.json", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == 32
    card = (tmp_path / "README.md").read_text()
    assert "base_model" in card
    assert "onnx" in card

    with hooked(model, adapter.scaled(0.5)):
        expected = torch_logits(model, PROMPTS)
    check_close(OnnxCausalLM(tmp_path, threads=1).logits(PROMPTS), expected)


@pytest.mark.slow
def test_bfloat16_model_is_written_in_float32(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=1).bfloat16()
    adapter = make_adapter(model, Component.NEURON, 1)
    write_onnx(model, tiny_tokenizer, adapter, tmp_path)
    assert model.dtype == torch.bfloat16
    # transformers 4 calls it torch_dtype.
    config = json.loads((tmp_path / "config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} <= {"float32", None} != {None}
    found = OnnxCausalLM(tmp_path, threads=1).logits(PROMPTS)
    model.float()
    with hooked(model, adapter):
        check_close(found, torch_logits(model, PROMPTS))


def test_adapter_of_another_base_is_refused(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_model("llama"), Component.FFN, 0)
    with pytest.raises(AdapterError, match="another base"):
        write_onnx(tiny_model("llama", seed=1), tiny_tokenizer, adapter, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rotary_embedding_that_depends_on_the_length_is_refused(tiny_model: Any) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope)
    with pytest.raises(RouteError, match=r"'dynamic'.*fold into safetensors"):
        export_graph(model)


def test_alibi_in_bfloat16_is_refused(tiny_model: Any) -> None:
    with pytest.raises(RouteError, match=r"falcon: its ALiBi .* fold into safetensors"):
        export_graph(tiny_model("falcon", alibi=True))


def test_untraceable_model_is_refused_in_one_line(tiny_model: Any) -> None:
    model = tiny_model("llama")

    def awkward(module: Any, args: Any, output: Tensor) -> Tensor:
        return output * int((output > 0).sum())

    handle = model.model.norm.register_forward_hook(awkward)
    with pytest.raises(RouteError, match="llama: torch cannot export") as error:
        export_graph(model)
    handle.remove()
    assert "\n" not in str(error.value)


def test_unknown_architecture_is_refused(tiny_model: Any) -> None:
    model = tiny_model("llama")
    model.config.model_type = "unheard_of"
    with pytest.raises(ModelError, match="unheard_of"):
        export_graph(model)


@pytest.mark.shared
@pytest.mark.slow
def test_real_model_writes_the_same_story(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = shared / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(source)("Once upon a time", return_tensors="np")
    base = torch_greedy(model, prompt.input_ids, 64)
    export_base(model, tmp_path / "base.onnx")
    for rank in (0, 1):
        adapter = make_adapter(model, Component.ATTENTION, rank)
        graft_file(tmp_path / "base.onnx", adapter, tmp_path / f"{rank}.onnx")
        steered = OnnxCausalLM(tmp_path / f"{rank}.onnx", threads=1)
        with adapter.attached(model):
            expected = torch_greedy(model, prompt.input_ids, 64)
            check_close(steered.logits(expected), torch_logits(model, expected))
        assert np.array_equal(steered.generate(prompt.input_ids, 64), expected)
        assert not np.array_equal(expected, base)
