"""The trained strengths: start wide over all components, prune to the units that help."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from transformers import PreTrainedModel

from austeer.adapters._progress import Progress, silent
from austeer.adapters.architectures import architecture_of
from austeer.adapters.config import Strength
from austeer.adapters.fitting.candidates import HEADROOM, Candidate, FitOptions
from austeer.adapters.fitting.checkpointing import gradient_checkpointing, is_large
from austeer.adapters.fitting.gains import TrainableGains, UnitStart
from austeer.adapters.fitting.objective import Continuations, Objective
from austeer.adapters.fitting.strength import unit_direction
from austeer.adapters.fitting.train import Limits, Trainable, Trained, TrainOptions, train
from austeer.adapters.localization.run import Ranking
from austeer.adapters.measurement.measure import Judgement, Share
from austeer.adapters.sites import Component, Site

_TRAIN_SHARE = 0.88  # share of the budget that training aims at
_START_ALPHA = 0.3  # α of the oriented gains that training starts from
_WIDTH = 64  # units at the start, as a multiple of those that stay
_PRUNED_BY = 0.6  # share of the steps after which no unit is pruned any more
_PRUNINGS = 6


class Trainer:
    """Trains any steering of a model with one loss, one budget and one set of data.

    Args:
        model: base model.
        options: see `FitOptions`.
        fit: split that is trained on.
        validation: split that chooses.
        progress: called with (stage, done, total).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: FitOptions,
        fit: Share,
        validation: Share,
        progress: Progress = silent,
    ) -> None:
        self._model, self._options, self._progress = model, options, progress
        self._validation = validation
        self._architecture = architecture_of(model.config.model_type)
        limit = options.fluency_limit
        self._limits = Limits(options.kl_budget * HEADROOM, limit**HEADROOM)
        bounded = math.isfinite(limit)
        self._objective = Objective(
            model,
            fit.pair_set.batches,
            fit.meter,
            options.kl_budget * _TRAIN_SHARE,
            Continuations(model, fit.prompts, options.seed) if bounded else None,
            limit**_TRAIN_SHARE,
        )

    def run(
        self,
        steering: Trainable,
        *,
        steps: int | None = None,
        label: str = "train",
        learning_rate: float | None = None,
    ) -> Trained:
        """Train in place; the best judged state within the budget stays in `steering`."""
        steps, options = steps or self._options.steps, self._options
        observe = None
        if isinstance(steering, TrainableGains) and steering.count > options.max_units:
            observe = partial(self._observe, steering, steps)
        saving = options.gradient_checkpointing
        saving = is_large(self._model) if saving is None else saving
        with gradient_checkpointing(self._model, self._architecture, enabled=saving):
            return train(
                self._model,
                self._architecture,
                steering,
                self._objective,
                partial(self.judge, steering),
                self._limits,
                TrainOptions(
                    steps=steps,
                    learning_rate=learning_rate or options.learning_rate,
                    judge_every=max(10, steps // 12),
                    seed=options.seed,
                ),
                observe,
                partial(self._progress, label),
            )

    def judge(self, steering: Trainable, beat: float = -math.inf) -> Judgement | None:
        """What a steering does on validation data; None if its margin is not above `beat`."""
        attached = partial(steering.attached, self._model, self._architecture)
        margin = self._validation.mean_margin(attached)
        if margin <= beat:
            return None
        kl = self._validation.meter.mean(attached)
        if kl > self._limits.kl or math.isinf(self._limits.fluency):
            return Judgement(margin, kl)
        return Judgement(margin, kl, self._validation.quick_probe.ratio(attached))

    def _observe(self, gains: TrainableGains, steps: int, step: int) -> bool:
        """Prune in a few rounds, by equal factors; says whether no more is to come."""
        gains.observe()
        target = self._options.max_units
        every = max(1, int(_PRUNED_BY * steps / _PRUNINGS))
        if gains.count > target and (step % every == 0 or step == steps):
            left = 0 if step == steps else max(0, _PRUNINGS - step // every)
            share = (target / gains.count) ** (1 / (left + 1))
            gains.prune(max(target, round(gains.count * share)))
        return gains.count <= target


def trained_candidates(
    model: PreTrainedModel,
    ranking: Ranking,
    options: FitOptions,
    fit: Share,
    validation: Share,
    progress: Progress = silent,
) -> Iterator[Candidate]:
    """Gains trained from the best units of all components, pruned to those that help."""
    trainer = Trainer(model, options, fit, validation, progress)
    gains = TrainableGains(
        starting_units(ranking, options),
        rank=options.rank if options.strength is Strength.ADAPTIVE else 0,
        keep_sign=options.keep_sign,
        seed=options.seed,
        device=model.device,
    )
    gains.constrain()
    trained = trainer.run(gains)
    yield Candidate(gains.to_sites(), trained.judgement, trained.within)


def starting_units(ranking: Ranking, options: FitOptions) -> dict[Site, UnitStart]:
    """The units of largest |β| of every component, with oriented gains to start from."""
    share = max(1, _WIDTH * options.max_units // len(options.components))
    units: dict[Site, UnitStart] = {}
    for component in options.components:
        units |= _component_units(ranking, component, share)
    return dict(sorted(units.items()))


def _component_units(
    ranking: Ranking, component: Component, count: int
) -> dict[Site, UnitStart]:
    table = ranking.top(component, min(count, ranking.beta(component).size))
    start = _START_ALPHA * unit_direction(table, ranking, Strength.ORIENTED)
    mean, std = ranking.mean(component), ranking.std(component)
    return {
        site: UnitStart(
            table.unit[rows],
            start[rows],
            mean[site.layer, table.unit[rows]],
            std[site.layer, table.unit[rows]],
        )
        for site, rows in table.by_site().items()
    }
