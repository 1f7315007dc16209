"""A combination of adapters held to the KL budget, and what it does to each behaviour."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.adapters._errors import FitError
from austeer.adapters._progress import Progress
from austeer.adapters.activations.reading import evaluating
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.attach import steering_hooks
from austeer.adapters.composition.combined import OnOverlap, check_adapters, combine
from austeer.adapters.composition.contributions import checked_weights
from austeer.adapters.fingerprint import ReadTensor
from austeer.adapters.fitting.candidates import HEADROOM
from austeer.adapters.live_model import check_bare, check_tokenizer
from austeer.adapters.measurement.evaluate import KLMeter
from austeer.adapters.measurement.measure import Share, as_report
from austeer.adapters.pairs import ContrastivePair, check_pairs

# Fits draw their neutral text from small seeds; this text must be none that an adapter saw.
_FRESH = 1 << 20
_TRIES, _CLOSE = 16, 0.98
# A fit takes 96; the KL of large gains, as by hand, varies more from text to text.
_SEQUENCES = 256
_STAGE = "KL of the combination"


def combine_within_budget(
    adapters: Sequence[SteeringAdapter],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Sequence[float] | None = None,
    *,
    kl_budget: float = 0.1,
    on_overlap: OnOverlap = "sum",
    names: Sequence[str] | None = None,
    pairs: Mapping[str, Sequence[ContrastivePair]] | None = None,
    read: ReadTensor | None = None,
    seed: int = 0,
    sequences: int = _SEQUENCES,
    length: int = 96,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> tuple[SteeringAdapter, dict[str, Any]]:
    """Combine adapters, all weights lowered by one factor where the KL is above the budget.

    The factor is chosen on one sample of neutral text, the figures come from another.

    Args:
        adapters: adapters of `model`.
        model: the base model.
        tokenizer: its tokenizer.
        weights: factor on every γ of each adapter; None for 1.
        kl_budget: ceiling of mean KL(base ‖ steered), nats per token; `inf` for none.
        on_overlap: see `combine`.
        names: what the report and messages call the adapters.
        pairs: contrastive pairs by behaviour, to report margins of.
        read: see `combine`.
        seed: of the neutral text, of which two samples are taken.
        sequences: texts in each sample.
        length: tokens of each.
        batch_size: pairs or texts per forward pass.
        progress: called with (stage, done, total).

    Returns:
        The adapter, and its report, which also stands in `config.fit["combined"]`: what
        `combine` writes there, the `factor`, `kl` with and `kl_unscaled` without it, `kl_alone`
        of each adapter at its own weight, and the figures of `behaviours`.

    Raises:
        AdapterError: what `combine` refuses.
        FitError: a budget that is not positive or that no factor keeps, no finite KL, or
            `pairs` that are no lists by name.
        ModelError: a model that is steered or compiled.
    """
    check_bare(model, "combine")
    check_tokenizer(tokenizer, "combine")
    check_adapters(adapters)
    _check_budget(kl_budget)
    _check_pairs(pairs)
    given = checked_weights(weights, len(adapters))
    joined = partial(
        combine, adapters, model=model, read=read, on_overlap=on_overlap, names=names
    )
    whole = joined(given)

    def share(
        number: int, some: Sequence[ContrastivePair] = (), like: Share | None = None
    ) -> Share:
        own: Any = {"seed": _FRESH + 2 * seed + number, "batch_size": batch_size, "like": like}
        return Share(model, tokenizer, some, sequences=sequences, length=length, **own)

    with evaluating(model):
        first = share(0)
        kl = partial(_mean_kl, first.meter, model, whole)
        factor = largest_factor(kl, kl_budget * HEADROOM, progress)
        made = whole if factor == 1.0 else joined([factor * weight for weight in given])
        alone = [one.scaled(weight) for one, weight in zip(adapters, given, strict=True)]
        figures = _side_effects(share(1, like=first), model, made, whole, alone)
        figures["behaviours"] = {
            name: _behaviour(share(1, some, first), model, made, alone)
            for name, some in (pairs or {}).items()
        }
    return _reported(made, kl_budget, factor, figures)


def _mean_kl(
    meter: KLMeter, model: PreTrainedModel, adapter: SteeringAdapter, factor: float
) -> float:
    return meter.mean(lambda: _steered(model, adapter, factor))


def _reported(
    made: SteeringAdapter, kl_budget: float, factor: float, figures: dict[str, Any]
) -> tuple[SteeringAdapter, dict[str, Any]]:
    """The adapter with its report in it, and the report."""
    budget = kl_budget if math.isfinite(kl_budget) else None
    report = made.config.fit["combined"] | {"kl_budget": budget, "factor": factor} | figures
    config = dataclasses.replace(made.config, fit={"combined": report})
    return SteeringAdapter(config, made.sites), report


def largest_factor(
    kl: Callable[[float], float], budget: float, progress: Progress | None = None
) -> float:
    """The largest factor in (0, 1] found whose KL is within the budget.

    Args:
        kl: KL at a factor on every weight, nats per token.
        budget: its ceiling.
        progress: called with (stage, done, total).

    Raises:
        FitError: every factor tried is above the budget.
    """
    low, low_kl, high, high_kl = 0.0, 0.0, 1.0, kl(1.0)
    if high_kl <= budget:
        return 1.0
    for tried in range(_TRIES):
        if progress:
            progress(_STAGE, tried, _TRIES)
        factor = low + (high - low) * _step(low_kl, high_kl, budget)
        found = kl(factor)
        if found <= budget:
            low, low_kl = factor, found
        else:
            high, high_kl = factor, found
        if low_kl >= _CLOSE * budget or high - low < 1e-3 * low:
            break
    if progress:
        progress(_STAGE, _TRIES, _TRIES)
    if low == 0.0:
        raise FitError(
            f"KL budget {budget:g}: not reached, KL is {high_kl:.3g} nats/token at {high:.3g} "
            "times the weights; raise the budget or leave an adapter out"
        )
    return low


def _check_budget(kl_budget: float) -> None:
    if not kl_budget > 0:
        raise FitError(
            f"KL budget: expected a positive number of nats per token, got {kl_budget}"
        )


def _check_pairs(pairs: Mapping[str, Sequence[ContrastivePair]] | None) -> None:
    if pairs is None:
        return
    if not isinstance(pairs, Mapping):
        raise FitError(
            f"combine: pairs: expected lists by behaviour's name, got {type(pairs).__name__}"
        )
    for name, some in pairs.items():
        check_pairs(some)
        if not some:
            raise FitError(f"combine: pairs of {name}: expected at least one, got none")


def _step(low_kl: float, high_kl: float, budget: float) -> float:
    """Where between two factors the KL should meet the budget, kept off both ends.

    For small strengths KL grows with their square, so its root is interpolated.
    """
    if not math.isfinite(high_kl):
        return 0.5
    below, above = math.sqrt(max(low_kl, 0.0)), math.sqrt(high_kl)
    return min(max((math.sqrt(budget) - below) / (above - below), 0.05), 0.95)


def _steered(
    model: PreTrainedModel, adapter: SteeringAdapter, scale: float = 1.0
) -> AbstractContextManager[None]:
    # Not `attached`, which reads the touched weights at every entry to check the base again.
    return steering_hooks(model, adapter.architecture, adapter.sites, scale)


def _side_effects(
    share: Share,
    model: PreTrainedModel,
    made: SteeringAdapter,
    whole: SteeringAdapter,
    alone: Sequence[SteeringAdapter],
) -> dict[str, Any]:
    """KL of the combination, of what was asked for, and of each adapter at its own weight.

    Raises:
        FitError: the combination makes the model overflow.
    """

    def kl(name: str, adapter: SteeringAdapter) -> dict[str, Any]:
        return as_report({name: share.meter.measure(lambda: _steered(model, adapter))})

    figures = kl("kl", made) | kl("kl_unscaled", whole)
    if not math.isfinite(figures["kl"]):
        raise FitError(
            f"the combination steers the model to KL {figures['kl']}; lower the weights, or "
            "give a KL budget"
        )
    figures["kl_alone"] = [kl("kl", one)["kl"] for one in alone]
    # JSON knows no infinity, and what was not taken may well be one.
    return {name: value if _is_finite(value) else None for name, value in figures.items()}


def _is_finite(value: float | Sequence[float]) -> bool:
    return bool(np.isfinite(value).all())


def _behaviour(
    share: Share,
    model: PreTrainedModel,
    made: SteeringAdapter,
    alone: Sequence[SteeringAdapter],
) -> dict[str, Any]:
    """Figures on one set of pairs, and the margin of each adapter alone."""

    def margin(one: SteeringAdapter) -> float:
        return share.mean_margin(lambda: _steered(model, one))

    figures = share.figures(lambda: _steered(model, made))
    return figures | {"margin_alone": [margin(one) for one in alone]}
