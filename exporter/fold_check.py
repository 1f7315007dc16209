"""Checks a folded checkpoint against its base by reading both, without running a model.

Independent of the fold's own arithmetic: each touched value must be its gain times the base's
within one rounding, so that W'·x == g_out ⊙ W·(g_in ⊙ x); all else must be the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from austeer.adapters._errors import ModelError, VerificationError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.sites import Component
from austeer.adapters.steered_site import SteeredSite
from austeer.adapters.tensors import Checkpoint, TensorEntry

Array = np.ndarray[Any, Any]
_CHUNK = 1 << 24
_SLACK = 1e-15  # rounding of float64 products, relative


@dataclass(frozen=True, slots=True)
class StructureReport:
    """Result of `verify_fold_structure`.

    Attributes:
        touched: names of the tensors that carry gains.
        identical: number of other tensors, found to have the base's exact bytes; 0 where
            only the touched ones were read.
        worst_error: largest error of a value, 1 = what one rounding can do at most.
    """

    touched: tuple[str, ...]
    identical: int
    worst_error: float


def verify_fold_structure(
    base: Path,
    folder: Path,
    adapter: SteeringAdapter,
    scale: float = 1.0,
    *,
    touched_only: bool = False,
) -> StructureReport:
    """Prove that `folder` is `base` with the adapter's gains folded in, and nothing else.

    Each value of a touched projection is g_out · W · g_in within one rounding of the stored
    dtype, so that W'·x == g_out ⊙ W·(g_in ⊙ x) for every x; biases likewise; slices without a
    gain and all other tensors are byte-identical; config.json is the base's.

    Args:
        base: directory of the base checkpoint.
        folder: directory of the folded checkpoint.
        adapter: what was folded.
        scale: factor on every γ.
        touched_only: leave out the other tensors' bytes, which takes longer than copying them
            did; names, dtypes, shapes and file sizes are compared all the same.

    Raises:
        VerificationError: a difference; names the tensor.
        ModelError: one of the two cannot be read.
    """
    before, after = Checkpoint(base), Checkpoint(folder)
    _check_same_tensors(before, after)
    if _json(base / "config.json") != _json(folder / "config.json"):
        raise VerificationError(f"{folder}/config.json: differs from the base's")
    gains = dict(touched_gains(adapter, before, scale))
    others = [] if touched_only else sorted(set(before) - set(gains))
    for name in others:
        if not same_bytes(before[name], after[name]):
            raise VerificationError(
                f"{folder}: {name} differs from the base, the adapter does not touch it"
            )
    worst = max(
        _tensor_error(before[name], after[name], by_axis) for name, by_axis in gains.items()
    )
    return StructureReport(tuple(sorted(gains)), len(others), worst)


def touched_gains(
    adapter: SteeringAdapter, checkpoint: Checkpoint, scale: float
) -> Iterator[tuple[str, dict[int, Float[np.ndarray, " width"]]]]:
    """Per touched tensor the full gain vector of each axis."""
    found: dict[str, dict[int, Array]] = {}
    for steered in adapter.sites:
        module = adapter.architecture.projection(steered.site)
        axis = adapter.architecture.width_axis(steered.site.component)
        targets = [(f"{module}.weight", axis)]
        if steered.site.component is Component.FFN:
            targets.append((f"{module}.bias", 0))
        for name, along in targets:
            entry = checkpoint.find(adapter.architecture.disk_names(name))
            if entry is not None:
                gain = _dense_gain(steered, entry.shape[along], scale)
                found.setdefault(entry.name, {})[along] = gain
            elif not name.endswith(".bias"):
                raise VerificationError(f"{checkpoint.root}: {name} is not in the checkpoint")
    yield from found.items()


def _dense_gain(steered: SteeredSite, width: int, scale: float) -> Float[np.ndarray, " width"]:
    steered.check_width(width)
    gain = np.ones(width)
    gain[steered.index] = 1.0 + scale * steered.gamma.astype(np.float64)
    return gain


def _tensor_error(
    before: TensorEntry, after: TensorEntry, gains: dict[int, Float[np.ndarray, " width"]]
) -> float:
    """Largest error of one touched tensor, in units of the bound; above 1 is an error."""
    old, new = before.read(), after.read()
    steered = {axis: np.flatnonzero(gain != 1.0) for axis, gain in gains.items()}
    bits = np.dtype(f"u{old.itemsize}")
    different = old.view(bits) != new.view(bits)
    for axis, units in steered.items():
        different = np.delete(different, units, axis)
    if different.any():
        raise VerificationError(f"{after.file}: {after.name} differs where no unit is steered")
    if not any(map(len, steered.values())):
        return 0.0
    if len(steered) == 1:
        # The rest is the same bytes: what the steered slices do is all there is to check.
        ((axis, units),) = steered.items()
        old, new = old.take(units, axis), new.take(units, axis)
        gains = {axis: gains[axis][units]}
    error = _largest_error(old, new, gains)
    if not error <= 1.0:
        raise VerificationError(
            f"{after.file}: {after.name} is not the base times its gains: a value is off by "
            f"{error:.3g} roundings of {old.dtype}, expected at most 1; fold again"
        )
    return error


def _largest_error(
    old: Array, new: Array, gains: dict[int, Float[np.ndarray, " width"]]
) -> float:
    """Largest |W' − g ⊙ W| over what one rounding of that value may be; axes as stored."""
    wide = old.astype(np.float64)
    for axis, gain in gains.items():
        wide *= gain.reshape([-1 if axis == other else 1 for other in range(old.ndim)])
    unit, spacing = _rounding(old.dtype)
    bound = (unit + _SLACK) * np.abs(wide) + spacing
    return float((np.abs(new.astype(np.float64) - wide) / bound).max())


def _rounding(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Largest relative error of rounding to `dtype`, and largest error below its normals."""
    facts = ml_dtypes.finfo(dtype)
    return float(facts.eps) / 2, float(facts.smallest_subnormal)


def _check_same_tensors(before: Checkpoint, after: Checkpoint) -> None:
    facts = [{name: (e.dtype, e.shape) for name, e in c.items()} for c in (before, after)]
    different = sorted(
        name for name in set(before) | set(after) if facts[0].get(name) != facts[1].get(name)
    )
    if different:
        name = different[0]
        raise VerificationError(
            f"{after.root}: {name}: expected {facts[0].get(name)}, found {facts[1].get(name)}; "
            "is it a fold of this base?"
        )


def same_bytes(before: TensorEntry, after: TensorEntry) -> bool:
    """Whether two stored tensors of one size have the same bytes; memory for a chunk."""
    with before.file.open("rb") as first, after.file.open("rb") as second:
        first.seek(before.start)
        second.seek(after.start)
        for done in range(0, before.size, _CHUNK):
            length = min(_CHUNK, before.size - done)
            if first.read(length) != second.read(length):
                return False
    return True


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot read it as JSON ({error})") from error
