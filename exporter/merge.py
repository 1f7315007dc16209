"""Runs a fold plan: base checkpoint and adapter in, steered plain checkpoint out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from austeer.adapters._errors import AdapterError, ModelError, RouteError
from austeer.adapters._files import publish_directory, read_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.card import model_card
from austeer.adapters.fingerprint import checkpoint_reader
from austeer.adapters.steered_site import check_layer
from austeer.adapters.weights import Checkpoint
from austeer.exporter.checkpoint import Copied, copy_checkpoint, shared_names
from austeer.exporter.copying import Change
from austeer.exporter.fold import fold_rows, fold_scale_rows
from austeer.exporter.plan import FoldPlan, describe_refusals, plan_fold
from austeer.exporter.proofs.fold_check import verify_fold_structure
from austeer.exporter.provenance import ProductFacts, Seal
from austeer.exporter.quantized.formats import Quantization, quantization_of
from austeer.exporter.quantized.plan import locate_sites, plan_quantized, quantized_notes
from austeer.exporter.rewrite import rewrite_checkpoint
from austeer.exporter.routes import Route
from austeer.exporter.settings import Handling, StoredAs


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """What a fold wrote.

    Attributes:
        path: the folder.
        files: names of its files.
        tensors: names of the tensors that were patched.
        units: number of folded units.
        values_changed: weights, bias elements or scales that now have other bits.
        scale: factor on every γ.
        notes: what the reader of the result should know.
    """

    path: Path
    files: tuple[str, ...]
    tensors: tuple[str, ...]
    units: int
    values_changed: int
    scale: float
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.path}: {self.units} units folded into {len(self.tensors)} tensors, "
            f"{self.values_changed} values changed, {len(self.files)} files"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values for machines."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def merge_checkpoint(
    base: Path,
    adapter: SteeringAdapter,
    out: Path,
    *,
    scale: float = 1.0,
    force: bool = False,
    stored: StoredAs | None = None,
    seal: Seal | None = None,
) -> MergeSummary:
    """Fold `adapter` into a copy of `base`, check the touched tensors, publish it at `out`.

    Bytes that the kernel copied are not read again; `verify_fold_structure` does that. In a
    quantized base the scales carry the gains, each rounded once, and the integers stay.

    Args:
        base: directory with config.json and safetensors weights, plain or quantized.
        adapter: constant gains at attention, ffn or neuron sites.
        out: new or empty directory.
        scale: factor on every γ.
        force: accept a base with another fingerprint.
        stored: other weight files than the base's.
        seal: what `austeer.json` says besides.

    Raises:
        RouteError: the adapter cannot fold, the fold would change nothing, or a value leaves
            the range of its dtype.
        ModelError: `base` is malformed.
        AdapterError: the adapter belongs to another base.
        SiteError: a unit or layer that the base does not have.
        OutputError: `out` is taken or cannot be written.
        VerificationError: the written checkpoint is not the fold of the base.
    """
    with publish_directory(out) as work:
        summary = write_folded(base, adapter, work, scale=scale, force=force, stored=stored)
        verify_fold_structure(base, work, adapter, scale, touched_only=True)
        handling = Handling(scale=scale, force=force, stored=stored or StoredAs())
        facts = ProductFacts(Route.SAFETENSORS, base, adapter, handling)
        files = (*summary.files, *(seal or Seal()).close_product(work, facts))
    return dataclasses.replace(summary, path=Path(out), files=files)


def write_folded(
    base: Path,
    adapter: SteeringAdapter,
    folder: Path,
    *,
    scale: float = 1.0,
    force: bool = False,
    stored: StoredAs | None = None,
    own_base: bool | None = None,
) -> MergeSummary:
    """Write the folded checkpoint into `folder`, an existing empty directory.

    Arguments and errors as in `merge_checkpoint`; nothing is published or verified. `own_base`
    is what `is_own_base` said, if it was asked already.
    """
    read_model_config(base)
    stored, quantization = stored or StoredAs(), quantization_of(base)
    if quantization is not None and stored.anew:
        raise RouteError(
            f"{base}: its weights are quantized and stay as they are; leave out dtype and "
            "max_shard_size"
        )
    checkpoint, check = _open(base, adapter, force, quantization)
    shared = shared_names(checkpoint)
    notes: tuple[str, ...] = ()
    if quantization is None:
        plan = plan_fold(adapter, checkpoint, shared, scale)
    else:
        plan = plan_quantized(adapter, checkpoint, quantization, shared, scale)
        notes = quantized_notes(adapter, checkpoint, quantization, scale)
    if not isinstance(plan, FoldPlan):
        check()
        raise RouteError(f"this adapter cannot fold: {describe_refusals(plan)}")
    copied = _write(checkpoint, folder, plan, stored, check)
    check_effect(copied.changed, scale)
    if own_base is None:
        own_base = is_own_base(checkpoint, adapter, force=force, quantization=quantization)
    usage = _usage(scale)
    card = model_card(
        adapter.config, "finetune", "transformers", usage, scale=scale, own_base=own_base
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    units = sum(len(steered.index) for steered in adapter.sites)
    names, files = tuple(plan.by_tensor()), (*copied.names, "README.md")
    return MergeSummary(folder, files, names, units, copied.changed, scale, notes)


def check_effect(changed: int, scale: float) -> None:
    """Refuse a fold that changed nothing.

    Raises:
        RouteError: `changed` values is none.
    """
    if changed == 0:
        raise RouteError(
            f"the fold changes no value at scale {scale:g}: every gain is 1, or vanishes in "
            "the checkpoint's dtype; raise the scale, or fold a float32 checkpoint"
        )


def _write(
    checkpoint: Checkpoint,
    folder: Path,
    plan: FoldPlan,
    stored: StoredAs,
    check: Callable[[], None],
) -> Copied:
    # Hashing what the adapter touches takes longer than copying it: one core does each.
    if stored.anew:
        return rewrite_checkpoint(checkpoint, folder, plan.by_tensor(), stored, check)
    changes = {
        name: Change(partial(fold_scale_rows, edits=edits), whole=True)
        if name in plan.scales
        else Change(partial(fold_rows, edits=edits, file=checkpoint[name].file))
        for name, edits in plan.by_tensor().items()
    }
    return copy_checkpoint(checkpoint, folder, changes, check, link=stored.link)


def open_base(
    base: Path,
    adapter: SteeringAdapter,
    *,
    force: bool = False,
    quantization: Quantization | None = None,
) -> Checkpoint:
    """Open a base checkpoint and check that `adapter` belongs to it.

    Args:
        base: model directory.
        adapter: checked against it.
        force: accept other weights.
        quantization: how the base is quantized, if that is to be accepted. An adapter is made
            for the unquantized weights: where a steered projection is quantized, model type,
            layers and units are all there is to compare.

    Raises:
        ModelError: malformed directory, config or weights.
        AdapterError: other model type, or other weights (unless `force`).
        SiteError: a unit or layer that the base does not have.
    """
    checkpoint, check = _open(base, adapter, force, quantization)
    check()
    return checkpoint


def _open(
    base: Path, adapter: SteeringAdapter, force: bool, quantization: Quantization | None
) -> tuple[Checkpoint, Callable[[], None]]:
    """The checkpoint, and what remains of the check of `open_base`: it reads weights."""
    config = read_model_config(base)
    expected = adapter.config.model_type
    if config.get("model_type") != expected:
        raise AdapterError(
            f"{base}: adapter for a {expected} model, this one is "
            f"{config.get('model_type')!r}; use the right base"
        )
    checkpoint = Checkpoint(base)
    layers = adapter.architecture.num_layers(config)
    if not is_comparable(adapter, checkpoint, quantization):
        return checkpoint, partial(_check_layers, adapter, layers)
    read = checkpoint_reader(adapter.architecture, checkpoint)
    return checkpoint, partial(adapter.check_base, read, layers, force)


def is_own_base(
    checkpoint: Checkpoint,
    adapter: SteeringAdapter,
    *,
    force: bool,
    quantization: Quantization | None = None,
) -> bool:
    """Whether a base that `open_base` accepted is the adapter's, as far as can be said.

    Arguments as there; only what was forced is read for it.
    """
    if not force or not is_comparable(adapter, checkpoint, quantization):
        return True
    return adapter.is_made_for(checkpoint_reader(adapter.architecture, checkpoint))


def is_comparable(
    adapter: SteeringAdapter, checkpoint: Checkpoint, quantization: Quantization | None
) -> bool:
    """Whether the weights that the adapter touches are stored as the fingerprint has them."""
    return quantization is None or not locate_sites(adapter, checkpoint, quantization).scales


def _check_layers(adapter: SteeringAdapter, layers: int) -> None:
    for steered in adapter.sites:
        check_layer(steered.site, layers)


def read_model_config(base: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model directory.

    Raises:
        ModelError: no such directory or file, or not a JSON object.
    """
    path = base / "config.json"
    if not base.is_dir():
        raise ModelError(f"{base}: expected a model directory, found none; download it first")
    return read_json(path, ModelError, "download the whole model")


def refuse_quantized(base: Path, reason: str) -> None:
    """Refuse a base with quantized weights; `reason` ends the message.

    Raises:
        RouteError: they are quantized.
    """
    if read_model_config(base).get("quantization_config"):
        raise RouteError(f"{base}: its weights are quantized, {reason}")


def _usage(scale: float) -> str:
    note = "" if scale == 1.0 else f"\n\nFolded at {scale:g} times the fitted strength."
    return f"""The steering is folded into the weights: native architecture, no extra code.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/model")
tokenizer = AutoTokenizer.from_pretrained("this/model")
```{note}"""
