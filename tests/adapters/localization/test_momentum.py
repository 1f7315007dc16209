"""Counters count by hand, and their float sums have the same bits in any order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.adapters import FitError
from austeer.adapters.localization import momentum
from austeer.adapters.localization.momentum import MomentumCounter


def counter(*batches: tuple[list[float], list[float]], compat: str | None = None) -> Any:
    made = MomentumCounter(1, 1, compat=compat)
    for positive, negative in batches:
        made.update(0, torch.tensor(positive)[:, None], torch.tensor(negative)[:, None])
    return made


def values(made: MomentumCounter) -> dict[str, float]:
    counts = made.counts()
    return {name: getattr(counts, name)[0, 0].item() for name in counts.__slots__}


def test_counter_by_hand() -> None:
    made = counter(([1.0, 2.0, 5.0], [0.5, 3.0, 5.0]), ([0.0], [-1.0]))
    assert made.count == 4
    assert values(made) == {
        "positive": 2,  # 1 > 0.5 and 0 > -1
        "negative": 1,
        "near_ties": 1,  # 5 and 5
        "delta": 0.5 - 1 + 0 + 1,
        "total": 8 + 8.5 - 1,
        "squares": 1 + 4 + 25 + 0.25 + 9 + 25 + 0 + 1,
    }


@pytest.mark.parametrize(
    ("x", "y", "near"),
    [
        (0.0, 9e-6, 1),
        (0.0, 1.1e-5, 0),
        (1000.0, 1000.009, 1),
        (1000.0, 1000.02, 0),
        (-1000.0, -1000.009, 1),
        (0.5, -0.5, 0),
    ],
)
def test_near_ties(x: float, y: float, near: int) -> None:
    assert values(counter(([x], [y])))["near_ties"] == near
    assert values(counter(([y], [x])))["near_ties"] == near


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("pairs", [1, 3, 50])
def test_signs_are_those_of_each_comparison(
    dtype: torch.dtype, compat: str | None, pairs: int
) -> None:
    """Units with ties, with near ties, with neither, and with the least numbers there are."""
    made = torch.Generator().manual_seed(pairs)
    counts = MomentumCounter(3, 40, compat=compat)
    wanted = np.zeros((3, 3, 40), dtype=np.int64)
    for _ in range(2):
        batch: dict[int, tuple[Any, Any]] = {}
        for layer in (2, 0, 1):
            x = (torch.randn(pairs, 40, generator=made) * 10.0**layer).to(dtype)
            y = torch.randn(pairs, 40, generator=made).to(dtype)
            y[:, :10] = x[:, :10]
            y[::3, 10:20] = (x[::3, 10:20].double() * (1 + 2e-6)).to(dtype)
            x[:, 20:25], y[:, 20:25] = torch.finfo(dtype).smallest_normal * 2**-4, 0.0
            batch[layer] = x, y
            near = (x.double() - y.double()).abs() <= 1e-5 * torch.maximum(
                x.double().abs(), y.double().abs()
            ).clamp(min=1.0)
            p, n = (x.half(), y.half()) if compat else (x, y)
            for row, hits in enumerate((p > n, p < n, near)):
                wanted[row, layer] += hits.sum(0).numpy()
        counts.update_layers(batch)
    np.testing.assert_array_equal(counts.state()[0], wanted)
    assert wanted[2].any() and (wanted[0, :, 25:] + wanted[1, :, 25:]).any()


def test_counters_merge_by_addition() -> None:
    first, second = ([1.0, -2.0], [0.0, 4.0]), ([3.0], [3.0])
    merged = counter(first)
    merged.merge(counter(second))
    assert values(merged) == values(counter(first, second)) and merged.count == 3


def test_reference_rounds_to_float16_before_comparing() -> None:
    batch = ([1.0001, 1.01], [1.0, 1.0])
    assert values(counter(batch))["positive"] == 2
    rounded = values(counter(batch, compat="reference"))
    assert rounded["positive"] == 1
    assert rounded["delta"] == pytest.approx(0.0101, abs=1e-6)


def scattered(seed: int, batches: int = 9) -> list[dict[int, tuple[Any, Any]]]:
    """Batches of two layers whose values span many magnitudes."""
    made = torch.Generator().manual_seed(seed)

    def value(pairs: int) -> Any:
        exponent = torch.randint(-12, 12, (pairs, 4), generator=made)
        return torch.randn(pairs, 4, generator=made) * 2.0**exponent

    sizes = [1 + (seed + number) % 5 for number in range(batches)]
    return [{layer: (value(size), value(size)) for layer in (0, 1)} for size in sizes]


def counted(batches: list[dict[int, tuple[Any, Any]]]) -> MomentumCounter:
    made = MomentumCounter(2, 4)
    for batch in batches:
        made.update_layers(batch)
    return made


def bits(made: MomentumCounter) -> bytes:
    counts = made.counts()
    return b"".join(getattr(counts, name).tobytes() for name in counts.__slots__)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.randoms(), st.integers(0, 9))
def test_bits_do_not_depend_on_order_or_merging(seed: int, order: Any, split: int) -> None:
    batches = scattered(seed)
    wanted = bits(counted(batches))
    order.shuffle(batches)
    merged, other = counted(batches[:split]), counted(batches[split:])
    assert bits(counted(batches)) == wanted
    merged.merge(other)
    assert bits(merged) == wanted and merged.count == sum(len(b[0][0]) for b in batches)
    states = [counted([batch]).state() for batch in batches]
    added = MomentumCounter(2, 4)
    added.add_state(*(np.sum(part, axis=0) for part in zip(*states, strict=True)), 0)
    assert bits(added) == wanted


def test_one_sum_has_one_state() -> None:
    """Half a quantum can be had from below and from above."""
    half, zero = 2.0**-11, [0.0]
    below, above = counter(([half], zero)), counter(([2 * half], zero), ([-half], zero))
    np.testing.assert_array_equal(below.state()[1][:, 0], above.state()[1][:, 0])


def test_sums_are_those_of_float64() -> None:
    batches = scattered(3, batches=200)
    counts = counted(batches).counts()
    for layer in (0, 1):
        x, y = (
            torch.cat([batch[layer][side] for batch in batches]).double() for side in (0, 1)
        )
        sums = ((x - y).sum(0), (x + y).sum(0), (x * x + y * y).sum(0))
        for found, wanted in zip(
            (counts.delta, counts.total, counts.squares), sums, strict=True
        ):
            np.testing.assert_allclose(found[layer], wanted.numpy(), rtol=1e-12, atol=1e-12)


def test_limbs_have_room_until_the_next_carry() -> None:
    """Each update adds at most half of the quantum above; float64 counts to 2^53."""
    for upper, lower in itertools.pairwise(momentum._QUANTA):
        assert momentum._CARRY_AFTER * (upper / lower) / 2 + upper / lower <= 2**53


def test_carries_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With quanta so far apart that a limb is full after 2^7 updates, not 2^15."""
    monkeypatch.setattr(momentum, "_QUANTA", (2.0**28, 2.0**-10, 2.0**-56))
    monkeypatch.setattr(momentum, "_CARRY_AFTER", 2**7)
    made, updates, steps = MomentumCounter(1, 1), 1500, 2**45 - 1
    for _ in range(updates):
        made.update(
            0, torch.tensor([[steps * 2.0**-56]], dtype=torch.float64), torch.zeros(1, 1)
        )
    limbs = made.state()[1][:, 0, 0, 0]
    assert sum(int(limb * 2.0**56) for limb in limbs) == updates * steps


