"""Write one product of an adapter and prove it against the attached model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.adapters._errors import ModelError
from austeer.adapters._files import check_output_free, publish_directory
from austeer.adapters._progress import Progress, silent
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.pairs import ContrastivePair, read_pairs, render_pairs
from austeer.exporter.gguf_file import is_gguf
from austeer.exporter.quantized_products import (
    check_kind,
    quantized_base,
    verify_quantized,
    write_quantized,
)
from austeer.exporter.route_steps import prove_product, write_product
from austeer.exporter.routes import Route, check_installed, check_routes, route_of
from austeer.exporter.settings import BaseOptions, Handling, ProductRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from austeer.exporter.verify import ParityReport


NEUTRAL_PROMPTS = (
    "Once upon a time",
    "The weather tomorrow will be",
    "She opened the door and",
    "In the middle of the table there was a",
)
_VERIFIED_PAIRS = 12


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A live base model, and the directory that it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path


@dataclass(frozen=True, slots=True, eq=False)
class Export:
    """A published product: its row of the report."""

    route: Route
    path: Path
    row: dict[str, Any]


def load_base(options: BaseOptions) -> Base:
    """Load model and tokenizer, and find their directory.

    Raises:
        ModelError: no such model, a malformed one, or several processes and a device map.
    """
    from austeer.adapters.loading import load_model, load_tokenizer
    from austeer.adapters.localization.distributed import launched_size, local_device
    from austeer.adapters.model_directory import model_directory

    if options.device_map is not None and launched_size() > 1:
        raise ModelError(
            "--device-map: several processes need a copy each; use it in one process alone"
        )
    folder = model_directory(options.model, options.revision)
    model = load_model(
        options.model,
        device=local_device(options.device),
        device_map=options.device_map,
        dtype=options.dtype,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    tokenizer = load_tokenizer(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    return Base(model, tokenizer, folder)


def verification_prompts(pairs: Sequence[ContrastivePair]) -> list[str]:
    """Prompts with the positive completion, spread over the file, and neutral text."""
    step = max(1, len(pairs) // _VERIFIED_PAIRS)
    spread = [pair.prompt + pair.positive for pair in pairs[::step]][:_VERIFIED_PAIRS]
    return list(dict.fromkeys([*spread, *NEUTRAL_PROMPTS]))


def check_base(base: Base, adapter: SteeringAdapter, handling: Handling) -> Handling:
    """Check that the adapter belongs to the base's files; the handling that follows from it.

    The files decide, because the live model may be loaded in another dtype, in which the same
    weights have another fingerprint. No later step needs to ask again.

    Raises:
        AdapterError: it is for another base (unless `handling.force`).
        SiteError: a unit or layer that the base does not have.
    """
    from austeer.exporter.merge import open_base

    open_base(base.folder, adapter, force=handling.force)
    return dataclasses.replace(handling, force=True)


def make_product(
    route: Route,
    base: Base,
    adapter: SteeringAdapter,
    folder: Path,
    prompts: Sequence[str],
    handling: Handling,
    progress: Progress = silent,
    *,
    path: str | None = None,
) -> dict[str, Any]:
    """Write one product into the existing directory `folder` and prove it.

    Args:
        route: kind of product.
        base: the live base and its files.
        adapter: what to steer.
        folder: where to write.
        prompts: texts to compare on.
        handling: how it is written and proved.
        progress: called with (stage, done, total).
        path: what to call it in the report and in errors; the folder's name without it.

    Returns:
        The product's entry in `report.json`.

    Raises:
        RouteError: the adapter cannot take this route.
        AdapterError: the adapter is for another base (unless `handling.force`).
        VerificationError: the product differs from the attached model.
    """
    started, path = time.monotonic(), path or folder.name
    handling = check_base(base, adapter, handling)
    progress(f"write {route}", 0, 1)
    write_product(route, base, adapter, folder, handling)
    progress(f"write {route}", 1, 1)
    parity = None
    if handling.verify:
        progress(f"verify {route}", 0, 1)
        parity = prove_product(route, base, adapter, folder, prompts, handling)
        dataclasses.replace(parity, path=path).require()
        progress(f"verify {route}", 1, 1)
    return _row(route, path, parity, started)


def export_product(request: ProductRequest, progress: Progress = silent) -> Export:
    """Write, prove and publish one product of an existing adapter.

    Raises:
        AusteerError: the adapter, the base or the output is unusable, or the product differs
            from the attached model; nothing is published then.
    """
    check_output_free(request.out)
    adapter = SteeringAdapter.from_pretrained(request.adapter)
    check_routes(
        [request.route],
        adapter.config.strength,
        adapter.config.components,
        verify=request.handling.verify,
    )
    pairs = read_pairs(request.pairs) if request.pairs else []
    quantized = quantized_base(request.base, request.route)
    if quantized is not None:
        row = write_quantized(quantized, adapter, request.out, request.handling)
        return Export(request.route, request.out, row)
    if request.route is not Route.ONNX and not request.handling.verify:
        return _write_unverified(request, adapter)
    progress("load the base model", 0, 1)
    base = load_base(request.base)
    progress("load the base model", 1, 1)
    prompts = verification_prompts(render_pairs(pairs, base.tokenizer))
    with publish_directory(request.out) as work:
        row = make_product(
            request.route,
            base,
            adapter,
            work,
            prompts,
            request.handling,
            progress,
            path=str(request.out),
        )
    return Export(request.route, request.out, row)


def verify_product(
    product: Path,
    base_options: BaseOptions,
    adapter_name: str,
    *,
    scale: float = 1.0,
    force: bool = False,
    pairs_file: str | None = None,
) -> Export:
    """Compare a product on disk with its base and adapter; its row holds the figures.

    Raises:
        AusteerError: product, base or adapter is unusable.
        VerificationError: the product differs from the attached model.
    """
    handling = Handling(
        scale=scale, force=force, trust_remote_code=base_options.trust_remote_code
    )
    if is_gguf(product):
        check_kind(product, base_options.model)
    route = Route.SAFETENSORS if is_gguf(product) else route_of(product)
    check_installed(route)
    adapter = SteeringAdapter.from_pretrained(adapter_name)
    pairs = read_pairs(pairs_file) if pairs_file else []
    quantized = quantized_base(base_options, route)
    if quantized is not None:
        return Export(route, product, verify_quantized(quantized, product, adapter, handling))
    started = time.monotonic()
    base = load_base(base_options)
    prompts = verification_prompts(render_pairs(pairs, base.tokenizer))
    handling = check_base(base, adapter, handling)
    parity = prove_product(route, base, adapter, product, prompts, handling)
    dataclasses.replace(parity, path=str(product)).require(
        "is it a product of this base and adapter, at this scale?"
    )
    return Export(route, product, _row(route, str(product), parity, started))


def _write_unverified(request: ProductRequest, adapter: SteeringAdapter) -> Export:
    """Write without a live model, which may be far larger than this machine's memory."""
    from austeer.adapters.model_directory import model_directory
    from austeer.exporter.code_export import export_code
    from austeer.exporter.merge import merge_checkpoint
    from austeer.exporter.peft_export import convert_peft

    started, route, out = time.monotonic(), request.route, request.out
    folder = model_directory(request.base.model, request.base.revision)
    scale, force = request.handling.scale, request.handling.force
    stored = request.handling.stored
    if route.is_peft:
        convert_peft(folder, adapter, out, route=route, scale=scale, force=force)
    elif route is Route.CODE:
        export_code(folder, adapter, out, scale=scale, force=force, link=stored.link)
    else:
        merge_checkpoint(folder, adapter, out, scale=scale, force=force, stored=stored)
    return Export(route, out, _row(route, str(out), None, started))


def _row(
    route: Route, path: str, parity: ParityReport | None, started: float
) -> dict[str, Any]:
    figures = parity.as_dict() if parity is not None else {}
    return figures | {
        "route": route.value,
        "path": path,
        "verified": parity is not None,
        "seconds": round(time.monotonic() - started, 2),
    }
