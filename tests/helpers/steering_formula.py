"""What a steered activation must be: the formulas of DESIGN §4 in float64 numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from austeer.adapters import SteeredSite, SteeringAdapter

Steer = Callable[[np.ndarray], np.ndarray]

UNITS = {
    "attention": ([3, 0], [0.5, -1.5]),
    "neuron": ([5, 1, 2], [2.0, -0.25, 1.0]),
    "ffn": ([2], [-0.8]),
    "layer": ([1, 3], [0.3, 0.9]),
}
"""Units and γ of each component of the toy graphs."""


def steer_of(site: SteeredSite, scale: float = 1.0) -> Steer:
    """x·(1 + scale·γ·φ(x)) at the site's units, φ = 1 without a predictor."""

    def steer(x: np.ndarray) -> np.ndarray:
        out, selected = x.astype(np.float64), x[..., site.index].astype(np.float64)
        phi: Any = 1.0
        if site.predictor is not None:
            p = site.predictor
            t = selected @ p.V.astype(float) + p.b
            phi = 4.0 / (1.0 + np.exp(-(t @ p.U.astype(float) - np.log(3.0))))
        out[..., site.index] = selected * (1.0 + scale * site.gamma.astype(float) * phi)
        return out

    return steer


def steering(*adapters: SteeringAdapter, scale: float = 1.0) -> dict[str, Steer]:
    """All sites of the adapters as `{layer}.{component}`; one adapter after the other."""
    found: dict[str, Steer] = {}
    for adapter in adapters:
        for site in adapter.sites:
            key = f"{site.site.layer}.{site.site.component}"
            own = steer_of(site, scale)
            before = found.get(key)
            found[key] = own if before is None else _then(before, own)
    return found


def _then(first: Steer, second: Steer) -> Steer:
    return lambda x: second(first(x))
