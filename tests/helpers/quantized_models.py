"""Tiny quantized checkpoints and what they dequantize to, after the formats' definitions.

`quantize_folder` turns a float32 checkpoint into one of METHODS; `dequantized` reads it back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
GROUP = 16
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of eight that each nibble holds, low first
_NAMES = {
    np.dtype("<f4"): "F32",
    np.dtype("<f2"): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype("<i8"): "I64",
    np.dtype("<i4"): "I32",
    np.dtype("i1"): "I8",
    np.dtype("u1"): "U8",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Every dtype of these formats, float8 among them."""
    header, start = {}, 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, start + value.nbytes],
        }
        start += value.nbytes
    header_bytes = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    with path.open("wb") as stream:
        stream.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        for value in tensors.values():
            stream.write(value.tobytes())


def read_safetensors(path: Path) -> dict[str, Array]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(data[8 + length + begin : 8 + length + end], np.uint8).copy()
        found[name] = raw.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def pack_low_first(values: Array, axis: int) -> Array:
    """Eight 4-bit values along `axis` in one int32, the first in the lowest bits."""
    lanes = np.moveaxis(values, axis, -1).astype(np.uint32)
    lanes = lanes.reshape(*lanes.shape[:-1], -1, 8)
    packed = sum(lanes[..., i] << np.uint32(4 * i) for i in range(8))
    return np.ascontiguousarray(np.moveaxis(np.asarray(packed).view(np.int32), -1, axis))


def unpack_low_first(packed: Array, axis: int) -> Array:
    words = np.ascontiguousarray(np.moveaxis(packed, axis, -1)).view(np.uint32)
    lanes = np.stack([(words >> np.uint32(4 * i)) & np.uint32(15) for i in range(8)], axis=-1)
    return np.moveaxis(lanes.reshape(*words.shape[:-1], -1), -1, axis).astype(np.int64)


def _grouped(weight: Array, group: Array, levels: float) -> tuple[Array, Array]:
    """Scales `[groups, out]` in float16 and the scale of each weight, `[out, in]`."""
    count = int(group.max()) + 1
    scales = np.stack(
        [np.abs(weight[:, group == g]).max(axis=1) / levels for g in range(count)]
    )
    scales = scales.astype(np.float16)
    return scales, scales[group].T.astype(np.float64)


def gptq(weight: Array) -> dict[str, Array]:
    """Groups in act-order: neighbours in the file belong to different groups."""
    rows, width = weight.shape
    group = (np.arange(width) % math.ceil(width / GROUP)).astype(np.int32)
    scales, each = _grouped(weight, group, 7.0)
    values = np.clip(np.round(weight / each) + 8, 0, 15)
    zeros = np.full((len(scales), rows), 7)  # one less than what is subtracted
    return {
        "qweight": pack_low_first(values.T, 0),
        "qzeros": pack_low_first(zeros, 1),
        "scales": scales,
        "g_idx": group,
    }


def from_gptq(parts: Mapping[str, Array]) -> Array:
    zeros = unpack_low_first(parts["qzeros"], 1) + 1
    values, group = unpack_low_first(parts["qweight"], 0), parts["g_idx"]
    scales = parts["scales"].astype(np.float32)
    return (scales[group] * (values - zeros[group]).astype(np.float32)).T


def awq(weight: Array) -> dict[str, Array]:
    """Zero points differ from row to row and from group to group."""
    rows, width = weight.shape
    group = np.arange(width) // GROUP
    scales, each = _grouped(weight, group, 6.0)
    zeros = 7 + (np.arange(scales.size).reshape(scales.shape) % 3)
    values = np.clip(np.round(weight / each) + zeros[group].T, 0, 15).T
    order = (np.arange(rows).reshape(-1, 8)[:, AWQ_NIBBLES]).ravel()
    return {
        "qweight": pack_low_first(values[:, order], 1),
        "qzeros": pack_low_first(zeros[:, order], 1),
        "scales": scales,
    }


def from_awq(parts: Mapping[str, Array]) -> Array:
    values, zeros = (unpack_low_first(parts[name], 1) for name in ("qweight", "qzeros"))
    order = (np.arange(values.shape[1]).reshape(-1, 8)[:, AWQ_NIBBLES]).ravel()
    plain, shift = np.empty_like(values), np.empty_like(zeros)
    plain[:, order], shift[:, order] = values, zeros
    group = np.arange(len(values)) // GROUP
    return (parts["scales"].astype(np.float32)[group] * (plain - shift[group])).T.astype(
        np.float32
    )


def compressed_int8(weight: Array) -> dict[str, Array]:
    scale = (np.abs(weight).max(axis=1, keepdims=True) / 127).astype(ml_dtypes.bfloat16)
    values = np.clip(np.round(weight / scale.astype(np.float64)), -128, 127)
    return {"weight": values.astype(np.int8), "weight_scale": scale}


