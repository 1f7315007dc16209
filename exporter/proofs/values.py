"""Compares the stored values of two files: the same bytes, or a gain within one rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from austeer.adapters._errors import VerificationError
from austeer.adapters.tensors import TensorEntry

Array = np.ndarray[Any, Any]
Gain = Float[np.ndarray, " width"]
_CHUNK = 1 << 24
_SLACK = 1e-15  # rounding of float64 products, relative


def values_error(old: Array, new: Array, gains: dict[int, Gain], what: str) -> float:
    """Largest error of one touched tensor's values, in units of what one rounding can do.

    Args:
        old: the base's values, any float dtype.
        new: the product's, of the same dtype.
        gains: the gain of every unit along each steered axis.
        what: names the tensor in errors.

    Raises:
        VerificationError: an error above 1, or a difference where no unit is steered.
    """
    steered = {axis: np.flatnonzero(gain != 1.0) for axis, gain in gains.items()}
    different = _bits(old) != _bits(new)
    for axis, units in steered.items():
        different[(slice(None),) * axis + (units,)] = False
    if different.any():
        raise VerificationError(f"{what} differs where no unit is steered")
    if not any(map(len, steered.values())):
        return 0.0
    if len(steered) == 1:
        # The rest is the same bytes: what the steered slices do is all there is to check.
        ((axis, units),) = steered.items()
        old, new = old.take(units, axis), new.take(units, axis)
        gains = {axis: gains[axis][units]}
    error = _largest_error(old, new, gains)
    # Not its opposite: an error may be nan.
    if not error <= 1.0:
        raise VerificationError(
            f"{what} is not the base times its gains: a value is off by {error:.3g} roundings "
            f"of {new.dtype}, expected at most 1; fold again"
        )
    return error


def _bits(rows: Array) -> Array:
    return rows.view(np.dtype(f"u{rows.itemsize}"))


def _largest_error(old: Array, new: Array, gains: dict[int, Gain]) -> float:
    """Largest |W' − g ⊙ W| over what one rounding of that value may be; axes as stored."""
    wide = old.astype(np.float64)
    for axis, gain in gains.items():
        wide *= gain.reshape([-1 if axis == other else 1 for other in range(old.ndim)])
    unit, spacing = rounding_errors(new.dtype)
    bound = (unit + _SLACK) * np.abs(wide) + spacing
    return float((np.abs(new.astype(np.float64) - wide) / bound).max())


def rounding_errors(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Largest relative error of rounding to `dtype`, and largest error below its normals."""
    facts = ml_dtypes.finfo(dtype)
    return float(facts.eps) / 2, float(facts.smallest_subnormal) / 2


def same_bytes(before: TensorEntry, after: TensorEntry) -> bool:
    """Whether two stored tensors of one size have the same bytes; memory for a chunk."""
    places = (before.file, before.start), (after.file, after.start)
    return differing_chunk(*places, before.size) is None


def differing_chunk(
    first: tuple[Path, int], second: tuple[Path, int], size: int
) -> tuple[int, int] | None:
    """The first chunk in which two stretches of files differ; None where they are the same.

    Args:
        first: a file, and where in it to start.
        second: the other.
        size: how many bytes to compare.

    Returns:
        Where the chunk starts and ends, counted from the start of the stretch.
    """
    with first[0].open("rb") as one, second[0].open("rb") as other:
        one.seek(first[1])
        other.seek(second[1])
        for done in range(0, size, _CHUNK):
            length = min(_CHUNK, size - done)
            if one.read(length) != other.read(length):
                return done, done + length
    return None
