"""Fitting: honest choices, honest figures, clear outcomes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import (
    Component,
    ContrastivePair,
    FitError,
    ModelError,
    NoEffectError,
    SteeringAdapter,
    Strength,
    fit_strength,
    load_model,
    load_tokenizer,
    localize,
    read_pairs,
)
from austeer.adapters.fitting.candidates import FitOptions
from austeer.adapters.fitting.fit import Fitter
from austeer.adapters.measurement import measure
from austeer.adapters.measurement.fluency import FluencyProbe
from austeer.adapters.measurement.measure import Splits, make_splits

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SMALL = {"neutral_sequences": 24, "neutral_length": 48, "steps": 30, "max_units": 32}
NAMES = ("Tom", "Mia", "the park", "the sun", "one day", "home", "it", "rain")
FIGURES = ("accuracy", "base_accuracy", "margin", "base_margin", "margin_gain", "kl", "fluency")


class Fits:
    """A model, pairs and their ranking, and fits of them."""

    def __init__(self, model: Any, tokenizer: Any, splits: Splits) -> None:
        self.model, self.tokenizer, self.splits = model, tokenizer, splits
        self.ranking = localize(self.model, self.tokenizer, self.splits.fit, components=["ffn"])

    def fit(self, splits: Splits | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
        chosen = FitOptions(components=(Component.FFN,), **{**SMALL, **options})
        fitter = Fitter(self.model, self.tokenizer, splits or self.splits, self.ranking, chosen)
        return fitter.run()


@pytest.fixture(scope="module")
def demo() -> Fits:
    """The demo model with its mood pairs."""
    folder = str(EXAMPLES / "demo_model")
    pairs = read_pairs(EXAMPLES / "pairs" / "mood_train.jsonl")[:96]
    test = read_pairs(EXAMPLES / "pairs" / "mood_test.jsonl")[:40]
    return Fits(load_model(folder), load_tokenizer(folder), make_splits(pairs, test))


def mood_pairs() -> list[ContrastivePair]:
    """Pairs in the words of the tiny tokenizer."""
    return [
        ContrastivePair(f"{name} {verb}", " happy", " sad", where=f"p:{name}{verb}")
        for name in NAMES
        for verb in ("was", "felt", "went", "and")
    ]


@pytest.fixture
def tiny(tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Fits:
    """Random weights, whose fits are quick and count as a success: for tests that compare."""
    monkeypatch.setattr("austeer.adapters.fitting.fit.no_effect_reason", lambda *_: None)
    return Fits(tiny_model("llama"), tiny_tokenizer, make_splits(mood_pairs()))


@pytest.fixture(scope="module")
def fitted(demo: Fits) -> tuple[SteeringAdapter, dict[str, Any]]:
    return demo.fit(strength=Strength.FITTED)


@pytest.fixture
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fluency from 4 tokens a continuation: for tests that need no figure."""
    monkeypatch.setattr(measure, "FluencyProbe", partial(FluencyProbe, steps=4))


def assert_equal(first: SteeringAdapter, second: SteeringAdapter) -> None:
    found = second.tensors()
    assert first.tensors().keys() == found.keys()
    assert max(float(np.abs(site.gamma).max()) for site in first.sites) > 0.01
    for name, tensor in first.tensors().items():
        assert np.array_equal(tensor, found[name]), name


def log_prob(model: Any, ids: list[int]) -> float:
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(scores[t, ids[t + 1]] for t in range(len(ids) - 1)))


def independent_margins(demo: Fits, pairs: list[ContrastivePair]) -> np.ndarray:
    encode = lambda text: demo.tokenizer(text)["input_ids"]  # noqa: E731
    return np.array([
        log_prob(demo.model, encode(pair.prompt + pair.positive))
        - log_prob(demo.model, encode(pair.prompt + pair.negative))
        for pair in pairs
    ])  # fmt: skip


def test_report_figures_are_those_of_the_returned_adapter(
    demo: Fits, fitted: tuple[SteeringAdapter, dict[str, Any]]
) -> None:
    adapter, report = fitted
    base = independent_margins(demo, demo.splits.test)
    with adapter.attached(demo.model):
        steered = independent_margins(demo, demo.splits.test)
    test = report["test"]
    assert test["base_margin"] == pytest.approx(base.mean(), abs=1e-3)
    assert test["margin"] == pytest.approx(steered.mean(), abs=1e-3)
    assert test["accuracy"] == (steered > 0).mean()
    assert test["base_accuracy"] == (base > 0).mean()


def test_a_fit_helps_within_its_budget(fitted: tuple[SteeringAdapter, dict[str, Any]]) -> None:
    adapter, report = fitted
    assert report["outcome"] == "steered"
    assert report["validation"]["kl"] <= 0.1
    assert report["test"]["accuracy"] > report["test"]["base_accuracy"]
    assert report["test"]["margin_gain_ci95"][0] > 0
    assert adapter.config.k == report["selected"]["k"] == 32
    assert adapter.config.strength is Strength.FITTED


