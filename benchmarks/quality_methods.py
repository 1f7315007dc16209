"""One cell of the quality comparison: a method fitted on a bench at a budget, and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

from baselines import Setting, caa_settings, iti_settings, sadi_settings
from baselines_trained import (
    Baseline,
    choose,
    ia3_baseline,
    lora_baseline,
    vector_baseline,
)
from baselines_tuned import Tuner
from quality_cases import Bench
from quality_table import OURS, TRAINED, UNTRAINED
from quality_text import TextProbe

from austeer.adapters import Component, NoEffectError, Strength, fit_strength
from austeer.adapters.architectures import architecture_of
from austeer.adapters.fitting.candidates import HEADROOM, FitOptions
from austeer.adapters.fitting.trained import Trainer
from austeer.adapters.measurement.evaluate import Steered
from austeer.adapters.measurement.measure import Judgement

UNITS = 64


@dataclass(frozen=True, slots=True)
class Cost:
    """What a steering takes: activations changed per token, numbers stored."""

    touched: int
    parameters: int


class Comparison:
    """Fits and measures every method on one bench.

    Args:
        bench: case and shared data.
        steps: optimizer steps of everything trained.
    """

    def __init__(self, bench: Bench, steps: int) -> None:
        self._bench, self._steps = bench, steps
        self._tuner: Callable[[str], Tuner] = cache(self._make_tuner)
        self._choice: Callable[[str, float], tuple[str, float]] = cache(self._make_choice)

    def cell(self, method: str, budget: float) -> dict[str, Any]:
        """Fit `method` within `budget` nats per token and report it on the test split."""
        prepared = time.process_time()
        self._prepare(method, budget)
        started = time.process_time()
        if method in OURS:
            found = self._ours(Strength(method), budget)
        elif method in UNTRAINED:
            found = self._untrained(method, budget)
        else:
            found = self._trained(method, budget)
        spent = {"prepare": started - prepared, "fit": time.process_time() - started}
        return found | {f"{name}_seconds": round(value, 1) for name, value in spent.items()}

    def _prepare(self, method: str, budget: float) -> None:
        """Rankings, mean differences and the base's own text; probes at this budget."""
        _ = self._texts, self._bench.ranking
        if method in UNTRAINED:
            self._tuner(method)
        elif method in TRAINED:
            self._choice(method, budget)

    @cached_property
    def _texts(self) -> TextProbe:
        bench = self._bench
        prompts = [pair.prompt for pair in bench.splits.test]
        return TextProbe(bench.model, bench.tokenizer, prompts, seed=3 * bench.seed + 2)

    def _ours(self, strength: Strength, budget: float) -> dict[str, Any]:
        bench = self._bench
        # What must fold stays within foldable components; the others may take any.
        kinds = [c for c in Component if c.foldable or strength is not Strength.FITTED]
        try:
            adapter, report = fit_strength(
                bench.model, bench.tokenizer, bench.train, bench.ranking, strength=strength,
                kl_budget=budget, max_units=UNITS, components=kinds,
                test_pairs=bench.test_pairs, seed=bench.seed, steps=self._steps,
            )  # fmt: skip
        except NoEffectError as error:
            return self._no_effect(error.report)
        sites = adapter.sites
        touched = sum(len(site.index) for site in sites)
        weights = [w for s in sites if (p := s.predictor) for w in (p.V, p.b, p.U)]
        cost = Cost(touched, touched + sum(weight.size for weight in weights))
        test = report["test"] | self._texts.measure(lambda: adapter.attached(bench.model))
        validation = _validated(report)
        return {"outcome": "steered", "setting": report["selected"]} | _record(
            cost, validation, test
        )

    def _no_effect(self, report: dict[str, Any]) -> dict[str, Any]:
        """A fit that found no help counts with what its best candidate measured."""
        touched = int(report["selected"]["k"])
        return {"outcome": "no_effect", "setting": report["selected"]} | _record(
            Cost(touched, touched), _validated(report), report["test"]
        )

    def _untrained(self, method: str, budget: float) -> dict[str, Any]:
        tuned = self._tuner(method).best(budget * HEADROOM)
        setting = {"name": tuned.setting.name, "strength": tuned.strength}
        cost = Cost(tuned.setting.touched, tuned.setting.parameters)
        return self._measured(tuned.steered(), cost, setting, tuned.judgement, tuned.within)

    def _trained(self, method: str, budget: float) -> dict[str, Any]:
        place, rate = self._choice(method, budget)
        steering = self._baseline(method).places[place]()
        model = self._bench.model
        architecture = architecture_of(model.config.model_type)
        try:
            trained = self._trainer(budget).run(steering, steps=self._steps, learning_rate=rate)
            cost = Cost(steering.touched, sum(p.numel() for p in steering.parameters()))
            return self._measured(
                lambda: steering.attached(model, architecture),
                cost,
                {"name": place, "learning_rate": rate, "step": trained.step},
                trained.judgement,
                trained.within,
            )
        finally:
            steering.remove()

    def _measured(
        self,
        steered: Steered,
        cost: Cost,
        setting: dict[str, Any],
        judged: Judgement,
        within: bool,
    ) -> dict[str, Any]:
        test = self._bench.test.figures(steered) | self._texts.measure(steered)
        validation = {"margin": judged.margin, "kl": judged.kl}
        outcome = "steered" if within else "over_budget"
        return {"outcome": outcome, "setting": setting} | _record(cost, validation, test)

    def _make_tuner(self, method: str) -> Tuner:
        bench = self._bench
        model, seen, head = bench.model, bench.activations, bench.head_dim
        settings: dict[str, Callable[[], Iterator[Setting]]] = {
            "ITI": lambda: iti_settings(model, seen, head),
            "CAA": lambda: caa_settings(model, seen),
            "SADI": lambda: sadi_settings(model, seen, head),
        }
        return Tuner(list(settings[method]()), bench.validation)

    def _make_choice(self, method: str, budget: float) -> tuple[str, float]:
        return choose(self._trainer(budget), self._baseline(method), self._steps)

    def _baseline(self, method: str) -> Baseline:
        model, seed = self._bench.model, self._bench.seed
        if method == "vector":
            return vector_baseline(model)
        return (ia3_baseline if method == "IA3" else lora_baseline)(model, seed)

    def _trainer(self, budget: float) -> Trainer:
        bench = self._bench
        options = FitOptions(
            kl_budget=budget, max_units=UNITS, steps=self._steps, seed=bench.seed
        )
        return Trainer(bench.model, options, bench.fit, bench.validation)


def _validated(report: dict[str, Any]) -> dict[str, float]:
    return {name: report["validation"][name] for name in ("margin", "kl")}


def _record(cost: Cost, validation: dict[str, float], test: dict[str, Any]) -> dict[str, Any]:
    return asdict(cost) | {"validation": validation, "test": test}
