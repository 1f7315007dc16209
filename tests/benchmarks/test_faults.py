"""A short fault run: `merge` survives kills, full disks and bad files; faults are seen."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
faults = importlib.import_module("faults")
children = importlib.import_module("fault_children")

pytestmark = pytest.mark.slow


@pytest.fixture
def merging(tmp_path: Path) -> Any:
    """Faults of the fold alone; the child that writes as nobody must reach the folder."""
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    return faults.Faults(tmp_path, ("merge",), seed=7)


def total(run: Any) -> Counter[str]:
    return sum(run.counts.values(), Counter())


def test_kills_leave_nothing_or_everything(merging: Any) -> None:
    merging.kills(4)
    merging.operations(10)
    found = total(merging)
    assert found["times"] == 14 == found["nothing"] + found["complete"]
    assert found["nothing"] > 0
    assert not merging.failed, list(merging.rows())


def test_full_disks_leave_nothing_or_everything(merging: Any) -> None:
    merging.sizes(4)
    found = merging.counts
    assert found["disk too small", "merge"]["nothing"] == 4
    told = merging.said
    assert "needs up to" in told["disk too small", "merge"]
    meanwhile = told["disk fills up meanwhile", "merge"]
    assert "no space left" in meanwhile or "file too large" in meanwhile
    assert not merging.failed, list(merging.rows())


def test_bad_files_leave_nothing_or_everything(merging: Any) -> None:
    merging.reads(1)
    assert len(merging.counts) == 7
    assert not merging.failed, (list(merging.rows()), merging.said)


# The harness itself


def test_an_output_that_differs_is_seen(merging: Any) -> None:
    (job,) = merging.jobs
    wrong = dataclasses.replace(job, wanted=job.wanted | {"config.json": "0" * 64})
    merging.fault("none", wrong)
    found = merging.counts["none", "merge"]
    assert found["other"] == found["rerun failed"] == 1
    assert merging.failed


def test_a_half_written_output_is_seen(merging: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = merging.jobs
    out = merging.place / "out"

    def half() -> None:
        out.mkdir()
        (out / "config.json").write_text("{")

    merging.fault("half", job, prepare=lambda: (half(), children.die()))
    assert merging.counts["half", "merge"]["other"] == 1 and merging.failed


def test_a_changed_base_is_seen(merging: Any) -> None:
    (job,) = merging.jobs

    def spoil() -> None:
        with (merging.base / "config.json").open("a") as stream:
            stream.write(" ")

    merging.fault("spoiled", job, repair=spoil)
    assert merging.counts["spoiled", "merge"]["base changed"] == 1 and merging.failed


@pytest.mark.parametrize("after", [1, 10_000])
def test_an_operation_is_met_where_it_is(
    merging: Any, after: int, fork: Callable[..., Any]
) -> None:
    (job,) = merging.jobs
    assert 20 < job.operations < 10_000
    prepare = children.at_operation(merging.place, after, children.die)
    ended = merging.fault("met", job, prepare=prepare)
    assert (ended.code == -9) == (after == 1)
    assert not merging.failed
