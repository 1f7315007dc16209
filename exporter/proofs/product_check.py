"""Checks a finished product: its sums, then its structure, then its logits."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.model_directory import model_directory
from austeer.adapters.pairs import read_pairs, render_pairs
from austeer.exporter.merge import open_base
from austeer.exporter.products import (
    Export,
    check_base,
    load_base,
    product_row,
    verification_prompts,
)
from austeer.exporter.proofs.fold_check import converted_dtype
from austeer.exporter.proofs.random_check import prove_structure
from austeer.exporter.quantized.gguf_file import is_gguf
from austeer.exporter.quantized.products import check_kind, quantized_base, verify_quantized
from austeer.exporter.route_steps import prove_product
from austeer.exporter.routes import Route, check_installed, check_routes, route_of
from austeer.exporter.settings import BaseOptions, Handling
from austeer.exporter.sums import require_sums, write_sums


def verify_product(
    product: Path,
    base_options: BaseOptions,
    adapter_name: str,
    *,
    scale: float = 1.0,
    force: bool = False,
    pairs_file: str | None = None,
    structure_only: bool = False,
    accept_changes: bool = False,
) -> Export:
    """Check a product on disk: its sums, its structure, then its logits; a row of figures.

    Args:
        product: the directory.
        base_options: its base model.
        adapter_name: its adapter, directory or Hub id.
        scale: factor on every γ.
        force: accept a base with another fingerprint.
        pairs_file: pairs whose prompts are compared besides the neutral ones.
        structure_only: run no model; see `austeer.exporter.proofs.random_check`.
        accept_changes: files may differ from `SHA256SUMS`; if the rest holds, write it anew.

    Raises:
        AusteerError: product, base or adapter is unusable.
        VerificationError: a file is not as it was published (`details` names each), or the
            product differs from the attached model.
    """
    if is_gguf(product):
        check_kind(product, base_options.model)
    checked = None if accept_changes else require_sums(product)
    started = time.monotonic()
    route = Route.SAFETENSORS if is_gguf(product) else route_of(product)
    adapter = SteeringAdapter.from_pretrained(adapter_name)
    if route.folds:
        # What no weight can absorb is in no product of this kind, whatever its γ.
        check_routes([route], adapter.config.strength, adapter.config.components, verify=False)
    quantized = quantized_base(base_options, route)
    if quantized is not None:
        handling = Handling(scale=scale, force=force)
        row = verify_quantized(quantized, product, adapter, handling)
    elif structure_only:
        row = _structure_row(route, product, base_options, adapter, scale=scale, force=force)
    else:
        row = _parity_row(
            route, product, base_options, adapter, scale=scale, force=force, pairs=pairs_file
        )
    if accept_changes and product.is_dir():
        write_sums(product)
        checked = require_sums(product)
    seconds = round(time.monotonic() - started, 2)
    return Export(route, product, row | {"files_checked": checked, "seconds": seconds})


def _structure_row(
    route: Route,
    product: Path,
    base: BaseOptions,
    adapter: SteeringAdapter,
    *,
    scale: float,
    force: bool,
) -> dict[str, Any]:
    folder = model_directory(base.model, base.revision)
    open_base(folder, adapter, force=force)
    proof = prove_structure(route, folder, product, adapter, scale)
    figures = {"structure_only": True, "verified": True, **dataclasses.asdict(proof)}
    return figures | {"route": route.value, "path": str(product)}


def _parity_row(
    route: Route,
    product: Path,
    base_options: BaseOptions,
    adapter: SteeringAdapter,
    *,
    scale: float,
    force: bool,
    pairs: str | None,
) -> dict[str, Any]:
    check_installed(route)
    handling = Handling(
        scale=scale, force=force, trust_remote_code=base_options.trust_remote_code
    )
    read = read_pairs(pairs) if pairs else []
    started = time.monotonic()
    if route is Route.SAFETENSORS and base_options.dtype is None:
        folder = model_directory(base_options.model, base_options.revision)
        # A base rounded as the product was is what it steers.
        dtype = converted_dtype(folder, product)
        base_options = dataclasses.replace(base_options, dtype=dtype)
    base = load_base(base_options)
    prompts = verification_prompts(render_pairs(read, base.tokenizer))
    handling = check_base(base, adapter, handling)
    parity = prove_product(route, base, adapter, product, prompts, handling)
    dataclasses.replace(parity, path=str(product)).require(
        "is it a product of this base and adapter, at this scale?"
    )
    return product_row(route, str(product), parity, started)
