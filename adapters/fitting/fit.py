"""Strength fitting: choose component, k and α (and train gains) under the KL budget.

Choices are made on the validation split and its neutral text; the figures reported for the
test split come from pairs and neutral text that no choice has seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.adapters._errors import FitError, NoEffectError
from austeer.adapters._progress import Progress, silent
from austeer.adapters.activations.reading import evaluating
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import steering_hooks
from austeer.adapters.config import Strength
from austeer.adapters.fitting.candidates import Candidate, FitOptions, best_of
from austeer.adapters.fitting.checks import (
    check_enough,
    check_trainable,
    chosen_components,
    chosen_strength,
)
from austeer.adapters.fitting.outcome import no_effect_reason, selected_facts
from austeer.adapters.fitting.search import find_candidates
from austeer.adapters.live_model import check_bare, check_tokenizer
from austeer.adapters.localization.run import Ranking, localize
from austeer.adapters.measurement.measure import (
    Share,
    Splits,
    check_neutral_text,
    make_splits,
    neutral_perplexity,
)
from austeer.adapters.pairs import ContrastivePair, check_pairs, pairs_digest, render_pairs
from austeer.adapters.sites import Component


def fit_strength(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[ContrastivePair],
    ranking: Ranking | None = None,
    *,
    strength: Strength | str = "auto",
    kl_budget: float = 0.1,
    max_units: int = 64,
    fluency_limit: float = 1.3,
    components: str | Sequence[Component | str] | None = None,
    test_pairs: Sequence[ContrastivePair] | None = None,
    rank: int = 1,
    keep_sign: bool = False,
    neutral_text: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    steps: int = 200,
    progress: Progress | None = None,
) -> tuple[SteeringAdapter, dict[str, Any]]:
    """Fit an adapter and report it.

    Args:
        model: base model in eval mode; its parameters are left as they are.
        tokenizer: its tokenizer.
        pairs: contrastive pairs; split by content into fit, validation and test.
        ranking: units ranked by `localize`; None localizes on the fit split.
        strength: a `Strength`, or "auto" for `adaptive`.
        kl_budget: ceiling of the side effect, nats per token.
        max_units: largest number of steered units.
        fluency_limit: ceiling of the perplexity, under the base, of steered continuations
            over that of its own; trained strengths keep it, infinity lifts it.
        components: components to choose among; None for those of the ranking.
        test_pairs: pairs that only the report sees; None takes a fifth of `pairs`.
        rank: rank of the γ predictor.
        keep_sign: keep every gain ≥ 0.
        neutral_text: texts whose perplexity is reported as well.
        seed: of everything random; equal seeds give equal adapters on a CPU.
        batch_size: pairs or texts per forward pass.
        steps: optimizer steps of a trained strength.
        progress: called with (stage, done, total).

    Returns:
        The adapter, and the dictionary behind `report.json` (DESIGN §5).

    Raises:
        NoEffectError: nothing within the budget helps; `.report` holds the same dictionary.
        FitError: options out of range, too few validation pairs, a ranking of another model, or
            neutral text that is none.
        PairsError: pairs that cannot be tokenized or split.
        ModelError: a model that is steered or compiled, or was made in inference mode.
    """
    check_bare(model, "fit")
    check_pairs(pairs)
    check_tokenizer(tokenizer, "fit")
    if ranking is not None and not isinstance(ranking, Ranking):
        raise FitError(
            f"ranking: expected a Ranking, got {type(ranking).__name__}; Ranking.load(file) "
            "gives one"
        )
    options = FitOptions(
        strength=chosen_strength(strength),
        components=chosen_components(components, ranking, model),
        kl_budget=kl_budget, max_units=max_units, fluency_limit=fluency_limit, rank=rank,
        keep_sign=keep_sign, seed=seed, batch_size=batch_size, steps=steps,
    )  # fmt: skip
    if options.strength.trained:
        check_trainable(model)
    test = None if test_pairs is None else render_pairs(test_pairs, tokenizer)
    splits = make_splits(render_pairs(pairs, tokenizer), test, seed)
    if neutral_text is not None:
        check_neutral_text(model, tokenizer, neutral_text)
    with evaluating(model):
        ranking = ranking or _localized(model, tokenizer, splits, options)
        return Fitter(model, tokenizer, splits, ranking, options, progress).run(neutral_text)


class Fitter:
    """One fit: candidates, the choice among them, and the report.

    Args:
        model: base model.
        tokenizer: its tokenizer.
        splits: pairs by purpose.
        ranking: the units' scores.
        options: see `FitOptions`.
        progress: called with (stage, done, total).

    Raises:
        FitError: the ranking belongs to another model, or there are too few validation pairs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        splits: Splits,
        ranking: Ranking,
        options: FitOptions,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._splits, self._ranking, self._options = splits, ranking, options
        self._progress = progress or silent
        self._architecture = architecture_of(model.config.model_type)
        ranking.check_model(model)
        check_enough(splits)
        self._fit, self._validation, self._test = fit_shares(model, tokenizer, splits, options)

    def run(
        self, neutral_text: Sequence[str] | None = None
    ) -> tuple[SteeringAdapter, dict[str, Any]]:
        """Choose, measure, report.

        Raises:
            NoEffectError: nothing within the budget helps.
        """
        # Training needs gradients, whatever the caller has turned off.
        with torch.inference_mode(False), torch.enable_grad():
            return self._run(neutral_text)

    def _run(
        self, neutral_text: Sequence[str] | None
    ) -> tuple[SteeringAdapter, dict[str, Any]]:
        started = time.monotonic()
        candidates = find_candidates(
            self._model,
            self._ranking,
            self._options,
            self._fit,
            self._validation,
            self._progress,
        )
        best = best_of(candidates)
        seconds = time.monotonic() - started
        report = self._report(best, candidates, neutral_text, seconds)
        if report["outcome"] != "steered":
            raise NoEffectError(report["reason"], report)
        adapter = SteeringAdapter.from_sites(
            self._model, best.sites, self._options.strength, best.alpha, self._record(report)
        )
        return adapter, report

    def _report(
        self,
        best: Candidate,
        candidates: Sequence[Candidate],
        neutral_text: Sequence[str] | None,
        seconds: float,
    ) -> dict[str, Any]:
        steered = partial(steering_hooks, self._model, self._architecture, best.sites)
        self._progress("measure", 0, 2)
        validation = self._validation.figures(steered)
        self._progress("measure", 1, 2)
        test = self._test.figures(steered)
        if neutral_text:
            test |= neutral_perplexity(self._model, self._tokenizer, neutral_text, steered)
        self._progress("measure", 2, 2)
        reason = no_effect_reason(best, validation, self._options)
        return {
            "outcome": "no_effect" if reason else "steered",
            "reason": reason,
            "selected": selected_facts(best, self._options),
            "validation": validation,
            "test": test,
            "fit": self._fit_facts(candidates, seconds),
        }

    def _fit_facts(self, candidates: Sequence[Candidate], seconds: float) -> dict[str, Any]:
        options, splits = self._options, self._splits
        parts = {"fit": splits.fit, "validation": splits.validation, "test": splits.test}
        fit_digest = pairs_digest(splits.fit)
        return {
            "kl_budget": options.kl_budget,
            "max_units": options.max_units,
            "fluency_limit": _finite(options.fluency_limit),
            "seed": options.seed,
            "splits": {name: len(part) for name, part in parts.items()},
            "digests": {name: pairs_digest(part) for name, part in parts.items()},
            "ranking_pairs": self._ranking.info.pairs_digest,
            "ranking_on_fit_split": self._ranking.info.pairs_digest == fit_digest,
            "neutral": {
                "sequences": options.neutral_sequences,
                "length": options.neutral_length,
                "test_tokens": int(self._test.neutral.valid.sum()),
                "end_tokens": self._test.neutral.ends,
                "source": "sampled from the base model",
            },
            "steps": options.steps if options.strength.trained else 0,
            "candidates": [candidate.as_dict() for candidate in candidates],
            "seconds": round(seconds, 2),
        }

    def _record(self, report: dict[str, Any]) -> dict[str, Any]:
        """The part of the report that travels with the adapter; the same for equal seeds."""
        facts = {
            key: value
            for key, value in report["fit"].items()
            if key not in ("seconds", "candidates")
        }
        return facts | {"validation": report["validation"], "test": report["test"]}


def fit_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    options: FitOptions,
) -> tuple[Share, Share, Share]:
    """The splits to fit, to choose by and to report, each with neutral text of its own."""

    def share(part: list[ContrastivePair], number: int, like: Share | None = None) -> Share:
        return Share(
            model,
            tokenizer,
            part,
            seed=3 * options.seed + number,
            sequences=options.neutral_sequences,
            length=options.neutral_length,
            batch_size=options.batch_size,
            whole=splits.whole(part),
            like=like,
        )

    validation = share(splits.validation, 1)
    return share(splits.fit, 0, validation), validation, share(splits.test, 2, validation)


def _localized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    options: FitOptions,
) -> Ranking:
    """A ranking of the fit split: what chooses and what reports must not be seen by it."""
    return localize(model, tokenizer, splits.fit, options.components)


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None
