"""`Ranking`: how every unit of a model tells positive from negative; ranked, saved, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from austeer.adapters._errors import FitError, SiteError
from austeer.adapters.architectures import text_config
from austeer.adapters.fingerprint import ends_fingerprint
from austeer.adapters.localization.ranking_file import (
    Counts,
    RankingInfo,
    read_ranking,
    write_ranking,
)
from austeer.adapters.sites import Component, UnitTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIE_BREAKS = ("effect", "reference")


class Ranking:
    """Discriminative scores of all units of the localized components.

    Args:
        info: what it was made from.
        counts: sums of each component.
    """

    def __init__(self, info: RankingInfo, counts: Mapping[Component, Counts]) -> None:
        self.info = info
        self._counts = dict(counts)

    @property
    def components(self) -> tuple[Component, ...]:
        """The localized components."""
        return tuple(self._counts)

    @property
    def count(self) -> int:
        """Number of pairs, N."""
        return self.info.count

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.info.num_layers

    def counts(self, component: str | Component) -> Counts:
        """All sums of one component.

        Raises:
            SiteError: the component was not localized.
        """
        if component not in self._counts:
            known = ", ".join(self._counts)
            raise SiteError(
                f"component {str(component)!r}: not in this ranking, which has {known}"
            )
        return self._counts[Component(component)]

    def positive(self, component: str | Component) -> Int[np.ndarray, "L D"]:
        """Pairs whose positive side has the larger value, per unit."""
        return self.counts(component).positive

    def negative(self, component: str | Component) -> Int[np.ndarray, "L D"]:
        """Pairs whose negative side has the larger value, per unit."""
        return self.counts(component).negative

    def near_ties(self, component: str | Component) -> int:
        """Comparisons, over all units and pairs, that rounding could decide; see `Counts`."""
        return int(self.counts(component).near_ties.sum())

    def beta(self, component: str | Component) -> Float[np.ndarray, "L D"]:
        """β = +p/N where p ≥ n, else −n/N."""
        counts = self.counts(component)
        p, n = counts.positive, counts.negative
        return np.where(p >= n, p, -n) / np.float64(self.count)

    def mean(self, component: str | Component) -> Float[np.ndarray, "L D"]:
        """Mean activation over both sides of all pairs."""
        return self.counts(component).total / (2 * self.count)

    def std(self, component: str | Component) -> Float[np.ndarray, "L D"]:
        """Standard deviation (population) of the activation over both sides of all pairs."""
        mean_square = self.counts(component).squares / (2 * self.count)
        variance = np.maximum(mean_square - self.mean(component) ** 2, 0.0)
        return np.asarray(np.sqrt(variance))

    def effect(self, component: str | Component) -> Float[np.ndarray, "L D"]:
        """Standardized effect size |mean Δ| / std(x), 0 for a constant unit."""
        shift = np.abs(self.counts(component).delta) / self.count
        std = self.std(component)
        return np.asarray(np.divide(shift, std, out=np.zeros_like(shift), where=std > 0))

    def top(self, component: str | Component, k: int, tie_break: str = "effect") -> UnitTable:
        """The k units with the largest |β| over all layers, best first.

        Args:
            component: a localized component.
            k: number of units.
            tie_break: order of equal |β|: `effect` (largest standardized effect first, then
                layer and unit) or `reference` (layer and unit).

        Raises:
            SiteError: fewer than k units exist, or unknown component or tie-break.
        """
        if tie_break not in TIE_BREAKS:
            raise SiteError(f"tie-break {tie_break!r}: expected {' or '.join(TIE_BREAKS)}")
        beta = self.beta(component).ravel()
        if not 1 <= k <= beta.size:
            raise SiteError(f"{component}: {k} units asked for, 1 to {beta.size} exist")
        strongest = -np.abs(beta)
        keys = (
            (-self.effect(component).ravel(), strongest)
            if tie_break == "effect"
            else (strongest,)
        )
        best = np.lexsort(keys)[:k]
        layer, unit = np.divmod(best, self.beta(component).shape[1])
        return UnitTable(Component(component), layer, unit, beta[best])

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model that this ranking was not made from.

        Raises:
            FitError: another model type, number of layers or weights.
        """
        found = (model.config.model_type, text_config(model).num_hidden_layers)
        made_for = (self.info.model_type, self.num_layers)
        if found != made_for:
            raise FitError(
                f"ranking for a {made_for[0]} model with {made_for[1]} layers, this one is "
                f"{found[0]} with {found[1]}; localize again"
            )
        digest = ends_fingerprint(model, self.components)
        if digest != self.info.base_fingerprint:
            raise FitError(
                f"ranking for another base model: made for fingerprint "
                f"{self.info.base_fingerprint}, this model has {digest}; localize again"
            )

    def save(self, path: str | Path) -> Path:
        """Write one .safetensors file, atomically; an existing file is replaced.

        Raises:
            OutputError: it cannot be written.
        """
        write_ranking(Path(path), self.info, self._counts)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Ranking:
        """Read a saved ranking.

        Raises:
            FitError: missing, corrupt, not a ranking, of another version, or inconsistent.
        """
        return cls(*read_ranking(Path(path)))
