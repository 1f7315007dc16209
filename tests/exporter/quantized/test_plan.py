"""Folds into quantized checkpoints: what they dequantize to, bit for bit; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from quantized_models import (
    METHODS,
    change_config,
    dequantized,
    nearest,
    parts_of,
    quantize_folder,
    read_safetensors,
    write_safetensors,
)

from austeer.adapters import (
    AdapterError,
    RouteError,
    SiteError,
    SteeringAdapter,
    VerificationError,
)
from austeer.adapters.config import Strength
from austeer.adapters.predictor import Predictor
from austeer.adapters.sites import Component, Site
from austeer.adapters.steered_site import SteeredSite
from austeer.exporter.merge import merge_checkpoint
from austeer.exporter.proofs.fold_check import verify_fold_structure

WEIGHTS = "model.safetensors"
DOWN = "model.layers.{}.mlp.down_proj"
UNITS = {0: [5, 0, 30], 1: [7, 31, 8]}
GAMMA = {0: [0.7, -2.3, 0.013], 1: [-1.0, 0.5, 1e-3]}  # a gain of 0 and one below 0 among them
EVERY = pytest.mark.parametrize("method", METHODS)


def adapter_for(model: Any, component: str = "ffn", layers: Any = (0, 1)) -> SteeringAdapter:
    layer = [i for i in layers for _ in UNITS[i]]
    units = [unit for i in layers for unit in UNITS[i]]
    gamma = [value for i in layers for value in GAMMA[i]]
    return SteeringAdapter.from_units(model, component, layer, units, gamma)


@pytest.fixture
def adapter(tiny_model: Callable[..., Any]) -> SteeringAdapter:
    return adapter_for(tiny_model("llama"))


@pytest.fixture
def quantized(saved_model: Callable[..., Path]) -> Callable[..., Path]:
    def make(method: str, model_type: str = "llama", modules: Any = ("proj",)) -> Path:
        folder = saved_model(model_type)
        quantize_folder(folder, method, modules)
        return folder

    return make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def scaled_once(parts: dict[str, Any], scales: str, units: Any, gain: Any) -> dict[str, Any]:
    """The stored parts of a module with the units' scales times the gain, rounded once."""
    found = parts[scales].copy()
    rows = found if found.shape[0] == 32 else found.T
    for unit, factor in zip(units, gain, strict=True):
        rows[unit] = nearest(rows[unit].astype(np.float64) * factor, found.dtype)
    return parts | {scales: found}


@EVERY
def test_what_is_tested_is_quantized(
    quantized: Callable[..., Path], tiny_model: Callable[..., Any], method: str
) -> None:
    """The packing of the helper is the definition's: the weights come back."""
    tensors = read_safetensors(quantized(method) / WEIGHTS)
    weight = tiny_model("llama").model.layers[1].mlp.down_proj.weight.numpy()
    found = dequantized(tensors, DOWN.format(1), method)
    bits = 8 if method in ("int8", "bitsandbytes") else 4
    assert np.abs(found - weight).max() < 1.1 * np.abs(weight).max() / 2 ** (bits - 1)
    assert f"{DOWN.format(1)}.bias" not in tensors


@EVERY
def test_dequantizes_to_scales_rounded_once(
    quantized: Callable[..., Path], adapter: SteeringAdapter, out: Path, method: str
) -> None:
    base = quantized(method)
    summary = merge_checkpoint(base, adapter, out)
    old, new = read_safetensors(base / WEIGHTS), read_safetensors(out / WEIGHTS)
    scales = METHODS[method][2]
    names = {f"{DOWN.format(layer)}.{scales}" for layer in (0, 1)}
    assert set(summary.tensors) == names and summary.units == 6
    for name in old.keys() | new.keys():
        assert (old[name].tobytes() != new[name].tobytes()) == (name in names), name
    for layer, units in UNITS.items():
        module, gain = DOWN.format(layer), 1 + np.float32(GAMMA[layer]).astype(np.float64)
        wanted = scaled_once(parts_of(old, module), scales, units, gain)
        wanted = METHODS[method][1](wanted)
        found = dequantized(new, module, method)
        assert found.tobytes() == wanted.tobytes()
        # And that is W' x == g * (W x), to the rounding of the scales.
        before = dequantized(old, module, method).astype(np.float64)
        x = np.random.default_rng(layer).standard_normal(48)
        bound = 2**-8 * (np.abs(before[units]) @ np.abs(x)) * np.abs(gain) + 1e-12
        assert (np.abs(found[units] @ x - gain * (before[units] @ x)) <= bound).all()


