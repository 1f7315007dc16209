"""The γ predictor of the `adaptive` strength: how much of γ a token deserves.

    t = Vᵀ x + b ∈ ℝʳ,    φ = 4 · sigmoid(Uᵀ t − ln 3) ∈ (0, 4),    γ(x) = γ · φ

x are the site's selected activations at one token; φ = 1 where t = 0, so that an untrained
predictor is the constant γ. The predictor reads one token only and needs no state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from austeer.adapters._errors import AdapterError

PHI_MAX = 4.0
PHI_SHIFT = math.log(3.0)


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """Weights of one site's predictor in float32, standardization already absorbed.

    Attributes:
        V: reads the k selected activations into r features.
        b: their bias.
        U: spreads the r features over the k units.

    Raises:
        AdapterError: shapes disagree, or a number is not finite.
    """

    V: Float[np.ndarray, "k r"]
    b: Float[np.ndarray, " r"]
    U: Float[np.ndarray, "r k"]

    def __post_init__(self) -> None:
        for name in "VbU":
            # As saved, so that an adapter steers the same before it is saved and after.
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float32))
        k, r = self.V.shape if self.V.ndim == 2 else (-1, -1)
        if r < 1 or self.b.shape != (r,) or self.U.shape != (r, k):
            raise AdapterError(
                f"predictor: expected V [k, r], b [r], U [r, k], got {self.V.shape}, "
                f"{self.b.shape}, {self.U.shape}"
            )
        if not all(np.isfinite(part).all() for part in (self.V, self.b, self.U)):
            raise AdapterError("predictor: expected finite weights, found NaN or infinity")

    @property
    def rank(self) -> int:
        """Number of features r."""
        return int(self.b.shape[0])

    @classmethod
    def absorb(
        cls,
        V: Float[np.ndarray, "k r"],
        b: Float[np.ndarray, " r"],
        U: Float[np.ndarray, "r k"],
        mean: Float[np.ndarray, " k"],
        std: Float[np.ndarray, " k"],
    ) -> Predictor:
        """Absorb z = (x − mean) / std into the weights: Vᵀz + b == V'ᵀx + b'."""
        scaled = V.astype(np.float64) / std.astype(np.float64)[:, None]
        shifted = b.astype(np.float64) - mean.astype(np.float64) @ scaled
        return cls(scaled.astype(np.float32), shifted.astype(np.float32), U.astype(np.float32))

    def phi(self, x: Float[np.ndarray, "*tokens k"]) -> Float[np.ndarray, "*tokens k"]:
        """φ for the selected activations x, computed in float64."""
        t = x.astype(np.float64) @ self.V.astype(np.float64) + self.b
        logits = t @ self.U.astype(np.float64) - PHI_SHIFT
        return np.asarray(PHI_MAX * np.exp(-np.logaddexp(0.0, -logits)))
