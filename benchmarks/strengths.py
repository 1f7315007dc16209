"""Effect and side effect of every strength at one KL budget, on held-out pairs.

    python benchmarks/strengths.py                   # the demo model, both behaviours
    python benchmarks/strengths.py --shared ../shared  # and stories260K, happy against sad

Prints a Markdown table with 95 % bootstrap intervals, the date and the machine.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from austeer.adapters import (
    Component,
    NoEffectError,
    Strength,
    fit_strength,
    load_model,
    load_tokenizer,
    localize,
    read_pairs,
)
from austeer.adapters.measure import make_splits

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@dataclass(frozen=True, slots=True)
class Case:
    """A model, a behaviour, and the components to choose among."""

    name: str
    model: Path
    train: Path
    test: Path
    components: tuple[Component, ...]


def cases(shared: Path | None) -> Iterator[Case]:
    """The demo's behaviours, and the shared real model when its folder is given."""
    for behaviour in ("mood", "tense"):
        yield Case(
            f"demo model, {behaviour}",
            EXAMPLES / "demo_model",
            EXAMPLES / "pairs" / f"{behaviour}_train.jsonl",
            EXAMPLES / "pairs" / f"{behaviour}_test.jsonl",
            (Component.FFN,),
        )
    if shared is not None:
        yield Case(
            "stories260K, happy_vs_sad",
            shared / "models" / "stories260K",
            shared / "data" / "happy_vs_sad_train.jsonl",
            shared / "data" / "happy_vs_sad_test.jsonl",
            (Component.ATTENTION,),
        )


def row(case: Case, strength: Strength, budget: float, seed: int) -> str:
    """One line of the table."""
    model, tokenizer = load_model(str(case.model)), load_tokenizer(str(case.model))
    pairs, test = read_pairs(case.train), read_pairs(case.test)
    ranking = localize(
        model, tokenizer, make_splits(pairs, test, seed).fit, components=case.components
    )
    started, outcome = time.process_time(), "steered"
    try:
        _, report = fit_strength(
            model, tokenizer, pairs, ranking, strength=strength, kl_budget=budget,
            test_pairs=test, seed=seed,
        )  # fmt: skip
    except NoEffectError as error:
        report, outcome = error.report, "no effect"
    seconds, figures = time.process_time() - started, report["test"]
    cells = [
        case.name,
        f"`{strength}`",
        f"{budget:g}",
        f"{figures['base_accuracy']:.2f} → {interval(figures, 'accuracy')}",
        interval(figures, "margin_gain", "+.1f"),
        interval(figures, "kl", ".3f"),
        interval(figures, "fluency"),
        f"{seconds:.0f}",
        outcome,
    ]
    return "| " + " | ".join(cells) + " |"


def interval(figures: dict[str, Any], name: str, form: str = ".2f") -> str:
    """A figure with its 95 % interval."""
    low, high = figures[f"{name}_ci95"]
    return f"{figures[name]:{form}} [{low:{form}}, {high:{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="folder with models/ and data/")
    parser.add_argument("--kl-budget", type=float, help="one budget for every strength")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{datetime.date.today()}, {os.cpu_count()} × {platform.machine()} cores,", end=" ")
    print(f"{options.threads} thread(s), torch {torch.__version__}\n")
    print("| model, behaviour | strength | KL budget | test accuracy, base → steered ", end="")
    print("| margin gained (nats) | test KL | fluency | CPU s | outcome |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases(options.shared):
        for strength in Strength:
            for budget in [options.kl_budget] if options.kl_budget else [0.05, 0.2]:
                print(row(case, strength, budget, options.seed), flush=True)


if __name__ == "__main__":
    main()
