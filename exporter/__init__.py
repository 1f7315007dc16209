"""Compile an adapter into files that other runtimes load; prove them; report the whole run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from austeer.exporter.routes import Route
from austeer.exporter.settings import BaseOptions, Handling, ProductRequest, RunOptions

if TYPE_CHECKING:
    from austeer.exporter.code_export import export_code
    from austeer.exporter.graft import GraftRequest, graft_job
    from austeer.exporter.merge import MergeSummary, merge_checkpoint
    from austeer.exporter.peft_export import PeftSummary, convert_peft
    from austeer.exporter.products import Export, export_product
    from austeer.exporter.proofs.code_parity import verify_code
    from austeer.exporter.proofs.peft_parity import verify_peft
    from austeer.exporter.proofs.product_check import verify_product
    from austeer.exporter.run import RunReport, fit_job, run_job
    from austeer.exporter.stages import localize_job
    from austeer.exporter.verify import (
        ParityReport,
        verify_checkpoint,
        verify_onnx,
    )

__all__ = [
    "BaseOptions",
    "Export",
    "GraftRequest",
    "Handling",
    "MergeSummary",
    "ParityReport",
    "PeftSummary",
    "ProductRequest",
    "Route",
    "RunOptions",
    "RunReport",
    "convert_peft",
    "export_code",
    "export_product",
    "fit_job",
    "graft_job",
    "localize_job",
    "merge_checkpoint",
    "run_job",
    "verify_checkpoint",
    "verify_code",
    "verify_onnx",
    "verify_peft",
    "verify_product",
]

# These open models; they load on first use, so that the CLI's help stays instant.
_LAZY = {
    "Export": "austeer.exporter.products",
    "GraftRequest": "austeer.exporter.graft",
    "MergeSummary": "austeer.exporter.merge",
    "ParityReport": "austeer.exporter.verify",
    "PeftSummary": "austeer.exporter.peft_export",
    "RunReport": "austeer.exporter.run",
    "convert_peft": "austeer.exporter.peft_export",
    "export_code": "austeer.exporter.code_export",
    "export_product": "austeer.exporter.products",
    "fit_job": "austeer.exporter.run",
    "graft_job": "austeer.exporter.graft",
    "localize_job": "austeer.exporter.stages",
    "merge_checkpoint": "austeer.exporter.merge",
    "run_job": "austeer.exporter.run",
    "verify_checkpoint": "austeer.exporter.verify",
    "verify_code": "austeer.exporter.proofs.code_parity",
    "verify_onnx": "austeer.exporter.verify",
    "verify_peft": "austeer.exporter.proofs.peft_parity",
    "verify_product": "austeer.exporter.proofs.product_check",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
