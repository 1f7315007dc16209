"""Products of bases that no live model is needed for: quantized checkpoints and GGUF files.

Their runtimes differ, and few run here. A fold into them is proved on the files: each touched
scale or value is the base's times its gain within one rounding, all else is the base's bytes.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from austeer.adapters._errors import RouteError
from austeer.adapters._files import publish_directory, publish_file
from austeer.adapters.adapter import SteeringAdapter
from austeer.exporter.free_space import check_space
from austeer.exporter.merge import merge_checkpoint, open_base, write_folded
from austeer.exporter.proofs.fold_check import StructureReport, verify_fold_structure
from austeer.exporter.provenance import ProductFacts, Seal
from austeer.exporter.quantized.formats import quantization_of
from austeer.exporter.quantized.gguf_check import verify_gguf_structure
from austeer.exporter.quantized.gguf_file import is_gguf, read_gguf
from austeer.exporter.quantized.gguf_merge import (
    check_gguf_output,
    merge_gguf,
    write_folded_gguf,
)
from austeer.exporter.quantized.gguf_plan import check_gguf_base, gguf_notes
from austeer.exporter.quantized.plan import quantized_notes
from austeer.exporter.routes import Route, route_of
from austeer.exporter.settings import BaseOptions, Handling, StoredAs

PROOF = "proved on the files, value by value; no model was run"


def quantized_base(options: BaseOptions, route: Route) -> Path | None:
    """Where the base is, if it is quantized or a GGUF file and is to be folded; else None.

    Raises:
        RouteError: quantized in a way that cannot fold, or a GGUF file on another route.
        ModelError: no such model.
    """
    if is_gguf(options.model):
        if route is not Route.SAFETENSORS:
            raise RouteError(
                f"{options.model}: a GGUF file can be folded into (merge) and nothing else; "
                f"for route {route} give the checkpoint that it was converted from"
            )
        _refuse_loading(options)
        return Path(options.model)
    if route is not Route.SAFETENSORS:
        return None
    from austeer.adapters.model_directory import model_directory

    folder = model_directory(options.model, options.revision)
    config = folder / "config.json"
    return folder if config.is_file() and quantization_of(folder) is not None else None


def _refuse_loading(options: BaseOptions) -> None:
    """Refuse what says how to find and load a model: a GGUF file is one, and is not loaded."""
    default = BaseOptions(model=options.model, dtype=options.dtype)
    for field in dataclasses.fields(options):
        if getattr(options, field.name) != getattr(default, field.name):
            raise RouteError(
                f"{options.model}: a GGUF file is folded as it is, no model is loaded; leave "
                f"out {field.name}"
            )


def write_quantized(
    base: Path,
    adapter: SteeringAdapter,
    out: Path,
    handling: Handling,
    seal: Seal | None = None,
) -> dict[str, Any]:
    """Fold into a quantized base, prove the result and publish it; its row for the report.

    Args:
        base: directory of a quantized checkpoint, or a GGUF file.
        adapter: what to fold.
        out: new directory, or file that ends in .gguf.
        handling: how it is written and proved.
        seal: what `austeer.json` of a directory says besides.

    Raises:
        AusteerError: adapter, base or output is unusable; nothing is published then.
    """
    started, gguf = time.monotonic(), is_gguf(base)
    options: dict[str, Any] = {"scale": handling.scale, "force": handling.force}
    if gguf and handling.stored != StoredAs():
        raise RouteError(
            f"{base}: one GGUF file of the same types comes out; leave out link, dtype and "
            "max_shard_size"
        )
    if not gguf:
        options["stored"] = handling.stored
    else:
        check_gguf_output(out)
        if base.is_file():
            check_space(out, base.stat().st_size, [base])
    if not handling.verify:
        if gguf:
            notes = merge_gguf(base, adapter, out, **options).notes
        else:
            notes = merge_checkpoint(base, adapter, out, seal=seal, **options).notes
        return _row(base, out, None, notes, started)
    with publish_file(out, replace=False) if gguf else publish_directory(out) as work:
        write = write_folded_gguf if gguf else write_folded
        summary = write(base, adapter, work, **options)
        report = _verify(base, work, adapter, handling.scale)
        if not gguf:
            facts = ProductFacts(Route.SAFETENSORS, base, adapter, handling)
            (seal or Seal()).close_product(work, facts)
    return _row(base, out, report, summary.notes, started)


def verify_quantized(
    base: Path, product: Path, adapter: SteeringAdapter, handling: Handling
) -> dict[str, Any]:
    """Compare a product with its quantized base; its row for the report.

    Raises:
        AusteerError: product, base or adapter is unusable, or they do not belong together.
    """
    started, scale = time.monotonic(), handling.scale
    check_kind(product, base)
    if is_gguf(base):
        file = read_gguf(base)
        check_gguf_base(file, adapter, handling.force)
        notes = gguf_notes(file, adapter, scale)
    else:
        if route_of(product) is not Route.SAFETENSORS:
            raise RouteError(f"{product}: expected a checkpoint folded from {base}")
        quantization = quantization_of(base)
        assert quantization is not None  # or it would be no quantized base
        checkpoint = open_base(base, adapter, force=handling.force, quantization=quantization)
        notes = quantized_notes(adapter, checkpoint, quantization, scale)
    report = _verify(base, product, adapter, scale)
    return _row(base, product, report, notes, started)


def check_kind(product: Path, base: str | Path) -> None:
    """Refuse to compare a GGUF file with something else.

    Raises:
        RouteError: only one of the two is a GGUF file.
    """
    if is_gguf(base) != is_gguf(product):
        raise RouteError(
            f"{product}: expected a product of its base {base}, of which only one is a GGUF "
            "file; name the base that it was folded from"
        )


def _verify(
    base: Path, product: Path, adapter: SteeringAdapter, scale: float
) -> StructureReport:
    verify = verify_gguf_structure if is_gguf(base) else verify_fold_structure
    return verify(base, product, adapter, scale)


def _row(
    base: Path,
    out: Path,
    report: StructureReport | None,
    notes: tuple[str, ...],
    started: float,
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if report is not None:
        figures["largest_error_in_roundings"] = report.worst_error
        notes = (*notes, PROOF)
    return figures | {
        "route": "gguf" if is_gguf(base) else Route.SAFETENSORS.value,
        "path": str(out),
        "verified": report is not None,
        "notes": list(notes),
        "seconds": round(time.monotonic() - started, 2),
    }
