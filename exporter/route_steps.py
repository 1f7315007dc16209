"""The two steps that each route does its own way: write a product's files, and prove them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.weights import Checkpoint
from austeer.exporter.merge import is_own_base
from austeer.exporter.routes import Route
from austeer.exporter.settings import Handling

if TYPE_CHECKING:
    from austeer.exporter.products import Base
    from austeer.exporter.verify import ParityReport


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars off stderr."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def write_product(
    route: Route, base: Base, adapter: SteeringAdapter, folder: Path, handling: Handling
) -> None:
    """Write the product's files into an existing directory.

    Raises:
        RouteError: the adapter cannot take this route.
        AdapterError: the adapter is for another base.
    """
    force, own = handling.force, handling.own_base
    if own is None:
        # Of the files: the live model may be loaded in another dtype.
        own = is_own_base(Checkpoint(base.folder), adapter, force=force)
    options: dict[str, Any] = {"scale": handling.scale, "force": force, "own_base": own}
    if route is Route.ONNX:
        from austeer.exporter.onnx_export import write_onnx

        write_onnx(
            base.model,
            base.tokenizer,
            adapter,
            folder,
            scale_as=handling.scale_as,
            **options,
        )
    elif route is Route.CODE:
        from austeer.exporter.code_export import write_code

        link = handling.stored.link
        write_code(base.folder, adapter, folder, link=link, **options)
    elif route.is_peft:
        from austeer.exporter.peft_export import write_peft

        write_peft(base.folder, adapter, folder, route=route, **options)
    else:
        from austeer.exporter.merge import refuse_quantized, write_folded

        refuse_quantized(
            base.folder, "fit the unquantized model, then merge the adapter into this one"
        )
        write_folded(base.folder, adapter, folder, stored=handling.stored, **options)


def prove_product(
    route: Route,
    base: Base,
    adapter: SteeringAdapter,
    folder: Path,
    prompts: Sequence[str],
    handling: Handling,
) -> ParityReport:
    """Reload the product from disk and compare it with the attached model.

    Raises:
        VerificationError: it does not load, or its files are not made of the base's.
    """
    from austeer.exporter.proofs.code_check import verify_code_structure
    from austeer.exporter.proofs.code_parity import verify_code
    from austeer.exporter.proofs.peft_parity import verify_peft
    from austeer.exporter.verify import verify_checkpoint, verify_fold_structure, verify_onnx

    model, tokenizer = base.model, base.tokenizer
    options: dict[str, Any] = {"scale": handling.scale, "force": handling.force}
    with quiet_transformers():
        if route is Route.ONNX:
            return verify_onnx(folder, model, tokenizer, adapter, prompts, **options)
        options["trust_remote_code"] = handling.trust_remote_code
        if route.is_peft:
            options["base"] = base.folder
            return verify_peft(folder, model, tokenizer, adapter, prompts, **options)
        if route is Route.CODE:
            verify_code_structure(base.folder, folder, adapter, handling.scale)
            return verify_code(folder, model, tokenizer, adapter, prompts, **options)
        verify_fold_structure(base.folder, folder, adapter, handling.scale)
        return verify_checkpoint(folder, model, tokenizer, adapter, prompts, **options)
