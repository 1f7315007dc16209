"""Tiny GGUF files, and what their blocks dequantize to, both after GGML's definitions."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
Scaled = Callable[[Array], Array]

FLOATS = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Number of the type, weights in a block, its bytes, where in them float16 scales are.
TYPES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "F32": (0, 1, 4, ()),
    "F16": (1, 1, 2, ()),
    "BF16": (30, 1, 2, ()),
    "Q4_0": (2, 32, 18, (0,)),
    "Q4_1": (3, 32, 20, (0, 2)),
    "Q5_0": (6, 32, 22, (0,)),
    "Q5_1": (7, 32, 24, (0, 2)),
    "Q8_0": (8, 32, 34, (0,)),
    "Q2_K": (10, 256, 84, (80, 82)),
    "Q3_K": (11, 256, 110, (108,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q5_K": (13, 256, 176, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
    "IQ2_XXS": (16, 256, 66, (0,)),
    "IQ2_XS": (17, 256, 74, (0,)),
    "IQ3_XXS": (18, 256, 98, (0,)),
    "IQ1_S": (19, 256, 50, (0,)),
    "IQ4_NL": (20, 32, 18, (0,)),
    "IQ3_S": (21, 256, 110, (0,)),
    "IQ2_S": (22, 256, 82, (0,)),
    "IQ4_XS": (23, 256, 136, (0,)),
    "IQ1_M": (29, 256, 56, ()),
    "TQ1_0": (34, 256, 54, (52,)),
    "TQ2_0": (35, 256, 66, (64,)),
    "MXFP4": (39, 32, 17, ()),
    "NVFP4": (40, 64, 36, ()),
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: `data` is a row of bytes for each row, or one for an axis."""

    kind: str
    shape: tuple[int, ...]
    start: int
    data: Array


@dataclass(frozen=True)
class GgufModel:
    """A written file, and how to read it or a copy of it back."""

    path: Path
    places: Mapping[str, tuple[str, tuple[int, ...], int, int]]

    def tensors(self, path: Path | None = None) -> dict[str, Stored]:
        data = np.frombuffer((path or self.path).read_bytes(), np.uint8)
        return {
            name: Stored(kind, shape, start, data[start : start + size].reshape(shape[0], -1))
            for name, (kind, shape, start, size) in self.places.items()
        }


def encode(weight: Array, kind: str, seed: int = 0) -> bytes:
    """A weight in a float type; random blocks with sensible scales for any other."""
    if kind in FLOATS:
        return weight.astype(FLOATS[kind]).tobytes()
    _, length, size, places = TYPES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (weight.size // length, size), np.uint8)
    for place in places:
        scales = rng.uniform(1e-3, 1e-2, len(blocks)).astype("<f2")
        blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    return blocks.tobytes()


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, tuple[Array, str]],
    settings: Mapping[str, Any] | None = None,
    layers: int = 2,
) -> GgufModel:
    """Tensors by name as (weight, kind); `settings` are strings, whole numbers, or lists."""
    entries = {
        "general.architecture": architecture,
        f"{architecture}.block_count": layers,
        "tokenizer.ggml.tokens": ["<s>", "a", "ß"],
        "tokenizer.ggml.scores": [1, 2, 3],
        **(settings or {}),
    }
    data, infos, places = b"", b"", {}
    for seed, (name, (weight, kind)) in enumerate(tensors.items()):
        raw = encode(weight, kind, seed)
        lengths = struct.pack(f"<{weight.ndim}Q", *reversed(weight.shape))
        infos += _string(name) + struct.pack("<I", weight.ndim) + lengths
        infos += struct.pack("<IQ", TYPES[kind][0], len(data))
        places[name] = (kind, weight.shape, len(data), len(raw))
        data += raw + bytes(-len(raw) % 32)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    header += b"".join(_string(key) + _setting(value) for key, value in entries.items())
    header += infos
    header += bytes(-len(header) % 32)
    path.write_bytes(header + data)
    return GgufModel(
        path, {n: (k, s, at + len(header), size) for n, (k, s, at, size) in places.items()}
    )


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _setting(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    text = isinstance(value[0], str)
    items = [_string(item) if text else struct.pack("<I", item) for item in value]
    return struct.pack("<IIQ", 9, 8 if text else 4, len(value)) + b"".join(items)


def rows_of(tensor: Stored) -> Array:
    """What a tensor dequantizes to, `[out, in]` in float32."""
    if tensor.kind in FLOATS:
        found = np.ascontiguousarray(tensor.data).view(FLOATS[tensor.kind])
        return found.reshape(tensor.shape).astype(np.float32)
    if tensor.kind in DEQUANTIZERS:
        return dequantize(tensor.data, tensor.kind)
    return package_rows_of(tensor)


def package_rows_of(tensor: Stored) -> Array:
    """The same by the `gguf` package."""
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.kind]
    return np.asarray(gguf.quants.dequantize(np.ascontiguousarray(tensor.data), kind))


