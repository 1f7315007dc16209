"""Single stages of the job as library calls: localization, and the files that stages share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from austeer.adapters._errors import FitError, OutputError
from austeer.adapters._files import check_output_free, final_path
from austeer.adapters._json import parse_json
from austeer.adapters._progress import Progress, silent
from austeer.adapters._rows import JSON_LINES, read_lines
from austeer.adapters.localization.distributed import launched
from austeer.adapters.localization.run import Ranking, localize
from austeer.adapters.localization.state_file import discard_state
from austeer.adapters.pairs import read_pairs, render_pairs
from austeer.adapters.sites import Component
from austeer.exporter.products import Base, load_base
from austeer.exporter.settings import BaseOptions, check_timeout

_TEXTS = (".txt", ".md", "")


def localize_job(
    base_options: BaseOptions,
    pairs_file: str,
    out: Path,
    *,
    components: Sequence[str] = (),
    batch_size: int | None = None,
    compat: str | None = None,
    restart: bool = False,
    timeout_minutes: float = 30.0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score every unit over all pairs of a file and write the ranking.

    Its state is in `<out>.state/` until then: after a stop the same call goes on from there.
    Processes that torchrun or accelerate started share the pairs; the first of them writes.

    Args:
        base_options: the model.
        pairs_file: pairs file or Hub dataset.
        out: new file.
        components: components to score; empty for all that the model has.
        batch_size: most pairs per forward pass, None for what memory allows.
        compat: "reference" to round as the paper's code does.
        restart: discard the state of an earlier run.
        timeout_minutes: how long to wait for another process before it counts as stopped.
        progress: called with (stage, done, total).

    Returns:
        `path`, `pairs`, and a row for each component; empty in all processes but the first.

    Raises:
        AusteerError: model, pairs or output are unusable; nothing is written.
        KeyboardInterrupt: an interrupt; the state is kept.
    """
    check_timeout(timeout_minutes)
    if out.is_dir():
        raise OutputError(f"{out}: expected a file name, found a directory; choose another")
    check_output_free(out, "a new file name")
    pairs = read_pairs(pairs_file)
    base = _loaded(base_options, progress)
    state = state_folder(out)
    with launched(timedelta(minutes=timeout_minutes)) as group, resumable(state):
        if restart and group.is_first:
            discard_state(state)
        ranking = localize(
            base.model,
            base.tokenizer,
            render_pairs(pairs, base.tokenizer),
            components=tuple(map(Component, components)) or None,
            batch_size=batch_size,
            compat=compat,
            state=state,
            progress=partial(progress, "localize"),
        )
    if not group.is_first:
        return {}
    ranking.save(out)
    discard_state(state)
    rows = [component_row(ranking, component) for component in ranking.components]
    return {"path": str(out), "pairs": ranking.count, "components": rows}


def _loaded(options: BaseOptions, progress: Progress) -> Base:
    progress("load the model", 0, 1)
    base = load_base(options)
    progress("load the model", 1, 1)
    return base


def state_folder(out: Path) -> Path:
    """Where the state of a localization is kept until `out` is written."""
    out = final_path(out)
    return out.with_name(f"{out.name}.state")


@contextmanager
def resumable(state: Path) -> Iterator[None]:
    """Say, where an interrupt ends the work, what it leaves."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"; the same command goes on with {state}" if state.is_dir() else ""
        raise KeyboardInterrupt(f"interrupted; nothing was published{kept}") from None


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
    """Neutral texts: one a line, or the `text` of each line of a file of JSON lines.

    Raises:
        FitError: of a kind that holds no lines of text, a line without text, or no text.
        PairsError: unreadable, or not UTF-8.
    """
    if path is None:
        return None
    kind = path.suffix.lower()
    if kind not in (*JSON_LINES, *_TEXTS):
        known = ", ".join((*JSON_LINES, *filter(None, _TEXTS)))
        raise FitError(f"{path}: neutral text: expected a file ending in {known}")
    texts = [
        _text(f"{path}:{number}", line.rstrip("\r\n"), kind in JSON_LINES)
        for number, line in read_lines(path)
        if line.strip()
    ]
    if not texts:
        raise FitError(f"{path}: has no text; give it one text a line")
    return texts


def _text(where: str, line: str, is_json: bool) -> str:
    if not is_json:
        return line
    try:
        text = parse_json(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise FitError(
            f"{where}: expected a JSON object with text, could not read one"
        ) from error
    if not isinstance(text, str) or not text.strip():
        raise FitError(f"{where}: expected text, found {text!r}")
    return text
