"""The commands that write and check products of an adapter: merge, onnx, peft, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from austeer.exporter.commands._console import (
    command_line,
    print_json,
    print_table,
    progress_on_terminal,
)
from austeer.exporter.commands._options import (
    FOLDER,
    base_options,
    chosen_base,
    chosen_scale_as,
    json_option,
    no_verify_option,
    out_option,
    peft_route_option,
    steering_options,
    storage_options,
    strength_input_options,
    sums_option,
)
from austeer.exporter.routes import Route
from austeer.exporter.settings import Handling, ProductRequest, StoredAs


@click.command()
@click.argument("model")
@click.argument("adapter")
@out_option
@click.option(
    "--code",
    is_flag=True,
    help="Leave the weights and add a modelling file: for what cannot fold (component layer, "
    "strength adaptive). Loads with trust_remote_code.",
)
@steering_options
@storage_options
@no_verify_option
@sums_option
@base_options
@json_option
def merge(as_json: bool, code: bool, **options: Any) -> None:
    """Fold ADAPTER into the weights of MODEL: a plain safetensors checkpoint.

    In a quantized MODEL output gains go into its scales. MODEL may be a GGUF file; OUT is one
    then. With --dtype the weights are written in that dtype, and compared in it; with --code
    they are only compared in it.
    """
    if code and options["max_shard_size"]:
        raise click.UsageError("--max-shard-size: with --code weight files stay as they are")
    _refuse_without_model(options, "device", "device_map", *(["dtype"] if code else []))
    stored = StoredAs(
        link=options["link"],
        dtype=None if code else options["dtype"],
        max_shard_size=options["max_shard_size"],
    )
    _export(Route.CODE if code else Route.SAFETENSORS, options, as_json, stored=stored)


@click.command()
@click.argument("model")
@click.argument("adapter")
@out_option
@steering_options
@strength_input_options
@no_verify_option
@sums_option
@base_options
@json_option
def onnx(as_json: bool, **options: Any) -> None:
    """Export MODEL steered by ADAPTER to ONNX, with a KV cache."""
    scale_as = chosen_scale_as(options["strength_input"], options["optional_strength_input"])
    _export(Route.ONNX, options, as_json, scale_as=scale_as)


@click.command()
@click.argument("adapter")
@click.argument("model")
@peft_route_option
@out_option
@steering_options
@no_verify_option
@sums_option
@base_options
@json_option
def peft(as_json: bool, route: str, **options: Any) -> None:
    """Convert ADAPTER into a LoRA or an IA3 for MODEL that stock peft loads; exact."""
    _refuse_without_model(options, "dtype", "device", "device_map")
    _export(Route(route), options, as_json)


@click.command()
@click.argument("product", type=FOLDER)
@click.option("--base", "model", required=True, help="Base model: directory or Hub id.")
@click.option("--adapter", required=True, help="Adapter: directory or Hub id.")
@steering_options
@click.option(
    "--structure-only",
    is_flag=True,
    help="Run no model: files, bytes, and each touched weight on random input.",
)
@click.option(
    "--accept-changes",
    is_flag=True,
    help="Your edits may differ from SHA256SUMS; if all else holds, it is written anew.",
)
@base_options
@json_option
def verify(as_json: bool, product: Path, **options: Any) -> None:
    """Check PRODUCT: its SHA256SUMS, its structure, then its logits.

    They are compared with those of its base model, steered live by its adapter.
    """
    if options["structure_only"]:
        _refuse_given("structure-only", "pairs", "device", "device_map", "dtype")
    from austeer.exporter.markdown import verify_sentences
    from austeer.exporter.proofs.product_check import verify_product

    with progress_on_terminal():
        export = verify_product(
            product,
            chosen_base(options),
            options["adapter"],
            scale=options["scale"],
            force=options["force"],
            pairs_file=options["pairs"],
            structure_only=options["structure_only"],
            accept_changes=options["accept_changes"],
        )
    _print_product(export.row, as_json)
    if not as_json:
        for sentence in verify_sentences(export.row):
            click.echo(sentence)


def _refuse_without_model(options: dict[str, Any], *names: str) -> None:
    """Options of a comparison that --no-verify leaves out."""
    if options["no_verify"]:
        _refuse_given("no-verify", *names)


def _refuse_given(why: str, *names: str) -> None:
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option}: with --{why} no model runs; choose one")


def _export(
    route: Route,
    options: dict[str, Any],
    as_json: bool,
    *,
    stored: StoredAs | None = None,
    scale_as: str = "constant",
) -> None:
    _refuse_without_model(options, "pairs")
    from austeer.exporter.products import export_product

    request = ProductRequest(
        base=chosen_base(options),
        adapter=options["adapter"],
        route=route,
        out=options["out"],
        pairs=options["pairs"],
        command=command_line(),
        handling=Handling(
            scale=options["scale"],
            force=options["force"],
            verify=not options["no_verify"],
            trust_remote_code=options["trust_remote_code"],
            scale_as=scale_as,
            stored=stored or StoredAs(),
            sums=options["sums"],
        ),
    )
    with progress_on_terminal() as progress:
        export = export_product(request, progress)
    _print_product(export.row, as_json)


def _print_product(row: dict[str, Any], as_json: bool) -> None:
    from austeer.exporter.markdown import PRODUCT_HEADER, product_rows

    if as_json:
        print_json(row)
        return
    print_table(
        "Verified" if row["verified"] else "Not verified", PRODUCT_HEADER, product_rows([row])
    )
    for note in row.get("notes", ()):
        click.echo(f"note: {note}")
