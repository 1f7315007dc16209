"""Gains by gradient: margin loss on pairs, a KL budget on neutral text as the constraint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from austeer.adapters._errors import FitError
from austeer.adapters.architectures import Architecture
from austeer.adapters.attach import adaptive_gain, constant_gain, rescale, transformed
from austeer.adapters.batches import PairBatch
from austeer.adapters.evaluate import KLMeter, margins
from austeer.adapters.predictor import PHI_MAX, Predictor
from austeer.adapters.sites import Site, UnitTable
from austeer.adapters.steered_site import SteeredSite

_MARGIN_SCALE = 4.0  # nats at which a pair counts as mostly won
_START_PRICE = 1.0  # nats of loss that twice the targeted KL costs, to begin with
_LEAST_PRICE = 0.02
_SHRINK = 0.95  # factor on gains that end above the budget
_SHRINK_TRIES = 6


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How gains are trained.

    Attributes:
        steps: optimizer steps.
        learning_rate: of Adam, for γ and the predictor alike.
        kl_target: mean KL per token that the multiplier steers towards, nats.
        keep_sign: keep every gain ≥ 0.
        judge_every: steps between two calls of the judge.
        seed: of the order of batches.
    """

    steps: int = 120
    learning_rate: float = 0.05
    kl_target: float = 0.085
    keep_sign: bool = False
    judge_every: int = 10
    seed: int = 0


