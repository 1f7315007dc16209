"""What `make test-shapes` would see."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped
from shape_checks import check


@jaxtyped(typechecker=check)
def product(
    W: Float[np.ndarray, "m n"], *vectors: Float[np.ndarray, " n"], wrong: bool = False
) -> Float[np.ndarray, " m"]:
    return W @ sum(vectors) if not wrong else np.concatenate(vectors)


def test_stated_arrays_pass() -> None:
    assert product(np.ones((2, 3)), np.ones(3), np.ones(3)).tolist() == [6, 6]


@pytest.mark.parametrize(
    "arguments",
    [
        (np.ones((2, 3)), np.ones(3), np.ones(2)),
        (np.ones((2, 3), np.int64), np.ones(3)),
        (np.ones(3), np.ones(3)),
    ],
)
def test_other_shapes_and_dtypes_are_seen(arguments: tuple[np.ndarray, ...]) -> None:
    with pytest.raises(TypeCheckError):
        product(*arguments)


def test_a_result_of_another_shape_is_seen() -> None:
    with pytest.raises(TypeCheckError):
        product(np.ones((2, 3)), np.ones(3), np.ones(3), wrong=True)
