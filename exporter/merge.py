"""Runs a fold plan: base checkpoint and adapter in, steered plain checkpoint out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from austeer.adapters._errors import AdapterError, ModelError, RouteError
from austeer.adapters._files import publish_directory, read_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.card import model_card
from austeer.adapters.fingerprint import checkpoint_reader
from austeer.adapters.tensors import Checkpoint
from austeer.exporter.checkpoint import copy_checkpoint, patch_tensor, shared_names
from austeer.exporter.fold import fold_tensor
from austeer.exporter.fold_check import verify_fold_structure
from austeer.exporter.plan import FoldPlan, describe_refusals, plan_fold
from austeer.exporter.provenance import ProductFacts, Seal
from austeer.exporter.routes import Route


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """What a fold wrote.

    Attributes:
        path: the folder.
        files: names of its files.
        tensors: names of the tensors that were patched.
        units: number of folded units.
        values_changed: weights and bias elements that now have other bits.
        scale: factor on every γ.
    """

    path: Path
    files: tuple[str, ...]
    tensors: tuple[str, ...]
    units: int
    values_changed: int
    scale: float

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
    seal: Seal | None = None,
) -> MergeSummary:
    """Fold `adapter` into a copy of `base`, check the touched tensors, publish it at `out`.

    Bytes that the kernel copied are not read again; `verify_fold_structure` does that.

    Args:
        base: directory with config.json and safetensors weights.
        adapter: constant gains at attention, ffn or neuron sites.
        out: new or empty directory.
        scale: factor on every γ.
        force: accept a base with another fingerprint.
        seal: what `austeer.json` says besides.

    Raises:
        RouteError: the adapter cannot fold, or the fold would change nothing.
        ModelError: `base` is malformed.
        AdapterError: the adapter belongs to another base.
        SiteError: a unit or layer that the base does not have.
        OutputError: `out` is taken or cannot be written.
        VerificationError: the written checkpoint is not the fold of the base.
    """
    with publish_directory(out) as work:
        summary = write_folded(base, adapter, work, scale=scale, force=force)
        verify_fold_structure(base, work, adapter, scale, touched_only=True)
        facts = ProductFacts(Route.SAFETENSORS, base, adapter, scale=scale, force=force)
        files = (*summary.files, *(seal or Seal()).close_product(work, facts))
    return dataclasses.replace(summary, path=Path(out), files=files)


def write_folded(
    base: Path,
    adapter: SteeringAdapter,
    folder: Path,
    *,
    scale: float = 1.0,
    force: bool = False,
) -> MergeSummary:
    """Write the folded checkpoint into `folder`, an existing empty directory.

    Arguments and errors as in `merge_checkpoint`; nothing is published or verified.
    """
    refuse_quantized(
        base,
        "column gains do not fold into them; fold the unquantized model and quantize the "
        "result",
    )
    checkpoint = open_base(base, adapter, force=force)
    plan = plan_fold(adapter, checkpoint, shared_names(checkpoint), scale)
    if not isinstance(plan, FoldPlan):
        raise RouteError(f"this adapter cannot fold: {describe_refusals(plan)}")
    files = copy_checkpoint(checkpoint, folder)
    changed = 0
    for name, edits in plan.by_tensor().items():
        changed += patch_tensor(checkpoint[name], folder, partial(fold_tensor, edits=edits))
    if changed == 0:
        raise RouteError(
            f"the fold changes no value at scale {scale:g}: every gain is 1, or vanishes in "
            "the checkpoint's dtype; raise the scale, or fold a float32 checkpoint"
        )
    card = model_card(adapter.config, "finetune", "transformers", _usage(scale))
    (folder / "README.md").write_text(card, encoding="utf-8")
    units = sum(len(steered.index) for steered in adapter.sites)
    names = tuple(plan.by_tensor())
    return MergeSummary(folder, (*files, "README.md"), names, units, changed, scale)


def open_base(base: Path, adapter: SteeringAdapter, *, force: bool = False) -> Checkpoint:
    """Open a base checkpoint and check that `adapter` belongs to it.

    Raises:
        ModelError: malformed directory, config or weights.
        AdapterError: other model type, or other weights (unless `force`).
        SiteError: a unit or layer that the base does not have.
    """
    config = read_model_config(base)
    expected = adapter.config.model_type
    if config.get("model_type") != expected:
        raise AdapterError(
            f"{base}: adapter for a {expected} model, this one is "
            f"{config.get('model_type')!r}; use the right base"
        )
    checkpoint = Checkpoint(base)
    read = checkpoint_reader(adapter.architecture, checkpoint)
    adapter.check_base(read, adapter.architecture.num_layers(config), force)
    return checkpoint


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