def _half(blocks: Array, offset: int) -> Array:
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2")[:, 0]


def q8_0(blocks: Array, scaled: Scaled) -> Array:
    """w = d q, q signed bytes."""
    return scaled(_half(blocks, 0))[:, None] * blocks[:, 2:].view(np.int8).astype(np.float32)


def q4_0(blocks: Array, scaled: Scaled) -> Array:
    """w = d (q − 8); low nibbles are the first half of the block."""
    q = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.int32)
    return scaled(_half(blocks, 0))[:, None] * (q - 8).astype(np.float32)


def q4_k(blocks: Array, scaled: Scaled) -> Array:
    """w = d s q − dmin t: eight groups of 32 with 6-bit s and t."""
    d, dmin, packed = scaled(_half(blocks, 0)), scaled(_half(blocks, 2)), blocks[:, 4:16]
    found = []
    for j in range(8):
        if j < 4:
            s, t = packed[:, j] & 63, packed[:, j + 4] & 63
        else:
            s = (packed[:, j + 4] & 15) | ((packed[:, j - 4] >> 6) << 4)
            t = (packed[:, j + 4] >> 4) | ((packed[:, j] >> 6) << 4)
        bytes_ = blocks[:, 16 + 32 * (j // 2) : 48 + 32 * (j // 2)]
        q = (bytes_ & 15) if j % 2 == 0 else (bytes_ >> 4)
        low = (dmin * t.astype(np.float32))[:, None]
        found.append((d * s.astype(np.float32))[:, None] * q.astype(np.float32) - low)
    return np.concatenate(found, axis=1)


def q6_k(blocks: Array, scaled: Scaled) -> Array:
    """w = d s (q − 32): sixteen groups of 16 with int8 s; 4 low and 2 high bits of q."""
    low, high = blocks[:, :128], blocks[:, 128:192]
    s, d = blocks[:, 192:208].view(np.int8).astype(np.float32), scaled(_half(blocks, 208))
    q = np.empty((len(blocks), 256), np.int32)
    for half in range(2):
        for quarter in range(4):
            part = low[:, 64 * half + 32 * (quarter % 2) :][:, :32]
            nibble = (part & 15) if quarter < 2 else (part >> 4)
            two = (high[:, 32 * half : 32 * half + 32] >> (2 * quarter)) & 3
            at = 128 * half + 32 * quarter
            q[:, at : at + 32] = nibble.astype(np.int32) | (two.astype(np.int32) << 4)
    return (d[:, None] * s).repeat(16, axis=1) * (q - 32).astype(np.float32)


DEQUANTIZERS = {
    "Q8_0": (34, q8_0),
    "Q4_0": (18, q4_0),
    "Q4_K": (144, q4_k),
    "Q6_K": (210, q6_k),
}


def dequantize(data: Array, kind: str, scaled: Scaled | None = None) -> Array:
    """Rows of bytes by the definitions above, each scale passed through `scaled`."""
    size, from_blocks = DEQUANTIZERS[kind]
    blocks = np.ascontiguousarray(data).reshape(-1, size)
    passed = scaled or (lambda d: d)
    found = from_blocks(blocks, lambda d: passed(d).astype(np.float32))
    return found.reshape(len(data), -1)
