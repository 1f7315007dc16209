"""Runs a fold plan on a GGUF file: copies it, and patches touched tensors in the copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from austeer.adapters._errors import OutputError, RouteError
from austeer.adapters._files import final_path, publish_file
from austeer.adapters.adapter import SteeringAdapter
from austeer.exporter.copying import copy_file
from austeer.exporter.fold import changed_values, fold_scales, fold_tensor
from austeer.exporter.merge import MergeSummary, check_effect
from austeer.exporter.plan import FoldPlan, TensorEdit, describe_refusals
from austeer.exporter.quantized.gguf_check import verify_gguf_structure
from austeer.exporter.quantized.gguf_file import FLOATS, Array, GgufTensor, is_gguf, read_gguf
from austeer.exporter.quantized.gguf_plan import check_gguf_base, gguf_notes, plan_gguf


def merge_gguf(
    base: Path, adapter: SteeringAdapter, out: Path, *, scale: float = 1.0, force: bool = False
) -> MergeSummary:
    """Fold `adapter` into a copy of the GGUF file `base`, check it, publish it at `out`.

    Blocks keep their integers: their scales carry the gains, each rounded once. Metadata,
    tokenizer included, and all other tensors are the base's bytes.

    Args:
        base: a GGUF file, not split.
        adapter: constant gains at ffn sites; at attention and neuron sites where the
            projection is stored as F32, F16 or BF16.
        out: new file, ends in .gguf.
        scale: factor on every γ.
        force: accept other weights, where they can be compared.

    Raises:
        RouteError: the adapter cannot fold, or the fold would change nothing.
        ModelError: `base` is malformed.
        AdapterError: the adapter belongs to another base.
        SiteError: a unit or layer that the base does not have.
        OutputError: `out` is taken or cannot be written.
        VerificationError: the written file is not the fold of the base.
    """
    check_gguf_output(out)
    with publish_file(out, replace=False) as work:
        summary = write_folded_gguf(base, adapter, work, scale=scale, force=force)
        verify_gguf_structure(base, work, adapter, scale, touched_only=True)
    return dataclasses.replace(summary, path=Path(out), files=(Path(out).name,))


def write_folded_gguf(
    base: Path, adapter: SteeringAdapter, work: Path, *, scale: float = 1.0, force: bool = False
) -> MergeSummary:
    """Write the folded file to `work`, an empty file that is there and may be locked.

    Arguments and errors as in `merge_gguf`; nothing is published or verified.
    """
    file = read_gguf(base)
    check_gguf_base(file, adapter, force)
    plan = plan_gguf(file, adapter, scale)
    if not isinstance(plan, FoldPlan):
        raise RouteError(f"{base}: this adapter cannot fold: {describe_refusals(plan)}")
    # A new file would not have the lock that keeps other runs from removing it.
    copy_file(base, work, existing=True)
    changed = sum(
        _patch(file.tensors[name], base, work, edits)
        for name, edits in plan.by_tensor().items()
    )
    check_effect(changed, scale)
    names = tuple(plan.by_tensor())
    units = sum(len(steered.index) for steered in adapter.sites)
    notes = gguf_notes(file, adapter, scale)
    return MergeSummary(work, (work.name,), names, units, changed, scale, notes)


def check_gguf_output(out: Path) -> None:
    """Refuse an output path that is taken, or not named as a GGUF file.

    Raises:
        OutputError: as said.
    """
    if not is_gguf(out):
        raise OutputError(f"{out}: a GGUF file comes out; expected a name that ends in .gguf")
    if final_path(out).exists() or final_path(out).is_symlink():
        raise OutputError(f"{out}: expected a new file; remove it or choose another name")


def _patch(tensor: GgufTensor, base: Path, target: Path, edits: Sequence[TensorEdit]) -> int:
    """Rewrite one tensor in the copy; how many numbers have other bits than the base's."""
    data = tensor.read(base)
    changed = 0
    for field in tensor.fields(data):
        changed += _fold(field, tensor, edits)
    with target.open("r+b") as stream:
        stream.seek(tensor.start)
        stream.write(data.data)
    return changed


def _fold(field: Array, tensor: GgufTensor, edits: Sequence[TensorEdit]) -> int:
    """Fold one view into the tensor's bytes, in place."""
    plain = tensor.kind in FLOATS
    folded = (fold_tensor if plain else fold_scales)(field, edits)
    changed = changed_values(field.copy(), folded)
    field[...] = folded
    return changed
