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
from austeer.adapters.weights import Checkpoint
from austeer.exporter.provenance import ProductFacts, Seal
from austeer.exporter.quantized.products import quantized_base, write_quantized
from austeer.exporter.route_steps import prove_product, write_product
from austeer.exporter.routes import Route, check_routes
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
    weights have another fingerprint. No later step needs to ask again, or to read them.

    Raises:
        AdapterError: it is for another base (unless `handling.force`).
        SiteError: a unit or layer that the base does not have.
    """
    from austeer.exporter.merge import is_own_base, open_base

    checkpoint = open_base(base.folder, adapter, force=handling.force)
    own = is_own_base(checkpoint, adapter, force=handling.force)
    return dataclasses.replace(handling, force=True, own_base=own)


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
    seal: Seal | None = None,
) -> dict[str, Any]:
    """Write one product into the existing directory `folder`, prove it, and seal it.

    Args:
        route: kind of product.
        base: the live base and its files.
        adapter: what to steer.
        folder: where to write.
        prompts: texts to compare on.
        handling: how it is written and proved.
        progress: called with (stage, done, total).
        path: what to call it in the report and in errors; the folder's name without it.
        seal: what `austeer.json` says besides.

    Returns:
        The product's entry in `report.json`.

    Raises:
        RouteError: the adapter cannot take this route.
        AdapterError: the adapter is for another base (unless `handling.force`).
        VerificationError: the product differs from the attached model.
    """
    started, path = time.monotonic(), path or folder.name
    facts = ProductFacts(route, base.folder, adapter, handling, live=True)
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
    (seal or Seal()).close_product(folder, facts)
    return product_row(route, path, parity, started)


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
    _refuse_base(request)
    if quantized is None or quantized.is_dir():
        _check_space(request, adapter)
    if quantized is not None:
        seal, handling = request_seal(request), request.handling
        row = write_quantized(quantized, adapter, request.out, handling, seal)
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
            seal=request_seal(request),
        )
    return Export(request.route, request.out, row)


def _refuse_base(request: ProductRequest) -> None:
    """What the writer would refuse, before the model is loaded: that may fail over less."""
    from austeer.adapters.model_directory import model_directory
    from austeer.exporter.code_export import check_code_base
    from austeer.exporter.merge import read_model_config
    from austeer.exporter.peft_export import refuse_quantized_peft

    if not (request.route is Route.CODE or request.route.is_peft):
        return
    base = model_directory(request.base.model, request.base.revision)
    if request.route is Route.CODE:
        check_code_base(base, read_model_config(base))
    else:
        refuse_quantized_peft(base)


def _check_space(request: ProductRequest, adapter: SteeringAdapter) -> None:
    """Before the model is loaded, which may take minutes."""
    from austeer.adapters.model_directory import model_directory
    from austeer.exporter.free_space import check_space, product_size

    base, route = model_directory(request.base.model, request.base.revision), request.route
    stored = request.handling.stored
    copies = route in (Route.SAFETENSORS, Route.CODE) and not stored.anew
    size = product_size(route, base, adapter, request.base.dtype, stored)
    check_space(request.out, size, Checkpoint(base).files if copies else ())


def _write_unverified(request: ProductRequest, adapter: SteeringAdapter) -> Export:
    """Write without a live model, which may be far larger than this machine's memory."""
    from austeer.adapters.model_directory import model_directory
    from austeer.exporter.code_export import export_code
    from austeer.exporter.merge import merge_checkpoint
    from austeer.exporter.peft_export import convert_peft

    started, route, out = time.monotonic(), request.route, request.out
    folder = model_directory(request.base.model, request.base.revision)
    options: dict[str, Any] = {
        "scale": request.handling.scale,
        "force": request.handling.force,
        "seal": request_seal(request),
    }
    stored = request.handling.stored
    if route.is_peft:
        convert_peft(folder, adapter, out, route=route, **options)
    elif route is Route.CODE:
        export_code(folder, adapter, out, link=stored.link, **options)
    else:
        merge_checkpoint(folder, adapter, out, stored=stored, **options)
    return Export(route, out, product_row(route, str(out), None, started))


def request_seal(request: ProductRequest) -> Seal:
    """What `austeer.json` says of a product that was asked for."""
    return Seal(
        command=request.command,
        model=request.base.model,
        revision=request.base.revision,
        sums=request.handling.sums,
    )


def product_row(
    route: Route, path: str, parity: ParityReport | None, started: float
) -> dict[str, Any]:
    """A product's entry in `report.json`; `started` on the monotonic clock."""
    figures = parity.as_dict() if parity is not None else {}
    return figures | {
        "route": route.value,
        "path": path,
        "verified": parity is not None,
        "seconds": round(time.monotonic() - started, 2),
    }
