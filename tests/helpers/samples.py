"""Made-up inputs that several test files share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from austeer.adapters import Predictor, Site, SteeredSite
from austeer.adapters.tokens import PairTokens


def some_tokens(lengths: Sequence[tuple[int, int, int]]) -> list[PairTokens]:
    """Random pairs with these numbers of tokens in prefix, positive and negative."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 40, (count,), generator=generator).tolist())

    return [
        PairTokens(ids(prefix), ids(positive), ids(negative), f"f:{number}")
        for number, (prefix, positive, negative) in enumerate(lengths)
    ]


def random_site(
    site: Site, units: Sequence[int], rank: int, rng: np.random.Generator
) -> SteeredSite:
    """Random gains, and for rank > 0 a random predictor, at these units."""
    k = len(units)
    shapes = ((k, rank), (rank,), (rank, k))
    weights = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    gamma = rng.normal(size=k).astype(np.float32)
    return SteeredSite(site, np.array(units), gamma, Predictor(*weights) if rank else None)
