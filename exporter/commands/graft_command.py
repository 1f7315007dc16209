"""The command `graft`: adapters onto an ONNX model that exists already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from austeer.exporter.commands._console import (
    command_line,
    print_json,
    print_table,
    progress_on_terminal,
)
from austeer.exporter.commands._options import (
    FOLDER,
    chosen_scale_as,
    json_option,
    out_option,
    strength_input_options,
    sums_option,
)


@click.command()
@click.argument("base_onnx", type=FOLDER)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@out_option
@click.option(
    "--scale", type=float, default=1.0, show_default=True, help="Factor on the strength."
)
@strength_input_options
@click.option(
    "--as-adapter",
    is_flag=True,
    help="Write empty sites, and each ADAPTER as an .onnx_adapter that a run makes active.",
)
@click.option(
    "--together", is_flag=True, help="With --as-adapter: several can be active in one run."
)
@click.option(
    "--inline", is_flag=True, help="Plain operators only, for runtimes without functions."
)
@click.option("--replace", is_flag=True, help="Take an earlier graft out of BASE_ONNX first.")
@click.option("--copy-data", is_flag=True, help="Copy the base's weight files into OUT.")
@click.option(
    "--library", is_flag=True, help="Put the operator library into OUT, for onnxruntime-genai."
)
@click.option("--force", is_flag=True, help="Accept a base with other weights.")
@click.option("--no-verify", is_flag=True, help="Publish without running the result.")
@sums_option
@json_option
def graft(
    base_onnx: Path,
    adapters: tuple[str, ...],
    strength_input: bool,
    optional_strength_input: bool,
    no_verify: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Graft ADAPTER onto BASE_ONNX, a model of optimum, torch or the onnxruntime-genai builder.

    OUT is a new directory, or a new .onnx file: beside BASE_ONNX it shares its weight files.
    Quantized models keep their weights; graft after quantizing, never before.
    """
    from austeer.exporter.graft import GraftRequest, graft_job

    request = GraftRequest(
        base=base_onnx,
        adapters=adapters,
        scale_as=chosen_scale_as(strength_input, optional_strength_input),
        verify=not no_verify,
        command=command_line(),
        **options,
    )
    with progress_on_terminal() as progress:
        row = graft_job(request, progress)
    if as_json:
        print_json(row)
        return
    _print_graft(row)


def _print_graft(row: dict[str, Any]) -> None:
    header = ("graft", "nodes", "largest site difference (roundings)", "moves logits by")
    keys = ("max_site_difference", "steered_vs_base")
    figures = [f"{row[key]:.3g}" if row["verified"] else "not verified" for key in keys]
    print_table(
        "Verified" if row["verified"] else "Not verified",
        header,
        [(row["path"], str(row["nodes"]), *figures)],
    )
    if row["base_weights"] == "not comparable":
        click.echo(
            "note: the graph holds its weights rounded or quantized, so it could not be "
            "compared with the adapter's base model beyond its architecture"
        )
    for name in row["adapter_files"]:
        click.echo(f"adapter: {name}")
