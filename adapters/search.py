"""The search behind a fit: candidates of component, k and α, or trained gains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from austeer.adapters._errors import FitError
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import steering_hooks
from austeer.adapters.config import Strength
from austeer.adapters.evaluate import Steered
from austeer.adapters.localization import Ranking
from austeer.adapters.measure import Share
from austeer.adapters.predictor import PHI_MAX
from austeer.adapters.sites import Component, UnitTable
from austeer.adapters.steered_site import SteeredSite
from austeer.adapters.strength import alphas_within, constant_sites, unit_direction
from austeer.adapters.train import Judgement, TrainableGains, TrainOptions, train_gains

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

_HEADROOM = 0.93  # share of the budget a choice may use, so that fresh text stays within it
_TRAIN_SHARE = 0.88  # share of the budget that training aims at
_PROBE_SHARE = 0.25  # share of the steps that compares candidates before one is trained
_LOWERINGS = 12  # times that α is lowered by 5 % at most
_START_ALPHA = 0.3  # α of the oriented gains that training starts from


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """What a fit may do.

    Attributes:
        strength: how gains are set.
        kl_budget: ceiling of KL(base ‖ steered), nats per token.
        max_units: largest number of steered units.
        components: components to choose among.
        rank: rank of the γ predictor (strength `adaptive`).
        keep_sign: keep every gain ≥ 0.
        steps: optimizer steps of a trained strength.
        learning_rate: of a trained strength.
        neutral_sequences: texts in each neutral sample.
        neutral_length: tokens of each.
        batch_size: pairs or texts per forward pass.
        seed: of splits, samples and training.

    Raises:
        FitError: a value out of range.
    """

    strength: Strength = Strength.FITTED
    kl_budget: float = 0.1
    max_units: int = 64
    components: tuple[Component, ...] = tuple(Component)
    rank: int = 1
    keep_sign: bool = False
    steps: int = 120
    learning_rate: float = 0.05
    neutral_sequences: int = 96
    neutral_length: int = 96
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.kl_budget) and self.kl_budget > 0):
            raise FitError(
                f"KL budget: expected a positive number of nats per token, got {self.kl_budget}"
            )
        for name in ("max_units", "rank", "steps", "batch_size", "neutral_sequences"):
            if getattr(self, name) < 1:
                raise FitError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.neutral_length < 2:
            raise FitError(f"neutral_length: expected at least 2, got {self.neutral_length}")
        if not self.components:
            raise FitError("components: expected at least one")


@dataclass(slots=True)
class Candidate:
    """One choice of component, k and α (or trained gains), judged on validation data."""

    component: Component
    k: int
    alpha: float | None
    sites: list[SteeredSite] = field(repr=False)
    judgement: Judgement
    within: bool

    def as_dict(self) -> dict[str, Any]:
        """The candidate's line in the report."""
        return {
            "component": self.component.value,
            "k": self.k,
            "alpha": self.alpha,
            "validation_margin": self.judgement.margin,
            "validation_kl": self.judgement.kl,
            "within_budget": self.within,
        }


