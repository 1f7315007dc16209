"""The self-test passes with sound kernels, and sees unsound ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from austeer.adapters import GraphError
from austeer.graphs import self_test as module
from austeer.graphs.custom_op import library_file

pytestmark = pytest.mark.skipif(library_file() is None, reason="no operator library was built")


def test_kernels_agree_with_their_bodies() -> None:
    found = module.self_test()
    assert 0.0 <= found["CPUExecutionProvider"] < 1e-2


def test_a_kernel_that_does_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run", lambda *a, **_: np.array(a[3]))
    with pytest.raises(GraphError, match="SteerAU in float on CPUExecutionProvider differs"):
        module.self_test()


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = module._run

    def wrong(*arguments: Any, kernels: bool) -> np.ndarray:
        return sound(*arguments, kernels=kernels) * (1.0 + 1e-4 * kernels)

    monkeypatch.setattr(module, "_run", wrong)
    with pytest.raises(GraphError, match="differs from its function body by"):
        module.self_test()
