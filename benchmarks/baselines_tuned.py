"""The best setting and strength of an untrained method at a KL budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from baselines import Setting

from austeer.adapters.measurement.evaluate import Steered
from austeer.adapters.measurement.measure import Judgement, Share

_LEAST_ALPHA, _LARGEST_ALPHA = 0.125, 1024.0
_REFINED = 3  # settings whose strength is refined on the whole neutral text
_FINE = 1.05  # factor of that refinement
_FINE_STEPS = 16


@dataclass(frozen=True, slots=True)
class Tuned:
    """A setting at its best strength, as judged on validation data."""

    setting: Setting
    strength: float
    judgement: Judgement
    within: bool

    def steered(self) -> Steered:
        """The steering it stands for."""
        return lambda: self.setting.at(self.strength)


class Tuner:
    """Chooses among the settings of one method; what no budget changes is measured once.

    Args:
        settings: of the method.
        validation: pairs and neutral text that choose.
    """

    def __init__(self, settings: Sequence[Setting], validation: Share) -> None:
        self._settings, self._validation = list(settings), validation
        self._screen = cache(lambda n, a: validation.screen.mean(self._steered(n, a)))
        self._margin = cache(lambda n, a: validation.mean_margin(self._steered(n, a)))
        self._judge = cache(lambda n, a: validation.judge(self._steered(n, a)))

    def best(self, limit: float) -> Tuned:
        """The largest validation margin with a KL of at most `limit`, nats per token.

        Strengths are searched on a quarter of the neutral text (the screen); those of the
        best settings are then moved, up or down, to what the whole text allows.
        """
        rough = [(self._rough(number, limit), number) for number in range(len(self._settings))]
        rough.sort(key=lambda found: self._margin(found[1], found[0]), reverse=True)
        found = [self._refined(number, alpha, limit) for alpha, number in rough[:_REFINED]]
        inside = [tuned for tuned in found if tuned.within]
        if inside:
            return max(inside, key=lambda tuned: tuned.judgement.margin)
        return min(found, key=lambda tuned: tuned.judgement.kl)

    def _rough(self, number: int, limit: float) -> float:
        alphas = alphas_within(lambda alpha: self._screen(number, alpha) <= limit)
        return max(alphas, key=lambda alpha: self._margin(number, alpha))

    def _refined(self, number: int, alpha: float, limit: float) -> Tuned:
        for _ in range(_FINE_STEPS):
            if self._judge(number, alpha).kl <= limit:
                break
            alpha /= _FINE
        for _ in range(_FINE_STEPS):
            more, now = self._judge(number, alpha * _FINE), self._judge(number, alpha)
            if more.kl > limit or more.margin <= now.margin:
                break
            alpha *= _FINE
        found = self._judge(number, alpha)
        return Tuned(self._settings[number], alpha, found, found.kl <= limit)

    def _steered(self, number: int, alpha: float) -> Steered:
        return lambda: self._settings[number].at(alpha)


def alphas_within(within: Callable[[float], bool]) -> list[float]:
    """Values of α inside the budget: doubled until it breaks, then bisected four times.

    α ends at 1024: beyond the paper's largest (100), a longer search finds nothing new. Where
    even the least α breaks the budget, one below it is returned all the same.
    """
    inside: list[float] = []
    alpha = _LEAST_ALPHA
    while within(alpha):
        inside.append(alpha)
        alpha *= 2
        if alpha > _LARGEST_ALPHA:
            return inside
    low, high = (inside[-1] if inside else alpha / 8), alpha
    for _ in range(4):
        middle = (low * high) ** 0.5
        if within(middle):
            inside.append(middle)
            low = middle
        else:
            high = middle
    return inside or [low]
