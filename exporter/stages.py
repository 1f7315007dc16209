"""Single stages of the job as library calls: localization, and the files that stages share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from austeer.adapters._errors import FitError, OutputError
from austeer.adapters._files import check_output_free
from austeer.adapters.localization import Ranking, localize
from austeer.adapters.pairs import read_pairs, render_pairs
from austeer.adapters.sites import Component
from austeer.exporter.products import Progress, load_base, silent
from austeer.exporter.settings import BaseOptions


def localize_job(
    base_options: BaseOptions,
    pairs_file: str,
    out: Path,
    *,
    components: Sequence[str] = (),
    batch_size: int = 16,
    compat: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score every unit over all pairs of a file and write the ranking.

    Args:
        base_options: the model.
        pairs_file: pairs file or Hub dataset.
        out: new file.
        components: components to score; empty for all four.
        batch_size: pairs per forward pass.
        compat: "reference" to round as the paper's code does.
        progress: called with (stage, done, total).

    Returns:
        A summary: `path`, `pairs`, and a row for each component.

    Raises:
        AusteerError: model, pairs or output are unusable; nothing is written.
    """
    if out.is_dir():
        raise OutputError(f"{out}: expected a file name, found a directory; choose another")
    check_output_free(out)
    pairs = read_pairs(pairs_file)
    progress("load the model", 0, 1)
    base = load_base(base_options)
    progress("load the model", 1, 1)
    ranking = localize(
        base.model,
        base.tokenizer,
        render_pairs(pairs, base.tokenizer),
        components=tuple(Component(name) for name in components) or tuple(Component),
        batch_size=batch_size,
        compat=compat,
        progress=partial(progress, "localize"),
    )
    ranking.save(out)
    return {
        "path": str(out),
        "pairs": ranking.count,
        "components": [component_row(ranking, component) for component in ranking.components],
    }


def component_row(ranking: Ranking, component: Component) -> dict[str, Any]:
    """What a ranking says about one component, in a few numbers."""
    beta = ranking.beta(component)
    best = ranking.top(component, 1)
    return {
        "component": component.value,
        "layers": beta.shape[0],
        "width": beta.shape[1],
        "certain": int((np.abs(beta) == 1.0).sum()),
        "near_ties": int(np.sum(ranking.near_ties(component))),
        "best_unit": f"layers.{best.layer[0]}.{component.value}[{best.unit[0]}]",
        "best_beta": round(float(best.beta[0]), 4),
    }


def load_ranking(path: Path | None, components: Sequence[Component]) -> Ranking | None:
    """A saved ranking that must cover `components`, None without a path.

    Raises:
        FitError: malformed, or it lacks a component.
    """
    if path is None:
        return None
    ranking = Ranking.load(path)
    missing = [component for component in components if component not in ranking.components]
    if missing:
        raise FitError(
            f"{path}: has no ranking of component {missing[0]} "
            f"(it has {', '.join(ranking.components)}); "
            "name what it has with --component, or localize again"
        )
    return ranking


def read_texts(path: Path | None) -> list[str] | None:
    """Neutral texts: one a line, or the `text` of each line of a .jsonl file.

    Raises:
        FitError: unreadable, a line without text, or no text at all.
    """
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise FitError(f"{path}: cannot read the neutral text ({reason})") from error
    texts = [
        _text(f"{path}:{number}", line, path.suffix == ".jsonl")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not texts:
        raise FitError(f"{path}: has no text; give it one text a line")
    return texts


def _text(where: str, line: str, is_json: bool) -> str:
    if not is_json:
        return line
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise FitError(
            f"{where}: expected a JSON object with text, could not read one"
        ) from error
    if not isinstance(text, str) or not text.strip():
        raise FitError(f"{where}: expected text, found {text!r}")
    return text
