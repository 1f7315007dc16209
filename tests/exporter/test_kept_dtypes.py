"""What a model in half precision keeps in float32 is not rounded by a fold either."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from austeer.adapters import ModelError, RouteError, SteeringAdapter, VerificationError
from austeer.adapters.architectures import ARCHITECTURES, TRANSFORMERS_4, architecture_of
from austeer.adapters.weights import Checkpoint
from austeer.exporter.cli import cli
from austeer.exporter.merge import merge_checkpoint
from austeer.exporter.proofs.fold_check import converted_dtype, verify_fold_structure
from austeer.exporter.settings import StoredAs

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Callable[[str], Path]:
    """A saved model whose kept values are none of bfloat16."""

    def save(model_type: str) -> Path:
        folder = saved_model(model_type)
        tensors = load_file(folder / "model.safetensors")
        for name, values in tensors.items():
            if name == BIAS or name.endswith(NORMS):
                tensors[name] = values + 8.0008
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return save


def adapter_of(folder: Path) -> SteeringAdapter:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return SteeringAdapter.from_units(model, "ffn", [0, 1], [3, 5], [0.7, -1.5])


@pytest.mark.parametrize(
    ("model_type", "dtype", "kept"),
    [
        ("deepseek_v3", "bfloat16", (BIAS,)),
        ("deepseek_v3", "float16", (BIAS,)),
        ("deepseek_v3", "float32", ()),
        ("gpt_oss", "bfloat16", ()),
        ("gpt_oss", "float16", NORMS),
        ("llama", "float16", ()),
    ],
)
def test_kept_tensors_keep_their_bytes(
    base: Callable[[str], Path],
    tmp_path: Path,
    model_type: str,
    dtype: str,
    kept: tuple[str, ...],
) -> None:
    folder, out = base(model_type), tmp_path / "out"
    adapter = adapter_of(folder)
    merge_checkpoint(folder, adapter, out, stored=StoredAs(dtype=dtype))
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    for name, values in after.items():
        wide = bool(kept) and name.endswith(kept)
        assert values.dtype == (torch.float32 if wide else getattr(torch, dtype)), name
        assert not wide or torch.equal(values, before[name])
    verify_fold_structure(folder, out, adapter)
    assert converted_dtype(folder, out) == (None if dtype == "float32" else dtype)


def test_a_rounded_one_is_no_fold(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out = base("deepseek_v3"), tmp_path / "out"
    adapter = adapter_of(folder)
    merge_checkpoint(folder, adapter, out, stored=StoredAs(dtype="bfloat16"))
    tensors = load_file(out / "model.safetensors")
    tensors[BIAS] = tensors[BIAS].bfloat16()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"e_score_correction_bias: expected \('F32'"):
        verify_fold_structure(folder, out, adapter)


@pytest.mark.parametrize(
    ("model_type", "dtype"), [("deepseek_v3", "bfloat16"), ("gpt_oss", "float16")]
)
def test_command_proves_and_verifies(
    base: Callable[[str], Path], tmp_path: Path, model_type: str, dtype: str
) -> None:
    folder, out, saved = base(model_type), str(tmp_path / "out"), str(tmp_path / "adapter")
    adapter_of(folder).save_pretrained(saved)
    again = ("verify", out, "--base", str(folder), "--adapter", saved)
    for arguments in (
        ("merge", str(folder), saved, "-o", out, "--dtype", dtype),
        again,
        (*again, "--structure-only"),
    ):
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output


@pytest.mark.skipif(TRANSFORMERS_4, reason="its classes name other tensors, release by release")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_rows_say_what_transformers_keeps(model_type: str) -> None:
    config = type(AutoConfig.for_model(model_type))
    module = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
    # Of classes that inherit from another model type's, too.
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel)
    ]
    row = architecture_of(model_type)
    for key, halves in (
        ("_keep_in_fp32_modules_strict", ("float16", "bfloat16")),
        ("_keep_in_fp32_modules", ("float16",)),
    ):
        for name in {name for kind in classes for name in getattr(kind, key) or ()}:
            assert all(row.stays_wide(f"model.layers.0.{name}.weight", half) for half in halves)
    assert not row.stays_wide("model.layers.0.mlp.down_proj.weight", "float16")
    assert not row.stays_wide(BIAS, "float32")


def test_a_loaded_model_agrees(base: Callable[[str], Path]) -> None:
    for model_type in ("deepseek_v3", "gpt_oss"):
        folder, row = base(model_type), architecture_of(model_type)
        for name, dtype in HALVES.items():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            for key, values in model.state_dict().items():
                wide = row.stays_wide(key, name)
                assert values.dtype == (torch.float32 if wide else dtype), key


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_narrow_float_is_refused_by_name(
    saved_model: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    folder = saved_model("llama")
    adapter, name = adapter_of(folder), "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RouteError, match=rf"model\.safetensors: {name} is stored as F8_E4M3"):
        merge_checkpoint(folder, adapter, tmp_path / "out", stored=StoredAs(dtype=dtype))
    assert not (tmp_path / "out").exists()
    sharded = StoredAs(max_shard_size=10**9)
    merge_checkpoint(folder, adapter, tmp_path / "out", stored=sharded)
    assert Checkpoint(tmp_path / "out")[name].dtype == "F8_E4M3"


@pytest.mark.parametrize("stored", [None, StoredAs(dtype="bfloat16")])
def test_infinity_in_a_steered_row_is_the_bases(
    saved_model: Callable[..., Path], tmp_path: Path, stored: StoredAs | None
) -> None:
    folder = saved_model("llama")
    adapter, name = adapter_of(folder), "model.layers.1.mlp.down_proj.weight"
    arrays = {key: entry.read() for key, entry in Checkpoint(folder).items()}
    arrays[name][5, 2] = float("inf")
    save_arrays(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"llama/model\.safetensors: {name}: the base .* 5 hold inf"
    ):
        merge_checkpoint(folder, adapter, tmp_path / "out", force=True, stored=stored)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("merge", "--code"), "and steering in code was not proved on those"),
        (("peft", "--as", "lora"), "the adapter's are not; convert for the unquantized model"),
        (("peft", "--as", "ia3"), "the adapter's are not; convert for the unquantized model"),
    ],
)
def test_a_quantized_base_is_refused_before_it_is_loaded(
    saved_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    reason: str,
) -> None:
    folder, saved = saved_model("llama"), str(tmp_path / "adapter")
    adapter_of(folder).save_pretrained(saved)
    config = (folder / "config.json").read_text().rstrip().removesuffix("}")
    quantized = config + ', "quantization_config": {"quant_method": "gptq", "bits": 4}}'
    (folder / "config.json").write_text(quantized)
    monkeypatch.setattr("austeer.exporter.products.load_base", None)
    given = (str(folder), saved) if options[0] == "merge" else (saved, str(folder))
    done = CliRunner().invoke(cli, [*options, *given, "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and reason in done.output.replace("\n", " "), done.output
