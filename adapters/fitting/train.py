"""Steering by gradient: margin loss on pairs, budgets on side effects as constraints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from austeer.adapters._errors import FitError
from austeer.adapters.architectures import Architecture
from austeer.adapters.fitting.objective import Objective
from austeer.adapters.measurement.measure import Judgement

_START_PRICE = 1.0  # nats of loss that twice the targeted side effect costs, to begin with
_LEAST_PRICE = 0.02
_BETAS = (0.9, 0.95)  # a budget that is broken now and then must not slow every later step
_LEAST_SHARE = 0.5  # of the last steering that is tried where all of it breaks a limit
_TRIES = 6


class Trainable(Protocol):
    """Steering with parameters: gains, or what they are compared with."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained."""

    def attached(
        self, model: PreTrainedModel, architecture: Architecture
    ) -> AbstractContextManager[None]:
        """Steer `model` inside the context, differentiably."""

    def constrain(self) -> None:
        """Called after each optimizer step."""

    def shrink(self, factor: float) -> None:
        """Move towards no steering."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` brings back."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Bring a state back."""


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How steering is trained.

    Attributes:
        steps: optimizer steps.
        learning_rate: of Adam.
        judge_every: steps between two calls of the judge.
        patience: calls of the judge without a better result after which training ends.
        seed: of the order of batches.
    """

    steps: int
    learning_rate: float = 0.05
    judge_every: int = 10
    patience: int = 6
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest judged side effects that count as within budget.

    Attributes:
        kl: nats per token.
        fluency: ratio of perplexities; infinity for none.
    """

    kl: float
    fluency: float = float("inf")

    def excess(self, found: Judgement) -> float:
        """By how much the worst side effect exceeds its limit: ratio − 1, ≤ 0 within."""
        used = [found.kl / self.kl]
        if found.fluency is not None:
            used.append(found.fluency / self.fluency)
        # max() would let a NaN pass.
        return max(used) - 1.0 if np.isfinite([found.margin, *used]).all() else np.inf


@dataclass(frozen=True, slots=True)
class Trained:
    """The best steering within the limits that a training run came by.

    Attributes:
        judgement: of it.
        step: at which it was found.
        within: whether any judged steering kept the limits.
        steps: optimizer steps taken.
    """

    judgement: Judgement
    step: int
    within: bool
    steps: int = 0


Judge = Callable[[float], Judgement | None]
"""Measures the current steering on validation data; None, without the cost of the side effects,
where its margin does not exceed the given one."""


