"""Effect against side effect of every strength and of published baselines, at equal budgets.

    python benchmarks/quality.py --shared ../shared --out quality.jsonl
    python benchmarks/quality.py --table quality.jsonl --figure quality.svg

The first line writes one JSON line per model, behaviour, budget and method, and skips what is
there already: a run may be resumed, or split with --cases, --budgets and --methods. The second
prints Markdown tables, the verdicts, and draws the figure.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BUDGETS = (0.05, 0.1, 0.2)


def run(options: argparse.Namespace) -> None:
    """Measure every cell that `options.out` does not hold yet."""
    import torch
    from quality_cases import all_cases
    from quality_table import METHODS

    from austeer.adapters.fitting.candidates import FitOptions

    torch.set_num_threads(options.threads)
    steps = options.steps or FitOptions().steps
    methods = _chosen(METHODS, options.methods)
    origin = environment()
    done = {_key(cell) for cell in read_cells(options.out)}
    for case in all_cases(options.shared):
        if options.cases and not any(part in case.name for part in options.cases):
            continue
        keys = [
            (case.name, budget, method, options.seed, steps)
            for budget in options.budgets
            for method in methods
        ]
        if missing := [key for key in keys if key not in done]:
            _run_case(case, missing, options, origin)


def _run_case(
    case: Any,
    keys: Sequence[tuple[Any, ...]],
    options: argparse.Namespace,
    origin: dict[str, str],
) -> None:
    from quality_cases import Bench
    from quality_methods import Comparison

    bench = Bench(case, options.seed)
    comparison = Comparison(bench, keys[0][-1])
    print(f"{case.name}: {len(bench.train)} + {len(bench.test_pairs)} pairs", end="")
    print(f", {bench.dropped} repeats dropped" if bench.dropped else "", flush=True)
    for name, budget, method, seed, steps in keys:
        cell = {"case": name, "budget": budget, "method": method, "seed": seed, "steps": steps}
        cell |= comparison.cell(method, budget)
        cell |= {"repeats_dropped": bench.dropped, "environment": origin}
        with options.out.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        test = cell["test"]
        print(
            f"  {budget:g} {method:9s} gain {test['margin_gain']:+6.2f}  KL {test['kl']:.3f}"
            f"  fluency {test['fluency']:.2f}  {cell['prepare_seconds']:.0f} +"
            f" {cell['fit_seconds']:.0f} s  {cell['outcome']}",
            flush=True,
        )


def environment() -> dict[str, str]:
    """Date, machine, versions and revision behind a cell."""
    import platform
    import subprocess

    import torch
    import transformers

    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        described = ""
    return {
        "revision": described.strip() or "unknown",
        "date": str(datetime.date.today()),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Cells of a results file, the latest of each key; none where there is no file."""
    if not path.exists():
        return []
    cells = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({_key(cell): cell for cell in cells}.values())


def _key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("case", "budget", "method", "seed", "steps"))


def _chosen(known: Sequence[str], names: Sequence[str] | None) -> list[str]:
    wanted = {name.lower() for name in names or known}
    if unknown := wanted - {name.lower() for name in known}:
        raise SystemExit(f"--methods: {', '.join(sorted(unknown))} not in {', '.join(known)}")
    return [name for name in known if name.lower() in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="folder with models/ and data/")
    parser.add_argument("--out", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--cases", nargs="+", help="parts of case names")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of everything trained; default: of a fit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, help="print the tables of this results file")
    parser.add_argument("--figure", type=Path, help="with --table: draw it as SVG")
    options = parser.parse_args()
    if options.table is None:
        run(options)
        return
    from quality_table import draw, report

    cells = read_cells(options.table)
    if not cells:
        raise SystemExit(f"{options.table}: no cells; run without --table first")
    print(report(cells))
    if options.figure:
        draw(cells, options.figure)


if __name__ == "__main__":
    main()
