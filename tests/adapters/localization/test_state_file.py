"""Files of a state that are whole and yet not what they claim: each refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import BOMB, attacked, changed_bytes
from hypothesis import given
from hypothesis import strategies as st

from austeer.adapters import Component, FitError
from austeer.adapters.localization.momentum import MomentumCounter
from austeer.adapters.localization.state_file import (
    Purpose,
    StatePart,
    _checksum,
    discard_state,
    state_files,
    state_name,
    write_state,
)
from austeer.adapters.tensors import Tensors, read_tensors, write_tensors

PURPOSE = Purpose({"pairs": "sha256:1"}, pairs=12, token_budget=100)


def counters() -> dict[Component, MomentumCounter]:
    return {Component.FFN: MomentumCounter(2, 3)}


def tensors() -> Tensors:
    signs, limbs = counters()[Component.FFN].state()
    bits = np.packbits(np.arange(12) < 5)
    return {"pairs": bits, "ffn.signs": signs + 1, "ffn.limbs": limbs + 0.5}


def read(path: Path) -> dict[Component, MomentumCounter]:
    found = counters()
    StatePart.open(path, PURPOSE).add_to(found)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "0-abc.safetensors"
    write_state(made, tensors(), PURPOSE)
    return made


def test_a_good_file_is_read(path: Path) -> None:
    part = StatePart.open(path, PURPOSE)
    assert part.pairs.tolist() == [True] * 5 + [False] * 7
    found = read(path)[Component.FFN]
    assert found.count == 5 and found.counts().positive.tolist() == [[1] * 3] * 2


def with_tensors(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        parts = tensors() | {name.replace("__", "."): x for name, x in changes.items()}
        write_state(path, {n: x for n, x in parts.items() if x is not None}, PURPOSE)

    return change


def with_notes(**changes: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        metadata, parts = read_tensors(path)
        # Its checksum is right: that is no proof of anything.
        assert metadata["checksum"] == _checksum(parts)
        write_tensors(path, parts, metadata | changes)

    return change


BAD = {
    "no pairs": with_tensors(pairs=None),
    "pairs of another size": with_tensors(pairs=np.zeros(3, np.uint8)),
    "pairs are numbers": with_tensors(pairs=np.zeros(2, np.int64)),
    "pairs are a table": with_tensors(pairs=np.zeros((2, 1), np.uint8)),
    "no signs": with_tensors(ffn__signs=None),
    "no limbs": with_tensors(ffn__limbs=None),
    "sums that would be broadcast": with_tensors(ffn__signs=np.ones((3, 1, 1), np.int64)),
    "signs are fractions": with_tensors(ffn__signs=np.ones((3, 2, 3))),
    "limbs of another width": with_tensors(ffn__limbs=np.ones((3, 3, 2, 4))),
    "facts are a list": with_notes(facts="[1]"),
    "facts are a bomb": with_notes(facts=BOMB),
    "count beyond memory": with_notes(pairs="9" * 18),
    "count beyond int": with_notes(pairs="9" * 5000),
    "negative count": with_notes(pairs="-12"),
    "another count": with_notes(pairs="13"),
    "budget of nothing": with_notes(token_budget="0"),
    "budget is infinite": with_notes(token_budget="inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_what_it_claims(path: Path, case: str) -> None:
    BAD[case](path)
    with pytest.raises(FitError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path.parent) in message and "--restart" in message and message.isprintable()


@attacked
@given(data=st.data())
def test_changed_files(path: Path, data: st.DataObject) -> None:
    write_state(path, tensors(), PURPOSE)
    path.write_bytes(data.draw(changed_bytes(path.read_bytes())))
    try:
        found = read(path)[Component.FFN]
    except FitError as error:
        assert str(error).isprintable()
    else:
        assert 0 <= found.count <= 12


def test_only_files_of_a_state_are_discarded(tmp_path: Path) -> None:
    ours = [state_name(0), state_name(12), f".{state_name(1)}.partial-x1"]
    foreign = [
        "model.safetensors",
        "mine.txt",
        ".model.safetensors.partial-x1",
        "0-ab.safetensors",
    ]
    for name in (*ours, *foreign):
        (tmp_path / name).write_text("x")
    assert {path.name for path in state_files(tmp_path)} == set(ours[:2])
    discard_state(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(foreign)
    for name in foreign:
        (tmp_path / name).unlink()
    discard_state(tmp_path)
    assert not tmp_path.exists()
