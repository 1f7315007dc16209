"""Checks a folded checkpoint against its base by reading both, without running a model.

Independent of the fold's own arithmetic: each touched value must be its gain times the base's
within one rounding, so that W'·x == g_out ⊙ W·(g_in ⊙ x); all else must be the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
from jaxtyping import Float

from austeer.adapters._errors import ModelError, VerificationError
from austeer.adapters._files import read_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import Architecture, architecture_of
from austeer.adapters.fingerprint import checkpoint_reader
from austeer.adapters.sites import Component
from austeer.adapters.steered_site import SteeredSite, touched_tensors
from austeer.adapters.tensors import STORED_DTYPES, TensorEntry, read_rows
from austeer.adapters.weights import Checkpoint
from austeer.exporter._threads import run_in_threads
from austeer.exporter.fold import round_once
from austeer.exporter.plan import FOLDABLE_DTYPES
from austeer.exporter.proofs.values import Array, Gain, same_bytes, values_error
from austeer.exporter.quantized.formats import Quantization, quantization_of
from austeer.exporter.quantized.plan import INPUT_SIDE, bias_entry, locate_sites
from austeer.exporter.rewrite import name_dtype, new_dtype

_WHOLE = "is the directory complete?"


@dataclass(frozen=True, slots=True)
class StructureReport:
    """Result of `verify_fold_structure`.

    Attributes:
        touched: names of the tensors that carry gains.
        identical: number of other tensors, found to have the base's exact bytes, or its
            values in the new dtype; 0 where only the touched ones were read.
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
    gain and all other tensors are byte-identical, or rounded once where all floats got
    another dtype, but for those that such models keep; config.json is the base's, but for
    that. Of a quantized projection the scales are the touched tensor.

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
    quantization = quantization_of(base)
    converted = _check_same_tensors(before, after, adapter.architecture)
    if quantization is None:
        gains = dict(touched_gains(adapter, before, scale))
    else:
        if converted is not None:
            raise VerificationError(f"{folder}: a quantized base got another dtype")
        gains = dict(_quantized_gains(adapter, before, quantization, scale))
    named = converted or _only_dtype(after, adapter.architecture)
    _check_same_config(base, after, named, converted is not None)
    others = [] if touched_only else sorted(set(before) - set(gains))
    for name in others:
        if before[name].dtype != after[name].dtype:
            _tensor_error(before[name], after[name], {}, Event())
        elif not same_bytes(before[name], after[name]):
            raise VerificationError(
                f"{folder}: {name} differs from the base, the adapter does not touch it"
            )
    errors = run_in_threads(
        [
            partial(_tensor_error, before[name], after[name], by_axis)
            for name, by_axis in gains.items()
        ]
    )
    return StructureReport(tuple(sorted(gains)), len(others), max(errors))


def touched_gains(
    adapter: SteeringAdapter, checkpoint: Checkpoint, scale: float
) -> Iterator[tuple[str, dict[int, Gain]]]:
    """Per touched tensor the full gain vector of each axis."""
    found: dict[str, dict[int, Array]] = {}
    read = checkpoint_reader(adapter.architecture, checkpoint)
    for steered in adapter.sites:
        for name, along, _ in touched_tensors([steered], adapter.architecture, read):
            entry = checkpoint.find(adapter.architecture.disk_names(name))
            if entry is None:
                raise VerificationError(f"{checkpoint.root}: {name} is not in the checkpoint")
            gain = dense_gain(steered, entry.shape[along], scale)
            found.setdefault(entry.name, {})[along] = gain
    yield from found.items()


def _quantized_gains(
    adapter: SteeringAdapter, checkpoint: Checkpoint, quantization: Quantization, scale: float
) -> Iterator[tuple[str, dict[int, Float[np.ndarray, " width"]]]]:
    """The same where scales carry the gains of quantized projections."""
    sites = locate_sites(adapter, checkpoint, quantization)
    if sites.plain is not None:
        yield from touched_gains(sites.plain, checkpoint, scale)
    for steered, scales in sites.scales:
        if isinstance(scales, str) or steered.site.component is not Component.FFN:
            reason = scales if isinstance(scales, str) else INPUT_SIDE
            raise VerificationError(f"{checkpoint.root}: {steered.site}: {reason}")
        gain = dense_gain(steered, scales.rows, scale)
        yield scales.entry.name, {scales.axis: gain}
        bias = bias_entry(adapter, steered, checkpoint)
        if bias is not None:
            yield bias.name, {0: gain}


