"""One ranking, bit for bit: any layout, stopped and resumed, one process or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import BEST_LAYOUT, MIXTURES, MODEL_TYPES

from austeer.adapters import (
    ContrastivePair,
    Ranking,
    load_model,
    load_tokenizer,
    localize,
    read_pairs,
)
from austeer.adapters.localization.distributed import launched

LAYOUTS = ("plain", "tree", "packed")
BEST = dict.fromkeys(MODEL_TYPES, "packed") | BEST_LAYOUT
Localized = Callable[..., Ranking]


def pairs() -> list[ContrastivePair]:
    ends = ((" happy", " sad"), (" happy and then sad", " rain !"), (" so so", " so sad"))
    places = ("park", "home", "the sun", "rain and then home")
    return [
        ContrastivePair(f"one day {name} went to {place} and", good, bad)
        for name in ("Tom", "Mia") for place in places for good, bad in ends
    ]  # fmt: skip


def all_bits(ranking: Ranking) -> dict[str, np.ndarray[Any, Any]]:
    """Every counter and every float sum."""
    return {
        f"{component}.{name}": getattr(ranking.counts(component), name)
        for component in ranking.components
        for name in ranking.counts(component).__slots__
    }


def assert_same_bits(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].tobytes() == array.tobytes(), name


def assert_same_scores(run: Localized, best: str = "packed") -> Ranking:
    """β of each layout up to the best that a model can take equals that of plain rows."""
    taken = LAYOUTS[: LAYOUTS.index(best) + 1]
    plain, *others = (run(layout=layout) for layout in taken)
    for other in others:
        for component in plain.components:
            np.testing.assert_array_equal(other.beta(component), plain.beta(component))
    assert all(np.ptp(plain.beta(name)) > 0 for name in plain.components)
    return plain


def stopped_and_resumed(run: Localized, folder: Path, batches: int) -> Ranking:
    """Stop after so many batches, go on with what is on disk; again and again to the end."""

    class StopHereError(Exception):
        pass

    for _ in range(30):
        left = batches

        def stop(done: int, total: int) -> None:
            nonlocal left
            left -= 1
            if not left and done < total:
                raise StopHereError

        try:
            return run(state=folder, state_every=3600.0, progress=stop)
        except StopHereError:
            assert len(list(folder.iterdir())) == 1
    raise AssertionError("does not come to an end")


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Any]) -> dict[str, Any]:
    return {model_type: tiny_model(model_type) for model_type in BEST}


@pytest.mark.parametrize("model_type", BEST)
def test_layouts_and_resumed_runs(
    tmp_path: Path, models: dict[str, Any], tiny_tokenizer: Any, model_type: str
) -> None:
    def run(**options: Any) -> Ranking:
        budget = {"token_budget": 60} | options
        return localize(models[model_type], tiny_tokenizer, pairs(), **budget)

    plain = assert_same_scores(run, BEST[model_type])
    assert len(plain.components) == (3 if model_type in MIXTURES else 4)
    whole = run()
    resumed = stopped_and_resumed(run, tmp_path / "state", batches=2)
    assert_same_bits(all_bits(resumed), all_bits(whole))
    np.testing.assert_array_equal(resumed.beta("layer"), plain.beta("layer"))


def test_two_processes(
    models: dict[str, Any], tiny_tokenizer: Any, launch: Callable[..., Any]
) -> None:
    def work(rank: int) -> dict[str, Any]:
        with launched() as group:
            assert (group.rank, group.size) == (rank, 2)
            return every_model(models, tiny_tokenizer)

    wanted = every_model(models, tiny_tokenizer)
    for child in launch(work):
        assert child.end() == 0
        assert_same_bits(child.result(), wanted)


def every_model(models: dict[str, Any], tokenizer: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {
        f"{model_type}.{name}": array
        for model_type, model in models.items()
        for name, array in all_bits(
            localize(model, tokenizer, pairs(), token_budget=60)
        ).items()
    }


@pytest.mark.shared
def test_real_model(tmp_path: Path, shared: Path, launch: Callable[..., Any]) -> None:
    folder = shared / "models" / "stories260K"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    found: Sequence[ContrastivePair] = read_pairs(shared / "data" / "happy_vs_sad_train.jsonl")

    def run(**options: Any) -> Ranking:
        return localize(model, tokenizer, found, **{"token_budget": 400, **options})

    plain, whole = assert_same_scores(run), run()
    resumed = stopped_and_resumed(run, tmp_path / "state", batches=5)
    assert_same_bits(all_bits(resumed), all_bits(whole))

    def work(rank: int) -> dict[str, Any]:
        with launched():
            return all_bits(run(state=tmp_path / "state2", state_every=0.0))

    for child in launch(work):
        assert child.end() == 0
        assert_same_bits(child.result(), all_bits(whole))
    for component in plain.components:
        np.testing.assert_array_equal(whole.beta(component), plain.beta(component))
