"""Write one product of an adapter and prove it against the attached model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.adapters._files import check_output_free, publish_directory
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.pairs import ContrastivePair, read_pairs, render_pairs
from austeer.exporter.routes import Route, check_routes, route_of
from austeer.exporter.settings import BaseOptions, Handling, ProductRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from austeer.exporter.verify import ParityReport

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

NEUTRAL_PROMPTS = (
    "Once upon a time",
    "The weather tomorrow will be",
    "She opened the door and",
    "In the middle of the table there was a",
)
_VERIFIED_PAIRS = 12


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""


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
        ModelError: no such model, or a malformed one.
    """
    from austeer.adapters.loading import load_model, load_tokenizer, model_directory

    folder = model_directory(options.model, options.revision)
    model = load_model(
        options.model,
        device=options.device,
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


def verification_prompts(pairs: Sequence[ContrastivePair]) -> list[str]:
    """Prompts with the positive completion, spread over the file, and neutral text."""
    step = max(1, len(pairs) // _VERIFIED_PAIRS)
    spread = [pair.prompt + pair.positive for pair in pairs[::step]][:_VERIFIED_PAIRS]
    return list(dict.fromkeys([*spread, *NEUTRAL_PROMPTS]))


def write_product(
    route: Route, base: Base, adapter: SteeringAdapter, folder: Path, handling: Handling
) -> None:
    """Write the product's files into an existing directory.

    Raises:
        RouteError: the adapter cannot take this route.
        AdapterError: the adapter is for another base.
    """
    scale, force = handling.scale, handling.force
    if route is Route.ONNX:
        from austeer.exporter.onnx_export import write_onnx

        write_onnx(base.model, base.tokenizer, adapter, folder, scale=scale, force=force)
    else:
        from austeer.exporter.merge import write_folded

        write_folded(base.folder, adapter, folder, scale=scale, force=force)


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
        VerificationError: it differs.
    """
    from austeer.exporter.verify import verify_checkpoint, verify_fold_structure, verify_onnx

    model, tokenizer = base.model, base.tokenizer
    options: dict[str, Any] = {"scale": handling.scale, "force": handling.force}
    with quiet_transformers():
        if route is Route.ONNX:
            parity = verify_onnx(folder, model, tokenizer, adapter, prompts, **options)
        else:
            verify_fold_structure(base.folder, folder, adapter, handling.scale)
            options["trust_remote_code"] = handling.trust_remote_code
            parity = verify_checkpoint(folder, model, tokenizer, adapter, prompts, **options)
    parity.require()
    return parity


def make_product(
    route: Route,
    base: Base,
    adapter: SteeringAdapter,
    folder: Path,
    prompts: Sequence[str],
    handling: Handling,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write one product into the existing directory `folder` and prove it.

    Returns:
        The product's entry in `report.json`.

    Raises:
        RouteError: the adapter cannot take this route.
        VerificationError: the product differs from the attached model.
    """
    started = time.monotonic()
    progress(f"write {route}", 0, 1)
    write_product(route, base, adapter, folder, handling)
    progress(f"write {route}", 1, 1)
    parity = None
    if handling.verify:
        progress(f"verify {route}", 0, 1)
        parity = prove_product(route, base, adapter, folder, prompts, handling)
        progress(f"verify {route}", 1, 1)
    return _row(route, folder.name, parity, started)


def export_product(request: ProductRequest, progress: Progress = silent) -> Export:
    """Write, prove and publish one product of an existing adapter.

    Raises:
        AusteerError: the adapter, the base or the output is unusable, or the product differs
            from the attached model; nothing is published then.
    """
    check_output_free(request.out)
    adapter = SteeringAdapter.from_pretrained(request.adapter)
    check_routes([request.route], adapter.config.strength, adapter.config.components)
    pairs = read_pairs(request.pairs) if request.pairs else []
    progress("load the base model", 0, 1)
    base = load_base(request.base)
    progress("load the base model", 1, 1)
    prompts = verification_prompts(render_pairs(pairs, base.tokenizer))
    with publish_directory(request.out) as work:
        row = make_product(
            request.route, base, adapter, work, prompts, request.handling, progress
        )
    return Export(request.route, request.out, row | {"path": str(request.out)})


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
    route = route_of(product)
    adapter = SteeringAdapter.from_pretrained(adapter_name)
    pairs = read_pairs(pairs_file) if pairs_file else []
    started = time.monotonic()
    base = load_base(base_options)
    prompts = verification_prompts(render_pairs(pairs, base.tokenizer))
    handling = Handling(
        scale=scale, force=force, trust_remote_code=base_options.trust_remote_code
    )
    parity = prove_product(route, base, adapter, product, prompts, handling)
    return Export(route, product, _row(route, str(product), parity, started))


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