class TrainableGains(nn.Module):
    """γ, and for rank > 0 the γ predictor, of the units of one table.

    Args:
        table: the units.
        gamma: initial γ in the table's order.
        mean: mean of each unit's activation, for standardization.
        std: its standard deviation.
        rank: of the predictor; 0 for constant gains.
        seed: of the predictor's random start (φ = 1 at the start in any case).
        device: where the parameters live.
    """

    def __init__(
        self,
        table: UnitTable,
        gamma: Float[np.ndarray, " k"],
        mean: Float[np.ndarray, " k"],
        std: Float[np.ndarray, " k"],
        *,
        rank: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.rank = rank
        self._unit = table.unit
        self._rows: dict[Site, np.ndarray] = table.by_site()
        # A unit that hardly moves says nothing, and must not be blown up to say something.
        self._mean, self._std = mean, np.maximum(std, 1e-3 * max(float(std.max()), 1e-6))
        k, sites = len(table), len(self._rows)
        noise = torch.Generator().manual_seed(seed)
        start = torch.randn(k, rank, generator=noise) / max(k, 1) ** 0.5
        self.gamma = nn.Parameter(torch.tensor(gamma, dtype=torch.float32, device=device))
        self.V = nn.Parameter(start.to(device))
        self.b = nn.Parameter(torch.zeros(sites, rank, device=device))
        self.U = nn.Parameter(torch.zeros(rank, k, device=device))

    @contextmanager
    def attached(self, model: PreTrainedModel, architecture: Architecture) -> Iterator[None]:
        """Steer `model` inside the context, differentiably."""
        with ExitStack() as stack:
            for number, (site, rows) in enumerate(self._rows.items()):
                steer = self._steer(number, rows)
                stack.enter_context(transformed(model, architecture.hookpoint(site), steer))
            yield

    def _steer(self, number: int, rows: np.ndarray) -> Callable[[Tensor], Tensor]:
        device = self.gamma.device
        index = torch.as_tensor(self._unit[rows], device=device)
        gamma = self.gamma[rows]
        if not self.rank:
            return lambda x: rescale(x, index, constant_gain(gamma, 1.0))
        mean = torch.as_tensor(self._mean[rows], dtype=torch.float32, device=device)
        std = torch.as_tensor(self._std[rows], dtype=torch.float32, device=device)
        V = self.V[rows] / std[:, None]
        b = self.b[number] - mean @ V
        gain = adaptive_gain(gamma, V, b, self.U[:, rows], 1.0)
        return lambda x: rescale(x, index, gain)

    @torch.no_grad()
    def clamp_sign(self) -> None:
        """Raise γ so that no gain is negative, whatever the predictor says."""
        self.gamma.clamp_(min=-1.0 / (PHI_MAX if self.rank else 1.0))

    @torch.no_grad()
    def scale_gamma(self, factor: float) -> None:
        """Multiply every γ."""
        self.gamma.mul_(factor)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all parameters."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def to_sites(self) -> list[SteeredSite]:
        """The gains as an adapter's sites, standardization absorbed."""
        gamma, V, b, U = (
            part.detach().cpu().numpy() for part in (self.gamma, self.V, self.b, self.U)
        )
        found = []
        for number, (site, rows) in enumerate(self._rows.items()):
            predictor = None
            if self.rank:
                predictor = Predictor.absorb(
                    V[rows], b[number], U[:, rows], self._mean[rows], self._std[rows]
                )
            index = self._unit[rows].astype(np.int64)
            found.append(SteeredSite(site, index, gamma[rows].copy(), predictor))
        return found


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a set of gains does on the data that chooses.

    Attributes:
        margin: mean margin over the validation pairs, nats.
        kl: mean KL per token on neutral text that training does not see, nats.
    """

    margin: float
    kl: float


@dataclass(frozen=True, slots=True)
class Trained:
    """The best gains within the budget that a training run came by.

    Attributes:
        judgement: of these gains.
        step: at which they were found.
        within: whether any judged gains kept the budget.
    """

    judgement: Judgement
    step: int
    within: bool


def train_gains(
    model: PreTrainedModel,
    architecture: Architecture,
    gains: TrainableGains,
    pairs: Sequence[PairBatch],
    neutral: KLMeter,
    judge: Callable[[], Judgement],
    kl_limit: float,
    options: TrainOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train `gains` in place and leave the best judged state within `kl_limit` in them.

    Minimizes mean −log sigmoid(margin / 4) subject to KL(base ‖ steered) ≤ target: a penalty
    on the excess, whose price rises while KL is above the target and falls while it is below.

    Args:
        model: frozen base model.
        architecture: its row.
        gains: what is trained; holds the result afterwards.
        pairs: batches of training pairs.
        neutral: KL on the training share of the neutral text.
        judge: measures the current gains on validation data.
        kl_limit: the largest judged KL that counts as within budget.
        options: see `TrainOptions`.
        progress: called with (steps done, steps in all).

    Raises:
        FitError: KL is not finite any more.
    """
    optimizer = torch.optim.Adam(gains.parameters(), lr=options.learning_rate)
    order = np.random.default_rng(options.seed)
    multiplier, smooth_kl = _START_PRICE, 0.0
    best, within = _Best(gains, kl_limit), False
    pair_turns, text_turns = _cycle(len(pairs), order), _cycle(len(neutral), order)
    for step in range(1, options.steps + 1):
        _set_rate(optimizer, options.learning_rate, step, options.steps)
        kl = _step(
            model, architecture, gains, optimizer, pairs[next(pair_turns)],
            neutral, next(text_turns), multiplier, options.kl_target,
        )  # fmt: skip
        if not np.isfinite(kl):
            raise FitError(f"training: KL became {kl} at step {step}; try --dtype float32")
        if options.keep_sign:
            gains.clamp_sign()
        smooth_kl = kl if step == 1 else 0.8 * smooth_kl + 0.2 * kl
        multiplier = _adjusted(multiplier, smooth_kl / options.kl_target)
        if step % options.judge_every == 0 or step == options.steps:
            within = best.consider(judge(), step)
        if progress is not None:
            progress(step, options.steps)
    # The last gains are the furthest trained; often a touch less of them keeps the budget.
    for _ in range(0 if within else _SHRINK_TRIES):
        gains.scale_gamma(_SHRINK)
        if best.consider(judge(), options.steps):
            break
    gains.load_state_dict(best.state)
    return best.trained


class _Best:
    """The best judged gains so far: within the limit if any are, then by margin."""

    def __init__(self, gains: TrainableGains, kl_limit: float) -> None:
        self._gains, self._limit = gains, kl_limit
        self.trained = Trained(Judgement(-np.inf, np.inf), 0, within=False)
        self.state = gains.snapshot()

    def consider(self, found: Judgement, step: int) -> bool:
        """Keep the present gains if they are better; says whether they are within the limit."""
        fresh = Trained(found, step, found.kl <= self._limit)
        if _worth(fresh) > _worth(self.trained):
            self.trained, self.state = fresh, self._gains.snapshot()
        return fresh.within


def _adjusted(price: float, used: float) -> float:
    """Raise the price while KL is above the target, lower it more slowly below.

    Without the second half a loss that is nearly won could not use what is left of the budget.
    """
    if used > 1.0:
        return price * (1.0 + 0.1 * min(used - 1.0, 1.0))
    return max(price * 0.97, _LEAST_PRICE)


def _worth(trained: Trained) -> tuple[bool, float]:
    """Within the budget the margin counts; outside it, being close to the budget."""
    found = trained.judgement
    return trained.within, found.margin if trained.within else -found.kl


def _step(
    model: PreTrainedModel,
    architecture: Architecture,
    gains: TrainableGains,
    optimizer: torch.optim.Optimizer,
    batch: PairBatch,
    neutral: KLMeter,
    number: int,
    price: float,
    target: float,
) -> float:
    """One descent step on loss + price · relu(KL / target − 1); returns the KL before it."""
    base = neutral.base_of(number)
    optimizer.zero_grad(set_to_none=True)
    with gains.attached(model, architecture):
        loss = -nn.functional.logsigmoid(margins(model, batch) / _MARGIN_SCALE).mean()
        kl = neutral.batch_kl(number, base).mean()
        # Named inputs: a base that nobody froze must not collect gradients of its own.
        trained = [parameter for parameter in gains.parameters() if parameter.numel()]
        penalty = price * torch.relu(kl / target - 1.0)
        torch.autograd.backward(loss + penalty, inputs=trained)
    nn.utils.clip_grad_norm_(gains.parameters(), 1.0)
    optimizer.step()
    return float(kl.detach())


def _cycle(length: int, order: np.random.Generator) -> Iterator[int]:
    while True:
        yield from (int(number) for number in order.permutation(length))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Cosine decay over the second half, down to a tenth."""
    late = max(0.0, 2.0 * step / steps - 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * (0.1 + 0.9 * 0.5 * (1.0 + float(np.cos(np.pi * late))))


__all__ = ["Judgement", "TrainOptions", "TrainableGains", "Trained", "train_gains"]
