"""Stored values are compared to the bit, or to one rounding of a gain."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from austeer.adapters import VerificationError
from austeer.exporter.proofs import values
from austeer.exporter.proofs.values import differing_chunk, rounding_errors, values_error


@pytest.mark.parametrize("axis", [0, 1])
def test_one_wrong_value_is_seen(axis: int) -> None:
    """In bfloat16, where the roundings of a whole projection hide it."""
    rng = np.random.default_rng(0)
    old = rng.normal(size=(512, 512)).astype(ml_dtypes.bfloat16)
    gain = np.where(np.arange(512) % 8 == 0, 1.5, 1.0)
    new = (old * np.expand_dims(gain, 1 - axis)).astype(ml_dtypes.bfloat16)
    assert values_error(old, new, {axis: gain}, "file: name") <= 1.0
    wrong = new.copy()
    wrong[8, 8] = -new[8, 8]
    with pytest.raises(VerificationError, match=r"^file: name is not the base times its gains"):
        values_error(old, wrong, {axis: gain}, "file: name")


def test_a_change_where_no_unit_is_steered_is_seen() -> None:
    old = np.zeros((4, 3), np.float32)
    gain = np.array([1.0, 2.0, 1.0])
    new = old.copy()
    new[2, 0] = -0.0  # equal, and another value
    assert values_error(old, old, {1: gain}, "name") == 0.0
    with pytest.raises(VerificationError, match="name differs where no unit is steered"):
        values_error(old, new, {1: gain}, "name")


def test_a_value_that_is_not_a_number_is_no_product() -> None:
    old, gain = np.ones((2, 2), np.float32), np.array([1.0, 2.0])
    new = np.array([[1.0, np.nan], [1.0, 2.0]], np.float32)
    with pytest.raises(VerificationError, match="off by nan roundings"):
        values_error(old, new, {1: gain}, "name")


@pytest.mark.parametrize(
    ("dtype", "relative"), [("float32", 2**-24), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_rounding_errors_are_half_a_step(dtype: str, relative: float) -> None:
    kind = np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    unit, spacing = rounding_errors(kind)
    assert unit == relative
    # A tie goes to the even neighbour, which is zero.
    assert np.array(1.01 * spacing).astype(kind) == 2 * spacing
    assert np.array(spacing).astype(kind) == 0


@pytest.mark.parametrize("place", [0, 9, 10, 24])
def test_the_first_chunk_that_differs(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_CHUNK", 10)
    content = bytes(range(25))
    changed = bytearray(content)
    changed[place] ^= 1
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"head" + content)
    other.write_bytes(changed + b"tail")
    first = place // 10 * 10
    assert differing_chunk((one, 4), (other, 0), 25) == (first, min(first + 10, 25))
    assert differing_chunk((one, 4), (one, 4), 25) is None
    # What lies behind the stretch does not count.
    assert differing_chunk((one, 4), (other, 0), place) is None