def compressed_fp8(weight: Array) -> dict[str, Array]:
    scale = (np.abs(weight).max(axis=1, keepdims=True) / 448).astype(np.float32)
    values = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}


def from_compressed(parts: Mapping[str, Array]) -> Array:
    return parts["weight"].astype(np.float32) * parts["weight_scale"].astype(np.float32)


def compressed_packed(weight: Array) -> dict[str, Array]:
    rows, width = weight.shape
    scales, each = _grouped(weight, np.arange(width) // GROUP, 7.0)
    values = np.clip(np.round(weight / each), -8, 7)
    return {
        "weight_packed": pack_low_first(values.astype(np.int64) + 8, 1),
        "weight_scale": np.ascontiguousarray(scales.T),
        "weight_shape": np.array([rows, width], np.int64),
    }


def from_packed(parts: Mapping[str, Array]) -> Array:
    values = unpack_low_first(parts["weight_packed"], 1) - 8
    group = np.arange(values.shape[1]) // GROUP
    return values.astype(np.float32) * parts["weight_scale"].astype(np.float32)[:, group]


def bitsandbytes(weight: Array) -> dict[str, Array]:
    largest = np.abs(weight).max(axis=1).astype(np.float32)
    return {
        "weight": np.round(weight * (127 / largest[:, None])).astype(np.int8),
        "SCB": largest,
        "weight_format": np.zeros((), np.uint8),
    }


def from_bitsandbytes(parts: Mapping[str, Array]) -> Array:
    return parts["weight"].astype(np.float32) * parts["SCB"][:, None] / np.float32(127)


def _compressed_config(kind: str, bits: int, number: str, strategy: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": number, "strategy": strategy, "symmetric": True}
    if strategy == "group":
        weights["group_size"] = GROUP
    group = {"targets": ["Linear"], "weights": weights, "format": kind}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


METHODS: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "gptq": (gptq, from_gptq, "scales", {"quant_method": "gptq", "bits": 4, "group_size": 16}),
    "awq": (awq, from_awq, "scales", {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "int8": (
        compressed_int8,
        from_compressed,
        "weight_scale",
        _compressed_config("int-quantized", 8, "int", "channel"),
    ),
    "fp8": (
        compressed_fp8,
        from_compressed,
        "weight_scale",
        _compressed_config("float-quantized", 8, "float", "channel"),
    ),
    "int4": (
        compressed_packed,
        from_packed,
        "weight_scale",
        _compressed_config("pack-quantized", 4, "int", "group"),
    ),
    "bitsandbytes": (
        bitsandbytes,
        from_bitsandbytes,
        "SCB",
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    ),
}
"""By name: quantize a weight, dequantize its parts, name of its scales, quantization_config."""


def quantize_folder(folder: Path, method: str, modules: Iterable[str] = ("proj",)) -> None:
    """Quantize, in place, each decoder weight whose name holds one of `modules`."""
    quantize, _, _, config = METHODS[method]
    tensors: dict[str, Array] = {}
    for name, value in read_safetensors(folder / "model.safetensors").items():
        wanted = any(part in name for part in modules)
        if wanted and "layers." in name and value.ndim == 2 and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            parts = quantize(value.astype(np.float64))
            tensors |= {f"{module}.{part}": found for part, found in parts.items()}
        else:
            tensors[name] = value
    write_safetensors(folder / "model.safetensors", tensors)
    change_config(folder, quantization_config=config)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def parts_of(tensors: Mapping[str, Array], module: str) -> dict[str, Array]:
    """What is stored of one module, by the last part of the names."""
    prefix = f"{module}."
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def dequantized(tensors: Mapping[str, Array], module: str, method: str) -> Array:
    """The weight of one module, `[out, in]` in float32."""
    return np.asarray(METHODS[method][1](parts_of(tensors, module)))


def nearest(values: Array, dtype: Any) -> Array:
    """The value of `dtype` nearest to each float64, ties to even; by trying the neighbours."""
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    start = values.astype(dtype).view(bits).astype(np.int64)
    best = start.copy()
    for step in (-1, 0, 1):
        trial = start + step
        trial = np.where((trial < 0) | (trial > np.iinfo(bits).max), start, trial)

        def off(candidate: Array) -> Array:
            found = candidate.astype(bits).view(dtype).astype(np.float64)
            return np.abs(np.where(np.isfinite(found), found, np.inf) - values)

        closer = off(trial) < off(best)
        even = (off(trial) == off(best)) & (trial % 2 == 0)
        best = np.where(closer | even, trial, best)
    return best.astype(bits).view(dtype)
