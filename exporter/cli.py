"""The command line: parse, one library call, print. Heavy imports sit inside commands."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from austeer.adapters._errors import NoEffectError
from austeer.adapters.sites import Component
from austeer.exporter.commands._console import (
    TranslatingGroup,
    command_line,
    print_json,
    print_table,
    progress_on_terminal,
)
from austeer.exporter.commands._options import (
    base_options,
    chosen_base,
    fit_options,
    json_option,
    localize_options,
    out_option,
    sums_option,
)
from austeer.exporter.commands.adapter_commands import combine, show
from austeer.exporter.commands.graft_command import graft
from austeer.exporter.commands.product_commands import merge, onnx, peft, verify
from austeer.exporter.routes import Route
from austeer.exporter.settings import (
    BaseOptions,
    RunOptions,
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
    _interrupt_on("SIGTERM", "SIGHUP")
    cli()


def _interrupt_on(*names: str) -> None:
    """Let these signals end a command as Ctrl-C does, which removes what is half done."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in names:
        number = getattr(signal, name, None)
        # nohup has SIGHUP ignored, and means it.
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


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


for command in (merge, onnx, peft, verify, graft, show, combine):
    cli.add_command(command)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Versions, onnxruntime providers, devices, op library; exits 1 on a problem."""
    from austeer.exporter.commands.environment import describe_environment, environment_rows

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
