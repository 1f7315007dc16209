"""Candidates of the untrained strengths: every component and k, at the α the budget allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from austeer.adapters._progress import Progress
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import steering_hooks
from austeer.adapters.fitting.candidates import HEADROOM, Candidate, FitOptions
from austeer.adapters.fitting.choice import choose
from austeer.adapters.fitting.strength import AlphaSearch, constant_sites, unit_direction
from austeer.adapters.fitting.sweep import sweep_kl
from austeer.adapters.localization.run import Ranking
from austeer.adapters.measurement.evaluate import Steered
from austeer.adapters.measurement.measure import Judgement, Share
from austeer.adapters.sites import UnitTable
from austeer.adapters.steered_site import SteeredSite

_LADDER = (1.0, 0.71, 0.5, 0.35, 0.25)  # of the largest α: more is not always better


@dataclass(frozen=True, slots=True, eq=False)
class _Direction:
    """γ per unit of α of one table of units."""

    table: UnitTable
    per_alpha: Float[np.ndarray, " k"]
    keep_sign: bool

    def sites(self, alpha: float) -> list[SteeredSite]:
        return constant_sites(self.table, alpha * self.per_alpha, self.keep_sign)


def untrained_candidates(
    model: PreTrainedModel,
    ranking: Ranking,
    options: FitOptions,
    validation: Share,
    progress: Progress,
) -> Iterator[Candidate]:
    """The best of all components, k and α by validation margin within the budget.

    For every component and k the largest α within the budget is found, all of them together.
    A few α up to it race on the validation pairs (`successive_halving`); those that saw every
    pair are judged on all validation data, one for each component and k, with α lowered where
    the whole of the neutral text asks for it.

    Args:
        model: base model.
        ranking: the units' scores.
        options: see `FitOptions`.
        validation: split that choices are made on.
        progress: called with (stage, done, total).
    """
    directions = list(_directions(ranking, options))
    largest = _largest_alphas(model, directions, options, validation, progress)
    entries = [
        (number, share * alpha) for number, alpha in enumerate(largest) for share in _LADDER
    ]
    pool = [directions[number].sites(alpha) for number, alpha in entries]
    choice = choose(
        model, pool, validation.tokens, batch_size=options.batch_size, seed=options.seed
    )
    # The first of each table, as finalists come best first.
    finalists = dict(reversed([entries[place] for place in choice.finalists]))
    for done, number in enumerate(sorted(finalists)):
        progress("candidates", done, len(finalists))
        yield _judged(model, directions[number], finalists[number], options, validation)
    progress("candidates", len(finalists), len(finalists))


def _largest_alphas(
    model: PreTrainedModel,
    directions: Sequence[_Direction],
    options: FitOptions,
    validation: Share,
    progress: Progress,
) -> list[float]:
    """For each table the largest α within the budget, on a quarter of the neutral text."""
    searches = [AlphaSearch(options.kl_budget * HEADROOM) for _ in directions]
    while unfinished := [n for n, search in enumerate(searches) if not search.done]:
        progress("strengths", len(searches) - len(unfinished), len(searches))
        steerings = [directions[n].sites(searches[n].propose()) for n in unfinished]
        sums, counts = sweep_kl(model, validation.screening_text, steerings, options.batch_size)
        for number, kl in zip(unfinished, sums.sum(axis=1) / counts.sum(), strict=True):
            searches[number].tell(float(kl))
    progress("strengths", len(searches), len(searches))
    return [search.best for search in searches]


def _judged(
    model: PreTrainedModel,
    direction: _Direction,
    alpha: float,
    options: FitOptions,
    validation: Share,
) -> Candidate:
    """Lower α where the whole of the neutral text, of which a part chose it, asks for it."""
    architecture = architecture_of(model.config.model_type)
    limit = options.kl_budget * HEADROOM

    def steered(alpha: float) -> Steered:
        return partial(steering_hooks, model, architecture, direction.sites(alpha))

    search = AlphaSearch(limit, alpha)
    search.tell(validation.meter.mean(steered(alpha)))
    while not search.done and (search.kl > limit or search.best < alpha):
        search.tell(validation.meter.mean(steered(search.propose())))
    found = Judgement(margin=validation.mean_margin(steered(search.best)), kl=search.kl)
    return Candidate(direction.sites(search.best), found, found.kl <= limit, search.best)


def _directions(ranking: Ranking, options: FitOptions) -> Iterator[_Direction]:
    for component in options.components:
        size = ranking.beta(component).size
        for k in sorted({min(k, size) for k in _unit_counts(options.max_units)}):
            table = ranking.top(component, k)
            direction = unit_direction(table, ranking, options.strength)
            yield _Direction(table, direction, options.keep_sign)


def _unit_counts(max_units: int) -> list[int]:
    """Powers of two below `max_units`, from an eighth of it, and `max_units` itself."""
    return sorted({max(1, max_units >> shift) for shift in range(4)})
