"""`report.json` and `report.md`: every figure of a run, and what it honestly amounts to."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from austeer.adapters._files import write_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.config import library_versions
from austeer.exporter.describe import site_rows
from austeer.exporter.markdown import ranking_saw_test, report_markdown

REPORT_JSON = "report.json"
REPORT_MARKDOWN = "report.md"
_FEW_PROMPTS = 5
_NOTABLE_FLUENCY = 1.3  # where no limit was set


def build_report(
    fit: Mapping[str, Any],
    *,
    options: Mapping[str, Any],
    data: Mapping[str, Any],
    seconds: Mapping[str, float],
    adapter: SteeringAdapter | None = None,
    products: Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Mapping[str, str]] = (),
    command: str = "",
) -> dict[str, Any]:
    """Put a run's report together.

    Args:
        fit: the dictionary of `fit_strength`: `test`, `validation`, `selected`, …
        options: what was asked for.
        data: path, count and digest of each pairs file.
        seconds: time spent in each stage.
        adapter: the adapter, None when nothing helped.
        products: one row each, with `route` and `path`.
        samples: texts with `prompt`, `base` and `steered`.
        command: the command line.

    Returns:
        Plain JSON values; numbers that are not finite become null.
    """
    report: dict[str, Any] = {
        **fit,
        "outcome": "steered" if adapter is not None else "no_effect",
        "command": command,
        "options": options,
        "seed": options.get("seed"),
        "data": data,
        "steered": site_rows(adapter) if adapter is not None else [],
        "products": list(products),
        "samples": list(samples),
        "timings": {**seconds, "total": round(sum(seconds.values()), 2)},
        "versions": library_versions() | {"python": platform.python_version()},
    }
    report["notes"] = notes(report)
    plain: dict[str, Any] = as_json(report)
    return plain


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.json` and `report.md` into an existing directory, without `timings`.

    What two runs with equal seeds say differently is for the terminal.
    """
    lasting = without_times(report)
    write_json(folder / REPORT_JSON, lasting)
    (folder / REPORT_MARKDOWN).write_text(report_markdown(lasting), encoding="utf-8")


def without_times(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without how long anything took."""
    kept = {key: value for key, value in report.items() if key != "timings"}
    rows = [
        {k: v for k, v in row.items() if k != "seconds"} for row in report.get("products", ())
    ]
    fit = report.get("fit")
    if isinstance(fit, Mapping):
        kept["fit"] = {key: value for key, value in fit.items() if key != "seconds"}
    return kept | {"products": rows}


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting the figures, one sentence each."""
    test, budget = report.get("test") or {}, report["options"].get("kl_budget")
    found = []
    if report["outcome"] == "no_effect":
        reason = str(report.get("reason") or "no candidate within the budget helps")
        found.append(f"No adapter and no product was written: {reason}.")
    elif _below(test.get("margin"), test.get("base_margin")):
        found.append("The validation split improved, the test margin did not: do not use this.")
    elif _not_above(test.get("margin_gain_ci95"), 0.0):
        found.append("The interval of the test margin's gain reaches 0: it may be chance.")
    if _above(_FEW_PROMPTS, test.get("prompts")):
        found.append(
            f"The test pairs have {test['prompts']} different prompts: the intervals say "
            "little of others."
        )
    if _above(test.get("base_accuracy"), test.get("accuracy")):
        found.append("Test accuracy fell.")
    if _above(test.get("kl"), budget):
        found.append(
            f"KL on fresh text is {test['kl']:.3g} nats/token, above the budget of {budget:g}."
        )
    if _above(test.get("fluency"), report["options"].get("fluency_limit") or _NOTABLE_FLUENCY):
        found.append(
            f"Steered continuations are {test['fluency']:.2f} times as surprising to the base "
            "model as its own: read the sample texts."
        )
    for name, figures in (("test", test), ("validation", report.get("validation") or {})):
        if figures.get("cut"):
            found.append(
                f"{figures['cut']} of {figures['pairs']} {name} pairs are longer than the "
                "tokens that are used: they were cut, and measured on what is left."
            )
    if ranking_saw_test(report):
        found.append(
            "The ranking was made from other pairs than the fit's and may have seen the test "
            "pairs: the test figures may flatter; leave --ranking out to localize anew."
        )
    flips = (report.get("selected") or {}).get("units_that_can_flip_sign")
    if flips:
        found.append(f"{flips} units can flip an activation's sign; --keep-sign forbids it.")
    return found


def as_json(value: Any) -> Any:
    """`value` as plain JSON types: numpy scalars unpacked, NaN and infinities as null.

    What is no text in UTF-8, such as the name of a file, is escaped.
    """
    if isinstance(value, Mapping):
        return {as_json(str(key)): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, str) or value is None or isinstance(value, (bool, int)):
        # Enumerations of text are text, but must not print as members.
        return _text(value) if isinstance(value, str) else value
    if hasattr(value, "tolist"):
        return as_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _text(str(value))


def _text(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _above(value: Any, limit: Any) -> bool:
    return _finite(value) and _finite(limit) and value > limit


def _below(value: Any, limit: Any) -> bool:
    """Not better: also when a figure is not finite."""
    return value is not None and not _above(value, limit)


def _not_above(interval: Any, limit: float) -> bool:
    return bool(interval) and not _above(interval[0], limit)
