"""When a product counts as equal to its reference, and what is said when it is not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from austeer.adapters import VerificationError
from austeer.exporter.proofs.parity import (
    ParityReport,
    compare_logits,
    float32_bound,
    top_margin,
)

GOOD: dict[str, Any] = {
    "route": "onnx",
    "path": "onnx",
    "max_logit_difference": 1e-5,
    "tolerance": 1e-3,
    "argmax_agreement": 0.9,
    "decided_agreement": 1.0,
    "steered_vs_base": 2.0,
    "greedy_agreement": 1.0,
    "tokens": 40,
    "prompts": 3,
}


def test_good_figures_pass() -> None:
    report = ParityReport(**GOOD)
    assert report.passed and report.failures() == []
    report.require()
    assert json.loads(json.dumps(report.as_dict())) == GOOD | {"passed": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_logit_difference": 2e-3}, "differ by 0.002 from the attached model"),
        ({"max_logit_difference": float("nan")}, "differ by nan"),
        ({"decided_agreement": 0.975}, "agrees at 97.50% of the clearly decided"),
        ({"greedy_agreement": 0.5}, "greedy decoding agrees at 50.00%"),
        ({"steered_vs_base": 0.0}, "steering has no effect"),
        ({"steered_vs_base": 2e-3}, "expected more than 0.002"),
        ({"steered_vs_base": float("nan")}, "steering has no effect"),
    ],
)
def test_each_failure_is_said_in_one_line(change: dict[str, float], message: str) -> None:
    report = ParityReport(**{**GOOD, **change})
    assert not report.passed
    with pytest.raises(VerificationError, match=message) as error:
        report.require()
    assert "40 tokens of 3 prompts" in str(error.value) and "\n" not in str(error.value)


def test_route_without_decoding_passes() -> None:
    assert ParityReport(**{**GOOD, "greedy_agreement": None}).passed


def test_figures_of_two_prompts() -> None:
    prompts = [np.array([[0, 1]]), np.array([[2]])]
    wanted = {0: np.array([[1.0, 3.0], [5.0, 4.9]]), 2: np.array([[0.0, -8.0]])}
    found = {0: np.array([[1.0, 3.5], [4.9, 5.0]]), 2: np.array([[0.0, -8.0]])}

    def of(table: dict[int, Any], shift: float = 0.0) -> Any:
        return lambda ids: table[int(ids[0, 0])] + shift

    figures = compare_logits(prompts, of(found), of(wanted), of(found, 0.25))
    assert figures.difference == pytest.approx(0.5)
    assert figures.to_base == pytest.approx(0.25)
    assert figures.peak == 8.0
    assert figures.agrees.tolist() == [True, False, True]
    assert figures.margin.tolist() == pytest.approx([2.0, 0.1, 8.0])
    near = figures.report("onnx", "x", 2, tolerance=0.06)
    assert (near.decided_agreement, near.argmax_agreement) == (1.0, pytest.approx(2 / 3))
    strict = figures.report("onnx", "x", 2, tolerance=0.04)
    assert strict.decided_agreement == pytest.approx(2 / 3)
    assert strict.tokens == 3


def test_not_a_number_survives_the_maximum() -> None:
    logits = np.array([[1.0, 0.0]])
    broken = np.array([[np.nan, 0.0]])
    figures = compare_logits(
        [np.array([[1]]), np.array([[2]])],
        lambda ids: broken if ids[0, 0] == 1 else logits,
        lambda _: logits,
        lambda _: logits,
    )
    assert not figures.report("onnx", "x", 2, tolerance=1.0).passed


def test_margin_and_bound() -> None:
    assert top_margin(np.array([[1.0, 4.0, 3.5], [2.0, 2.0, 0.0]])).tolist() == [0.5, 0.0]
    assert float32_bound(0.1) == pytest.approx(1e-4)
    assert float32_bound(30) == pytest.approx(3e-3)
