"""What a fit may do, and the candidates that it chooses among."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from austeer.adapters._errors import FitError
from austeer.adapters._numbers import check_whole
from austeer.adapters.config import Strength
from austeer.adapters.measurement.measure import Judgement
from austeer.adapters.sites import Component
from austeer.adapters.steered_site import SteeredSite

HEADROOM = 0.93  # share of the budget a choice may use, so that fresh text stays within it


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """What a fit may do.

    Attributes:
        strength: how gains are set.
        kl_budget: ceiling of KL(base ‖ steered), nats per token.
        max_units: largest number of steered units.
        components: components to choose among.
        fluency_limit: ceiling of the perplexity ratio of steered continuations; infinity for
            none. Only trained strengths aim at it.
        rank: rank of the γ predictor (strength `adaptive`).
        keep_sign: keep every gain ≥ 0.
        steps: optimizer steps of a trained strength.
        learning_rate: of a trained strength.
        neutral_sequences: texts in each neutral sample.
        neutral_length: tokens of each.
        batch_size: pairs or texts per forward pass.
        seed: of splits, samples and training.
        gradient_checkpointing: keep less for the backward pass; None where the model is large.

    Raises:
        FitError: a value out of range.
    """

    strength: Strength = Strength.FITTED
    kl_budget: float = 0.1
    max_units: int = 64
    components: tuple[Component, ...] = tuple(Component)
    fluency_limit: float = 1.3
    rank: int = 1
    keep_sign: bool = False
    steps: int = 200
    learning_rate: float = 0.05
    neutral_sequences: int = 96
    neutral_length: int = 96
    batch_size: int = 16
    seed: int = 0
    gradient_checkpointing: bool | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.kl_budget) and self.kl_budget > 0):
            raise FitError(
                f"KL budget: expected a positive number of nats per token, got {self.kl_budget}"
            )
        if not self.fluency_limit > 1.0:
            raise FitError(f"fluency limit: expected a ratio above 1, got {self.fluency_limit}")
        for name in ("max_units", "rank", "steps", "batch_size", "neutral_sequences", "seed"):
            check_whole(name, getattr(self, name), int(name != "seed"))
        if self.rank > 1 and self.strength is not Strength.ADAPTIVE:
            raise FitError(f"rank: {self.strength} has no γ predictor; leave it at 1")
        check_whole("neutral_length", self.neutral_length, 2)
        if not self.components:
            raise FitError("components: expected at least one")


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One choice of units and their gains, judged on validation data.

    Attributes:
        sites: the gains.
        judgement: on validation data.
        within: whether the budget is kept.
        alpha: factor of an untrained strength, else None.
    """

    sites: list[SteeredSite]
    judgement: Judgement
    within: bool
    alpha: float | None = None

    @property
    def k(self) -> int:
        """Number of steered units."""
        return sum(len(steered.index) for steered in self.sites)

    @property
    def components(self) -> tuple[Component, ...]:
        """Components with a steered unit."""
        return tuple(sorted({steered.site.component for steered in self.sites}))

    def as_dict(self) -> dict[str, Any]:
        """The candidate's line in the report."""
        return {
            "component": "+".join(self.components),
            "k": self.k,
            "alpha": self.alpha,
            "validation_margin": self.judgement.margin,
            "validation_kl": self.judgement.kl,
            "validation_fluency": self.judgement.fluency,
            "within_budget": self.within,
        }


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """The largest validation margin within the budget, else the least side effect."""
    inside = [candidate for candidate in candidates if candidate.within]
    if inside:
        return max(inside, key=lambda candidate: candidate.judgement.margin)
    return min(candidates, key=lambda candidate: candidate.judgement.kl)
