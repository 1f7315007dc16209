"""Checks products of models too large to run: W'·x == g_out ⊙ W·(g_in ⊙ x) on random x.

Each touched projection is read from both sides' files and applied to random input in float64.
What may differ is stated, row by row: every stored number may be off by one rounding of its
dtype, u relative or s below its normals, so that with n columns, in float64,

    |W'·x − W·(g ⊙ x)| ≤ Σ (u |g W| + s) |x|  +  2 n 2⁻⁵³ Σ |g W| |x|

and for a LoRA, whose two factors are both rounded, 2u Σ |B| |A| |x| besides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from austeer.adapters._errors import RouteError, VerificationError
from austeer.adapters._files import read_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.tensors import Tensors, read_tensors
from austeer.adapters.weights import Checkpoint
from austeer.exporter.fold import round_once
from austeer.exporter.peft_content import peft_content
from austeer.exporter.peft_export import CONFIG, WEIGHTS
from austeer.exporter.proofs.code_check import verify_code_structure
from austeer.exporter.proofs.fold_check import (
    converted_dtype,
    touched_gains,
    verify_fold_structure,
)
from austeer.exporter.proofs.values import rounding_errors
from austeer.exporter.routes import Route

Array = np.ndarray[Any, Any]
_BLOCK = 1 << 22  # values that are float64 at one time
_EXACT = 2.0**-53
_FLOAT32 = 2.0**-24
_NORMAL = 2.0**-126  # smallest normal float32: numbers below it round by u times this
_SEED = 20261122


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureProof:
    """Result of `prove_structure`.

    Attributes:
        touched: names of the tensors or modules that carry gains.
        identical: number of other tensors, found to have the base's bytes, or its values in
            the new dtype.
        converted: name of the dtype that a fold gave all floats, None if they kept theirs.
        random_error: largest error on random input, 1 = what rounding can do at most; None
            where no weight is touched.
        steering: largest change of a projection's output that the gains make.
    """

    touched: tuple[str, ...]
    identical: int
    random_error: float | None
    steering: float | None
    converted: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """One projection, rows of outputs: the base's weight, the gains, and the product's.

    `added` is the product's B and A for a LoRA, whose weight is the base's own.
    """

    name: str
    before: Array
    after: Array
    row_gain: Float[np.ndarray, " rows"]
    column_gain: Float[np.ndarray, " columns"]
    stored_gain: Float[np.ndarray, " columns"] | None = None
    added: tuple[Array, Array] | None = None


def prove_structure(
    route: Route, base: Path, folder: Path, adapter: SteeringAdapter, scale: float = 1.0
) -> StructureProof:
    """Prove from the files alone that `folder` is `base` steered by `adapter`.

    Memory is that of two tensors, or of a LoRA twice; no model is built.

    Args:
        route: kind of product.
        base: directory of the base checkpoint, whose fingerprint was checked.
        folder: directory of the product.
        adapter: what steers it.
        scale: factor on every γ.

    Raises:
        RouteError: an ONNX graph, which proves nothing unless it runs.
        VerificationError: a difference; names the tensor.
        ModelError: one of the two cannot be read.
    """
    if route is Route.ONNX:
        raise RouteError(
            "route onnx: a graph is proved by running it; leave --structure-only out, or fold "
            "into safetensors what no machine here can run"
        )
    if route is Route.CODE:
        verify_code_structure(base, folder, adapter, scale)
        return StructureProof(
            touched=(), identical=len(Checkpoint(base)), random_error=None, steering=None
        )
    if route is not Route.SAFETENSORS:
        stored = _peft_tensors(route, base, folder, adapter, scale)
        return _prove(_peft_pairs(base, stored, adapter, scale), folder)
    identical = verify_fold_structure(base, folder, adapter, scale).identical
    proof = _prove(_folded_pairs(base, folder, adapter, scale), folder)
    converted = converted_dtype(base, folder)
    return dataclasses.replace(proof, identical=identical, converted=converted)


def _prove(pairs: Iterator[_Pair], folder: Path) -> StructureProof:
    rng = np.random.default_rng(_SEED)
    touched, worst, steering = [], 0.0, 0.0
    for pair in pairs:
        error, moved = _errors(pair, rng.standard_normal(pair.before.shape[1]))
        if not error <= 1.0:
            raise VerificationError(
                f"{folder}: {pair.name}: on random x its output is not that of the base's "
                f"weight on steered x: off by {error:.3g} times what rounding explains; make "
                "it again"
            )
        touched.append(pair.name)
        worst, steering = max(worst, error), max(steering, moved)
    if not steering > 0.0:
        raise VerificationError(f"{folder}: its gains change no output; it is not steered")
    return StructureProof(
        touched=tuple(touched), identical=0, random_error=worst, steering=steering
    )


def _errors(pair: _Pair, x: Float[np.ndarray, " columns"]) -> tuple[float, float]:
    """Largest error over its bound, and largest change against the base's own output."""
    unit, spacing = _rounding(pair)
    stored_x = x if pair.stored_gain is None else x * pair.stored_gain
    inner = outer = np.zeros(0)
    if pair.added is not None:
        B, A = (part.astype(np.float64) for part in pair.added)
        inner = B @ (A @ x)
        outer = (np.abs(B) + _NORMAL) @ ((np.abs(A) + _NORMAL) @ np.abs(x))
    columns = len(x)
    worst = moved = 0.0
    for rows in _blocks(*pair.before.shape):
        base = pair.before[rows].astype(np.float64)
        gain = pair.row_gain[rows]
        wanted = gain * (base @ (pair.column_gain * x))
        peak = np.abs(gain) * (np.abs(base) @ np.abs(pair.column_gain * x))
        found = pair.after[rows].astype(np.float64) @ stored_x
        bound = unit * peak + spacing * np.abs(x).sum() + 2 * columns * _EXACT * peak
        if pair.added is not None:
            found = found + inner[rows]
            slack = 2 * _FLOAT32 + 4 * columns * _EXACT
            bound += slack * outer[rows] + 4 * columns * _EXACT * (np.abs(base) @ np.abs(x))
        # Also where both are zero: a bound of 0 asks for equality.
        over = np.abs(found - wanted) / np.maximum(bound, np.finfo(np.float64).tiny)
        # Not max(), which drops what is not a number.
        worst = float(np.maximum(worst, over.max(initial=0.0)))
        moved = max(moved, float(np.abs(wanted - base @ x).max(initial=0.0)))
    return worst, moved


