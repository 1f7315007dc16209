"""The report: keys, JSON that survives any number, and honest sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from austeer.adapters import SteeringAdapter, Strength
from austeer.exporter.markdown import figure_rows, number, report_markdown, table
from austeer.exporter.report import (
    as_json,
    build_report,
    notes,
    without_times,
    write_report,
)


def figures(**changes: Any) -> dict[str, Any]:
    values = {
        "accuracy": 0.9,
        "base_accuracy": 0.4,
        "margin": 3.0,
        "base_margin": 0.5,
        "margin_gain": 2.5,
        "kl": 0.08,
        "fluency": 1.2,
    }
    intervals = {f"{name}_ci95": [value - 0.1, value + 0.1] for name, value in values.items()}
    return values | intervals | changes


def fit_part(**changes: Any) -> dict[str, Any]:
    selected = {"component": "attention", "k": 8, "alpha": None, "strength": Strength.FITTED}
    test = figures(**changes)
    return {
        "selected": selected,
        "validation": figures(),
        "test": test,
        "fit": {"ranking_on_fit_split": True},
        "reason": None,
    }


@pytest.fixture
def adapter(tiny_model: Callable[..., Any]) -> SteeringAdapter:
    return SteeringAdapter.from_units(
        tiny_model("llama"), "attention", [0, 0, 1], [1, 2, 9], [-1.5, 0.5, 2.0]
    )


def report(adapter: SteeringAdapter | None, fit: dict[str, Any]) -> dict[str, Any]:
    return build_report(
        fit,
        options={"seed": 3, "kl_budget": 0.1, "out": Path("out")},
        data={"pairs": {"path": "p.jsonl", "count": 12, "digest": "sha256:00"}},
        seconds={"fit": 1.5, "load": 0.25},
        adapter=adapter,
        products=[
            {
                "route": "onnx",
                "path": "onnx",
                "max_logit_difference": 1e-6,
                "argmax_agreement": 1.0,
            }
        ],
        samples=[{"prompt": "Tom was", "base": " sad | *", "steered": " happy\n# no heading"}],
        command="austeer-export run m p",
    )


def test_keys_are_those_of_the_design(adapter: SteeringAdapter) -> None:
    values = report(adapter, fit_part())
    for split in ("test", "validation"):
        for name in ("accuracy", "base_accuracy", "margin", "base_margin", "kl", "fluency"):
            assert isinstance(values[split][name], float)
            assert len(values[split][f"{name}_ci95"]) == 2
    assert set(values["selected"]) >= {"component", "k", "alpha", "strength"}
    assert set(values["products"][0]) >= {
        "route", "path", "max_logit_difference", "argmax_agreement",
    }  # fmt: skip
    assert values["seed"] == 3
    assert values["timings"] == {"fit": 1.5, "load": 0.25, "total": 1.75}
    assert values["data"]["pairs"]["count"] == 12
    assert {"torch", "transformers", "python"} <= set(values["versions"])
    assert values["outcome"] == "steered"


def test_files_hold_the_report(tmp_path: Path, adapter: SteeringAdapter) -> None:
    values = report(adapter, fit_part())
    values["products"][0]["seconds"] = values["fit"]["seconds"] = 2.5
    write_report(values, tmp_path)
    lasting = without_times(values)
    assert json.loads((tmp_path / "report.json").read_text()) == lasting
    assert (tmp_path / "report.md").read_text() == report_markdown(lasting)
    assert "timings" in values and "timings" not in lasting
    assert "seconds" not in (tmp_path / "report.json").read_text()
    assert "seconds" not in (tmp_path / "report.md").read_text()


def test_numbers_that_are_not_finite_become_null(
    tmp_path: Path, adapter: SteeringAdapter
) -> None:
    values = report(adapter, fit_part(margin=-math.inf, kl=math.nan, margin_ci95=[math.nan, 1]))
    write_report(values, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "report.json").read_text()
    read = json.loads(text, parse_constant=refuse)
    assert read["test"]["margin"] is None
    assert read["test"]["margin_ci95"] == [None, 1]
    assert "nan" not in (tmp_path / "report.md").read_text()
    assert any("margin did not" in note for note in values["notes"])


def test_plain_json_types() -> None:
    found = as_json(
        {
            1: np.float32(0.5),
            "a": np.array([1, 2]),
            "s": Strength.PAPER,
            "p": Path("x"),
            "t": (True,),
        }
    )
    assert found == {"1": 0.5, "a": [1, 2], "s": "paper", "p": "x", "t": [True]}
    assert type(found["s"]) is str
    assert type(found["a"][0]) is int
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl": 0.12}, "KL on fresh text is 0.12 nats/token, above the budget of 0.1"),
        ({"margin": 0.4}, "the test margin did not"),
        ({"margin_gain_ci95": [-0.1, 0.5]}, "reaches 0"),
        ({"accuracy": 0.3}, "Test accuracy fell"),
        ({"fluency": 1.8}, "1.80 times as surprising"),
    ],
)
def test_a_weak_result_is_said(
    adapter: SteeringAdapter, changes: dict[str, Any], words: str
) -> None:
    values = report(adapter, fit_part(**changes))
    assert any(words in note for note in values["notes"])
    assert words in report_markdown(values)


UNSEEN = "no choice has seen it"
GIVEN = {
    "ranking_on_fit_split": False,
    "digests": {"fit": "sha256:1", "validation": "sha256:2", "test": "sha256:3"},
}


@pytest.mark.parametrize(
    ("used", "apart", "saw"),
    [
        ("sha256:1", False, False),
        ("sha256:2", False, False),
        ("sha256:3", False, True),  # the test split itself
        ("sha256:00", False, True),  # all pairs, the test split's among them
        ("sha256:00", True, False),  # all pairs, where the test has a file of its own
        ("sha256:3", True, True),
        ("sha256:ff", True, True),  # any others: they may be both
    ],
)
def test_a_ranking_that_may_know_the_test_is_said(
    adapter: SteeringAdapter, used: str, apart: bool, saw: bool
) -> None:
    fit = GIVEN | {"ranking_pairs": used, "ranking_on_fit_split": used == "sha256:1"}
    values = report(adapter, fit_part() | {"fit": fit})
    if apart:
        values["data"]["test_pairs"] = {"path": "t.jsonl", "count": 9, "digest": "sha256:3"}
        values["notes"] = notes(values)
    assert any("may have seen the test" in note for note in values["notes"]) is saw
    assert (UNSEEN in report_markdown(values)) is not saw


def test_pairs_that_were_cut_are_said(adapter: SteeringAdapter) -> None:
    values = report(adapter, fit_part(cut=7, pairs=20))
    assert any("7 of 20 test pairs are longer" in note for note in values["notes"])


def test_a_good_result_has_no_notes(adapter: SteeringAdapter) -> None:
    assert report(adapter, fit_part())["notes"] == []


def test_no_effect_is_the_first_thing_said() -> None:
    values = report(None, fit_part() | {"reason": "too timid", "outcome": "no_effect"})
    assert values["outcome"] == "no_effect"
    assert values["steered"] == []
    assert notes(values)[0] == "No adapter and no product was written: too timid."
    text = report_markdown(values)
    assert text.index("Nothing within the budget helps") < text.index("## ")


def test_markdown_shows_what_is_steered(adapter: SteeringAdapter) -> None:
    text = report_markdown(report(adapter, fit_part()))
    assert "| layers.0.attention | 2 | -1.5 to 0.5 | – | 1 | 1, 2 |" in text
    assert "| layers.1.attention | 1 | 2 to 2 | – | 0 | 9 |" in text
    assert "| accuracy | 0.4 | 0.9 | 0.8 to 1 |" in text


def test_sampled_text_cannot_become_markup(adapter: SteeringAdapter) -> None:
    text = report_markdown(report(adapter, fit_part()))
    assert "\n# no heading" not in text
    assert "    steered ' happy\\n# no heading'" in text.splitlines()


def test_tables_escape_their_cells() -> None:
    assert table(("a", "b"), [("x|y", "1\n2")]).splitlines()[2] == "| x\\|y | 1 2 |"
    assert table(("a",), []) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (2, "2"),
        (None, "–"),
        (math.nan, "–"),
        (-math.inf, "–"),
        (True, "–"),
    ],
)
def test_numbers(value: object, text: str) -> None:
    assert number(value) == text


def test_figures_that_are_absent_are_left_out() -> None:
    assert [row[0] for row in figure_rows({"kl": 0.5, "kl_ci95": [0.4, 0.6]})] == [
        "KL to base (nats/token)"
    ]
