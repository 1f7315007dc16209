"""Where quantized checkpoints keep the factors of a projection's output rows.

Every format here dequantizes a weight as `scale · (integer − zero)`, with scales of its own for
each output row, one or one for each group of inputs. The gain of an output unit therefore goes
into that row's scales, and no integer or zero point changes; the sign of a scale is free.
An input unit crosses every row's scales: no scale can hold its gain.

Layouts, `[out, in]` being the projection's weight: GPTQ packs `qweight` along the inputs and
keeps `scales` as `[groups, out]`; AWQ's gemm layout packs `qweight` along the outputs, `scales`
likewise `[groups, out]`; compressed-tensors keeps `weight` (int8, float8) or `weight_packed`
as stored and `weight_scale` as `[out, 1 or groups]`; bitsandbytes int8 keeps `SCB` as `[out]`,
127 times the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.adapters._errors import ModelError, RouteError
from austeer.adapters._files import read_json
from austeer.adapters.architectures import Architecture
from austeer.adapters.tensors import TensorEntry
from austeer.exporter.plan import stands_twice, stored_names

REMEDY = "fold the unquantized model and quantize the result"
SCALE_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Layout:
    """How one quantized projection is stored, by names below its module.

    Attributes:
        values: the tensor of integers or small floats.
        dtypes: its storage types.
        values_axis: the axis that counts output units, `packed` of them in one element.
        scales: the tensor of scales.
        scales_axis: the axis of it that counts output units.
        packed: output units in one element of `values`.
    """

    values: str
    dtypes: tuple[str, ...]
    values_axis: int
    scales: str
    scales_axis: int
    packed: int = 1


@dataclass(frozen=True, slots=True)
class Quantization:
    """A quantization method that the fold knows, and its layouts."""

    method: str
    layouts: tuple[Layout, ...]

    @property
    def endings(self) -> tuple[str, ...]:
        """How the names of scales end."""
        return tuple(f".{layout.scales}" for layout in self.layouts)


@dataclass(frozen=True, slots=True)
class RowScales:
    """The scales of one stored projection, one or more for each of `rows` output units."""

    entry: TensorEntry
    axis: int
    rows: int


def quantization_of(base: Path) -> Quantization | None:
    """How the weights of a model directory are quantized; None where they are not.

    Raises:
        RouteError: in a way whose scales cannot hold the gain of a row, or an unknown one.
        ModelError: config.json cannot be read.
    """
    config = read_json(base / "config.json", ModelError, "download the whole model")
    settings = config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise ModelError(f"{base}/config.json: quantization_config is not an object")
    method = str(settings.get("quant_method") or _unnamed(settings))
    if method not in _METHODS:
        reason = _REASONS.get(method, "this way is not known here")
        raise RouteError(f"{base}: weights quantized with {method}: {reason}; {REMEDY}")
    layouts, objections = _METHODS[method]
    for objection in objections(settings):
        raise RouteError(f"{base}: weights quantized with {method}: {objection}; {REMEDY}")
    return Quantization(method, layouts)


def row_scales(
    quantization: Quantization,
    architecture: Architecture,
    module: str,
    tensors: Mapping[str, TensorEntry],
) -> RowScales | str | None:
    """Where the scales of `module` are; why not; or None where it is stored unquantized."""

    def stored(part: str) -> list[str]:
        return stored_names(architecture, f"{module}.{part}", tensors)

    def find(part: str) -> TensorEntry | None:
        return next((tensors[name] for name in stored(part)), None)

    parts = {part for layout in quantization.layouts for part in (layout.values, layout.scales)}
    for part in sorted({*parts, "bias"}):
        if len(names := stored(part)) > 1:
            return stands_twice(names)
    for layout in quantization.layouts:
        values, scales = find(layout.values), find(layout.scales)
        if values is not None and values.dtype in layout.dtypes:
            return _checked(layout, values, scales)
    left = [layout.scales for layout in quantization.layouts if find(layout.scales)]
    if left:
        # Such weights are rounded at load, by scales that know nothing of a fold.
        return f"it has {left[0]} without quantized values beside them"
    return None


def _checked(
    layout: Layout, values: TensorEntry, scales: TensorEntry | None
) -> RowScales | str:
    if scales is None:
        return f"its {layout.values} is {values.dtype}, and has no {layout.scales}"
    if scales.dtype not in SCALE_DTYPES:
        return f"its scales cannot express a gain: {layout.scales} is {scales.dtype}"
    rows = values.shape[layout.values_axis] * layout.packed if len(values.shape) == 2 else 0
    found = scales.shape[layout.scales_axis] if len(scales.shape) > layout.scales_axis else 0
    if not rows or found != rows:
        return (
            f"its scales cannot express a gain: {layout.scales} has shape {scales.shape}, not "
            f"scales of its own for each of {rows} output units"
        )
    return RowScales(scales, layout.scales_axis, rows)


def _unnamed(settings: Mapping[str, Any]) -> str:
    # bitsandbytes wrote no name in its first releases.
    known = settings.get("load_in_8bit") or settings.get("load_in_4bit")
    return "bitsandbytes" if known else "an unnamed method"


def _rotated(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("rotation") or settings.get("transform_config"):
        yield "it rotates activations, the adapter's units are not the rows of the weights"


def _gptq_objections(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from _rotated(settings)
    kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if kind not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        name = "marlin" if settings.get("is_marlin_format") else kind
        yield f"format {name} holds its scales in an order of a kernel, expected gptq"


def _awq_objections(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from _rotated(settings)
    kind = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if kind != "gemm" or settings.get("backend") == "llm-awq":
        yield f"layout {kind} of {settings.get('backend', 'autoawq')}, expected gemm of autoawq"
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        yield f"{bits} bits, expected 4"


def _compressed_objections(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from _rotated(settings)
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and group.get("output_activations"):
            yield "it rounds the outputs of projections too, a gain changes what that does"
            return


def _bitsandbytes_objections(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("load_in_4bit") or not settings.get("load_in_8bit"):
        kind = settings.get("bnb_4bit_quant_type", "fp4")
        yield f"its scales cannot express a gain: {kind} rounds them, and shares them in blocks"


_LAYOUT_AWQ = Layout("qweight", ("I32",), 1, "scales", 1, packed=8)
_METHODS: Mapping[
    str, tuple[tuple[Layout, ...], Callable[[Mapping[str, Any]], Iterator[str]]]
] = {
    "gptq": ((Layout("qweight", ("I32",), 1, "scales", 1),), _gptq_objections),
    "awq": ((_LAYOUT_AWQ,), _awq_objections),
    "compressed-tensors": (
        (
            Layout("weight_packed", ("I32",), 0, "weight_scale", 0),
            Layout("weight", ("I8", "F8_E4M3"), 0, "weight_scale", 0),
        ),
        _compressed_objections,
    ),
    "bitsandbytes": ((Layout("weight", ("I8",), 0, "SCB", 0),), _bitsandbytes_objections),
}
_REASONS: Mapping[str, str] = {
    "mxfp4": "its scales cannot express a gain, they are powers of two",
    "fp8": "its scales cannot express a gain, each belongs to a block of rows",
}