def _rounding(pair: _Pair) -> tuple[float, float]:
    """Largest relative error of the stored numbers, and largest error below the normals."""
    if pair.added is not None:
        return 0.0, 0.0
    if pair.stored_gain is not None:
        return _FLOAT32, 0.0
    return rounding_errors(pair.after.dtype)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _folded_pairs(
    base: Path, folder: Path, adapter: SteeringAdapter, scale: float
) -> Iterator[_Pair]:
    """Touched tensors as matrices over their last axis; a bias is a column."""
    before, after = Checkpoint(base), Checkpoint(folder)
    for name, by_axis in touched_gains(adapter, before, scale):
        old, new = before[name].read(), after[name].read()
        if old.dtype != new.dtype:
            old = round_once(old.astype(np.float64), new.dtype)
        shape = old.shape if old.ndim > 1 else (*old.shape, 1)
        rows = np.ones(shape[:-1])
        for axis, gain in by_axis.items():
            if axis < rows.ndim:
                rows = rows * gain.reshape([-1 if axis == i else 1 for i in range(rows.ndim)])
        columns = by_axis.get(len(shape) - 1, np.ones(shape[-1]))
        old, new = old.reshape(-1, shape[-1]), new.reshape(-1, shape[-1])
        yield _Pair(name, old, new, rows.reshape(-1), columns)


def _peft_tensors(
    route: Route, base: Path, folder: Path, adapter: SteeringAdapter, scale: float
) -> Tensors:
    """The tensors of a PEFT adapter, once all that has no rounding is what we would write."""
    _, config, wanted = peft_content(Checkpoint(base), adapter, route, scale)
    file, again = folder / WEIGHTS, "convert it again"
    written = read_json(folder / CONFIG, VerificationError, again)
    for key in sorted(config.keys() | written.keys()):
        given, expected = (d.get(key, "absent") for d in (written, config))
        if given != expected:
            raise VerificationError(
                f"{folder / CONFIG}: {key} is {given!r}, expected {expected!r}; {again}"
            )
    try:
        _, stored = read_tensors(file)
    except OSError as error:
        raise VerificationError(
            f"{file}: cannot read it ({error.strerror}); {again}"
        ) from error
    for name in sorted(wanted.keys() ^ stored.keys()):
        what = "is not in it" if name in wanted else "is no part of this adapter"
        raise VerificationError(f"{file}: {name} {what}; {again}")
    for name, values in wanted.items():
        found = stored[name]
        if (found.dtype, found.shape) != (values.dtype, values.shape):
            raise VerificationError(
                f"{file}: {name} is {found.dtype} of shape {found.shape}, expected "
                f"{values.dtype} of shape {values.shape}; {again}"
            )
        if found[values == 0.0].any():
            raise VerificationError(
                f"{file}: {name} has values where the adapter steers nothing; {again}"
            )
    return stored


def _peft_pairs(
    base: Path, stored: Tensors, adapter: SteeringAdapter, scale: float
) -> Iterator[_Pair]:
    before, architecture = Checkpoint(base), adapter.architecture
    gains = dict(touched_gains(adapter, before, scale))
    modules = sorted({architecture.projection(s.site) for s in adapter.sites})
    for module in modules:
        entry = before.find(architecture.disk_names(f"{module}.weight"))
        if entry is None:
            continue
        by_axis, weight = gains[entry.name], entry.read()
        output, given = by_axis.get(0), by_axis.get(1)
        if architecture.transposed:
            weight, output, given = weight.T, given, output
        row = np.ones(weight.shape[0]) if output is None else output
        column = np.ones(weight.shape[1]) if given is None else given
        yield _peft_pair(module, weight, row, column, stored)


def _peft_pair(module: str, weight: Array, row: Array, column: Array, stored: Tensors) -> _Pair:
    prefix = f"base_model.model.{module}"
    vector = stored.get(f"{prefix}.ia3_l")
    if vector is not None:
        values = vector.astype(np.float64).reshape(-1)
        if vector.shape[0] == 1:
            return _Pair(module, weight, weight, row, column, stored_gain=values)
        # An output-side vector scales rows: the transposed projection's columns.
        return _Pair(module, weight.T, weight.T, column, row, stored_gain=values)
    added = (stored[f"{prefix}.lora_B.weight"], stored[f"{prefix}.lora_A.weight"])
    return _Pair(module, weight, weight, row, column, added=added)
