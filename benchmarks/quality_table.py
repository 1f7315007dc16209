"""Tables, verdicts and the figure of a quality comparison, from its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

OURS = ("paper", "oriented", "fitted", "adaptive")
UNTRAINED = ("ITI", "CAA", "SADI")
TRAINED = ("vector", "IA3", "LoRA")
METHODS = (*OURS, *UNTRAINED, *TRAINED)
_RIVALS = ("paper", *UNTRAINED)
_COLORS = {"fitted": "#1f5fbf", "adaptive": "#c8102e", "oriented": "#7aa6e0"}

Cell = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """Cells of one budget, of the cases that every method has.

    Attributes:
        budget: nats per token.
        cases: (case, seed) in order of appearance.
        methods: in the order of `METHODS`.
        cells: by (method, case).
        left_out: cases that some method lacks.
    """

    budget: float
    cases: list[tuple[str, int]]
    methods: list[str]
    cells: dict[tuple[str, tuple[str, int]], Cell]
    left_out: int

    def values(self, method: str, name: str) -> np.ndarray:
        """A test figure of a method, one value a case."""
        return np.array([self.cells[method, case]["test"][name] for case in self.cases])

    def error(self, method: str, name: str) -> float:
        """Standard error of the mean over these cases, from the cells' own intervals."""
        ends = self.values(method, f"{name}_ci95")
        widths = (ends[:, 1] - ends[:, 0]) / 3.92
        return float(np.sqrt((widths**2).sum()) / len(widths))

    def interval(self, method: str, name: str, form: str, top: float = np.inf) -> str:
        """Mean over cases, with the interval that pairs and texts give it."""
        mean, half = self.values(method, name).mean(), 1.96 * self.error(method, name)
        return f"{mean:{form}} [{mean - half:{form}}, {min(mean + half, top):{form}}]"


def groups(cells: Sequence[Cell]) -> Iterator[Group]:
    """The cells by budget."""
    for budget in sorted({cell["budget"] for cell in cells}):
        chosen = [cell for cell in cells if cell["budget"] == budget]
        found = {(cell["method"], (cell["case"], cell["seed"])): cell for cell in chosen}
        methods = [method for method in METHODS if any(key[0] == method for key in found)]
        cases = list(dict.fromkeys(case for _, case in found))
        full = [case for case in cases if all((method, case) in found for method in methods)]
        yield Group(budget, full, methods, found, len(cases) - len(full))


def report(cells: Sequence[Cell]) -> str:
    """Everything as Markdown: averages, verdicts, cases."""
    if len(steps := {cell["steps"] for cell in cells}) > 1:
        raise SystemExit(f"steps: expected one number in a table, found {sorted(steps)}")
    lines = [_origin(cells), ""]
    parts = [group for group in groups(cells) if group.cases]
    for group in parts:
        lines += [*_average(group), ""]
    lines += ["### Verdicts", "", *(line for g in parts for line in verdicts(g)), ""]
    for case in dict.fromkeys(cell["case"] for cell in cells):
        lines += [*_case(case, [cell for cell in cells if cell["case"] == case]), ""]
    return "\n".join(lines)


def _origin(cells: Sequence[Cell]) -> str:
    facts = {
        name: sorted({str(cell["environment"][name]) for cell in cells})
        for name in ("revision", "date", "machine", "torch", "transformers")
    } | {name: sorted({str(cell[name]) for cell in cells}) for name in ("seed", "steps")}
    return "; ".join(f"{name} {', '.join(values)}" for name, values in facts.items())


def _seconds(cell: Cell) -> float:
    """CPU time of a fit; of trained baselines with the choice of place and rate."""
    chosen = cell["prepare_seconds"] if cell["method"] in TRAINED else 0.0
    return float(cell["fit_seconds"] + chosen)


