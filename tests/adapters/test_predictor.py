"""The γ predictor: shape checks, φ, and how standardization is absorbed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from austeer.adapters import AdapterError, Predictor


def random_parts(k: int = 5, r: int = 2) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=s).astype(np.float32) for s in ((k, r), (r,), (r, k)))  # type: ignore[return-value]


def test_phi_is_one_without_evidence() -> None:
    V, b, U = random_parts()
    untrained = Predictor(V * 0, b * 0, U)
    np.testing.assert_allclose(untrained.phi(np.ones((3, 5))), 1.0, rtol=1e-12)
    assert untrained.rank == 2


def test_numbers_are_those_that_are_saved() -> None:
    parts = [part.astype(np.float64) / 3 for part in random_parts()]
    predictor = Predictor(*parts)
    for name, part in zip("VbU", parts, strict=True):
        found = getattr(predictor, name)
        assert found.dtype == np.float32 and np.array_equal(found, part.astype(np.float32))


def test_phi_is_the_documented_formula() -> None:
    V, b, U = random_parts()
    x = np.random.default_rng(1).normal(size=5)
    for i in range(5):
        t = [sum(float(V[j, a]) * x[j] for j in range(5)) + float(b[a]) for a in range(2)]
        logit = sum(t[a] * float(U[a, i]) for a in range(2)) - math.log(3)
        expected = 4 / (1 + math.exp(-logit))
        assert Predictor(V, b, U).phi(x)[i] == pytest.approx(expected, rel=1e-12)


def test_phi_stays_in_range_for_any_input() -> None:
    V, b, U = random_parts()
    phi = Predictor(V, b, U).phi(1e6 * np.random.default_rng(2).normal(size=(50, 5)))
    assert np.isfinite(phi).all() and (phi >= 0).all() and (phi <= 4).all()
    assert phi.min() < 0.01 and phi.max() > 3.99


def test_absorbed_standardization_changes_nothing() -> None:
    V, b, U = random_parts()
    rng = np.random.default_rng(3)
    mean, std, x = rng.normal(size=5), rng.uniform(0.1, 2, size=5), rng.normal(size=(7, 5))
    expected = Predictor(V, b, U).phi((x - mean) / std)
    got = Predictor.absorb(V, b, U, mean, std).phi(x)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 2), (3,), (2, 5)),
        ((5, 2), (2,), (5, 2)),
        ((5,), (2,), (2, 5)),
        ((5, 0), (0,), (0, 5)),
    ],
)
def test_shapes_that_disagree(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(AdapterError, match="expected V"):
        Predictor(*(np.ones(shape, np.float32) for shape in shapes))


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_must_be_finite(part: int, value: float) -> None:
    parts = [array.copy() for array in random_parts()]
    parts[part].flat[0] = value
    with pytest.raises(AdapterError, match="NaN or infinity"):
        Predictor(*parts)