def test_huge_activations_degrade_to_rounding_and_overflow_is_refused() -> None:
    huge = [([3e30], [-1e30]), ([1.0], [0.0]), ([2e30], [5e30])]
    for order in itertools.permutations(huge):
        found = values(counter(*order))
        assert found["squares"] == pytest.approx(9e60 + 1e60 + 4e60 + 25e60, rel=1e-6)
        assert (found["positive"], found["negative"]) == (2, 1)
    made = MomentumCounter(1, 1)
    made.update(0, torch.tensor([[1e300]]).double(), torch.zeros(1, 1).double())
    with pytest.raises(FitError, match="overflows float64"):
        made.counts()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_groups_of_layers_count_as_single_layers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = {n: (torch.randn(7, 6).to(dtype), torch.randn(7, 6).to(dtype)) for n in range(5)}
    whole, single = MomentumCounter(5, 6), MomentumCounter(5, 6)
    monkeypatch.setattr("austeer.adapters.localization.momentum._GROUP", {"cpu": 2 * 7 * 6})
    whole.update_layers(batch)
    for layer, both in batch.items():
        single.update(layer, *both)
    mine, theirs = whole.state(), single.state()
    np.testing.assert_array_equal(mine[0], theirs[0])
    # Within one update the order of additions is torch's.
    np.testing.assert_allclose(mine[1].sum(0), theirs[1].sum(0), rtol=1e-13)
    assert whole.count == 7


def test_a_device_without_float64_sums_on_the_cpu() -> None:
    assert MomentumCounter(1, 1, "mps").device == torch.device("cpu")
