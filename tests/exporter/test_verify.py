"""Verification passes true products, and only those: each kind of wrong one is caught."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product as product_of
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import austeer.graphs
from austeer.adapters import (
    AdapterError,
    GraphError,
    ModelError,
    RouteError,
    SteeringAdapter,
    VerificationError,
)
from austeer.adapters.weights import Checkpoint
from austeer.exporter.graft import GraftRequest, graft_job
from austeer.exporter.merge import merge_checkpoint
from austeer.exporter.proofs.allowance import fold_rounding, rounding_allowance
from austeer.exporter.proofs.reference import encode_prompts, greedy_agreement
from austeer.exporter.verify import verify_checkpoint, verify_onnx

PROMPTS = ("one day Tom felt happy and went to the park .", "Mia was sad", "the sun so very")
DOWN = "model.layers.0.mlp.down_proj.weight"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNITS: tuple[list[int], list[int], list[float]] = ([0, 0, 1], [1, 5, 7], [1.5, -0.8, 2.0])


@pytest.fixture
def product(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> Callable[..., tuple[Path, Path, Any, SteeringAdapter]]:
    """Base folder, folded folder, live base and adapter, in the dtypes asked for."""
    from transformers import AutoModelForCausalLM

    def make(
        model_type: str = "llama",
        stored: torch.dtype = torch.float32,
        live: torch.dtype | None = None,
        component: str = "ffn",
    ) -> tuple[Path, Path, Any, SteeringAdapter]:
        base, out = tmp_path / "base", tmp_path / "out"
        tiny_model(model_type).to(stored).save_pretrained(base)
        tiny_tokenizer.save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=live or stored).eval()
        adapter = SteeringAdapter.from_units(model, component, *UNITS)
        merge_checkpoint(base, adapter, out)
        return base, out, model, adapter

    return make


def poke(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change one stored tensor behind everybody's back."""
    entry = Checkpoint(folder)[name]
    with entry.file.open("r+b") as stream:
        stream.seek(entry.start)
        stream.write(change(entry.read()).astype(entry.numpy_dtype).tobytes())


# Not here: stored float32, live float16. Rounding to float16 first changes some of the
# fingerprint's bfloat16 roundings, so that such a base is refused without `force`.
@pytest.mark.parametrize(
    ("stored", "live"),
    [pair for pair in product_of(DTYPES, DTYPES) if pair != (torch.float32, torch.float16)],
    ids=str,
)
def test_true_folds_pass_in_every_dtype(
    product: Any, tiny_tokenizer: Any, stored: torch.dtype, live: torch.dtype
) -> None:
    _, out, model, adapter = product("llama", stored, live)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = verify_checkpoint(out, model, tiny_tokenizer, adapter, PROMPTS)
    report.require()
    assert report.route == "safetensors" and report.path == "out"
    assert report.prompts == 3
    assert report.tokens == sum(len(tiny_tokenizer(text)["input_ids"]) for text in PROMPTS)
    assert report.greedy_agreement is None
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.dtype == live


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("component", ["attention", "ffn", "neuron"])
def test_true_bfloat16_folds_pass_in_other_architectures(
    product: Any, tiny_tokenizer: Any, model_type: str, component: str
) -> None:
    _, out, model, adapter = product(model_type, torch.bfloat16, component=component)
    report = verify_checkpoint(out, model, tiny_tokenizer, adapter, PROMPTS)
    report.require()
    assert report.tolerance < 0.1 * report.steered_vs_base


