"""Click options that several commands share, and the values they make."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from austeer.adapters.sites import Component
from austeer.adapters.tensors import STORED_DTYPES
from austeer.exporter.routes import Route
from austeer.exporter.settings import BaseOptions

Command = TypeVar("Command", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path)
STRENGTHS = ("auto", "paper", "oriented", "fitted", "adaptive")


def together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several decorators as one; the first is listed first in the help."""
    return lambda command: reduce(lambda f, option: option(f), reversed(options), command)


out_option = click.option(
    "-o", "--out", type=FOLDER, required=True, help="New path for what comes out."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else."
)
peft_route_option = click.option(
    "--as", "route", required=True, type=click.Choice([r.value for r in Route if r.is_peft])
)
base_options = together(
    click.option("--device", default="cpu", show_default=True, help="Torch device."),
    click.option(
        "--device-map", type=click.Choice(["auto"]),
        help="auto: spread the model over all devices, through accelerate.",
    ),
    click.option(
        "--dtype", type=click.Choice(list(STORED_DTYPES)),
        help="Load in this dtype.  [default: the model's]",
    ),
    click.option("--revision", help="Hub revision of the model."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run code that comes with the model."
    ),
)  # fmt: skip
localize_options = together(
    click.option(
        "--component",
        "components",
        type=click.Choice([component.value for component in Component]),
        multiple=True,
        help="Place to steer; repeat for several.  [default: all that can come out]",
    ),
    click.option(
        "--batch-size", type=click.IntRange(1),
        help="Most pairs or texts per forward pass.  [default: what memory allows]",
    ),
    click.option(
        "--process-timeout", type=click.FloatRange(0, min_open=True), default=30.0,
        show_default=True,
        help="Under torchrun: minutes to wait for a process before it counts as stopped.",
    ),
    click.option(
        "--restart", is_flag=True, help="Discard the localization's state of a stopped run."
    ),
)  # fmt: skip
fit_options = together(
    click.option("--test-pairs", help="Pairs for the report.  [default: a split of PAIRS]"),
    click.option(
        "--strength", type=click.Choice(STRENGTHS), default="auto", show_default=True,
        help="How gains are set; auto: fitted where a product must fold, else adaptive.",
    ),
    click.option(
        "--kl-budget", type=float, default=0.1, show_default=True,
        help="Ceiling of the side effect, nats per token.",
    ),
    click.option(
        "--max-units", type=click.IntRange(1), default=64, show_default=True,
        help="Ceiling of steered units.",
    ),
    click.option(
        "--fluency-limit", type=float, default=1.3, show_default=True,
        help="Ceiling of the perplexity, under the base, of steered text over its own text; "
        "trained strengths keep it (inf: none).",
    ),
    click.option(
        "--rank", type=click.IntRange(1), default=1, show_default=True,
        help="Rank of the γ predictor (adaptive).",
    ),
    click.option("--keep-sign", is_flag=True, help="Never turn an activation's sign."),
    click.option(
        "--neutral-text", type=FOLDER,
        help="Text whose perplexity is reported: .txt or .md, a text a line, or .jsonl with "
        "text.",
    ),
    click.option("--ranking", type=FOLDER, help="Ranking that `localize` wrote."),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
)  # fmt: skip
steering_options = together(
    click.option(
        "--scale", type=float, default=1.0, show_default=True, help="Factor on the strength."
    ),
    click.option("--force", is_flag=True, help="Accept a base with other weights."),
    click.option("--pairs", help="Verify on this file's prompts as well."),
)
strength_input_options = together(
    click.option(
        "--strength-input", is_flag=True,
        help="Make the factor a graph input, steering_scale.",
    ),
    click.option(
        "--optional-strength-input", is_flag=True,
        help="The same with a default, for callers that do not know it; JavaScript cannot "
        "set it.",
    ),
)  # fmt: skip
storage_options = together(
    click.option(
        "--link", is_flag=True,
        help="Hard link weight files that stay as they are: quick, and they are then the "
        "base's files, too.",
    ),
    click.option(
        "--max-shard-size",
        callback=lambda _, __, text: None if text is None else parse_size(text),
        help="Write the weights anew in files of at most so many bytes of tensors, such as "
        "5GB.  [default: the base's files]",
    ),
)  # fmt: skip
sums_option = click.option(
    "--sums/--no-sums",
    default=True,
    help="Write SHA256SUMS; hashing takes longer than copying.  [default: --sums]",
)
no_verify_option = click.option(
    "--no-verify", is_flag=True, help="Publish without comparing with the attached model."
)


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB (10^6), 5GiB (2^30) or 1000.

    Raises:
        click.BadParameter: not of that form, or below 1.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is not None:
        step = 1024 if found[3] else 1000
        size = float(found[1]) * step ** " KMGT".index(found[2].upper() or " ")
        if 1 <= size < 2**63:
            return int(size)
    raise click.BadParameter(f"expected a size such as 5GB or 500MiB, got {text!r}")


def chosen_scale_as(strength_input: bool, optional_strength_input: bool) -> str:
    """What the values of `strength_input_options` make of the factor.

    Raises:
        click.UsageError: both are set.
    """
    if strength_input and optional_strength_input:
        raise click.UsageError(
            "--strength-input and --optional-strength-input: choose one of them"
        )
    if optional_strength_input:
        return "optional"
    return "required" if strength_input else "constant"


def chosen_base(options: Mapping[str, Any]) -> BaseOptions:
    """The base model among the values of `base_options`."""
    names = ("model", "device", "device_map", "dtype", "revision", "trust_remote_code")
    return BaseOptions(**{name: options[name] for name in names})
