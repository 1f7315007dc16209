"""The `combine` command: several adapters in, one adapter within the KL budget out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.adapters._errors import FitError
from austeer.adapters._files import check_output_free, publish_directory
from austeer.adapters._progress import Progress
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.composition.contributions import checked_weights
from austeer.adapters.fingerprint import checkpoint_reader
from austeer.adapters.pairs import ContrastivePair, read_pairs
from austeer.adapters.weights import Checkpoint
from austeer.exporter.markdown import Row, number
from austeer.exporter.provenance import Seal, adapter_facts, pairs_facts
from austeer.exporter.settings import BaseOptions

if TYPE_CHECKING:
    from austeer.adapters.composition.combined import OnOverlap


PART_HEADER = ("adapter", "strength", "weight", "weight kept", "KL alone")
OVERLAP_HEADER = ("site", "unit", "γ of each", "directions", "kept")
BEHAVIOUR_HEADER = ("pairs", "base margin", "combined", "each alone", "accuracy")
_MOST_ROWS = 20
_OPTIONS = ("weights", "kl_budget", "on_overlap", "batch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineRequest:
    """What `combine` was asked for.

    Attributes:
        base: the base model.
        adapters: directories or Hub ids.
        out: new directory.
        weights: factor on every γ of each adapter, empty for 1.
        kl_budget: ceiling of the side effect, nats per token.
        on_overlap: see `austeer.adapters.composition.combined.combine`.
        pairs: files of pairs whose margins are reported.
        batch_size: pairs or texts per forward pass.
        seed: of the neutral text.
        command: the command line, for `austeer.json`.
        sums: write `SHA256SUMS`.

    Raises:
        AdapterError: weights that are not one finite number an adapter.
        FitError: a budget that is not positive.
    """

    base: BaseOptions
    adapters: tuple[str, ...]
    out: Path
    weights: tuple[float, ...] = ()
    kl_budget: float = 0.1
    on_overlap: OnOverlap = "sum"
    pairs: tuple[str, ...] = ()
    batch_size: int = 16
    seed: int = 0
    command: str = ""
    sums: bool = True

    def __post_init__(self) -> None:
        checked_weights(self.weights or None, len(self.adapters))
        if not self.kl_budget > 0:
            raise FitError(f"kl_budget: expected a number above 0, got {self.kl_budget}")


def combine_job(request: CombineRequest, progress: Progress) -> dict[str, Any]:
    """Combine adapters and write the result to a new directory.

    Args:
        request: what to combine.
        progress: called with (stage, done, total).

    Returns:
        The report of `combine_within_budget`, with `path`, `units`, `strength` and `rank`.

    Raises:
        AusteerError: unusable adapters, base, pairs or output, or a budget out of reach.
    """
    check_output_free(request.out)
    loaded = [SteeringAdapter.from_pretrained(name) for name in request.adapters]
    files = {file: read_pairs(file) for file in request.pairs}

    from austeer.adapters.composition.budget import combine_within_budget
    from austeer.adapters.pairs import render_pairs
    from austeer.exporter.products import load_base

    progress("load the model", 0, 1)
    base = load_base(request.base)
    progress("load the model", 1, 1)
    adapter, report = combine_within_budget(
        loaded,
        base.model,
        base.tokenizer,
        request.weights or None,
        kl_budget=request.kl_budget,
        on_overlap=request.on_overlap,
        names=request.adapters,
        read=checkpoint_reader(loaded[0].architecture, Checkpoint(base.folder)),
        pairs={file: render_pairs(pairs, base.tokenizer) for file, pairs in files.items()},
        seed=request.seed,
        batch_size=request.batch_size,
        progress=progress,
    )
    with publish_directory(request.out) as work:
        adapter.write_files(work)
        _close(work, request, loaded, adapter, base.folder, files)
    config = adapter.config
    facts = {"units": config.k, "strength": config.strength.value, "rank": config.rank}
    return report | facts | {"path": str(request.out)}


def _close(
    work: Path,
    request: CombineRequest,
    parts: Sequence[SteeringAdapter],
    adapter: SteeringAdapter,
    folder: Path,
    pairs: Mapping[str, Sequence[ContrastivePair]],
) -> None:
    seal = Seal(
        command=request.command,
        model=request.base.model,
        revision=request.base.revision,
        seed=request.seed,
        sums=request.sums,
    )
    options = {name: getattr(request, name) for name in _OPTIONS}
    facts = {
        "options": options | {"base": dataclasses.asdict(request.base)},
        "parts": {
            name: adapter_facts(part)
            for name, part in zip(request.adapters, parts, strict=True)
        },
        "data": {file: pairs_facts(found) for file, found in pairs.items()},
    }
    seal.close_job(work, folder, adapter, facts)


def part_rows(report: Mapping[str, Any]) -> list[Row]:
    """Rows under `PART_HEADER`: what went in."""
    factor = report["factor"]
    return [
        (
            part["name"],
            part["strength"],
            number(part["weight"] / factor),
            number(part["weight"]),
            number(kl),
        )
        for part, kl in zip(report["adapters"], report["kl_alone"] or (), strict=False)
    ]


def overlap_rows(report: Mapping[str, Any]) -> list[Row]:
    """Rows under `OVERLAP_HEADER`: units steered by several adapters, conflicts first."""
    rows: list[Row] = []
    ordered = sorted(report["overlaps"], key=lambda overlap: not overlap["conflict"])
    for overlap in ordered[:_MOST_ROWS]:
        given = overlap["gamma"]
        strongest = max(range(len(given)), key=lambda n: abs(given[n] or 0.0))
        kept = "the sum" if overlap["summable"] else report["adapters"][strongest]["name"]
        directions = "opposite" if overlap["conflict"] else "the same"
        gamma = ", ".join(number(value) for value in given)
        rows.append((overlap["site"], str(overlap["unit"]), gamma, directions, kept))
    return rows


def behaviour_rows(report: Mapping[str, Any]) -> list[Row]:
    """Rows under `BEHAVIOUR_HEADER`: one a file of pairs."""
    return [
        (
            file,
            number(figures["base_margin"]),
            number(figures["margin"]),
            ", ".join(number(value) for value in figures["margin_alone"]),
            f"{number(figures['base_accuracy'])} → {number(figures['accuracy'])}",
        )
        for file, figures in report["behaviours"].items()
    ]


def combine_sentences(report: Mapping[str, Any]) -> list[str]:
    """What came out, a sentence a fact."""
    found = [f"{report['units']} units, strength {report['strength']} → {report['path']}"]
    shared = len(report["overlaps"])
    if shared:
        found.append(
            f"{shared} units are steered by several adapters, {report['conflicts']} of them in "
            "opposite directions"
        )
    low, high = report["kl_ci95"]
    kl = f"KL {number(report['kl'])} [{number(low)}, {number(high)}] nats/token on fresh text"
    if report["factor"] < 1.0:
        kl += (
            f"; all weights × {number(report['factor'])}, for KL was "
            f"{number(report['kl_unscaled'])} at a budget of {number(report['kl_budget'])}"
        )
    return [*found, kl]
