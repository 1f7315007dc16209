"""Gain arithmetic: the identities, exact rounding, range."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from austeer.adapters import ModelError, RouteError
from austeer.adapters.sites import Component, Site
from austeer.exporter.fold import fold_rows, fold_scales, fold_tensor, round_once
from austeer.exporter.plan import TensorEdit

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def edit(axis: int, index: list[int], gain: list[float]) -> TensorEdit:
    return TensorEdit("w", axis, np.array(index), np.array(gain), ())


def random_weight(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def nearest(value: Fraction, dtype: Any) -> float:
    """The representable number nearest to `value`, ties to even, by trying neighbours."""
    start = np.asarray([float(value)]).astype(dtype)
    bits = start.view(np.uint16 if start.itemsize == 2 else np.uint32)
    exact = []
    for step in (-1, 0, 1):
        number = (bits.astype(np.int64) + step).astype(bits.dtype)
        found = float(number.view(dtype)[0])
        exact.append((abs(Fraction(found) - value), int(number[0]) & 1, found))
    return min(exact)[2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_side_absorbs_the_gain(dtype: Any) -> None:
    weight, x = random_weight((6, 9), dtype), np.random.default_rng(1).normal(size=9)
    folded = fold_tensor(weight, [edit(1, [2, 7], [1.7, -0.4])])
    g = np.ones(9)
    g[[2, 7]] = 1.7, -0.4
    expected = weight.astype(np.float64) @ (g * x)
    got = folded.astype(np.float64) @ x
    size = np.abs(weight.astype(np.float64)) @ np.abs(x)
    tolerance = float(ml_dtypes.finfo(dtype).eps) * size
    assert (np.abs(got - expected) <= 2 * tolerance).all()
    assert folded.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_side_absorbs_the_gain_into_weight_and_bias(dtype: Any) -> None:
    weight, bias = random_weight((6, 9), dtype), random_weight((6,), dtype, 2)
    edits = [edit(0, [0, 4], [3.0, 0.0])]
    folded, folded_bias = fold_tensor(weight, edits), fold_tensor(bias, edits)
    assert folded[4].astype(float).tolist() == [0.0] * 9
    assert folded_bias[4] == 0
    np.testing.assert_array_equal(folded[0], (weight[0].astype(np.float64) * 3).astype(dtype))
    np.testing.assert_array_equal(folded_bias[[1, 2, 3, 5]], bias[[1, 2, 3, 5]])


def test_slices_without_a_gain_keep_their_bits_and_the_input_is_left_alone() -> None:
    weight = random_weight((6, 9), np.float16)
    before = weight.copy()
    folded = fold_tensor(weight, [edit(1, [2], [1.3])])
    assert weight.tobytes() == before.tobytes()
    keep = [0, 1, *range(3, 9)]
    assert folded[:, keep].tobytes() == weight[:, keep].tobytes()
    assert (folded[:, 2] != weight[:, 2]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_crossing_edits_round_once(dtype: Any) -> None:
    weight = random_weight((40, 40), dtype)
    rows, columns = [1, 8], [3, 5, 30]
    edits = [edit(0, rows, [1.37, 0.61]), edit(1, columns, [1.1, 0.9, -2.3])]
    folded = fold_tensor(weight, edits)
    g_row, g_column = np.ones(40), np.ones(40)
    g_row[rows], g_column[columns] = (1.37, 0.61), (1.1, 0.9, -2.3)
    wide = weight.astype(np.float64) * g_column * g_row[:, None]
    for i in range(40):
        for j in range(40):
            assert float(folded[i, j]) == nearest(Fraction(wide[i, j]), dtype), (i, j)
    swapped = fold_tensor(weight, edits[::-1])
    assert folded.tobytes() == swapped.tobytes()


@given(st.floats(min_value=1e-30, max_value=1e30), st.sampled_from([-1, 1]))
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rounding_is_exact(dtype: Any, value: float, sign: int) -> None:
    value *= sign
    got = float(round_once(np.array([value]), np.dtype(dtype))[0])
    assert got == nearest(Fraction(value), dtype)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1 + 2**-8 + 2**-40, 1 + 2**-7),  # through float32 this would round down to 1
        (1 + 2**-8, 1.0),
        (1 + 3 * 2**-8, 1 + 2**-6),
        (-(1 + 2**-8 + 2**-40), -(1 + 2**-7)),
        (1e39, np.inf),
        (0.0, 0.0),
    ],
)
def test_bfloat16_is_not_rounded_twice(value: float, expected: float) -> None:
    got = round_once(np.array([value]), np.dtype(ml_dtypes.bfloat16))
    assert float(got[0]) == expected


@pytest.mark.parametrize(
    ("dtype", "big"), [(np.float16, 6e4), (np.float32, 3e38), (ml_dtypes.bfloat16, 3e38)]
)
def test_overflow_names_tensor_and_unit(dtype: Any, big: float) -> None:
    weight = random_weight((4, 5), dtype)
    weight[2, 3] = big
    with pytest.raises(RouteError, match=r"w: unit 3 times gain 2 leaves the range of"):
        fold_tensor(weight, [edit(1, [1, 3], [1.5, 2.0])])
    with pytest.raises(RouteError, match=r"w: unit 2 times gain -2 leaves the range of"):
        fold_tensor(weight, [edit(0, [2, 0], [-2.0, 1.0])])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_in_the_base_is_named(dtype: Any, value: float) -> None:
    weight = random_weight((4, 5), dtype)
    weight[3, 1] = value
    with pytest.raises(ModelError, match=rf"m\.st: w: .* unit 1 hold {value}"):
        fold_rows(weight[2:], 2, [edit(1, [0, 1], [2.0, 1.5])], Path("m.st"))
    with pytest.raises(ModelError, match=rf"^w: .* unit 3 hold {value}"):
        fold_rows(weight[2:], 2, [edit(0, [0, 3], [2.0, 1.5])])


def test_what_is_not_finite_stays_where_nothing_is_steered() -> None:
    weight = random_weight((4, 5), np.float32)
    weight[0, 1] = np.inf
    for edits in ([edit(1, [1, 2], [1.0, 2.0])], [edit(0, [1], [2.0])]):
        assert np.isinf(fold_tensor(weight, edits)[0, 1])


@pytest.mark.parametrize("cuts", [(1,), (3, 4), (5, 6, 9), tuple(range(1, 10))])
def test_rows_in_blocks_are_the_whole_tensor(cuts: tuple[int, ...]) -> None:
    weight = random_weight((10, 7), np.float32)
    weight[4, 1] = 0.0
    edits = [edit(0, [8, 0, 4], [2.0, -1.0, 0.5]), edit(1, [1, 6], [3.0, 1.0])]
    blocks = np.split(weight.copy(), cuts)
    firsts = [0, *cuts]
    changed = sum(fold_rows(b, first, edits) for b, first in zip(blocks, firsts, strict=True))
    whole = fold_tensor(weight, edits)
    assert np.concatenate(blocks).tobytes() == whole.tobytes()
    assert changed == (whole != weight).sum() == 3 * 7 + 7 - 1


def test_overflow_in_a_block_names_the_tensors_unit() -> None:
    weight = random_weight((4, 5), np.float32)
    weight[3, 3] = 3e38
    with pytest.raises(RouteError, match="w: unit 3 times gain 2 leaves"):
        fold_rows(weight[2:], 2, [edit(0, [0, 3], [9.0, 2.0])])
    with pytest.raises(RouteError, match="w: unit 3 times gain 2 leaves"):
        fold_rows(weight[2:], 2, [edit(1, [3], [2.0])])


def scale_edit(gain: float, axis: int = 0) -> TensorEdit:
    site = Site(3, Component.FFN)
    return TensorEdit("down_proj.scales", axis, np.array([1]), np.array([gain]), (site,))


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_of_a_unit_are_rounded_once(axis: int) -> None:
    scales = np.random.default_rng(0).uniform(1e-3, 1, (4, 4)).astype(np.float16)
    folded = fold_scales(scales, [scale_edit(-0.37, axis)])
    wanted = scales.copy()
    view = wanted if axis == 0 else wanted.T
    view[1] = (view[1].astype(np.float64) * -0.37).astype(np.float16)
    assert folded.tobytes() == wanted.tobytes()


def test_small_scales_may_be_rounded_as_coarsely_as_bfloat16() -> None:
    # float16 has no normals below 6.1e-5; blocks of six bits keep their scales there.
    small = np.array([[1e-3], [1.5e-5], [1e-3]], np.float16)
    for gain in (3.0, 0.7, -0.1):
        wanted = np.float16(float(small[1, 0]) * gain)
        assert fold_scales(small, [scale_edit(gain)])[1, 0] == wanted
    # A block of nearly nothing may vanish beside others of its row.
    row = np.array([[1.0, 1.0], [1e-3, 6e-8], [1.0, 1.0]], np.float16)
    assert fold_scales(row, [scale_edit(0.4)])[1].tolist() == [np.float16(row[1, 0] * 0.4), 0]
    assert not fold_scales(row, [scale_edit(0.0)])[1].any()
    assert not fold_scales(row * np.float16(0), [scale_edit(0.4)])[1].any()


@pytest.mark.parametrize(("scale", "gain"), [(1.5e-6, 0.71), (1.5e-6, 1.03), (1e-3, 1e-6)])
def test_scales_too_small_for_their_dtype_are_refused(scale: float, gain: float) -> None:
    scales = np.full((3, 2), scale, np.float16)
    with pytest.raises(RouteError, match=r"layers.3.ffn: unit 1 times gain.*float16"):
        fold_scales(scales, [scale_edit(gain)])
    assert fold_scales(scales.astype(np.float32), [scale_edit(gain)])[1].all()


def test_scales_that_overflow_are_refused() -> None:
    with pytest.raises(RouteError, match=r"unit 1 times gain 1e\+06 leaves the range"):
        fold_scales(np.ones((3, 2), np.float16), [scale_edit(1e6)])