def test_report_has_the_keys_of_the_design_and_is_json(
    fitted: tuple[SteeringAdapter, dict[str, Any]],
) -> None:
    _, report = fitted
    for split in ("validation", "test"):
        for name in FIGURES:
            low, high = report[split][f"{name}_ci95"]
            assert low <= report[split][name] <= high or np.isclose(low, high)
    assert {"component", "k", "alpha", "strength"} <= set(report["selected"])
    assert report["fit"]["ranking_on_fit_split"] is True
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("strength", [Strength.FITTED, Strength.ADAPTIVE, Strength.ORIENTED])
def test_equal_seeds_give_equal_adapters_whatever_the_test_pairs(
    strength: Strength, tiny: Fits
) -> None:
    few = Splits(tiny.splits.fit, tiny.splits.validation, tiny.splits.test[:3])
    first, _ = tiny.fit(strength=strength, steps=12, kl_budget=0.3)
    second, _ = tiny.fit(splits=few, strength=strength, steps=12, kl_budget=0.3)
    assert_equal(first, second)


def test_adaptive_beats_constant_gains_at_the_same_budget(
    demo: Fits, fitted: tuple[SteeringAdapter, dict[str, Any]]
) -> None:
    adapter, report = demo.fit(strength=Strength.ADAPTIVE)
    assert adapter.config.rank == 1
    assert all(steered.predictor is not None for steered in adapter.sites)
    assert report["validation"]["kl"] <= 0.1
    assert report["validation"]["margin"] > fitted[1]["validation"]["margin"]


def test_keep_sign_holds_in_the_adapter(tiny: Fits) -> None:
    options: dict[str, Any] = {"strength": Strength.FITTED, "kl_budget": 20.0}
    free, kept = (tiny.fit(**options, keep_sign=keep) for keep in (False, True))
    assert free[1]["selected"]["units_that_can_flip_sign"] > 0
    assert kept[1]["selected"]["units_that_can_flip_sign"] == 0
    assert min(float(s.gamma.min()) for s in kept[0].sites) >= -1.0


def test_an_adapter_remembers_its_fit(
    tmp_path: Path, fitted: tuple[SteeringAdapter, dict[str, Any]]
) -> None:
    adapter, report = fitted
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = SteeringAdapter.from_pretrained(tmp_path / "adapter")
    assert loaded.config.fit["test"] == report["test"]
    assert loaded.config.fit["digests"] == report["fit"]["digests"]


@pytest.mark.usefixtures("short_samples")
def test_a_budget_nothing_can_keep_is_said(demo: Fits) -> None:
    with pytest.raises(NoEffectError, match=r"does not help|no candidate keeps") as caught:
        demo.fit(strength=Strength.ORIENTED, kl_budget=1e-7)
    assert caught.value.report["outcome"] == "no_effect"
    assert caught.value.report["test"]["pairs"] == len(demo.splits.test)
    json.dumps(caught.value.report, allow_nan=False)
    assert "\n" not in str(caught.value)


