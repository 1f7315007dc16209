"""A state holds counters and pairs together; nothing is counted twice or taken from others."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import Component, ContrastivePair, FitError, Ranking, localize
from austeer.adapters.localization.distributed import Processes
from austeer.adapters.localization.momentum import MomentumCounter
from austeer.adapters.localization.run_state import RunState
from austeer.adapters.localization.state_file import Purpose

KIND = Component.FFN
ALONE = Processes()
FACTS = {"pairs": "sha256:1", "model": ["llama", 2], "compat": None}


def opened(folder: Path | None, every: float = 0.0, size: int = 12, **changes: Any) -> RunState:
    purpose = Purpose({**FACTS, **changes}, size, token_budget=changes.get("budget", 100))
    return RunState({KIND: MomentumCounter(2, 3)}, purpose, folder, every, ALONE)


def values(numbers: Sequence[int]) -> dict[Component, Any]:
    """Activations that tell by themselves which pairs they are of."""
    x = torch.tensor([[n * 0.1 + unit for unit in range(3)] for n in numbers])
    return {KIND: {layer: (x * (layer + 1), -x) for layer in range(2)}}


def add(run: RunState, *batches: Sequence[int]) -> None:
    for batch in batches:
        run.add(batch, values(batch))


def sums(run: RunState) -> bytes:
    counts = run.totals()[KIND]
    return b"".join(getattr(counts, name).tobytes() for name in counts.__slots__)


BATCHES = ([0, 1], [2, 3, 4], [11], [5, 6, 7], [8, 9, 10])


def undisturbed() -> bytes:
    run = opened(None)
    add(run, *BATCHES)
    return sums(run)


def test_goes_on_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "state"
    add(opened(folder), *BATCHES[:2])
    assert not caplog.records
    second = opened(folder)
    assert second.done.tolist() == [True] * 5 + [False] * 7
    assert "resumed: 5 of 12 pairs were done" in caplog.text
    add(second, *BATCHES[2:4])
    assert len(list(folder.iterdir())) == 1, "the first file is part of the second"
    third = opened(folder)
    add(third, *BATCHES[4:])
    assert sums(third) == undisturbed()
    assert sums(opened(folder)) == undisturbed()


def test_files_of_several_processes_are_one_state(tmp_path: Path) -> None:
    first, second, third = (opened(tmp_path / "new") for _ in range(3))
    folder = tmp_path / "new"
    for run, batches in zip((first, second, third), (BATCHES[:2], BATCHES[2:3], BATCHES[3:]),
                            strict=True):  # fmt: skip
        add(run, *batches)
    assert len(list(folder.iterdir())) == 3
    whole = opened(folder)
    assert whole.done.all() and sums(whole) == undisturbed()
    whole.save()
    assert len(list(folder.iterdir())) == 1
    assert sums(opened(folder)) == undisturbed()


def test_a_file_that_is_part_of_another_is_not_counted_again(tmp_path: Path) -> None:
    """A kill between the writing of the merged file and the removal of its parts."""
    folder = tmp_path / "state"
    add(opened(folder), *BATCHES[:2])
    (part,) = folder.iterdir()
    kept = part.read_bytes()
    add(opened(folder), *BATCHES[2:4])
    part.write_bytes(kept)
    assert len(list(folder.iterdir())) == 2
    last = opened(folder)
    assert int(last.done.sum()) == 9
    add(last, BATCHES[4])
    assert sums(last) == undisturbed() and len(list(folder.iterdir())) == 1


def test_writes_no_more_often_than_asked(tmp_path: Path) -> None:
    run = opened(tmp_path / "state", every=3600.0)
    add(run, *BATCHES[:4])
    assert not (tmp_path / "state").exists()
    with pytest.raises(KeyboardInterrupt), run.kept():
        raise KeyboardInterrupt
    assert int(opened(tmp_path / "state").done.sum()) == 9


def test_half_an_update_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tmp_path / "state", every=3600.0)
    add(run, BATCHES[0])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MomentumCounter, "update_layers", interrupted)
    with pytest.raises(KeyboardInterrupt), run.kept():
        add(run, BATCHES[1])
    assert not (tmp_path / "state").exists()


def test_a_stop_while_writing_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, data: bytes) -> None:
        path.write_text(data[: len(data) // 2].decode("latin-1"))
        raise KeyboardInterrupt

    run = opened(tmp_path / "state")
    add(run, BATCHES[0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", half)
        add(run, BATCHES[1])
    assert opened(tmp_path / "state").done.tolist() == [True] * 2 + [False] * 10


def test_a_resumed_run_keeps_its_token_budget(tmp_path: Path) -> None:
    add(opened(tmp_path / "state"), BATCHES[0])
    counters = {KIND: MomentumCounter(2, 3)}
    other = RunState(counters, Purpose(FACTS, 12, 77), tmp_path / "state", 3.0, ALONE)
    assert other.token_budget == 100


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pairs": "sha256:2"}, "other pairs;"),
        ({"compat": "reference"}, "other compat;"),
        ({"model": ["gpt2", 2], "pairs": "sha256:2"}, "other pairs and other model;"),
    ],
)
def test_the_state_of_another_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    add(opened(tmp_path / "state"), BATCHES[0])
    with pytest.raises(FitError, match=named) as refused:
        opened(tmp_path / "state", **changes)
    assert "delete that folder" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no safetensors at all",
        lambda data: data[:-3],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b'"checksum":"crc32:', b'"checksum":"crc31:'),
        lambda data: data.replace(b"austeer-localization-state", b"austeer-localization-stuff"),
        lambda data: data.replace(b'"format_version":"1"', b'"format_version":"2"'),
        lambda data: data.replace(b'"pairs":"12"', b'"pairs":"1x"'),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    add(opened(tmp_path / "state"), BATCHES[0])
    (file,) = (tmp_path / "state").iterdir()
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    with pytest.raises(FitError, match="not a readable state") as refused:
        opened(tmp_path / "state")
    assert str(file) in str(refused.value) and "--restart" in str(refused.value)


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    add(opened(tmp_path / "state"), BATCHES[0])
    (file,) = (tmp_path / "state").iterdir()
    leftover = file.with_name(f".{file.name}.partial-abc")
    leftover.write_bytes(b"half")
    assert int(opened(tmp_path / "state").done.sum()) == 2
    assert not leftover.exists()


def many_pairs() -> list[ContrastivePair]:
    words = ("park", "home", "sun", "rain", "day", "so", "it")
    return [
        ContrastivePair(f"one {a} {b} and {c}", " happy", " sad !")
        for a in words for b in words for c in words
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_at_ten_moments(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, fork: Callable[..., Any]
) -> None:
    """kill -9 whenever it comes; what goes on ends with the bits of an undisturbed run."""
    model, found, folder = tiny_model("llama"), many_pairs(), tmp_path / "state"

    def run(**options: Any) -> Ranking:
        return localize(model, tiny_tokenizer, found, batch_size=2, **options)

    wanted, chance, moments = run(), random.Random(7), [0]
    for _ in range(10):
        heard, told = os.pipe()
        child = fork(
            lambda told=told: (
                run(state=folder, state_every=0.0, progress=lambda *_: os.write(told, b"."))
                and None
            )
        )
        os.close(told)
        for _ in range(chance.randint(1, 12)):
            assert os.read(heard, 1), "ended before it was killed: give it more pairs"
        # Anywhere in the next few batches, or the writing of their state.
        time.sleep(chance.uniform(0.0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        assert child.end() == -signal.SIGKILL
        os.close(heard)
        moments.append(pairs_done(folder))
    assert moments == sorted(set(moments)) and moments[-1] < len(found), moments
    resumed = run(state=folder)
    for component in wanted.components:
        mine, theirs = resumed.counts(component), wanted.counts(component)
        for name in mine.__slots__:
            assert getattr(mine, name).tobytes() == getattr(theirs, name).tobytes()


def pairs_done(folder: Path) -> int:
    """Most pairs of one file: the later ones hold the earlier."""
    from safetensors.numpy import load_file

    counts = [0]
    for file in folder.glob("*.safetensors"):
        counts.append(int(np.unpackbits(load_file(file)["pairs"]).sum()))
    return max(counts)