def train(
    model: PreTrainedModel,
    architecture: Architecture,
    steering: Trainable,
    objective: Objective,
    judge: Judge,
    limits: Limits,
    options: TrainOptions,
    observe: Callable[[int], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train `steering` in place and leave the best judged state within `limits` in it.

    Minimizes the objective's loss subject to the objective's constraints: each costs
    price · relu(value / target − 1), and its price rises while the value is above the target
    and falls while it is below.

    Args:
        model: frozen base model.
        architecture: its row.
        steering: what is trained; holds the result afterwards.
        objective: loss and constraints on the training data.
        judge: see `Judge`.
        limits: what counts as within budget.
        options: see `TrainOptions`.
        observe: called with the step when only the margin loss has its gradient; returns
            whether results count (False while units are still being pruned).
        progress: called with (steps done, steps in all).

    Raises:
        FitError: a loss is not finite any more.
    """
    optimizer = torch.optim.Adam(steering.parameters(), lr=options.learning_rate, betas=_BETAS)
    order = np.random.default_rng(options.seed)
    prices = {name: _Price() for name in objective.targets}
    best, within, stale, step = _Best(steering, limits), False, 0, 0
    turns = {name: _cycle(size, order) for name, size in objective.sizes.items()}
    for step in range(1, options.steps + 1):
        _set_rate(optimizer, options.learning_rate, step, options.steps)
        objective.prepare(step, lambda: steering.attached(model, architecture))
        numbers = {name: next(turn) for name, turn in turns.items()}
        optimizer.zero_grad(set_to_none=True)
        final = _gradients(
            model, architecture, steering, objective, numbers, prices, step, observe
        )
        nn.utils.clip_grad_norm_(steering.parameters(), 1.0)
        optimizer.step()
        steering.constrain()
        if final and (step % options.judge_every == 0 or step == options.steps):
            before = best.trained
            within = best.consider(judge, step)
            stale = 0 if best.trained is not before else stale + 1
        if progress is not None:
            progress(step, options.steps)
        if stale >= options.patience:
            break
    if not within:
        _calibrate(steering, judge, best, step)
    steering.load_state_dict(best.state)
    return Trained(best.trained.judgement, best.trained.step, best.trained.within, step)


def _gradients(
    model: PreTrainedModel,
    architecture: Architecture,
    steering: Trainable,
    objective: Objective,
    numbers: Mapping[str, int],
    prices: Mapping[str, _Price],
    step: int,
    observe: Callable[[int], bool] | None,
) -> bool:
    """Gradients of loss and penalties at one batch each; says whether results count."""
    known = {name: objective.base_of(name, numbers[name]) for name in prices}
    # Named inputs: a base that nobody froze must not collect gradients of its own.
    inputs = [parameter for parameter in steering.parameters() if parameter.numel()]
    with steering.attached(model, architecture):
        loss = _finite(objective.loss(numbers["pairs"]), "the margin loss", step)
        torch.autograd.backward(loss, inputs=inputs)
    final = observe(step) if observe is not None else True
    for name, price in prices.items():
        with steering.attached(model, architecture):
            used = objective.constraint(name, numbers[name], known[name])
            used = _finite(used, name, step) / objective.targets[name]
            if used > 1.0:
                torch.autograd.backward(price.value * (used - 1.0), inputs=inputs)
        price.adjust(float(used.detach()))
    return final


def _finite(value: Tensor, name: str, step: int) -> Tensor:
    if torch.isfinite(value):
        return value
    raise FitError(
        f"training: {name} became {float(value.detach())} at step {step}; try --dtype float32"
    )


class _Price:
    """What breaking one constraint costs.

    It rises while the constraint is broken and falls more slowly while it is kept: without the
    second half, a loss that is nearly won could not use what is left of the budget.
    """

    def __init__(self) -> None:
        self.value = _START_PRICE
        self._smooth: float | None = None

    def adjust(self, used: float) -> None:
        """Take note of value / target at this step."""
        self._smooth = used if self._smooth is None else 0.8 * self._smooth + 0.2 * used
        if self._smooth > 1.0:
            self.value *= 1.0 + 0.1 * min(self._smooth - 1.0, 1.0)
        else:
            self.value = max(self.value * 0.97, _LEAST_PRICE)


class _Best:
    """The best judged state so far: within the limits if any are, then by margin."""

    def __init__(self, steering: Trainable, limits: Limits) -> None:
        self._steering, self._limits = steering, limits
        self.trained = Trained(Judgement(-np.inf, np.inf), 0, within=False)
        self.state = self._snapshot()

    def consider(self, judge: Judge, step: int) -> bool:
        """Keep the present state if it is better; says whether no gentler one need be tried."""
        found = judge(self.trained.judgement.margin if self.trained.within else -np.inf)
        if found is None:
            return True
        fresh = Trained(found, step, self._limits.excess(found) <= 0.0)
        if self._worth(fresh) > self._worth(self.trained):
            self.trained, self.state = fresh, self._snapshot()
        return fresh.within

    def _worth(self, trained: Trained) -> tuple[bool, float]:
        """Within the limits the margin counts; outside, being close to them."""
        found = trained.judgement
        worth = found.margin if trained.within else -self._limits.excess(found)
        return trained.within, worth

    def _snapshot(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self._steering.state_dict().items()}


def _calibrate(steering: Trainable, judge: Judge, best: _Best, step: int) -> None:
    """Try the last state scaled down: the furthest trained, often a touch above a limit."""
    last = {name: value.clone() for name, value in steering.state_dict().items()}
    low, high = _LEAST_SHARE, 1.0
    for _ in range(_TRIES):
        middle = (low + high) / 2
        steering.load_state_dict(last)
        steering.shrink(middle)
        if best.consider(judge, step):
            low = middle
        else:
            high = middle


def _cycle(length: int, order: np.random.Generator) -> Iterator[int]:
    while True:
        yield from (int(number) for number in order.permutation(length))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Cosine decay over the second half, down to a tenth."""
    late = max(0.0, 2.0 * step / steps - 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * (0.1 + 0.9 * 0.5 * (1.0 + float(np.cos(np.pi * late))))
