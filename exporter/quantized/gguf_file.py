"""GGUF files: names, types and places of their tensors, and where gains go in their blocks.

GGML stores a weight `[out, in]` row by row, a row as blocks of 32 or 256 inputs. Every block
of the types in `BLOCKS` dequantizes to something linear in its float16 scales (`d · q`,
`d · q + m`, `d · s · q − dmin · t` with integers q, s, t), so that the gain of an output unit
goes into the scales of its row's blocks. F32, F16 and BF16 tensors are plain matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from austeer.adapters._errors import ModelError, RouteError
from austeer.adapters.sites import Component, Site
from austeer.adapters.tensors import DTYPES
from austeer.exporter.quantized.gguf_header import GgufHeader, read_gguf_header

Array = np.ndarray[Any, Any]
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class BlockType:
    """A GGML type: `size` bytes hold `length` weights; float16 scales at the offsets."""

    length: int
    size: int
    scales: tuple[int, ...]


BLOCKS: Mapping[str, BlockType] = MappingProxyType(
    {
        "Q4_0": BlockType(32, 18, (0,)),
        "Q4_1": BlockType(32, 20, (0, 2)),
        "Q5_0": BlockType(32, 22, (0,)),
        "Q5_1": BlockType(32, 24, (0, 2)),
        "Q8_0": BlockType(32, 34, (0,)),
        "Q2_K": BlockType(256, 84, (80, 82)),
        "Q3_K": BlockType(256, 110, (108,)),
        "Q4_K": BlockType(256, 144, (0, 2)),
        "Q5_K": BlockType(256, 176, (0, 2)),
        "Q6_K": BlockType(256, 210, (208,)),
        "IQ1_S": BlockType(256, 50, (0,)),
        "IQ2_XXS": BlockType(256, 66, (0,)),
        "IQ2_XS": BlockType(256, 74, (0,)),
        "IQ2_S": BlockType(256, 82, (0,)),
        "IQ3_XXS": BlockType(256, 98, (0,)),
        "IQ3_S": BlockType(256, 110, (0,)),
        "IQ4_NL": BlockType(32, 18, (0,)),
        "IQ4_XS": BlockType(256, 136, (0,)),
        "TQ1_0": BlockType(256, 54, (52,)),
        "TQ2_0": BlockType(256, 66, (64,)),
    }
)
"""Types whose blocks have float16 scales: all but IQ1_M, which spreads its scale over other
fields, and MXFP4 and NVFP4, whose scales are not float16."""

KINDS: Mapping[int, str] = MappingProxyType(
    {
        **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1"))),
        **dict(enumerate(("Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K"), 6)),
        **dict(enumerate(("Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS"), 13)),
        **dict(enumerate(("IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"), 19)),
        **{29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"},
    }
)
"""Names of GGML's types by number."""

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        **{name: name for name in ("llama", "qwen2", "qwen3", "gemma2", "phi3", "granite")},
        **{name: name for name in ("olmo2", "stablelm", "smollm3", "starcoder2", "gpt2")},
        **{name: name for name in ("falcon", "bloom", "mpt")},
        "mistral": "llama",
        **dict.fromkeys(("gemma3_text", "gemma3"), "gemma3"),
        "cohere": "command-r",
        "phi": "phi2",
        "gpt_neox": "gptneox",
    }
)
"""llama.cpp's name for each `model_type` whose two projections it converts row for row."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file: its bytes are `[start : start + size]`.

    Attributes:
        name: such as `blk.0.ffn_down.weight`.
        kind: name of its GGML type.
        shape: rows first: `[out, in]` of a weight.
        start: first byte in the file.
        size: number of bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, path: Path) -> Array:
        """Its bytes, copied into memory."""
        with path.open("rb") as stream:
            stream.seek(self.start)
            return np.frombuffer(stream.read(self.size), np.uint8).copy()

    def fields(self, data: Array) -> list[Array]:
        """Views into its bytes of every number that is linear in the weights, rows first.

        For a plain tensor that is the tensor; for one in blocks, `[out, blocks]` for each
        scale of a block.
        """
        if self.kind in FLOATS:
            return [data.view(DTYPES[self.kind]).reshape(self.shape)]
        block = BLOCKS[self.kind]
        blocks = data.reshape(self.shape[0], -1, block.size)
        return [
            blocks[:, :, offset : offset + 2].view(np.dtype("<f2"))[:, :, 0]
            for offset in block.scales
        ]


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        architecture: llama.cpp's name of the model's architecture.
        layers: number of decoder layers.
        tensors: every tensor by name.
        data_start: first byte behind the header.
    """

    path: Path
    architecture: str
    layers: int
    tensors: Mapping[str, GgufTensor]
    data_start: int


def is_gguf(name_or_path: str | Path) -> bool:
    """Whether a base or product is named as a GGUF file; the file need not exist."""
    return str(name_or_path).lower().endswith(".gguf") and not Path(name_or_path).is_dir()


def tensor_name(site: Site, part: str = "weight") -> str:
    """The name of a site's projection; attention and MLP of every architecture here."""
    module = "attn_output" if site.component is Component.ATTENTION else "ffn_down"
    return f"blk.{site.layer}.{module}.{part}"


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF header and check that its tensors lie apart from each other.

    Raises:
        RouteError: the file is a part of a split model.
        ModelError: not a GGUF file, truncated, malformed or without tensors.
    """
    header = read_gguf_header(path)
    parts = header.settings.get("split.count", 1)
    # Parts that llama-gguf-split joined have a count of 0.
    if not isinstance(parts, int) or parts > 1:
        raise RouteError(
            f"{path}: a part of a split model; join the parts first (llama-gguf-split --merge)"
        )
    architecture = header.settings.get("general.architecture")
    layers = header.settings.get(f"{architecture}.block_count")
    if not isinstance(architecture, str) or not isinstance(layers, int):
        raise _corrupt(path, "it names no architecture, or no number of layers")
    if not header.tensors:
        raise ModelError(
            f"{path}: expected a model, found no tensors; name the file with its weights"
        )
    tensors = {tensor.name: tensor for tensor in _placed(path, header)}
    return GgufFile(path, architecture, layers, tensors, header.size)


def _placed(path: Path, header: GgufHeader) -> Iterator[GgufTensor]:
    """The tensors with their sizes; that of a type not known here reaches up to the next."""
    infos = sorted(header.tensors, key=lambda info: info.start)
    total = path.stat().st_size
    ends = [*(info.start for info in infos[1:]), total]
    for info, end in zip(infos, ends, strict=True):
        kind = KINDS.get(info.number, f"type {info.number}")
        if kind in BLOCKS and (not info.shape or info.shape[-1] % BLOCKS[kind].length):
            raise _corrupt(path, f"{info.name} of shape {info.shape} is no whole {kind} blocks")
        size = _size(kind, info.shape)
        if size is None:
            size = end - info.start
        if info.start + size > end or size < 0:
            raise _corrupt(
                path, f"{info.name} ends at byte {info.start + size}, expected {end} or before"
            )
        yield GgufTensor(info.name, kind, info.shape, info.start, size)


def _size(kind: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor; None for a type not known here."""
    if kind in FLOATS:
        return math.prod(shape) * DTYPES[kind].itemsize
    if kind in BLOCKS:
        return math.prod(shape) // BLOCKS[kind].length * BLOCKS[kind].size
    return None


def _corrupt(path: Path, what: str) -> ModelError:
    return ModelError(f"{path}: not a whole GGUF file: {what}; fetch it again")