def test_steered_at_another_scale(product: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    base, out, model, adapter = product()
    merge_checkpoint(base, adapter, tmp_path / "half", scale=0.5)
    half = tmp_path / "half"
    assert verify_checkpoint(half, model, tiny_tokenizer, adapter, PROMPTS, scale=0.5).passed
    assert not verify_checkpoint(half, model, tiny_tokenizer, adapter, PROMPTS).passed
    assert not verify_checkpoint(out, model, tiny_tokenizer, adapter, PROMPTS, scale=0.5).passed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_base_is_not_steered(product: Any, tiny_tokenizer: Any, dtype: torch.dtype) -> None:
    base, _, model, adapter = product("llama", dtype)
    report = verify_checkpoint(base, model, tiny_tokenizer, adapter, PROMPTS)
    assert report.steered_vs_base == 0
    with pytest.raises(VerificationError, match="steering has no effect"):
        report.require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_unit_with_a_wrong_gain_is_caught(
    product: Any, tiny_tokenizer: Any, dtype: torch.dtype
) -> None:
    _, out, model, adapter = product("llama", dtype)

    def halve_one_row(weight: Any) -> Any:
        weight[1] *= 0.5
        return weight

    poke(out, DOWN, halve_one_row)
    report = verify_checkpoint(out, model, tiny_tokenizer, adapter, PROMPTS)
    assert not report.passed and report.max_logit_difference > report.tolerance


def test_not_a_number_is_caught(product: Any, tiny_tokenizer: Any) -> None:
    _, out, model, adapter = product()
    poke(out, DOWN, lambda weight: weight * np.nan)
    report = verify_checkpoint(out, model, tiny_tokenizer, adapter, PROMPTS)
    with pytest.raises(VerificationError, match="differ by nan"):
        report.require()


def test_product_that_does_not_load(product: Any, tiny_tokenizer: Any) -> None:
    _, out, model, adapter = product()
    (out / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match="transformers cannot load it") as error:
        verify_checkpoint(out, model, tiny_tokenizer, adapter, PROMPTS)
    assert "\n" not in str(error.value)


def test_live_model_must_be_the_base(
    product: Any, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    _, out, _, adapter = product()
    with pytest.raises(AdapterError, match="another base model"):
        verify_checkpoint(out, tiny_model("llama", 1), tiny_tokenizer, adapter, PROMPTS)


def test_prompts_without_tokens(tiny_tokenizer: Any) -> None:
    class Mute:
        def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
            return {"input_ids": [1] * len(text.split())}

    assert [row.shape for row in encode_prompts(Mute(), ["", "a b c", "d"], 2)] == [
        (1, 2),
        (1, 1),
    ]
    with pytest.raises(VerificationError, match="at least one prompt with a token, got 2"):
        encode_prompts(Mute(), ["", ""], 2)


def test_a_rendered_chat_has_one_start_token(tiny_tokenizer: Any) -> None:
    plain, rendered = encode_prompts(tiny_tokenizer, ["Tom felt", "<s>Tom felt"], 9)
    assert plain.shape == (1, 3) and plain.tolist() == rendered.tolist()


def test_allowance_is_the_effect_of_one_rounding(product: Any, tiny_tokenizer: Any) -> None:
    _, out, model, adapter = product("llama", torch.bfloat16, torch.float32)
    unit, spacing = fold_rounding(out, model, adapter)
    assert unit == 2**-8 and spacing < 1e-38
    encoded = encode_prompts(tiny_tokenizer, PROMPTS, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    allowance = rounding_allowance(model, adapter, 1.0, encoded, unit, spacing)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    report = verify_checkpoint(out, model, tiny_tokenizer, adapter, PROMPTS)
    assert report.max_logit_difference < allowance < 20 * report.max_logit_difference
    # Small errors add up linearly: a dtype with 8 times finer steps earns 8 times less.
    finer = rounding_allowance(model, adapter, 1.0, encoded, unit / 8, spacing)
    assert finer == pytest.approx(allowance / 8, rel=0.05)


@pytest.mark.parametrize(
    ("stored", "live", "expected"),
    [
        (torch.float32, torch.float32, 2**-24),
        (torch.float16, torch.float32, 2**-11),
        (torch.float32, torch.bfloat16, 2**-24 + 2**-7),
        (torch.bfloat16, torch.float16, 2**-8),
    ],
)
def test_rounding_unit_of_two_dtypes(
    product: Any, stored: torch.dtype, live: torch.dtype, expected: float
) -> None:
    _, out, model, adapter = product("llama", stored, live)
    assert fold_rounding(out, model, adapter)[0] == expected


class FakeRunner:
    """Stands in for onnxruntime: a torch model behind the runner's interface."""

    model: Any = None
    adapter: SteeringAdapter | None = None
    error = 0.0
    spoilt_token: int | None = None
    half = False
    adjustable = False
    switchable = False

    def __init__(self, path: Path) -> None:
        assert path.name == "model.onnx"

    def logits(self, ids: Any) -> Any:
        with self.adapter.attached(self.model), torch.no_grad():
            return self.model(torch.from_numpy(ids)).logits.float().numpy() + self.error

    def generate(self, ids: Any, max_new_tokens: int) -> Any:
        for count in range(max_new_tokens):
            best = self.logits(ids)[:, -1].argmax(-1)
            best = (best + 1) % 40 if count == self.spoilt_token else best
            ids = np.concatenate([ids, best[:, None]], axis=1)
        return ids


@pytest.fixture
def runner(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Any], tmp_path: Path
) -> type[FakeRunner]:
    x, y = ir.val("x", ir.DataType.FLOAT, [1]), ir.val("y", ir.DataType.FLOAT, [1])
    nodes = [ir.node("Neg", [x], outputs=[y])]
    graph = ir.Graph([x], [y], nodes=nodes, opset_imports={"": 20}, name="stand_in")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")

    class Runner(FakeRunner):
        model = tiny_model("llama")

    Runner.adapter = SteeringAdapter.from_units(Runner.model, "layer", *UNITS)
    monkeypatch.setattr(austeer.graphs, "OnnxCausalLM", Runner)
    return Runner


def onnx_report(runner: Any, tokenizer: Any, tmp_path: Path) -> Any:
    return verify_onnx(tmp_path, runner.model, tokenizer, runner.adapter, PROMPTS)


def test_true_graph_passes(runner: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    report = onnx_report(runner, tiny_tokenizer, tmp_path)
    report.require()
    assert report.greedy_agreement == 1.0
    assert report.route == "onnx"


def test_graph_with_wrong_logits(runner: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    runner.error = 0.01
    report = onnx_report(runner, tiny_tokenizer, tmp_path)
    assert report.max_logit_difference == pytest.approx(0.01, rel=0.01)
    assert not report.passed


class Foreign:
    """A tokenizer with an id beyond the tiny models' embeddings."""

    def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
        return {"input_ids": [1, 4000]}


def test_a_tokenizer_of_another_model(product: Any, runner: Any, tmp_path: Path) -> None:
    _, out, model, adapter = product()
    with pytest.raises(ModelError, match="the tokenizer gives id 4000, the model has"):
        verify_checkpoint(out, model, Foreign(), adapter, PROMPTS)
    with pytest.raises(ModelError, match="the tokenizer gives id 4000, the model has"):
        onnx_report(runner, Foreign(), tmp_path)


def test_a_scale_at_which_the_model_itself_overflows(
    runner: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    arguments = (tmp_path, runner.model, tiny_tokenizer, runner.adapter, PROMPTS)
    with pytest.raises(RouteError, match=r"scale 3e\+38: .* overflow; lower the scale"):
        verify_onnx(*arguments, scale=3e38)


@pytest.mark.parametrize("kind", ["MatMulNBits", "DynamicQuantizeLinear", "MatMulInteger"])
def test_a_quantized_graph_is_not_compared(
    kind: str, runner: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = ir.load(tmp_path / "model.onnx")
    model.graph.node(0).op_type = kind
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(RouteError, match="quantized, so its logits are not"):
        onnx_report(runner, tiny_tokenizer, tmp_path)


def test_graph_that_decodes_otherwise(runner: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    runner.spoilt_token = 8
    report = onnx_report(runner, tiny_tokenizer, tmp_path)
    assert report.greedy_agreement == pytest.approx(0.5)
    with pytest.raises(VerificationError, match="greedy decoding agrees at 50"):
        report.require()


def test_graph_without_steering(
    runner: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steered = runner.adapter
    monkeypatch.setattr(runner, "adapter", steered.scaled(0.0))
    report = verify_onnx(tmp_path, runner.model, tiny_tokenizer, steered, PROMPTS)
    with pytest.raises(VerificationError, match="no effect"):
        report.require()


def test_bfloat16_graph_is_judged_by_the_live_models_noise(
    runner: Any, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    # transformers 4.57 loads in float32 unless told otherwise.
    runner.model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16
    ).eval()
    runner.adapter = SteeringAdapter.from_units(runner.model, "layer", *UNITS)
    runner.half = True
    assert runner.model.dtype == torch.bfloat16
    report = onnx_report(runner, tiny_tokenizer, tmp_path)
    report.require()
    assert report.max_logit_difference > 1e-3, "bfloat16 activations must be visible"
    # Twice the live model's own distance, and the product here is exactly the live model.
    assert report.tolerance == pytest.approx(2 * report.max_logit_difference, rel=0.2)


def test_float32_graph_of_a_bfloat16_base_gets_no_allowance(
    runner: Any, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    import copy

    live = tiny_model("llama").to(torch.bfloat16)
    runner.adapter = SteeringAdapter.from_units(live, "layer", *UNITS)
    runner.model = copy.deepcopy(live).float()
    report = verify_onnx(tmp_path, live, tiny_tokenizer, runner.adapter, PROMPTS)
    report.require()
    assert report.tolerance < 1e-2, "bfloat16 noise would hide a wrong graph"


def test_near_ties_end_the_comparison(tiny_model: Callable[..., Any]) -> None:
    model, ids = tiny_model("llama"), np.array([[1, 5, 9]])
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits[0, -1]
    first, second = logits.topk(2).indices.tolist()
    gap = float(logits[first] - logits[second])
    other = np.array([[1, 5, 9, second, 0, 0, 0]])
    assert greedy_agreement(model, ids, other, near_tie=1.01 * gap) == 1.0
    assert greedy_agreement(model, ids, other, near_tie=0.99 * gap) == 0.0
    right = np.array([[1, 5, 9, first]])
    assert greedy_agreement(model, ids, right, near_tie=0.0) == 1.0


@pytest.mark.parametrize("decoded", [[[1, 5, 9]], [[4, 4, 4, 4]]])
def test_decoding_must_continue_the_prompt(
    tiny_model: Callable[..., Any], decoded: list[list[int]]
) -> None:
    model, ids = tiny_model("llama"), np.array([[1, 5, 9]])
    assert greedy_agreement(model, ids, np.array(decoded), near_tie=9.0) == 0.0


@pytest.fixture
def switchable(
    base_folder: Callable[..., tuple[Any, Path]],
    adapter_folder: Callable[..., Path],
    tmp_path: Path,
) -> Callable[..., tuple[Path, Any, list[SteeringAdapter]]]:
    """A graft of two adapters, its live base, and the two with one that is not in it."""

    def make(**options: Any) -> tuple[Path, Any, list[SteeringAdapter]]:
        model, base = base_folder()
        folders = [adapter_folder(component="layer", rank=1), adapter_folder(seed=1)]
        names = tuple(str(folder) for folder in folders)
        request = GraftRequest(
            base=base, adapters=names, out=tmp_path / "out", as_adapter=True, verify=False,
            **options,
        )  # fmt: skip
        graft_job(request)
        folders.append(adapter_folder(seed=2))
        return request.out, model, [SteeringAdapter.from_pretrained(f) for f in folders]

    return make


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("scale_as", ["constant", "required", "optional"])
def test_the_adapter_of_a_switchable_graft_is_made_active(
    scale_as: str, together: bool, switchable: Any, tiny_tokenizer: Any
) -> None:
    scale = 1.0 if scale_as == "required" else 0.5
    out, model, adapters = switchable(together=together, scale=scale, scale_as=scale_as)
    for adapter in adapters[:2]:
        report = verify_onnx(out, model, tiny_tokenizer, adapter, PROMPTS, scale=scale)
        report.require()
        assert report.steered_vs_base > 0.01
    # Where a run sets the strength it is any, else the one that the file holds.
    fixed = scale_as == "constant" and not together
    report = verify_onnx(out, model, tiny_tokenizer, adapters[1], PROMPTS, scale=0.8)
    assert report.passed is not fixed
    with pytest.raises(GraphError, match=r"in none \(attention-0-1\.onnx_adapter, layer-1-0"):
        verify_onnx(out, model, tiny_tokenizer, adapters[2], PROMPTS, scale=scale)


def test_a_switchable_graft_whose_files_are_not_what_they_were(
    switchable: Any, tiny_tokenizer: Any
) -> None:
    out, model, (first, second, _) = switchable()
    files = sorted(out.glob("*.onnx_adapter"))
    (moved, kept) = files
    moved.write_bytes(kept.read_bytes())
    verify_onnx(out, model, tiny_tokenizer, first, PROMPTS).require()
    with pytest.raises(VerificationError, match="does not hold any more"):
        verify_onnx(out, model, tiny_tokenizer, second, PROMPTS)
    for file in files:
        file.unlink()
    (out / "austeer.json").write_text("[]")
    with pytest.raises(GraphError, match=r"in none \(no \.onnx_adapter file\)"):
        verify_onnx(out, model, tiny_tokenizer, second, PROMPTS)
