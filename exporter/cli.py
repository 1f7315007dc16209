"""The command line: parse, one library call, print. Heavy imports sit inside commands."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from austeer.adapters._errors import NoEffectError
from austeer.adapters.sites import Component
from austeer.exporter._console import (
    TranslatingGroup,
    command_line,
    print_json,
    print_table,
    progress_on_terminal,
)
from austeer.exporter._options import (
    FOLDER,
    base_options,
    chosen_base,
    fit_options,
    json_option,
    localize_options,
    no_verify_option,
    out_option,
    peft_route_option,
    steering_options,
    storage_options,
    strength_input_options,
    sums_option,
)
from austeer.exporter.adapter_commands import combine, show
from austeer.exporter.graft_command import graft
from austeer.exporter.routes import Route
from austeer.exporter.settings import (
    BaseOptions,
    Handling,
    ProductRequest,
    RunOptions,
    StoredAs,
)


@click.group(cls=TranslatingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="austeer")
def cli() -> None:
    """Compile activation steering into plain checkpoints, ONNX models and PEFT adapters.

    MODEL is a local directory or a Hub id. PAIRS is JSONL or CSV with prompt (or chat
    messages), positive and negative; Parquet and Hub datasets with the [data] extra.
    """


def main() -> None:
    """Entry point of `austeer-export`."""
    if not sys.warnoptions:
        # Deprecations inside libraries mean nothing to who runs a command; -W shows them.
        warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if os.environ.get("RANK", "0") != "0":
        # The first of several processes says it for all.
        logging.getLogger("austeer").setLevel(logging.ERROR)
    cli()


@cli.command()
@click.argument("model")
@click.argument("pairs")
@out_option
@click.option(
    "--to",
    "routes",
    type=click.Choice([route.value for route in Route]),
    multiple=True,
    help="Product to make; repeat for several.  [default: the adapter alone]",
)
@localize_options
@fit_options
@sums_option
@base_options
@json_option
def run(as_json: bool, routes: tuple[str, ...], **options: Any) -> None:
    """The whole job: localize, fit, write each product, prove it, report."""
    chosen = _run_options(options, tuple(dict.fromkeys(Route(route) for route in routes)))
    from austeer.exporter.run import run_job

    try:
        with progress_on_terminal() as progress:
            values = run_job(chosen, progress).values
    except NoEffectError as error:
        _print_run(error.report, chosen.out, as_json)
        raise
    _print_run(values, chosen.out, as_json)


@cli.command()
@click.argument("model")
@click.argument("pairs")
@out_option
@localize_options
@click.option(
    "--compat",
    type=click.Choice(["reference"]),
    help="reference: round activations to float16 as the paper's code does.",
)
@base_options
@json_option
def localize(as_json: bool, **options: Any) -> None:
    """Score every unit and write the ranking to OUT, one .safetensors file.

    After a stop of any kind the same command goes on where it was: the state is in OUT.state
    until OUT is written. Under torchrun or accelerate launch the processes share the pairs.
    """
    from austeer.exporter.stages import localize_job

    with progress_on_terminal() as progress:
        summary = localize_job(
            chosen_base(options),
            options["pairs"],
            options["out"],
            components=options["components"],
            batch_size=options["batch_size"],
            compat=options["compat"],
            restart=options["restart"],
            timeout_minutes=options["process_timeout"],
            progress=progress,
        )
    if not summary:
        return
    if as_json:
        print_json(summary)
        return
    header = ("component", "layers", "width", "|β| = 1", "near ties", "best unit", "its β")
    rows = [[str(row[key]) for key in row] for row in summary["components"]]
    print_table(f"{summary['pairs']} pairs → {summary['path']}", header, rows)


@cli.command()
@click.argument("model")
@click.argument("pairs")
@out_option
@localize_options
@fit_options
@sums_option
@base_options
@json_option
def fit(as_json: bool, **options: Any) -> None:
    """Find units and their strength; write the adapter and its report to OUT."""
    chosen = _run_options(options, ())
    from austeer.exporter.run import fit_job

    try:
        with progress_on_terminal() as progress:
            values = fit_job(chosen, progress).values
    except NoEffectError as error:
        _print_run(error.report, chosen.out, as_json)
        raise
    _print_run(values, chosen.out, as_json)


@cli.command()
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
    stored = StoredAs(
        link=options["link"],
        dtype=None if code else options["dtype"],
        max_shard_size=options["max_shard_size"],
    )
    _export(Route.CODE if code else Route.SAFETENSORS, options, as_json, stored)


@cli.command()
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
    _export(Route.ONNX, options, as_json)


@cli.command()
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
    _export(Route(route), options, as_json)


@cli.command()
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
    from austeer.exporter.markdown import verify_sentences
    from austeer.exporter.product_check import verify_product

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


cli.add_command(graft)
cli.add_command(show)
cli.add_command(combine)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Versions, onnxruntime providers, devices, op library; exits 1 on a problem."""
    from austeer.exporter.environment import describe_environment, environment_rows

    values = describe_environment()
    if as_json:
        print_json(values)
    else:
        print_table("Environment", ("", ""), environment_rows(values))
        for problem in values["problems"]:
            click.echo(f"problem: {problem}", err=True)
    if values["problems"]:
        raise click.exceptions.Exit(1)


def _run_options(options: dict[str, Any], routes: tuple[Route, ...]) -> RunOptions:
    base = chosen_base(options)
    rest = {key: value for key, value in options.items() if key not in BaseOptions.__slots__}
    rest["components"] = tuple(Component(name) for name in options["components"])
    chosen = RunOptions(base=base, routes=routes, command=command_line(), **rest)
    # Before torch is imported, which alone takes seconds.
    chosen.check()
    return chosen


def _export(
    route: Route, options: dict[str, Any], as_json: bool, stored: StoredAs | None = None
) -> None:
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
            scale_as=options.get("scale_as") or "constant",
            stored=stored or StoredAs(),
            sums=options["sums"],
        ),
    )
    with progress_on_terminal() as progress:
        export = export_product(request, progress)
    _print_product(export.row, as_json)


def _print_run(values: dict[str, Any], out: Path, as_json: bool) -> None:
    from austeer.exporter import markdown

    if as_json:
        print_json(values | {"out": str(out)})
        return
    print_table("Test split", markdown.FIGURE_HEADER, markdown.figure_rows(values["test"]))
    print_table("Products", markdown.PRODUCT_HEADER, markdown.product_rows(values["products"]))
    click.echo(markdown.outcome_sentence(values))
    for note in values["notes"]:
        click.echo(f"note: {note}")
    click.echo(markdown.time_sentence(values["timings"]))
    what = "Everything" if values["outcome"] == "steered" else "The report"
    click.echo(f"{what} is in {out}")


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
