"""Commands about adapters that exist already: `show` and `combine`."""

from __future__ import annotations

from typing import Any, get_args

import click

from austeer.adapters.composition.combined import OnOverlap
from austeer.exporter.commands._console import (
    command_line,
    print_json,
    print_table,
    progress_on_terminal,
)
from austeer.exporter.commands._options import (
    base_options,
    chosen_base,
    json_option,
    out_option,
    sums_option,
)
from austeer.exporter.settings import BaseOptions


@click.command()
@click.argument("adapter")
@click.option("--base", "model", help="Base model: check it, and say what the units do in it.")
@click.option(
    "--units",
    type=click.IntRange(0),
    help="With --base: how many of the strongest units; 0 checks the base alone.  "
    "[default: 16]",
)
@base_options
@json_option
def show(
    adapter: str, model: str | None, units: int | None, as_json: bool, **options: Any
) -> None:
    """What ADAPTER steers, and with --base what its strongest units do one by one."""
    given = [name for name, value in options.items() if value not in (None, False, "cpu")]
    given += ["units"] if units is not None else []
    if model is None and given:
        option = f"--{given[0].replace('_', '-')}"
        raise click.UsageError(f"{option}: is about the base model; name it with --base")
    from austeer.adapters.adapter import SteeringAdapter
    from austeer.exporter.describe import describe_adapter, describe_in_base

    loaded = SteeringAdapter.from_pretrained(adapter)
    values = describe_adapter(loaded)
    if model is not None:
        base = chosen_base(options | {"model": model})
        chosen = 16 if units is None else units
        with progress_on_terminal() as progress:
            values |= describe_in_base(loaded, adapter, base, chosen, progress)
    if as_json:
        print_json(values)
    else:
        _print_adapter(adapter, values)


@click.command()
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@click.option("--base", "model", required=True, help="Base model: directory or Hub id.")
@out_option
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    help="Factor on an adapter's strength; one each, in their order.  [default: 1]",
)
@click.option(
    "--kl-budget",
    type=float,
    default=0.1,
    show_default=True,
    help="Ceiling of the side effect, nats per token; above it all weights come down.",
)
@click.option(
    "--on-overlap",
    type=click.Choice(get_args(OnOverlap)),
    default="sum",
    show_default=True,
    help="A unit steered twice: sum adds gains, and refuses those that read the input; "
    "strongest leaves such a unit to the larger; refuse refuses every one.",
)
@click.option("--pairs", multiple=True, help="Report margins on these pairs; repeat for more.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@sums_option
@base_options
@json_option
def combine(as_json: bool, **options: Any) -> None:
    """One adapter that does what each ADAPTER does, within a KL budget."""
    from austeer.exporter import compose

    own = {key: value for key, value in options.items() if key not in BaseOptions.__slots__}
    request = compose.CombineRequest(base=chosen_base(options), command=command_line(), **own)
    with progress_on_terminal() as progress:
        report = compose.combine_job(request, progress)
    if as_json:
        print_json(report)
        return
    print_table("Combined", compose.PART_HEADER, compose.part_rows(report))
    print_table("Steered twice", compose.OVERLAP_HEADER, compose.overlap_rows(report))
    print_table("Margins (nats)", compose.BEHAVIOUR_HEADER, compose.behaviour_rows(report))
    for sentence in compose.combine_sentences(report):
        click.echo(sentence)


def _print_adapter(name: str, values: dict[str, Any]) -> None:
    from austeer.adapters.config import figures_of_test
    from austeer.exporter import describe
    from austeer.exporter.markdown import FIGURE_HEADER, SITE_HEADER, figure_rows, steered_rows

    print_table(name, ("", ""), describe.fact_rows(values))
    print_table("Sites", SITE_HEADER, steered_rows(values["sites"]))
    print_table("Test split", FIGURE_HEADER, figure_rows(figures_of_test(values["fit"])))
    found = values.get("analysis")
    if found is None:
        return
    print_table("Strongest units", describe.UNIT_HEADER, describe.unit_rows(found))
    header, rows = describe.kl_table(found)
    print_table("KL (row ‖ column), nats/token, each unit steered alone", header, rows)
