"""`MomentumCounter`: signs and sums over pairs, the same bits in whatever order they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from austeer.adapters._errors import FitError
from austeer.adapters.localization.ranking_file import Counts

NEAR_TIE = 1e-5

# Each limb holds multiples of its quantum, the next one what is below it.
_QUANTA = (2.0**28, 2.0**-10, 2.0**-48)
# A limb below the first grows by at most half of the quantum above it, 2^37 of its own, with
# each update: after 2^15 of them it still has one of its 53 bits to spare.
_CARRY_AFTER = 2**15
# Elements handled at once: on a CPU they should stay in its cache, elsewhere each call costs.
_GROUP = {"cpu": 2**15}
_GROUP_ELSEWHERE = 2**22

LayerValues = Mapping[int, tuple[Float[Tensor, "P D"], Float[Tensor, "P D"]]]


class MomentumCounter:
    """Sums over pairs for every unit of one component; they merge by addition.

    The float sums of each update are cut into three limbs, whose additions are exact while a
    sum stays below 2^81 (2.4e24): the bits of the result then depend on what was summed in
    each update, not on the order of updates and merges. What is below 2^-48 (3.6e-15) of an
    update is dropped. A larger sum is right to the usual rounding of float64.

    Args:
        num_layers: decoder layers of the model.
        width: units of the component in each layer.
        device: where the sums are kept; the CPU stands in for one without float64.
        compat: `reference` rounds activations to float16 before comparing.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        device: torch.device | str = "cpu",
        compat: str | None = None,
    ) -> None:
        self.device = _summing_device(torch.device(device))
        shape = (3, num_layers, width)
        # Rows: positive, negative, near ties; and, in each limb, ΣΔ, Σx, Σx².
        self._integers = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._limbs = torch.zeros((3, *shape), dtype=torch.float64, device=self.device)
        self._compat = compat
        self._seen = [0] * num_layers
        self._updates = 0

    @property
    def count(self) -> int:
        """Pairs added so far to every layer."""
        return min(self._seen)

    def update(
        self, layer: int, positive: Float[Tensor, "P D"], negative: Float[Tensor, "P D"]
    ) -> None:
        """Add P pairs of one layer; signs are taken in the dtype the values come in."""
        self.update_layers({layer: (positive, negative)})

    def update_layers(self, values: LayerValues) -> None:
        """Add the same P pairs to several layers: (positive, negative) of each layer."""
        if not any(len(positive) for positive, _ in values.values()):
            return
        if self._updates + len(values) > _CARRY_AFTER:
            self._carry()
        self._updates += len(values)
        parts = []
        for layers in _groups(values):
            positive, negative = (
                _stacked([values[layer][side] for layer in layers]) for side in (0, 1)
            )
            parts.append(_sums(positive, negative))
        surplus, least, sums = (
            torch.cat([x.to(self.device) for x in part], -2)
            for part in zip(*parts, strict=True)
        )
        signs = self._signs(values, surplus, least, sums[2].sqrt())
        where = torch.tensor(list(values), device=self.device)
        self._integers.index_add_(1, where, signs)
        self._limbs.index_add_(2, where, _limbs(sums))
        for layer, (positive, _) in values.items():
            self._seen[layer] += len(positive)

    def _signs(
        self,
        values: LayerValues,
        surplus: Float[Tensor, "G D"],
        least: Float[Tensor, "G D"],
        largest: Float[Tensor, "G D"],
    ) -> Int[Tensor, "3 G D"]:
        """Counts of positive, negative and near ties.

        Comparing costs several times as much as subtracting, and few units have a near tie:
        only units that may have one are compared.

        Args:
            values: of all layers.
            surplus: positives minus negatives of each unit, if it has no tie.
            least: its smallest difference.
            largest: no value of it is larger.
        """
        pairs = len(next(iter(values.values()))[0])
        signs = torch.stack((pairs + surplus, pairs - surplus, torch.zeros_like(surplus)))
        signs = signs.div_(2).long()
        # 1 % more than the bound of a near tie, for the rounding of differences of 16 bits.
        near = least <= largest.clamp_(min=1.0).mul_(1.01 * NEAR_TIE)
        if self._compat is not None:
            near.fill_(True)
        layer, unit = near.nonzero().unbind(1)
        if len(unit):
            positive, negative = (_columns(values, side, layer, unit) for side in (0, 1))
            signs[:, layer, unit] = _compared(positive, negative, self._compat)
        return signs

    def merge(self, other: MomentumCounter) -> None:
        """Add the sums over other pairs."""
        self.add_state(*other.state(), other._seen)

    def state(self) -> tuple[Int[np.ndarray, "3 L D"], Float[np.ndarray, "3 3 L D"]]:
        """Exact sums: signs (positive, negative, near ties), and limbs of (ΣΔ, Σx, Σx²).

        Equal sums have equal bits, however they were added up.
        """
        self._carry()
        return self._integers.cpu().numpy(), self._limbs.cpu().numpy()

    def add_state(
        self,
        signs: Int[np.ndarray, "3 L D"],
        limbs: Float[np.ndarray, "3 3 L D"],
        pairs: int | Sequence[int],
    ) -> None:
        """Add the `state` of another counter over `pairs` other pairs (in each layer)."""
        self._carry()
        self._integers += torch.from_numpy(signs.copy()).to(self.device)
        self._limbs += torch.from_numpy(limbs.copy()).to(self.device)
        more = [pairs] * len(self._seen) if isinstance(pairs, int) else pairs
        self._seen = [sum(both) for both in zip(self._seen, more, strict=True)]

    def counts(self) -> Counts:
        """The sums as numpy arrays.

        Raises:
            FitError: a sum is not finite.
        """
        signs, (high, middle, low) = self.state()
        # A negative sum is a negative limb and positive ones: the large ones cancel first.
        sums = (high + middle) + low
        if not np.isfinite(sums).all():
            raise FitError("a sum over activations overflows float64; are the weights sound?")
        return Counts(*signs, *sums)

    def _carry(self) -> None:
        """Move what a limb holds above its place into the next one; the sum stays the same.

        Rounding down leaves every limb below the first in [0, quantum above), which makes
        the limbs of a sum unique.
        """
        for upper in (1, 0):
            step = _QUANTA[upper]
            excess = (self._limbs[upper + 1] / step).floor_().mul_(step)
            self._limbs[upper] += excess
            self._limbs[upper + 1] -= excess
        self._updates = 0