def dense_gain(steered: SteeredSite, width: int, scale: float) -> Float[np.ndarray, " width"]:
    """The gain of every unit of a site, 1 where it is not steered.

    Raises:
        SiteError: a unit that the base does not have.
    """
    steered.check_width(width)
    gain = np.ones(width)
    gain[steered.index] = 1.0 + scale * steered.gamma.astype(np.float64)
    return gain


def _tensor_error(
    before: TensorEntry, after: TensorEntry, gains: dict[int, Gain], stopped: Event
) -> float:
    """Largest error of one touched tensor, in units of the bound; above 1 is an error."""
    worst, what = 0.0, f"{after.file}: {after.name}"
    with before.file.open("rb", buffering=0) as old, after.file.open("rb", buffering=0) as new:
        blocks = zip(read_rows(before, old), read_rows(after, new), strict=True)
        for (first, old_rows), (_, new_rows) in blocks:
            here = gains | {0: gains[0][first : first + len(old_rows)]} if 0 in gains else gains
            if old_rows.dtype != new_rows.dtype:
                # What the new dtype made of the base carries the gains.
                old_rows = round_once(old_rows.astype(np.float64), new_rows.dtype)
            worst = max(worst, values_error(old_rows, new_rows, here, what))
            if stopped.is_set():
                break
    return worst


def converted_dtype(base: Path, folder: Path) -> str | None:
    """Name of the torch dtype that a fold of `base` gave all weights, None if it kept them.

    Raises:
        VerificationError: it has other tensors than the base.
        ModelError: one of the two cannot be read.
    """
    row = architecture_of(read_json(base / "config.json", ModelError, _WHOLE).get("model_type"))
    return _check_same_tensors(Checkpoint(base), Checkpoint(folder), row)


def _check_same_tensors(before: Checkpoint, after: Checkpoint, row: Architecture) -> str | None:
    """Refuse other names, shapes or dtypes; the dtype that the float tensors got, if any."""
    converted = _only_dtype(after, row)
    expected = {
        name: entry.dtype if converted is None else new_dtype(entry, converted, row)
        for name, entry in before.items()
    }
    facts = [
        {name: (dtype, before[name].shape) for name, dtype in expected.items()},
        {name: (entry.dtype, entry.shape) for name, entry in after.items()},
    ]
    different = sorted(
        name for name in set(before) | set(after) if facts[0].get(name) != facts[1].get(name)
    )
    if different:
        name = different[0]
        raise VerificationError(
            f"{after.root}: {name}: expected {facts[0].get(name)}, found {facts[1].get(name)}; "
            "is it a fold of this base?"
        )
    changed = any(before[name].dtype != after[name].dtype for name in before)
    return converted if changed else None


def _only_dtype(checkpoint: Checkpoint, row: Architecture) -> str | None:
    """The torch dtype of all float tensors but those that stay wide in it, None for several."""
    floats = [entry for entry in checkpoint.values() if entry.dtype in FOLDABLE_DTYPES]
    for name, dtype in STORED_DTYPES.items():
        found = {entry.dtype for entry in floats if not row.stays_wide(entry.name, name)}
        if found == {dtype}:
            return name
    return None


def _check_same_config(
    base: Path, after: Checkpoint, dtype: str | None, converted: bool
) -> None:
    expected, found = (
        read_json(root / "config.json", ModelError, _WHOLE) for root in (base, after.root)
    )
    named = name_dtype(expected, dtype)
    # A base whose config names another dtype than it has is put right where one was asked for.
    if found != named and (converted or found != expected):
        raise VerificationError(f"{after.root}/config.json: differs from the base's")
