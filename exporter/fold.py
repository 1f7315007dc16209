"""Gain arithmetic on one tensor: float64 inside, one rounding back to the stored dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from austeer.adapters._errors import ModelError, RouteError
from austeer.exporter.plan import TensorEdit

Array = np.ndarray[Any, Any]

_COARSEST = 2.0**-8  # relative error of rounding to bfloat16, the coarsest dtype of scales


def fold_tensor(tensor: Array, edits: Sequence[TensorEdit]) -> Array:
    """A copy of `tensor` with every edited slice multiplied by its gain.

    Where edits along two axes cross, both gains apply before the one rounding.

    Args:
        tensor: the stored weight or bias, any float dtype.
        edits: edits of this tensor, at most one per axis.

    Raises:
        RouteError: a value leaves the dtype's range; names the tensor and the unit.
        ModelError: a value to be multiplied is no finite number.
    """
    folded = tensor.copy()
    fold_rows(folded, 0, edits)
    return folded


def fold_rows(
    rows: Array, first: int, edits: Sequence[TensorEdit], file: Path | None = None
) -> int:
    """Do to some rows of a tensor, in place, what `fold_tensor` does to all of them.

    Args:
        rows: successive rows.
        first: number of the first of them.
        edits: edits of the whole tensor.
        file: of the base, for errors.

    Returns:
        How many values have other bits now.

    Raises:
        RouteError: as for `fold_tensor`.
        ModelError: as there.
    """
    parts = [part for edit in edits if len((part := _within(edit, first, len(rows))).index)]
    if not parts:
        return 0
    gains = [np.ones(length) for length in rows.shape]
    for part in parts:
        gains[part.axis][part.index] *= part.gain
    # All slices are taken before one is written: they may cross.
    befores = [rows.take(part.index, axis=part.axis) for part in parts]
    afters = []
    for part, before in zip(parts, befores, strict=True):
        wide = before.astype(np.float64)
        _check_finite(wide, part, first, file)
        for axis, gain in enumerate(gains):
            factor = gain[part.index] if axis == part.axis else gain
            if axis == part.axis or len(parts) > 1:
                wide *= factor.reshape([-1 if axis == i else 1 for i in range(wide.ndim)])
        afters.append(round_once(wide, rows.dtype))
        _check_range(before, afters[-1], part, first)
    whole = rows.copy() if len(parts) > 1 else None
    for part, after in zip(parts, afters, strict=True):
        rows[(slice(None),) * part.axis + (part.index,)] = after
    return (
        changed_values(befores[0], afters[0]) if whole is None else changed_values(whole, rows)
    )


def _within(edit: TensorEdit, first: int, count: int) -> TensorEdit:
    """The part of an edit that falls into rows [first, first + count), numbered from there."""
    if edit.axis:
        return edit
    inside = (edit.index >= first) & (edit.index < first + count)
    return dataclasses.replace(edit, index=edit.index[inside] - first, gain=edit.gain[inside])


def changed_values(before: Array, after: Array) -> int:
    """How many values have other bits."""
    bits = np.dtype(f"u{before.itemsize}")
    return int(np.count_nonzero(before.view(bits) != after.view(bits)))


def fold_scales(scales: Array, edits: Sequence[TensorEdit]) -> Array:
    """A copy of a quantized projection's scales, those of every edited unit times its gain.

    The same arithmetic as `fold_tensor`; the integers that go with the scales stay, so that
    the product dequantizes to what the base does with each scale rounded once. Below the
    normals of a dtype roundings are all of one size (float16: 3e-8, and six-bit GGML blocks
    keep scales around 1e-5 there): a unit may be off by 1/256 of what it was or becomes,
    bfloat16's own rounding, and no more; nor may it vanish, but for a gain of 0.

    Args:
        scales: float scales, one axis counts units.
        edits: edits of these scales.

    Raises:
        RouteError: a scale leaves the dtype's range, above or below; names site and unit.
    """
    folded = fold_tensor(scales, edits)
    for edit in edits:
        before, after = (
            np.moveaxis(values.take(edit.index, edit.axis), edit.axis, 0)
            .astype(np.float64)
            .reshape(len(edit.index), -1)
            for values in (scales, folded)
        )
        wanted = before * edit.gain[:, None]
        off = np.abs(after - wanted).max(axis=1)
        allowed = _COARSEST * np.maximum(np.abs(before), np.abs(wanted)).max(axis=1)
        lost = (off > allowed) | (wanted.any(axis=1) & ~after.any(axis=1))
        if lost.any():
            row = int(lost.argmax())
            raise RouteError(
                f"{edit.sites[0]}: unit {edit.index[row]} times gain {edit.gain[row]:g}: its "
                f"scales in {edit.name}, at most {np.abs(wanted[row]).max():.2g}, are too "
                f"small for {scales.dtype}; leave the unit out, or fold the unquantized model"
            )
    return folded


def fold_scale_rows(rows: Array, first: int, edits: Sequence[TensorEdit]) -> int:
    """Do in place, to all scales of a projection, what `fold_scales` does.

    Returns:
        How many have other bits now.

    Raises:
        RouteError: as for `fold_scales`.
    """
    assert first == 0  # whether a unit vanishes only all its scales tell
    folded = fold_scales(rows, edits)
    changed = changed_values(rows, folded)
    rows[...] = folded
    return changed


def round_once(wide: Float[np.ndarray, "*shape"], dtype: np.dtype[Any]) -> Array:
    """Round float64 values to the nearest value of `dtype`, ties to even; overflow is inf."""
    with np.errstate(over="ignore"):
        if dtype != ml_dtypes.bfloat16:
            return np.asarray(wide.astype(dtype))
        # ml_dtypes goes through float32, which would round twice: truncating to float32 with
        # a sticky last bit ("round to odd") keeps what the final rounding needs to know.
        narrow = wide.astype(np.float32)
        narrow = np.where(
            np.abs(narrow) > np.abs(wide), np.nextafter(narrow, np.float32(0)), narrow
        )
        inexact = narrow.astype(np.float64) != wide
        odd = (narrow.view(np.uint32) | inexact).view(np.float32)
        return np.asarray(odd.astype(dtype))


def _check_finite(wide: Array, edit: TensorEdit, first: int, file: Path | None) -> None:
    """Refuse infinities and NaN: no check could tell their fold from a wrong one."""
    gain = edit.gain.reshape([-1 if axis == edit.axis else 1 for axis in range(wide.ndim)])
    broken = ~np.isfinite(wide) & (gain != 1.0)
    if broken.any():
        place = tuple(np.argwhere(broken)[0])
        unit = edit.index[place[edit.axis]] + (0 if edit.axis else first)
        raise ModelError(
            f"{f'{file}: ' if file else ''}{edit.name}: the base model's weights of unit "
            f"{unit} hold {wide[place]}, expected finite numbers; fetch the model again, or "
            "leave the unit out"
        )


def _check_range(before: Array, after: Array, edit: TensorEdit, first: int) -> None:
    left = np.isfinite(before.astype(np.float64)) & ~np.isfinite(after.astype(np.float64))
    if not left.any():
        return
    row = int(np.argwhere(left)[0][edit.axis])
    unit = edit.index[row] + (0 if edit.axis else first)
    raise RouteError(
        f"{edit.name}: unit {unit} times gain {edit.gain[row]:g} leaves the range "
        f"of {after.dtype}; lower the scale, or fold a checkpoint with a wider dtype"
    )