@EVERY
def test_a_gain_of_zero_silences_a_unit(
    quantized: Callable[..., Path], adapter: SteeringAdapter, out: Path, method: str
) -> None:
    merge_checkpoint(quantized(method), adapter, out)
    new = read_safetensors(out / WEIGHTS)
    weight = dequantized(new, DOWN.format(1), method)
    assert not weight[7].any() and weight[[6, 8]].any(axis=1).all()


@EVERY
@pytest.mark.parametrize("component", ["attention", "neuron"])
def test_input_gains_are_refused_with_what_works(
    quantized: Callable[..., Path],
    tiny_model: Callable[..., Any],
    out: Path,
    method: str,
    component: str,
) -> None:
    adapter = adapter_for(tiny_model("llama"), component)
    with pytest.raises(RouteError, match=r"cannot express it; fold the unquantized.*graft"):
        merge_checkpoint(quantized(method), adapter, out)
    assert not out.exists()


def test_a_projection_left_unquantized_folds_as_ever(
    quantized: Callable[..., Path], tiny_model: Callable[..., Any], out: Path
) -> None:
    model = tiny_model("llama")
    sites = [
        SteeredSite(Site(0, Component.ATTENTION), np.array([3]), np.array([1.5])),
        SteeredSite(Site(1, Component.FFN), np.array([9]), np.array([0.25])),
    ]
    adapter = SteeringAdapter.from_sites(model, sites, Strength.FITTED)
    base = quantized("gptq", modules=("mlp",))
    summary = merge_checkpoint(base, adapter, out)
    old, new = read_safetensors(base / WEIGHTS), read_safetensors(out / WEIGHTS)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert set(summary.tensors) == {name, f"{DOWN.format(1)}.scales"}
    wanted = old[name].copy()
    wanted[:, 3] *= 2.5
    assert new[name].tobytes() == wanted.tobytes()
    found = dequantized(new, DOWN.format(1), "gptq")[9]
    assert found == pytest.approx(1.25 * dequantized(old, DOWN.format(1), "gptq")[9], rel=1e-3)
    verify_fold_structure(base, out, adapter)


def test_a_bias_is_steered_with_its_row(
    quantized: Callable[..., Path], tiny_model: Callable[..., Any], out: Path
) -> None:
    module = "gpt_neox.layers.{}.mlp.dense_4h_to_h"
    adapter = adapter_for(tiny_model("gpt_neox"))
    base = quantized("awq", "gpt_neox", ("dense_4h_to_h",))
    merge_checkpoint(base, adapter, out)
    old, new = read_safetensors(base / WEIGHTS), read_safetensors(out / WEIGHTS)
    for layer, units in UNITS.items():
        wanted = old[f"{module.format(layer)}.bias"].copy()
        wanted[units] *= 1 + np.float32(GAMMA[layer])
        assert new[f"{module.format(layer)}.bias"] == pytest.approx(wanted, rel=1e-6)
        assert old[f"{module.format(layer)}.bias"][units].all()
    verify_fold_structure(base, out, adapter)


def test_notes_say_what_was_not_compared_and_which_signs_turned(
    quantized: Callable[..., Path], adapter: SteeringAdapter, out: Path, tmp_path: Path
) -> None:
    base = quantized("gptq")
    notes = merge_checkpoint(base, adapter, out).notes
    assert len(notes) == 2 and all("\n" not in note for note in notes)
    assert "weights could not be" in notes[0] and "scales: 1;" in notes[1]
    assert len(merge_checkpoint(base, adapter, tmp_path / "less", scale=0.1).notes) == 1


def test_weights_are_compared_where_they_can_be(
    quantized: Callable[..., Path], tiny_model: Callable[..., Any], out: Path, tmp_path: Path
) -> None:
    base = quantized("gptq", modules=("self_attn",))
    ours, other = (adapter_for(tiny_model("llama", seed=seed)) for seed in (0, 1))
    assert merge_checkpoint(base, ours, out).notes == ()
    with pytest.raises(AdapterError, match="fingerprint"):
        merge_checkpoint(base, other, tmp_path / "other")


