"""Token budgets from free memory, and what counts as running out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from austeer.adapters.activations.memory import (
    CPU_TOKENS,
    LEAST_TOKENS,
    MOST_TOKENS,
    out_of_memory,
    token_budget_for,
)

GIB = 1 << 30


class OnGpus:
    """A model as `token_budget_for` sees it, on devices that this machine lacks."""

    def __init__(self, model: Any, *devices: str) -> None:
        self.config, self.dtype = model.config, model.dtype
        self._devices = devices

    def parameters(self) -> Any:
        class Weight:
            def __init__(self, device: str) -> None:
                self.device = torch.device(device)

        return (Weight(device) for device in self._devices)


def free(monkeypatch: pytest.MonkeyPatch, bytes_of: dict[int, int], cached: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (bytes_of[device.index], 1))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: cached + 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)


def test_budget_on_a_cpu(tiny_model: Callable[..., Any]) -> None:
    assert token_budget_for(tiny_model("llama")) == CPU_TOKENS


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_budget_follows_the_least_free_memory(
    tiny_model: Callable[..., Any], model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OnGpus(tiny_model(model_type), "cuda:0", "cuda:1", "cpu")

    def budget(first: int, second: int, cached: int = 0) -> int:
        free(monkeypatch, {0: first, 1: second}, cached)
        return token_budget_for(model)  # type: ignore[arg-type]

    small, large = budget(40 << 20, GIB), budget(80 << 20, GIB)
    assert LEAST_TOKENS < small < large < MOST_TOKENS
    assert large == pytest.approx(2 * small, rel=0.01)
    assert budget(GIB, 40 << 20) == small
    assert budget(40 << 20, GIB, cached=40 << 20) == large
    assert budget(1, GIB) == LEAST_TOKENS
    assert budget(80 * GIB, 80 * GIB) == MOST_TOKENS


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough "
                      "memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: Error code 12"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_out_of_memory(error: Exception, is_memory: bool) -> None:
    assert out_of_memory(error) is is_memory


def test_what_torch_says_on_this_machine() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert out_of_memory(caught.value)