def test_meaningless_pairs_have_no_effect(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Half of the pairs say the opposite of the other half: nothing to learn."""
    pairs = []
    for name in NAMES:
        for verb in ("was", "felt", "went"):
            sides = (" happy", " sad") if len(pairs) % 2 else (" sad", " happy")
            pairs.append(ContrastivePair(f"{name} {verb}", *sides, where=f"p:{len(pairs)}"))
    with pytest.raises(NoEffectError) as caught:
        fit_strength(
            tiny_model("llama"), tiny_tokenizer, pairs, strength="paper",
            components=["attention"], max_units=8, kl_budget=0.001,
        )  # fmt: skip
    assert caught.value.report["selected"]["strength"] == "paper"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_budget": 0.0}, "KL budget"),
        ({"kl_budget": float("nan")}, "KL budget"),
        ({"max_units": 0}, "max_units"),
        ({"steps": 0}, "steps"),
        ({"rank": 0}, "rank"),
        ({"rank": 2, "strength": Strength.ORIENTED}, "oriented has no γ predictor"),
        ({"neutral_length": 1}, "neutral_length"),
        ({"components": ()}, "components"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        FitOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": "strong"}, "strength 'strong': expected auto, paper"),
        ({"components": ["mlp"]}, "component mlp: the ranking has ffn"),
    ],
)
def test_unknown_names_are_refused(demo: Fits, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        fit_strength(demo.model, demo.tokenizer, demo.splits.fit, demo.ranking, **options)


def test_too_few_pairs_to_choose_by_are_refused(demo: Fits) -> None:
    with pytest.raises(FitError, match="2 are left for validation, at least 5 are needed"):
        fit_strength(demo.model, demo.tokenizer, demo.splits.fit[:8], demo.ranking,
                     test_pairs=demo.splits.test)  # fmt: skip


def test_dropout_is_off_while_fitting(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """With dropout on, the model would differ from itself and no budget could be kept."""
    pairs = mood_pairs()
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    try:
        _, report = fit_strength(
            model, tiny_tokenizer, pairs, strength="oriented", components=["attention"],
            max_units=8, kl_budget=0.05,
        )  # fmt: skip
    except NoEffectError as error:
        report = error.report
    assert report["test"]["kl"] < 0.06
    assert model.training


def test_more_units_than_exist_are_refused(demo: Fits) -> None:
    with pytest.raises(FitError, match=r"max_units 100000: more than exist \(ffn has"):
        demo.fit(strength=Strength.ORIENTED, max_units=100_000)


def test_a_component_outside_the_ranking_is_refused(demo: Fits) -> None:
    with pytest.raises(FitError, match=r"component neuron: the ranking has ffn"):
        fit_strength(
            demo.model, demo.tokenizer, demo.splits.fit, demo.ranking, components=["neuron"]
        )


def test_a_ranking_of_another_model_is_refused(
    demo: Fits, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    with pytest.raises(FitError, match="localize again"):
        fit_strength(tiny_model("gpt2"), tiny_tokenizer, demo.splits.fit, demo.ranking)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize(
    ("strength", "budget", "accuracy", "gain"),
    [("oriented", 0.2, 0.90, 1.0), ("fitted", 0.05, 0.90, 3.0), ("adaptive", 0.05, 0.90, 10.0)],
)
def test_real_model_is_steered_within_the_budget(
    shared: Path, strength: str, budget: float, accuracy: float, gain: float
) -> None:
    folder = str(shared / "models" / "stories260K")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    _, report = fit_strength(
        model, tokenizer, read_pairs(shared / "data" / "happy_vs_sad_train.jsonl"),
        test_pairs=read_pairs(shared / "data" / "happy_vs_sad_test.jsonl"),
        strength=strength, kl_budget=budget, components=["attention"], steps=60,
    )  # fmt: skip
    test = report["test"]
    assert test["base_accuracy"] == pytest.approx(0.433, abs=0.001)
    assert test["accuracy"] >= accuracy
    assert test["margin_gain"] >= gain
    assert test["kl"] <= budget


@pytest.mark.slow
@pytest.mark.shared
def test_the_papers_rule_does_not_help_on_the_real_model(shared: Path) -> None:
    folder = str(shared / "models" / "stories260K")
    with pytest.raises(NoEffectError, match="strength paper does not help") as caught:
        fit_strength(
            load_model(folder), load_tokenizer(folder),
            read_pairs(shared / "data" / "happy_vs_sad_train.jsonl"),
            test_pairs=read_pairs(shared / "data" / "happy_vs_sad_test.jsonl"),
            strength="paper", kl_budget=0.2, components=["attention"],
        )  # fmt: skip
    test = caught.value.report["test"]
    assert test["accuracy"] <= test["base_accuracy"] + 0.05


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "float64", "bfloat16"])
def test_what_the_caller_has_set_changes_no_fit(how: str, tiny: Fits) -> None:
    options: dict[str, Any] = {"strength": Strength.ADAPTIVE, "steps": 6, "kl_budget": 0.5}
    wanted, _ = tiny.fit(**options)
    before = torch.get_default_dtype()
    try:
        if how in ("no_grad", "inference_mode"):
            with getattr(torch, how)():
                found, _ = tiny.fit(**options)
        else:
            torch.set_default_dtype(getattr(torch, how))
            found, _ = tiny.fit(**options)
    finally:
        torch.set_default_dtype(before)
    assert_equal(wanted, found)


def test_a_model_made_in_inference_mode_is_refused(tiny_model: Any, demo: Fits) -> None:
    with torch.inference_mode():
        model = tiny_model("llama", seed=99)
    with pytest.raises(ModelError, match=r"made under torch\.inference_mode"):
        fit_strength(model, demo.tokenizer, demo.splits.fit)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"test_pairs": []}, FitError, "test pairs: expected at least one"),
        ({"neutral_text": "one text"}, FitError, "expected a list of texts"),
        ({"neutral_text": [""]}, FitError, "two tokens or more"),
        ({"ranking": "ranking.safetensors"}, FitError, r"Ranking\.load\(file\) gives one"),
        ({"tokenizer": "stories"}, ModelError, "expected a tokenizer of transformers, got str"),
        ({"seed": 1.5}, FitError, "seed: expected a whole number from 0 on, got 1.5"),
        ({"seed": -1}, FitError, "seed: expected a whole number from 0 on, got -1"),
        ({"steps": 10.0}, FitError, "steps: expected a whole number from 1 on"),
        ({"components": "mlp"}, FitError, "component mlp: the ranking has ffn"),
    ],
)
def test_bad_input_costs_no_fit(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    demo: Fits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Fitter, "run", lambda *_: pytest.fail("too late"))
    given = {"tokenizer": demo.tokenizer, "ranking": demo.ranking} | options
    with pytest.raises(error, match=message):
        fit_strength(demo.model, pairs=demo.splits.fit, **given)