def test_another_model_type_layer_or_unit_is_refused(
    quantized: Callable[..., Path], tiny_model: Callable[..., Any], out: Path
) -> None:
    base = quantized("gptq")
    with pytest.raises(AdapterError, match="qwen2"):
        merge_checkpoint(base, adapter_for(tiny_model("qwen2")), out, force=True)
    wide = tiny_model("llama", hidden_size=64)
    with pytest.raises(SiteError, match="unit 50 outside width 32"):
        merge_checkpoint(base, SteeringAdapter.from_units(wide, "ffn", [0], [50], [1.0]), out)
    deep = tiny_model("llama", num_hidden_layers=4)
    for layers in ([3, 3], [1, 3]):
        adapter = SteeringAdapter.from_units(deep, "ffn", layers, [5, 6], [1.0, 1.0])
        with pytest.raises(SiteError, match="layer 3 outside the model's 2"):
            merge_checkpoint(base, adapter, out)


def test_what_folds_nowhere_is_refused_for_its_own_reason(
    quantized: Callable[..., Path], tiny_model: Callable[..., Any], out: Path
) -> None:
    base, model = quantized("gptq"), tiny_model("llama")
    with pytest.raises(RouteError, match="residual stream"):
        merge_checkpoint(base, adapter_for(model, "layer"), out)
    predictor = Predictor(*(np.ones(shape, np.float32) for shape in ((1, 1), (1,), (1, 1))))
    site = SteeredSite(Site(0, Component.FFN), np.array([1]), np.array([1.0]), predictor)
    with pytest.raises(RouteError, match="anew at every token"):
        merge_checkpoint(
            base, SteeringAdapter.from_sites(model, [site], Strength.ADAPTIVE), out
        )


@pytest.mark.parametrize("scale", [1e7, 1e-7])
def test_scales_that_leave_float16_are_refused(
    quantized: Callable[..., Path], tiny_model: Callable[..., Any], out: Path, scale: float
) -> None:
    model = tiny_model("llama")
    adapter = SteeringAdapter.from_units(model, "ffn", [1], [4], [scale - 1.0])
    with pytest.raises(RouteError, match=r"unit 4 times gain.*float16"):
        merge_checkpoint(quantized("awq"), adapter, out)
    assert not out.exists()


def test_no_effect_is_refused(
    quantized: Callable[..., Path], adapter: SteeringAdapter, out: Path
) -> None:
    with pytest.raises(RouteError, match="changes no value"):
        merge_checkpoint(quantized("int8"), adapter, out, scale=0.0)


@EVERY
def test_the_check_sees_a_wrong_scale_and_a_wrong_integer(
    quantized: Callable[..., Path], adapter: SteeringAdapter, out: Path, method: str
) -> None:
    base = quantized(method)
    merge_checkpoint(base, adapter, out)
    report = verify_fold_structure(base, out, adapter)
    assert len(report.touched) == 2 and report.identical > 10 and 0 < report.worst_error <= 1
    right = read_safetensors(out / WEIGHTS)
    for part in (METHODS[method][2], next(iter(METHODS[method][0](np.ones((32, 48)))))):
        wrong = right[f"{DOWN.format(0)}.{part}"].copy()
        raw = wrong.reshape(-1).view(np.uint8)
        raw[-1] ^= 1
        write_safetensors(out / WEIGHTS, right | {f"{DOWN.format(0)}.{part}": wrong})
        with pytest.raises(VerificationError, match="down_proj"):
            verify_fold_structure(base, out, adapter)
    write_safetensors(out / WEIGHTS, read_safetensors(base / WEIGHTS))
    with pytest.raises(VerificationError, match="not the base times its gains"):
        verify_fold_structure(base, out, adapter)


def test_scales_that_several_rows_share_are_refused(
    quantized: Callable[..., Path], adapter: SteeringAdapter, out: Path
) -> None:
    base = quantized("int8")
    tensors = read_safetensors(base / WEIGHTS)
    for shape in ((1,), (2, 3), (2,)):
        shared = np.ones(shape, ml_dtypes.bfloat16)
        changed = {f"{DOWN.format(layer)}.weight_scale": shared for layer in (0, 1)}
        write_safetensors(base / WEIGHTS, tensors | changed)
        with pytest.raises(RouteError, match=r"cannot express a gain.*each of 32 output units"):
            merge_checkpoint(base, adapter, out)


def test_small_floats_as_scales_are_refused(
    quantized: Callable[..., Path], adapter: SteeringAdapter, out: Path
) -> None:
    base = quantized("int4")
    tensors = read_safetensors(base / WEIGHTS)
    changed = {
        name: value.astype(ml_dtypes.float8_e4m3fn)
        for name, value in tensors.items()
        if name.endswith("weight_scale")
    }
    write_safetensors(base / WEIGHTS, tensors | changed)
    with pytest.raises(RouteError, match="weight_scale is F8_E4M3"):
        merge_checkpoint(base, adapter, out)


