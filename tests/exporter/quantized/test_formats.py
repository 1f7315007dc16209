"""Which quantization_config is folded, and in what words the others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from austeer.adapters import ModelError, RouteError
from austeer.exporter.quantized.formats import quantization_of

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "output_activations": None}},
    "transform_config": {},
}
BNB = {"load_in_8bit": True, "load_in_4bit": False, "quant_method": "bitsandbytes"}
ROUNDED_OUTPUTS = {"a": {"output_activations": None}, "b": {"output_activations": {"bits": 8}}}


def folder_of(folder: Path, settings: Any) -> Path:
    config = {"model_type": "llama", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        GPTQ,
        GPTQ | {"checkpoint_format": "gptq"},
        GPTQ | {"checkpoint_format": "gptq_v2"},
        GPTQ | {"format": "gptq", "bits": 8},
        AWQ,
        AWQ | {"version": "GEMM"},
        AWQ | {"format": "gemm", "backend": "autoawq"},
        COMPRESSED,
        BNB,
        {"load_in_8bit": True},
    ],
)
def test_known_methods(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = quantization_of(folder_of(tmp_path, settings))
    assert found is not None and found.layouts
    assert found.method == settings.get("quant_method", "bitsandbytes")


@pytest.mark.parametrize("settings", [None, {}])
def test_a_plain_model_is_none(tmp_path: Path, settings: Any) -> None:
    assert quantization_of(folder_of(tmp_path, settings)) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (GPTQ | {"checkpoint_format": "marlin"}, "format marlin"),
        (GPTQ | {"is_marlin_format": True}, "format marlin"),
        (GPTQ | {"format": "bitblas"}, "format bitblas"),
        (GPTQ | {"rotation": "hadamard"}, "it rotates activations"),
        (AWQ | {"version": "gemv"}, "layout gemv"),
        (AWQ | {"format": "gemv_fast"}, "layout gemv_fast"),
        (AWQ | {"backend": "llm-awq"}, "of llm-awq"),
        (AWQ | {"bits": 8}, "8 bits, expected 4"),
        (COMPRESSED | {"transform_config": {"config_groups": {"R1": {}}}}, "it rotates"),
        (COMPRESSED | {"config_groups": ROUNDED_OUTPUTS}, "rounds the outputs"),
        (BNB | {"load_in_8bit": False, "load_in_4bit": True}, "cannot express a gain: fp4"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "cannot express a gain: nf4",
        ),
        ({"quant_method": "mxfp4"}, "cannot express a gain, they are powers of two"),
        ({"quant_method": "fp8"}, "each belongs to a block of rows"),
        ({"quant_method": "aqlm"}, "aqlm: this way is not known here"),
        ({"bits": 4}, "an unnamed method"),
    ],
)
def test_what_is_refused_says_why_and_what_works(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RouteError) as caught:
        quantization_of(folder_of(tmp_path, settings))
    text = str(caught.value)
    assert reason in text and "\n" not in text
    assert text.endswith("fold the unquantized model and quantize the result")


@pytest.mark.parametrize("settings", [[1], "gptq", 8])
def test_malformed_settings_are_one_line(tmp_path: Path, settings: Any) -> None:
    with pytest.raises(ModelError, match="quantization_config is not an object"):
        quantization_of(folder_of(tmp_path, settings))


@pytest.mark.parametrize("groups", [None, [], "x", {"a": 3}, {"a": None}])
def test_odd_groups_are_no_traceback(tmp_path: Path, groups: Any) -> None:
    settings = COMPRESSED | {"config_groups": groups}
    assert quantization_of(folder_of(tmp_path, settings)) is not None
