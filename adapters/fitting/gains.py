"""`TrainableGains`: γ and the γ predictor of many units as parameters that can be pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from austeer.adapters.architectures import Architecture
from austeer.adapters.attach import adaptive_gain, constant_gain, rescale, transformed
from austeer.adapters.predictor import PHI_MAX, Predictor
from austeer.adapters.sites import Site
from austeer.adapters.steered_site import SteeredSite

_FORGET = 0.9  # of the saliency, a step


@dataclass(frozen=True, slots=True, eq=False)
class UnitStart:
    """Units of one site and what training starts from.

    Attributes:
        index: unit numbers, ascending.
        gamma: initial γ.
        mean: mean of each unit's activation, for standardization.
        std: its standard deviation.
    """

    index: Int[np.ndarray, " k"]
    gamma: Float[np.ndarray, " k"]
    mean: Float[np.ndarray, " k"]
    std: Float[np.ndarray, " k"]


class TrainableGains(nn.Module):
    """γ, and for rank > 0 the γ predictor, of the units of several sites.

    Args:
        units: the units of each site, and where they start.
        rank: of the predictor; 0 for constant gains.
        keep_sign: `constrain` keeps every gain ≥ 0.
        seed: of the predictor's random start (φ = 1 at the start in any case).
        device: where the parameters live.
    """

    def __init__(
        self,
        units: Mapping[Site, UnitStart],
        *,
        rank: int = 0,
        keep_sign: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.rank, self._keep_sign = rank, keep_sign
        self._sites = tuple(units)
        ends = np.cumsum([len(part.index) for part in units.values()])
        self._bounds = [0, *ends.tolist()]
        self._unit = np.concatenate([part.index for part in units.values()])
        self._mean = np.concatenate([part.mean for part in units.values()])
        # A unit that hardly moves says nothing, and must not be blown up to say something.
        self._std = np.concatenate(
            [np.maximum(p.std, 1e-3 * max(float(p.std.max()), 1e-6)) for p in units.values()]
        )
        gamma = np.concatenate([part.gamma for part in units.values()])
        k = len(gamma)
        noise = torch.Generator().manual_seed(seed)
        # Whatever the caller's default dtype and device are.
        own: Any = {"dtype": torch.float32, "device": device}
        start = torch.randn(k, rank, generator=noise, dtype=torch.float32, device="cpu")
        start /= max(k, 1) ** 0.5
        self.gamma = nn.Parameter(torch.tensor(gamma, **own))
        self.V = nn.Parameter(start.to(device))
        self.b = nn.Parameter(torch.zeros(len(units), rank, **own))
        self.U = nn.Parameter(torch.zeros(rank, k, **own))
        self.kept: Tensor
        self.register_buffer("kept", torch.ones(k, dtype=torch.bool, device=device))
        self._saliency = torch.zeros(k, **own)

    @property
    def count(self) -> int:
        """Units not pruned."""
        return int(self.kept.sum())

    @contextmanager
    def attached(self, model: PreTrainedModel, architecture: Architecture) -> Iterator[None]:
        """Steer `model` inside the context, differentiably."""
        with ExitStack() as stack:
            for number, site, rows in self._kept_rows():
                steer = self._steer(number, rows)
                stack.enter_context(transformed(model, architecture.hookpoint(site), steer))
            yield

    def _kept_rows(self) -> Iterator[tuple[int, Site, Int[np.ndarray, " rows"]]]:
        kept = self.kept.cpu().numpy()
        for number, site in enumerate(self._sites):
            first, end = self._bounds[number : number + 2]
            rows = first + np.flatnonzero(kept[first:end])
            if len(rows):
                yield number, site, rows

    def _steer(self, number: int, rows: Int[np.ndarray, " rows"]) -> Callable[[Tensor], Tensor]:
        device = self.gamma.device
        index, gamma = torch.as_tensor(self._unit[rows], device=device), self.gamma[rows]
        if not self.rank:
            return lambda x: rescale(x, index, constant_gain(gamma, 1.0))
        mean = torch.as_tensor(self._mean[rows], dtype=torch.float32, device=device)
        std = torch.as_tensor(self._std[rows], dtype=torch.float32, device=device)
        V = self.V[rows] / std[:, None]
        b = self.b[number] - mean @ V
        gain = adaptive_gain(gamma, V, b, self.U[:, rows], 1.0)
        return lambda x: rescale(x, index, gain)

    @torch.no_grad()
    def observe(self) -> None:
        """Note how much each unit helps, from the gradient of the margin loss alone.

        Saliency −γ_i ∂loss/∂γ_i − V_i · ∂loss/∂V_i is, to first order, the loss that unit i
        takes away: by being rescaled, and by telling the predictor where it is.
        """
        self._saliency.mul_(_FORGET)
        for part in (self.gamma, self.V):
            if part.grad is not None:
                worth = (part * part.grad).reshape(len(self.gamma), -1).sum(1)
                self._saliency.sub_(worth, alpha=1 - _FORGET)

    @torch.no_grad()
    def prune(self, count: int) -> None:
        """Keep the `count` units of largest saliency; the others steer no longer."""
        worth = self._saliency.masked_fill(~self.kept, -torch.inf)
        best = worth.topk(min(count, self.count)).indices
        self.kept.zero_()
        self.kept[best] = True

    @torch.no_grad()
    def constrain(self) -> None:
        """With `keep_sign`, raise γ so that no predictor can make a gain negative."""
        if self._keep_sign:
            self.gamma.clamp_(min=-1.0 / (PHI_MAX if self.rank else 1.0))

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Multiply every γ."""
        self.gamma.mul_(factor)

    def to_sites(self) -> list[SteeredSite]:
        """The kept gains as an adapter's sites, standardization absorbed."""
        gamma, V, b, U = (
            part.detach().cpu().numpy() for part in (self.gamma, self.V, self.b, self.U)
        )
        found = []
        for number, site, rows in self._kept_rows():
            predictor = None
            if self.rank:
                predictor = Predictor.absorb(
                    V[rows], b[number], U[:, rows], self._mean[rows], self._std[rows]
                )
            index = self._unit[rows].astype(np.int64)
            found.append(SteeredSite(site, index, gamma[rows].copy(), predictor))
        return found
