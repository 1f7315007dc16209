"""Checks a folded GGUF file against its base by reading both, without running a model.

Independent of the fold's own arithmetic, as `austeer.exporter.proofs.fold_check`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from austeer.adapters._errors import VerificationError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.sites import Component
from austeer.exporter.proofs.fold_check import StructureReport, dense_gain
from austeer.exporter.proofs.values import differing_chunk, values_error
from austeer.exporter.quantized.gguf_file import GgufFile, GgufTensor, read_gguf, tensor_name
from austeer.exporter.quantized.gguf_plan import objection

Gains = dict[int, Float[np.ndarray, " width"]]


def verify_gguf_structure(
    base: Path,
    product: Path,
    adapter: SteeringAdapter,
    scale: float = 1.0,
    *,
    touched_only: bool = False,
) -> StructureReport:
    """Prove that `product` is `base` with the adapter's gains folded in, and nothing else.

    Each steered value of a plain tensor, and each scale of a steered row's blocks, is the
    base's times its gain within one rounding; every other byte of the file is the base's.

    Args:
        base: the base's GGUF file.
        product: the folded file.
        adapter: what was folded.
        scale: factor on every γ.
        touched_only: leave out the other tensors' bytes; the header is compared all the same.

    Raises:
        VerificationError: a difference; names the tensor.
        ModelError: one of the two cannot be read.
        SiteError: a unit that the base does not have.
    """
    before, size = read_gguf(base), base.stat().st_size
    if product.stat().st_size != size:
        raise VerificationError(
            f"{product}: {product.stat().st_size} bytes long, the base has {size}; is it a "
            "fold of this base?"
        )
    gains = _gains(before, adapter, scale)
    _check_same(before, product, 0, before.data_start)
    if not touched_only:
        _check_rest(before, product, [before.tensors[name] for name in gains])
    others = 0 if touched_only else len(before.tensors) - len(gains)
    worst = max(
        _tensor_error(before, product, before.tensors[name], by_axis)
        for name, by_axis in gains.items()
    )
    return StructureReport(tuple(sorted(gains)), others, worst)


def _gains(file: GgufFile, adapter: SteeringAdapter, scale: float) -> dict[str, Gains]:
    """Per touched tensor the full gain vector of each axis."""
    found: dict[str, Gains] = {}
    for steered in adapter.sites:
        output = steered.site.component is Component.FFN
        for part in ("weight", "bias") if output else ("weight",):
            tensor = file.tensors.get(tensor_name(steered.site, part))
            axis = 0 if output else 1
            if tensor is not None:
                reason = None if part == "bias" else objection(tensor, axis)
                if reason is not None:
                    raise VerificationError(f"{file.path}: {steered.site}: {reason}")
                gain = dense_gain(steered, tensor.shape[axis], scale)
                found.setdefault(tensor.name, {})[axis] = gain
            elif part == "weight":
                name = tensor_name(steered.site)
                raise VerificationError(f"{file.path}: {name} is not in the file")
    return found


def _tensor_error(file: GgufFile, product: Path, tensor: GgufTensor, gains: Gains) -> float:
    """Largest error of one touched tensor, in units of the bound; above 1 is an error."""
    old, new = tensor.read(file.path), tensor.read(product)
    worst = 0.0
    for before, after in zip(tensor.fields(old), tensor.fields(new), strict=True):
        error = values_error(before, after, gains, f"{product}: {tensor.name}")
        worst = max(worst, error)
        after[...] = before
    if old.tobytes() != new.tobytes():
        raise VerificationError(
            f"{product}: {tensor.name}: its integers differ from the base's; fold again"
        )
    return worst


def _check_rest(file: GgufFile, product: Path, touched: list[GgufTensor]) -> None:
    """Compare every byte outside the touched tensors, the header's included."""
    start = 0
    for tensor in sorted(touched, key=lambda tensor: tensor.start):
        _check_same(file, product, start, tensor.start)
        start = tensor.start + tensor.size
    _check_same(file, product, start, file.path.stat().st_size)


def _check_same(file: GgufFile, product: Path, start: int, end: int) -> None:
    chunk = differing_chunk((file.path, start), (product, start), end - start)
    if chunk is not None:
        name = _name_at(file, start + chunk[0], start + chunk[1])
        raise VerificationError(
            f"{product}: {name} differs from the base's, the adapter does not touch it"
        )


def _name_at(file: GgufFile, start: int, end: int) -> str:
    """What lies between two bytes, in words."""
    inside = [
        t.name for t in file.tensors.values() if start < t.start + t.size and t.start < end
    ]
    return " or ".join(inside[:3]) + (" or more" if len(inside) > 3 else "") or "the header"