def _summing_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type in ("mps", "meta") else device


def _groups(values: LayerValues) -> Iterator[list[int]]:
    """Layers whose values lie on one device, not too many at once."""
    group: list[int] = []
    for layer, (x, _) in values.items():
        most = _GROUP.get(x.device.type, _GROUP_ELSEWHERE)
        if group and (
            values[group[0]][0].device != x.device or (len(group) + 1) * x.numel() > most
        ):
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def _stacked(layers: Sequence[Float[Tensor, "P D"]]) -> Float[Tensor, "G P D"]:
    return torch.stack(list(layers)) if len(layers) > 1 else layers[0][None]


def _sums(
    positive: Float[Tensor, "G P D"], negative: Float[Tensor, "G P D"]
) -> tuple[Float[Tensor, "G D"], Float[Tensor, "G D"], Float[Tensor, "3 G D"]]:
    """Of one group of layers over its P pairs: Σ sign Δ, min |Δ|, and (ΣΔ, Σx, Σx²)."""
    device = _summing_device(positive.device)
    positive, negative = positive.to(device), negative.to(device)
    # Even the least difference of two floats is a float: none but equal values give zero.
    difference = positive - negative
    surplus = difference.sign().sum(1, dtype=torch.float32)
    least = difference.abs_().amin(1).double()
    wide, totals, squares = torch.empty_like(positive, dtype=torch.float64), [], []
    # One side after the other: two copies in float64 are more than a cache holds.
    for side in (positive, negative):
        totals.append(wide.copy_(side).sum(1))
        squares.append(wide.square_().sum(1))
    more, less = totals
    return surplus, least, torch.stack((more - less, more + less, squares[0] + squares[1]))


def _columns(
    values: LayerValues, side: int, rows: Int[Tensor, " U"], units: Int[Tensor, " U"]
) -> Float[Tensor, "P U"]:
    """One side's values of `units`, each in the layer that stands at its row of `values`."""
    counts = torch.bincount(rows, minlength=len(values)).tolist()
    parts = [
        both[side].index_select(1, some.to(both[side].device)).to(units.device)
        for both, some in zip(values.values(), torch.split(units, counts), strict=True)
    ]
    return torch.cat(parts, 1)


def _compared(
    positive: Float[Tensor, "P U"], negative: Float[Tensor, "P U"], compat: str | None
) -> Int[Tensor, "3 U"]:
    """Counts of positive, negative and near ties, value by value."""
    near = _near_ties(positive, negative)
    if compat == "reference":
        positive, negative = positive.half(), negative.half()
    hits = (positive > negative, positive < negative, near)
    return torch.stack([hit.sum(0, dtype=torch.int32) for hit in hits]).long()


def _near_ties(positive: Tensor, negative: Tensor) -> Tensor:
    if positive.dtype.itemsize < 4:
        positive, negative = positive.float(), negative.float()
    scale = torch.maximum(positive.abs(), negative.abs()).clamp_(min=1.0)
    return (positive - negative).abs_() <= scale.mul_(NEAR_TIE)


def _limbs(sums: Float[Tensor, "3 G D"]) -> Float[Tensor, "3 3 G D"]:
    """Cut each sum into multiples of the three quanta; what is left below is dropped."""
    parts = []
    for quantum in _QUANTA:
        part = (sums / quantum).round_().mul_(quantum)
        sums = sums - part
        parts.append(part)
    return torch.stack(parts)