def _average(group: Group) -> Iterator[str]:
    left = f"; {group.left_out} incomplete ones left out" if group.left_out else ""
    yield f"### Budget {group.budget:g} nats/token, mean over {len(group.cases)} cases{left}"
    yield ""
    yield (
        "| method | margin gained (nats) | accuracy | KL on fresh text (worst) "
        "| fluency (worst) | repeated 4-grams | distinct-2 | activations touched "
        "| parameters | CPU s | cells without effect or over budget |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    base = group.interval(group.methods[0], "base_accuracy", ".3f", 1.0)
    own = _mean_of(group, group.methods[0], lambda c: c["test"].get("base_repetition"))
    yield f"| base | 0 | {base} | 0 | 1 | {own:.3f} | 1 | 0 | 0 | | |"
    yield from (_average_row(group, method) for method in group.methods)


def _average_row(group: Group, method: str) -> str:
    kl, fluency = group.values(method, "kl"), group.values(method, "fluency")
    cells = [group.cells[method, case] for case in group.cases]
    marked = sum(cell["outcome"] != "steered" for cell in cells)
    seconds = np.mean([_seconds(cell) for cell in cells])
    row = [
        f"`{method}`",
        group.interval(method, "margin_gain", "+.2f"),
        group.interval(method, "accuracy", ".3f", 1.0),
        f"{group.interval(method, 'kl', '.3f')} ({kl.max():.3f})",
        f"{group.interval(method, 'fluency', '.2f')} ({fluency.max():.2f})",
        f"{_mean_of(group, method, lambda c: c['test'].get('repetition')):.3f}",
        f"{_mean_of(group, method, lambda c: c['test'].get('distinct2')):.2f}",
        f"{np.mean([cell['touched'] for cell in cells]):.0f}",
        f"{np.mean([cell['parameters'] for cell in cells]):.0f}",
        f"{seconds:.0f}",
        str(marked or ""),
    ]
    return "| " + " | ".join(row) + " |"


def _mean_of(group: Group, method: str, read: Callable[[Cell], float | None]) -> float:
    """Mean over the cases that have the figure (a fit without effect leaves no text)."""
    known = [read(group.cells[method, case]) for case in group.cases]
    values = [value for value in known if value is not None]
    return float(np.mean(values)) if values else float("nan")


def verdicts(group: Group) -> Iterator[str]:
    """What the comparison has to show, and whether it does."""
    has = set(group.methods)
    if "fitted" in has:
        yield from (_larger(group, "fitted", rival) for rival in _RIVALS if rival in has)
    if "adaptive" in has:
        rivals = [rival for rival in _RIVALS if rival in has]
        if rivals:
            best = max(rivals, key=lambda rival: group.values(rival, "margin_gain").mean())
            yield _larger(group, "adaptive", best, 3.0)
        yield from (_larger(group, "adaptive", rival) for rival in TRAINED if rival in has)
    for method in ("fitted", "adaptive"):
        if method in has:
            yield _below(group, method, "kl", 1.1 * group.budget, "KL on fresh text")
            yield _below(group, method, "fluency", 1.3, "fluency")


def _larger(group: Group, ours: str, rival: str, factor: float = 1.0) -> str:
    """Whether the mean gain of `ours` is `factor` times that of `rival`, or more."""
    mine, theirs = (group.values(method, "margin_gain") for method in (ours, rival))
    difference = mine.mean() - factor * theirs.mean()
    half = 1.96 * np.hypot(
        group.error(ours, "margin_gain"), factor * group.error(rival, "margin_gain")
    )
    verdict = "holds" if difference > 0 else "FAILS"
    times = f"{factor:g} × " if factor != 1.0 else ""
    sign = "≥" if factor != 1.0 else ">"
    return (
        f"- {group.budget:g}: `{ours}` {mine.mean():+.2f} {sign} {times}`{rival}` "
        f"{theirs.mean():+.2f}: **{verdict}**, by {difference:+.2f} "
        f"[{difference - half:+.2f}, {difference + half:+.2f}], "
        f"in {(mine > factor * theirs).sum()} of {len(mine)} cases"
    )


def _below(group: Group, method: str, name: str, limit: float, title: str) -> str:
    values = group.values(method, name)
    verdict = "holds" if values.mean() <= limit else "FAILS"
    worst = int(values.argmax())
    return (
        f"- {group.budget:g}: `{method}` {title} {values.mean():.3f} ≤ {limit:.3g}: "
        f"**{verdict}**; in {(values <= limit).sum()} of {len(values)} cases, "
        f"worst {values[worst]:.3f} ({group.cases[worst][0]})"
    )


def _case(case: str, cells: Sequence[Cell]) -> Iterator[str]:
    first = cells[0]["test"]
    dropped = cells[0]["repeats_dropped"]
    repeats = f", {dropped} repeated rows dropped" if dropped else ""
    yield f"### {case}"
    yield ""
    yield (
        f"{first['pairs']} test pairs{repeats}; base: margin {first['base_margin']:+.2f}, "
        f"accuracy {first['base_accuracy']:.2f}."
    )
    yield ""
    yield (
        "| budget | method | setting | margin gained | accuracy | KL | fluency "
        "| repeated 4-grams | distinct-2 | touched | parameters | outcome |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    yield from map(_case_row, sorted(cells, key=_position))


def _case_row(cell: Cell) -> str:
    test = cell["test"]
    row = [
        f"{cell['budget']:g}",
        f"`{cell['method']}`",
        _setting(cell["setting"]),
        _interval(test, "margin_gain", "+.2f"),
        _interval(test, "accuracy", ".2f"),
        _interval(test, "kl", ".3f"),
        _interval(test, "fluency", ".2f"),
        _interval(test, "repetition", ".3f"),
        f"{test['distinct2']:.2f}" if "distinct2" in test else "–",
        str(cell["touched"]),
        str(cell["parameters"]),
        "" if cell["outcome"] == "steered" else cell["outcome"].replace("_", " "),
    ]
    return "| " + " | ".join(row) + " |"


def _position(cell: Cell) -> tuple[float, int, int]:
    return cell["budget"], METHODS.index(cell["method"]), cell["seed"]


def _setting(setting: dict[str, Any]) -> str:
    known = {
        "name": "",
        "component": "",
        "k": "k=",
        "alpha": "α=",
        "strength": "α=",
        "learning_rate": "rate ",
    }
    parts = [
        f"{label}{value:.3g}" if isinstance(value, float) else f"{label}{value}"
        for name, label in known.items()
        if (value := setting.get(name)) is not None
        and not (name == "strength" and isinstance(value, str))
    ]
    return ", ".join(parts)


def _interval(test: dict[str, Any], name: str, form: str) -> str:
    if name not in test:
        return "–"
    low, high = test[f"{name}_ci95"]
    return f"{test[name]:{form}} [{low:{form}}, {high:{form}}]"


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Margin gained against KL on fresh text, means over cases, budgets joined by lines."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "austeer"
    from matplotlib import pyplot

    parts = [group for group in groups(cells) if group.cases]
    figure, axes = pyplot.subplots(figsize=(7.5, 5.0), layout="constrained")
    markers = dict(zip(METHODS, "vDosPX^hd*", strict=True))
    for method in METHODS:
        having = [group for group in parts if method in group.methods]
        if not having:
            continue
        axes.plot(
            [group.values(method, "kl").mean() for group in having],
            [group.values(method, "margin_gain").mean() for group in having],
            marker=markers[method],
            color=_COLORS.get(method),
            linestyle="-" if method in ("fitted", "adaptive") else "--",
            linewidth=2.2 if method in ("fitted", "adaptive") else 1.1,
            label=method,
        )
    axes.set_xlabel("side effect: KL on fresh neutral text (nats per token)")
    axes.set_ylabel("effect: test margin gained (nats)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