def test_scales_beside_float_weights_are_refused(
    quantized: Callable[..., Path], adapter: SteeringAdapter, out: Path
) -> None:
    base = quantized("int8")
    tensors = read_safetensors(base / WEIGHTS)
    name = f"{DOWN.format(0)}.weight"
    write_safetensors(base / WEIGHTS, tensors | {name: tensors[name].astype(np.float32)})
    with pytest.raises(RouteError, match="without quantized values beside"):
        merge_checkpoint(base, adapter, out)


def test_force_never_makes_a_refused_method_pass(
    quantized: Callable[..., Path], adapter: SteeringAdapter, out: Path
) -> None:
    base = quantized("gptq")
    config = json.loads((base / "config.json").read_text())["quantization_config"]
    change_config(base, quantization_config=config | {"checkpoint_format": "marlin"})
    with pytest.raises(RouteError, match="format marlin"):
        merge_checkpoint(base, adapter, out, force=True)


def test_a_config_that_claims_too_much_is_refused(
    saved_model: Callable[..., Path], adapter: SteeringAdapter, out: Path
) -> None:
    base = saved_model("llama")
    for _, _, _, config in METHODS.values():
        change_config(base, quantization_config=config)
        with pytest.raises(RouteError, match=r"says quantized with .*, no tensor is"):
            merge_checkpoint(base, adapter, out)
        assert not out.exists()


def test_a_bias_that_is_no_row_of_units_is_refused(
    quantized: Callable[..., Path], tiny_model: Callable[..., Any], out: Path
) -> None:
    base = quantized("awq", "gpt_neox", ("dense_4h_to_h",))
    tensors = read_safetensors(base / WEIGHTS)
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h.bias"
    for shape in ((), (31,), (32, 0)):
        write_safetensors(base / WEIGHTS, tensors | {name: np.ones(shape, np.float32)})
        with pytest.raises(RouteError, match=rf"{name} is F32 of shape"):
            merge_checkpoint(base, adapter_for(tiny_model("gpt_neox")), out)


@pytest.mark.parametrize("method", ["gptq", "int8"])
@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("qwen2_moe", ("experts.",)),
        ("qwen2_moe", ("shared_expert.down_proj",)),
        ("qwen3_moe", ("experts.1.down_proj",)),
        ("llama4_text", ("shared_expert.down_proj",)),
    ],
)
def test_quantized_experts_are_the_reason(
    quantized: Callable[..., Path],
    tiny_model: Callable[..., Any],
    out: Path,
    method: str,
    model_type: str,
    names: tuple[str, ...],
) -> None:
    base = quantized(method, model_type, names)
    adapter = adapter_for(tiny_model(model_type))
    with pytest.raises(
        RouteError, match=r"experts are quantized.*quantize the result"
    ) as caught:
        merge_checkpoint(base, adapter, out)
    assert "--force" not in str(caught.value) and not out.exists()


def test_experts_that_a_quantizer_took_apart_are_the_reason(
    quantized: Callable[..., Path], tiny_model: Callable[..., Any], out: Path
) -> None:
    """Llama 4 keeps all in one tensor, its quantized checkpoints each in its own."""
    base = quantized("gptq", "llama4_text", ("self_attn",))
    tensors = read_safetensors(base / WEIGHTS)
    fused = [name for name in tensors if name.endswith("feed_forward.experts.down_proj")]
    assert fused
    for name in fused:
        for number, weight in enumerate(tensors.pop(name)):
            module = name.replace("experts.", f"experts.{number}.")
            parts = METHODS["gptq"][0](weight.T.astype(np.float64))
            tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    for left in (tensors, {k: v for k, v in tensors.items() if "router" not in k}):
        write_safetensors(base / WEIGHTS, left)
        with pytest.raises(RouteError, match="experts are quantized"):
            merge_checkpoint(base, adapter_for(tiny_model("llama4_text")), out)


def test_experts_left_unquantized_fold_as_ever(
    quantized: Callable[..., Path], tiny_model: Callable[..., Any], out: Path
) -> None:
    base = quantized("gptq", "qwen3_moe", ("self_attn",))
    adapter = adapter_for(tiny_model("qwen3_moe"))
    assert merge_checkpoint(base, adapter, out).notes == ()
    verify_fold_structure(base, out, adapter)