class CandidateSearch:
    """Makes the candidates of a fit and chooses among them on validation data.

    Args:
        model: base model.
        ranking: the units' scores.
        options: see `FitOptions`.
        fit: split that gains are trained on.
        validation: split that choices are made on.
        progress: called with (stage, done, total).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ranking: Ranking,
        options: FitOptions,
        fit: Share,
        validation: Share,
        progress: Progress,
    ) -> None:
        self._model, self._ranking, self._options = model, ranking, options
        self._fit, self._validation, self._progress = fit, validation, progress
        self._architecture = architecture_of(model.config.model_type)
        self._limit = options.kl_budget * _HEADROOM

    def candidates(self) -> list[Candidate]:
        """Every candidate, judged on validation data.

        Raises:
            FitError: more units asked for than exist.
        """
        trained = self._options.strength.trained
        return list(self._trained() if trained else self._untrained())

    def choose(self, candidates: Sequence[Candidate]) -> Candidate:
        """The largest validation margin within the budget, else the least side effect."""
        inside = [candidate for candidate in candidates if candidate.within]
        if inside:
            return max(inside, key=lambda candidate: candidate.judgement.margin)
        return min(candidates, key=lambda candidate: candidate.judgement.kl)

    def steered(self, sites: Sequence[SteeredSite]) -> Steered:
        """The context maker that steers the model at `sites`."""
        return lambda: steering_hooks(self._model, self._architecture, sites)

    def _untrained(self) -> Iterator[Candidate]:
        tables = list(self._tables(_unit_counts(self._options.max_units)))
        for number, table in enumerate(tables):
            self._progress("candidates", number, len(tables))
            yield self._best_alpha(table)
        self._progress("candidates", len(tables), len(tables))

    def _best_alpha(self, table: UnitTable) -> Candidate:
        """The α with the largest validation margin whose KL keeps the budget."""
        direction = unit_direction(table, self._ranking, self._options.strength)

        def steered(alpha: float) -> Steered:
            sites = constant_sites(table, alpha * direction, self._options.keep_sign)
            return self.steered(sites)

        def margin(alpha: float) -> float:
            return self._validation.mean_margin(steered(alpha))

        screen = self._validation.screen
        alpha = max(alphas_within(lambda a: screen.mean(steered(a)) <= self._limit), key=margin)
        found = self._validation.judge(steered(alpha))
        for _ in range(_LOWERINGS):
            if found.kl <= self._limit:
                break
            # The screen is a quarter of the text: the whole of it may ask for a lower α.
            alpha *= 0.95
            found = self._validation.judge(steered(alpha))
        sites = constant_sites(table, alpha * direction, self._options.keep_sign)
        within = found.kl <= self._limit
        return Candidate(table.component, len(table), alpha, sites, found, within)

    def _trained(self) -> Iterator[Candidate]:
        tables = list(self._tables(_probe_counts(self._options.max_units)))
        if len(tables) > 1:
            steps = max(1, round(self._options.steps * _PROBE_SHARE))
            probes = [self._train(table, steps, "probe") for table in tables]
            yield from probes
            best = self.choose(probes)
            tables = [
                table for table, probe in zip(tables, probes, strict=True) if probe is best
            ]
        yield self._train(tables[0], self._options.steps, "train")

    def _train(self, table: UnitTable, steps: int, stage: str) -> Candidate:
        options = self._options
        gains = self._gains(table)
        trained = train_gains(
            self._model,
            self._architecture,
            gains,
            self._fit.pair_set.batches,
            self._fit.meter,
            lambda: self._validation.judge(
                lambda: gains.attached(self._model, self._architecture)
            ),
            self._limit,
            TrainOptions(
                steps=steps,
                learning_rate=options.learning_rate,
                kl_target=options.kl_budget * _TRAIN_SHARE,
                keep_sign=options.keep_sign,
                judge_every=max(10, steps // 12),
                seed=options.seed,
            ),
            lambda done, total: self._progress(f"{stage} {table.component.value}", done, total),
        )
        sites = gains.to_sites()
        found = Candidate(
            table.component, len(table), None, sites, trained.judgement, trained.within
        )
        return found if found.within else self._shrink(found)

    def _gains(self, table: UnitTable) -> TrainableGains:
        options = self._options
        adaptive = options.strength is Strength.ADAPTIVE
        start = _START_ALPHA * unit_direction(table, self._ranking, Strength.ORIENTED)
        lowest = -1.0 / (PHI_MAX if adaptive else 1.0)
        if options.keep_sign:
            start = np.maximum(start, lowest)
        place = (table.layer, table.unit)
        return TrainableGains(
            table,
            start,
            self._ranking.mean(table.component)[place],
            self._ranking.std(table.component)[place],
            rank=options.rank if adaptive else 0,
            seed=options.seed,
            device=self._model.device,
        )

    def _shrink(self, candidate: Candidate) -> Candidate:
        """Scale γ down until the validation KL keeps the budget."""
        factor = 1.0
        for _ in range(24):
            factor *= 0.9
            sites = [
                SteeredSite(s.site, s.index, s.gamma * np.float32(factor), s.predictor)
                for s in candidate.sites
            ]
            found = self._validation.judge(self.steered(sites))
            if found.kl <= self._limit:
                return Candidate(
                    candidate.component, candidate.k, None, sites, found, within=True
                )
        return candidate

    def _tables(self, counts: Sequence[int]) -> Iterator[UnitTable]:
        sizes = {c: self._ranking.beta(c).size for c in self._options.components}
        if max(counts) > max(sizes.values()):
            known = ", ".join(f"{c.value} has {size}" for c, size in sizes.items())
            raise FitError(f"max_units {max(counts)}: more than exist ({known}); ask for fewer")
        for component, size in sizes.items():
            for k in sorted({min(k, size) for k in counts}):
                yield self._ranking.top(component, k)


def _unit_counts(max_units: int) -> list[int]:
    """Powers of two below `max_units`, from an eighth of it, and `max_units` itself."""
    return sorted({max(1, max_units >> shift) for shift in range(4)})


def _probe_counts(max_units: int) -> list[int]:
    """A quarter of `max_units`, and all of it."""
    return sorted({max(1, max_units // 4), max_units})
