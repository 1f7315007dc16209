"""The report as Markdown, and its figures as rows that the terminal prints as well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = tuple[str, ...]

FIGURE_HEADER = ("figure", "base", "steered", "95 % interval")
_FIGURES = (
    ("accuracy", "accuracy", "base_accuracy"),
    ("margin (nats)", "margin", "base_margin"),
    ("margin gained (nats)", "margin_gain", None),
    ("KL to base (nats/token)", "kl", None),
    ("perplexity ratio of continuations", "fluency", None),
    ("perplexity of neutral text", "neutral_perplexity", "base_neutral_perplexity"),
)
PRODUCT_HEADER = ("product", "path", "largest logit difference", "argmax agreement")
SITE_HEADER = ("site", "units", "γ", "|β|", "flipped", "strongest units")


def figure_rows(figures: Mapping[str, Any]) -> list[Row]:
    """Rows under `FIGURE_HEADER` for one split of a report."""
    rows: list[Row] = []
    for title, key, base in _FIGURES:
        if key in figures:
            low_high = figures.get(f"{key}_ci95")
            interval = " to ".join(number(bound) for bound in low_high) if low_high else ""
            before = number(figures.get(base)) if base else ""
            rows.append((title, before, number(figures[key]), interval))
    return rows


def product_rows(products: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows under `PRODUCT_HEADER`."""
    return [
        (
            product["route"],
            str(product["path"]),
            number(product.get("max_logit_difference")),
            number(product.get("argmax_agreement")),
        )
        for product in products
    ]


def steered_rows(sites: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows under `SITE_HEADER`."""
    return [
        (
            site["site"],
            str(site["units"]),
            f"{number(site['gamma_min'])} to {number(site['gamma_max'])}",
            f"{number(site['beta_min'])} to {number(site['beta_max'])}"
            if "beta_min" in site
            else "–",
            str(site["flipped"]),
            ", ".join(str(unit) for unit in site["strongest"]),
        )
        for site in sites
    ]


def outcome_sentence(report: Mapping[str, Any]) -> str:
    """What came out, in one sentence."""
    selected, test = report.get("selected") or {}, report.get("test") or {}
    if report["outcome"] == "no_effect":
        return "Nothing within the budget helps: there is no adapter and no product."
    return (
        f"{selected.get('k')} units of {selected.get('component')} steered with strength "
        f"{selected.get('strength')}: test accuracy {number(test.get('base_accuracy'))} → "
        f"{number(test.get('accuracy'))} at KL {number(test.get('kl'))} nats/token."
    )


def verify_sentences(row: Mapping[str, Any]) -> list[str]:
    """What `verify` found beyond the table, a sentence a fact."""
    count = row["files_checked"]
    if count is None:
        found = ["It has no SHA256SUMS: whether its files are as published was not checked."]
    else:
        found = [f"All {count} files are those that SHA256SUMS lists."]
    if not row.get("structure_only"):
        return found
    if row["random_error"] is None:
        return [*found, "Its tensors are the base's and the adapter's; no model was run."]
    how = "byte for byte"
    if row["converted"] is not None:
        how = f"its floats rounded once to {row['converted']}"
    # A LoRA or IA3 has none of the base's tensors.
    others = f"{row['identical']} other tensors are the base's, {how}; "
    return [
        *found,
        f"{len(row['touched'])} steered weights agree with the base's on random input, off by "
        f"{number(row['random_error'])} of what rounding explains; "
        f"{others if row['identical'] else ''}no model was run.",
    ]


def time_sentence(seconds: Mapping[str, float]) -> str:
    """How long each stage took; for the terminal, because no two runs agree on it."""
    return "seconds: " + ", ".join(
        f"{stage} {number(value)}" for stage, value in seconds.items()
    )


def report_markdown(report: Mapping[str, Any]) -> str:
    """`report.md` for the content of `report.json`."""
    parts = [f"# Steering report\n\n**{outcome_sentence(report)}**\n"]
    parts.append("".join(f"\n> {note}\n" for note in report.get("notes", [])))
    parts.extend(_section(title, body) for title, body in _sections(report) if body)
    return "\n".join(part for part in parts if part)


def ranking_saw_test(report: Mapping[str, Any]) -> bool:
    """Whether a given ranking may count test pairs: it was made from other pairs."""
    fit, data = report.get("fit") or {}, report.get("data") or {}
    used = fit.get("ranking_pairs")
    if used is None or fit.get("ranking_on_fit_split"):
        return False
    # All of the pairs are the test's as well, unless that has a file of its own.
    apart = (data.get("pairs") or {}).get("digest") if "test_pairs" in data else None
    return used not in (apart, (fit.get("digests") or {}).get("validation"))


def number(value: object) -> str:
    """Four significant digits; a dash for what is absent or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _sections(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    test, validation = report.get("test") or {}, report.get("validation") or {}
    data = report.get("data", {})
    unseen = "" if ranking_saw_test(report) else " (no choice has seen it)"
    return [
        (f"Test split{unseen}", table(FIGURE_HEADER, figure_rows(test))),
        ("Validation split", table(FIGURE_HEADER, figure_rows(validation))),
        ("Products", table(PRODUCT_HEADER, product_rows(report.get("products", [])))),
        ("Before and after (greedy)", _samples(report.get("samples", []))),
        ("What is steered", table(SITE_HEADER, steered_rows(report.get("steered", [])))),
        ("Selected", _facts(report.get("selected") or {})),
        ("Data", table(("file", "pairs", "digest"), [_data_row(row) for row in data.values()])),
        ("Run", _run(report)),
    ]


def table(header: Sequence[str], rows: Sequence[Row]) -> str:
    """A Markdown table, empty without rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}\n"


def _facts(values: Mapping[str, Any]) -> str:
    rows = [(key, _value(value)) for key, value in values.items()]
    return table(("setting", "value"), rows)


def _value(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value)
    return "–" if value is None else str(value)


def _data_row(row: Mapping[str, Any]) -> Row:
    return (str(row["path"]), str(row["count"]), f"`{row['digest']}`")


def _samples(samples: Iterable[Mapping[str, str]]) -> str:
    # Four spaces make a code block, in which no sampled text can turn into markup.
    blocks = []
    for sample in samples:
        lines = [f"{name:8}{sample[name]!r}".rstrip() for name in ("prompt", "base", "steered")]
        blocks.append("\n".join("    " + line for line in lines))
    return "\n\n".join(blocks)


def _run(report: Mapping[str, Any]) -> str:
    command = f"    {report['command']}\n\n" if report.get("command") else ""
    facts = {**report.get("options", {}), **report.get("versions", {})}
    return command + _facts(facts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
