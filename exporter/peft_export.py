"""Writes an adapter as a stock PEFT adapter: LoRA or IA3, exact, no code of ours to load it.

Neither torch nor peft takes part in it; memory is that of one weight of the base and of the
result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.adapters._errors import RouteError
from austeer.adapters._files import publish_directory, write_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import architecture_of
from austeer.adapters.card import model_card
from austeer.adapters.sites import Component, Site
from austeer.adapters.tensors import Tensors, write_tensors
from austeer.adapters.weights import Checkpoint
from austeer.exporter.merge import is_own_base, open_base, read_model_config, refuse_quantized
from austeer.exporter.peft_content import NAMES, peft_content
from austeer.exporter.peft_plan import MIXTURE_REFUSAL, PeftPlan
from austeer.exporter.provenance import ProductFacts, Seal
from austeer.exporter.routes import Route
from austeer.exporter.settings import Handling

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class PeftSummary:
    """What a conversion wrote.

    Attributes:
        path: the folder.
        files: names of its files.
        route: `lora` or `ia3`.
        modules: paths of the steered modules.
        units: number of steered units.
        rank: rank of the LoRA, 0 for an IA3.
        scale: factor on every γ.
    """

    path: Path
    files: tuple[str, ...]
    route: Route
    modules: tuple[str, ...]
    units: int
    rank: int
    scale: float

    def summary(self) -> str:
        """One line for people."""
        rank = f" of rank {self.rank}" if self.rank else ""
        return (
            f"{self.path}: {self.units} units as {NAMES[self.route]}{rank} "
            f"on {len(self.modules)} modules"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values for machines."""
        return {**dataclasses.asdict(self), "path": str(self.path), "route": self.route.value}


def convert_peft(
    base: Path,
    adapter: SteeringAdapter,
    out: Path,
    *,
    route: Route,
    scale: float = 1.0,
    force: bool = False,
    seal: Seal | None = None,
) -> PeftSummary:
    """Convert `adapter` into a PEFT adapter for `base` and publish it at `out`.

    Args:
        base: directory with config.json and safetensors weights.
        adapter: constant gains at attention, ffn or neuron sites.
        out: new or empty directory.
        route: `Route.LORA` or `Route.IA3`.
        scale: factor on every γ.
        force: accept a base with another fingerprint.
        seal: what `austeer.json` says besides.

    Raises:
        RouteError: the adapter cannot take this route, or would change nothing.
        ModelError: `base` is malformed.
        AdapterError: the adapter belongs to another base.
        SiteError: a unit or layer that the base does not have.
        OutputError: `out` is taken or cannot be written.
    """
    with publish_directory(out) as work:
        summary = write_peft(base, adapter, work, route=route, scale=scale, force=force)
        facts = ProductFacts(route, base, adapter, Handling(scale=scale, force=force))
        files = (*summary.files, *(seal or Seal()).close_product(work, facts))
    return dataclasses.replace(summary, path=Path(out), files=files)


def refuse_quantized_peft(base: Path) -> None:
    """Refuse a quantized base, from whose weights no exact factors can be taken.

    Raises:
        RouteError: as said.
    """
    refuse_quantized(
        base,
        "the adapter's are not; convert for the unquantized model, peft loads the result onto "
        "a quantized copy as well",
    )


def write_peft(
    base: Path,
    adapter: SteeringAdapter,
    folder: Path,
    *,
    route: Route,
    scale: float = 1.0,
    force: bool = False,
    own_base: bool | None = None,
) -> PeftSummary:
    """Write the PEFT adapter into `folder`, an existing empty directory.

    Arguments and errors as in `convert_peft`; nothing is published. `own_base` is what
    `is_own_base` said, if it was asked already.
    """
    if route not in NAMES:
        raise RouteError(f"route {route}: expected lora or ia3")
    refuse_quantized_peft(base)
    checkpoint = open_base(base, adapter, force=force)
    plan, config, tensors = peft_content(checkpoint, adapter, route, scale)
    if not _changes_anything(tensors):
        raise RouteError(
            f"{NAMES[route]} at scale {scale:g} would change no activation: every gain is 1; "
            "raise the scale"
        )
    write_json(folder / CONFIG, config)
    # The metadata is what torch's loaders look for before they read a file.
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    if own_base is None:
        own_base = is_own_base(checkpoint, adapter, force=force)
    usage = _usage(adapter, route, plan, scale)
    card = model_card(adapter.config, "adapter", "peft", usage, scale=scale, own_base=own_base)
    (folder / "README.md").write_text(card, encoding="utf-8")
    units = sum(len(steered.index) for steered in adapter.sites)
    rank = plan.rank if route is Route.LORA else 0
    files = ("README.md", CONFIG, WEIGHTS)
    return PeftSummary(folder, files, route, tuple(plan.modules), units, rank, scale)


def check_peft_base(base: Path, route: Route, components: Iterable[Component]) -> None:
    """Refuse, before anything is fitted, components that no LoRA or IA3 of this base can hold.

    Raises:
        RouteError: `ffn` of a mixture of experts; on route lora also where the MLP's last
            projection has a bias.
        ModelError: `base` is malformed.
    """
    if not route.is_peft or Component.FFN not in components:
        return
    architecture = architecture_of(read_model_config(base).get("model_type"))
    if architecture.mixture is not None:
        raise RouteError(f"route {route}: component ffn: {MIXTURE_REFUSAL}")
    bias = f"{architecture.projection(Site(0, Component.FFN))}.bias"
    known = Checkpoint(base).find(architecture.disk_names(bias)) is not None
    if route is Route.LORA and known:
        raise RouteError(
            f"route lora: component ffn: {bias} must be scaled with the output, which a LoRA "
            "cannot; leave ffn out, or take route ia3 or safetensors"
        )


def _changes_anything(tensors: Tensors) -> bool:
    neutral = {"lora_B.weight": 0.0, "ia3_l": 1.0}
    return any(
        (values != value).any()
        for name, values in tensors.items()
        for end, value in neutral.items()
        if name.endswith(end)
    )


def _usage(adapter: SteeringAdapter, route: Route, plan: PeftPlan, scale: float) -> str:
    name = adapter.config.base_model_name_or_path
    notes = "" if scale == 1.0 else f"\n\nConverted at {scale:g} times the fitted strength."
    if route is Route.LORA:
        notes += f"\n\nRank {plan.rank}: vLLM needs `--max-lora-rank` of at least that."
    return f"""The steering is {NAMES[route]}, exact on the unchanged base.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({name!r})
model = PeftModel.from_pretrained(base, "this/adapter")
```{notes}"""
