"""Numbers given by callers."""

from __future__ import annotations

import numpy as np
import pytest

from austeer.adapters import FitError
from austeer.adapters._numbers import check_whole


@pytest.mark.parametrize("value", [2, 10**30, np.int64(7), np.uint8(2)])
def test_whole_numbers(value: object) -> None:
    check_whole("rank", value, 2)


@pytest.mark.parametrize("value", [1, -3, 2.0, "4", None, True, np.float32(5), np.bool_(True)])
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(FitError, match=f"rank: expected a whole number from 2 on, got {value}"):
        check_whole("rank", value, 2)
    if value is True:
        with pytest.raises(FitError):
            check_whole("rank", value, 0)
