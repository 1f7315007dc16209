"""Processes that meet, agree and add up; one that stops ends the others with a clear line."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from austeer.adapters import ContrastivePair, localize
from austeer.adapters._errors import DistributedError
from austeer.adapters.localization.distributed import (
    Processes,
    launched,
    launched_size,
    local_device,
    processes,
)

Launch = Callable[..., list[Any]]


def pairs(count: int = 24) -> list[ContrastivePair]:
    words = ("park", "home", "sun", "rain", "day", "so")
    return [
        ContrastivePair(f"one {words[n % 6]} {words[n // 6]} and", " happy", " sad !")
        for n in range(count)
    ]


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with launched() as group:
        assert group == processes() == Processes(0, 1) and group.is_first
    assert group.tell({"a": [1]}) == {"a": [1]}
    np.testing.assert_array_equal(group.total(np.arange(3)), np.arange(3))
    group.check_equal({"a": 1})


def test_three_processes_tell_and_add(launch: Launch) -> None:
    def work(rank: int) -> dict[str, Any]:
        with launched() as group:
            told = group.tell({"text": "β", "rank": rank})
            group.check_equal({"same": 1})
            with launched() as inner:
                assert inner == group
            integers = group.total(np.array([[rank, 2**60]]))
            floats = group.total(np.array([rank * 0.5]))
        assert processes().size == 1
        return {"told": told["rank"], "text": told["text"], "sum": integers, "floats": floats}

    for child in launch(work, size=3):
        assert child.end() == 0
        found = child.result()
        assert found["told"] == 0 and found["text"] == "β"
        assert found["sum"].tolist() == [[3, 3 * 2**60 - 2**64 * (3 * 2**60 >= 2**63)]]
        assert found["floats"].tolist() == [1.5]


def test_processes_with_other_arguments_are_refused(
    tiny_model: Any, tiny_tokenizer: Any, launch: Launch
) -> None:
    model = tiny_model("llama")

    def work(rank: int) -> dict[str, Any]:
        with launched():
            localize(model, tiny_tokenizer, pairs(24 - rank), ["ffn"])
        return {}

    first, second = launch(work)
    assert first.end() == second.end() == 1
    assert "DistributedError: another process has other options" in first.error()
    assert "DistributedError: process 1: its pairs (or tokenizer) differ" in second.error()


def test_processes_with_other_batches_are_refused(
    tiny_model: Any, tiny_tokenizer: Any, launch: Launch
) -> None:
    """Batches are dealt out by number: other batches would lose pairs and count some twice."""
    model = tiny_model("llama")

    def work(rank: int) -> dict[str, Any]:
        with launched():
            localize(model, tiny_tokenizer, pairs(), ["ffn"], batch_size=2 + rank)
        return {}

    first, second = launch(work)
    assert first.end() == second.end() == 1
    assert "its batch size differ" in second.error()


def test_a_process_that_stops_ends_the_run_and_leaves_a_state(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, launch: Launch
) -> None:
    model, folder = tiny_model("llama"), tmp_path / "state"
    options: dict[str, Any] = {"batch_size": 2, "state": folder, "state_every": 0.0}

    def work(rank: int) -> dict[str, Any]:
        def die(done: int, total: int) -> None:
            if rank == 1 and done >= total // 2:
                os._exit(9)

        with launched():
            localize(model, tiny_tokenizer, pairs(), ["ffn"], progress=die, **options)
        return {}

    first, second = launch(work)
    assert (first.end(), second.end()) == (1, 9)
    assert "DistributedError: another process of this run stopped" in first.error()
    assert "start the same command again" in first.error() and "\n" not in first.error()
    steps: list[int] = []
    resumed = localize(
        model,
        tiny_tokenizer,
        pairs(),
        ["ffn"],
        progress=lambda n, _: steps.append(n),
        **options,
    )
    # The first process finished its half; the second counted at least a quarter.
    assert steps[0] >= 12 + 6
    whole = localize(model, tiny_tokenizer, pairs(), ["ffn"], batch_size=2)
    for name in whole.counts("ffn").__slots__:
        mine, theirs = (getattr(found.counts("ffn"), name) for found in (resumed, whole))
        assert mine.tobytes() == theirs.tobytes()


def test_a_foreign_state_is_refused_by_all(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, launch: Launch
) -> None:
    model, folder = tiny_model("llama"), tmp_path / "state"
    localize(model, tiny_tokenizer, pairs(12), ["ffn"], state=folder, state_every=0.0)

    def work(rank: int) -> dict[str, Any]:
        with launched():
            localize(model, tiny_tokenizer, pairs(), ["ffn"], state=folder)
        return {}

    for child in launch(work):
        assert child.end() == 1
        assert "FitError" in child.error() and "the state of another run" in child.error()


def test_processes_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            DistributedError, match=r"cannot join the other processes at 127.0.0.1:9"
        ),
        launched(timedelta(seconds=1)),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(DistributedError, match="'two': expected the number"):
        launched_size()


def test_each_process_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert local_device("cuda") == "cuda:1"
    assert (local_device("cuda:3"), local_device("cpu")) == ("cuda:3", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert local_device("cuda") == "cuda"
