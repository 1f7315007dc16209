"""Where a model can be steered: components, sites, ranked units, refusals."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float, Int

from austeer.adapters._errors import SiteError


class Component(StrEnum):
    """A place in every decoder layer whose activations can be rescaled."""

    ATTENTION = "attention"
    """Input of the attention output projection (o_proj)."""
    FFN = "ffn"
    """Output of the MLP's last projection, before any norm or residual add."""
    NEURON = "neuron"
    """Input of the MLP's last projection (down_proj)."""
    LAYER = "layer"
    """Output of the decoder layer."""

    @property
    def foldable(self) -> bool:
        """Whether a constant gain at this place can be absorbed into weights."""
        return self is not Component.LAYER


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One component of one decoder layer; `key` names it in files."""

    layer: int
    component: Component

    def __post_init__(self) -> None:
        # A plain string would compare equal to the enum and yet fail every `is`.
        object.__setattr__(self, "component", Component(self.component))

    @property
    def key(self) -> str:
        """`layers.{i}.{component}`, the prefix of this site's tensors."""
        return f"layers.{self.layer}.{self.component.value}"

    def __str__(self) -> str:
        return self.key

    @classmethod
    def parse(cls, key: str) -> Site:
        """Read a site back from its `key`.

        Raises:
            SiteError: not of the form `layers.{i}.{component}`.
        """
        names = "|".join(component.value for component in Component)
        # One spelling for each site, and no more digits than int() takes.
        found = re.fullmatch(rf"layers\.(0|[1-9][0-9]{{0,8}})\.({names})", key)
        if found is None:
            raise SiteError(f"{key!r}: expected layers.<number>.<{names}>")
        return cls(int(found[1]), Component(found[2]))


@dataclass(frozen=True, slots=True, eq=False)
class UnitTable:
    """The k best atomic units of one component, one row each, best first."""

    component: Component
    layer: Int[np.ndarray, " k"]
    unit: Int[np.ndarray, " k"]
    beta: Float[np.ndarray, " k"]

    def __len__(self) -> int:
        return len(self.unit)

    def head(self, k: int) -> UnitTable:
        """The first k rows.

        Raises:
            SiteError: fewer than k units exist, or k < 1.
        """
        if not 1 <= k <= len(self):
            raise SiteError(f"{self.component}: {k} units asked for, 1 to {len(self)} exist")
        return UnitTable(self.component, self.layer[:k], self.unit[:k], self.beta[:k])

    def by_site(self) -> dict[Site, Int[np.ndarray, " rows"]]:
        """Row numbers of each steered site, sites ascending, rows by unit."""
        order = np.lexsort((self.unit, self.layer))
        sites: dict[Site, Int[np.ndarray, " rows"]] = {}
        for layer in np.unique(self.layer):
            rows = order[self.layer[order] == layer]
            sites[Site(int(layer), self.component)] = rows
        return sites


@dataclass(frozen=True, slots=True)
class Refusal:
    """A "no" with its reason: which site, why, and what works instead."""

    site: Site | None
    reason: str

    def __str__(self) -> str:
        return f"{self.site}: {self.reason}" if self.site else self.reason
