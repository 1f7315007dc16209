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
    found = module.self_test()["CPUExecutionProvider"]
    assert found is not None and 0.0 <= found < 1e-2


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("cuda", ["", "90"])
def test_a_provider_that_does_not_start_was_not_tested(
    cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime takes the CPU instead, with no more than a warning."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("here it may start")
    offered = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    monkeypatch.setattr(module, "library_facts", lambda: {"cuda": cuda})
    found = module.self_test()
    assert found["CUDAExecutionProvider"] is None
    assert found["CPUExecutionProvider"] is not None


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
