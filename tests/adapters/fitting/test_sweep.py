"""The sweep: equal to steering by each candidate alone, and no shared layer run twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from reference import MIXTURES

from austeer.adapters import Component, Predictor, Site
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import steering_hooks
from austeer.adapters.fitting.sweep import Steering, measure_each, sweep_kl, sweep_margins
from austeer.adapters.measurement.evaluate import KLMeter, PairSet, batch_pairs
from austeer.adapters.measurement.neutral import TokenText
from austeer.adapters.steered_site import SteeredSite
from austeer.adapters.tokens import PairTokens

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")
# Residuals added inside a block, an MLP without a module, outputs changed in place.
ODD_TYPES = ("bloom", "mpt", "opt", "opt-350m", "falcon", "gpt_neo")
LAYERS = 3
KEYS = {"gpt2": "n_layer", "gptj": "n_layer", "bloom": "n_layer", "mpt": "n_layers"}
CHANGES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 3, "attention_types": [[["global", "local", "global"], 1]]},
    "opt-350m": {"do_layer_norm_before": False},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}
TOKENS = [
    PairTokens((1, 5, 6, 7), (8, 9), (10,), "p:1"),
    PairTokens((1, 9, 4), (11,), (12, 13, 14), "p:2"),
    PairTokens((1, 9, 4, 4, 20, 21), (11, 5), (12,), "p:3"),
]
TEXT = TokenText(
    torch.tensor([[1, 7, 8, 9, 10], [1, 20, 21, 0, 0], [1, 5, 0, 0, 0]]),
    torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool),
)


def site(
    layer: int, component: str, gamma: float = 0.8, rank: int = 0, seed: int = 0
) -> SteeredSite:
    index = np.array([3, 1, 7])
    generator = np.random.default_rng(seed)
    predictor = None
    if rank:
        V, b, U = (generator.normal(size=size) for size in ((3, rank), rank, (rank, 3)))
        predictor = Predictor(*(part.astype(np.float32) for part in (V, b, U)))
    values = gamma * np.array([1.0, -0.5, 0.7])
    return SteeredSite(Site(layer, Component(component)), index, values, predictor)


CANDIDATES: list[list[SteeredSite]] = [
    [site(2, "ffn")],
    [site(0, "attention"), site(2, "neuron")],
    [],
    [site(0, "attention"), site(2, "neuron", 0.4)],
    [site(0, "attention", rank=1), site(1, "ffn")],
    [site(0, "attention", rank=1, seed=1), site(1, "ffn")],
    [site(1, "layer"), site(2, "layer")],
    [site(1, "layer")],
    [site(0, "attention"), site(2, "neuron")],
    [site(1, "layer", rank=2), site(1, "ffn", rank=1)],
    [site(0, "layer", -1.5), site(0, "ffn"), site(1, "neuron")],
    [site(0, "attention", rank=1), site(1, "ffn", -0.8)],
    [site(2, "layer")],
    [site(0, "layer"), site(1, "attention", 0.3), site(1, "neuron")],
    [site(0, "layer"), site(1, "attention", 0.6), site(1, "neuron")],
]


def alone(model: Any, steering: Steering, measure: Callable[[], Any]) -> Any:
    architecture = architecture_of(model.config.model_type)
    with torch.no_grad(), steering_hooks(model, architecture, steering):
        return measure()


def kl_alone(model: Any, steering: Steering) -> np.ndarray[Any, Any]:
    """KL of each text, from the definition and in float64, one text at a time."""
    sums = []
    for ids, valid in zip(TEXT.input_ids, TEXT.valid, strict=True):
        text = ids[valid][None]
        run = lambda text=text: model(input_ids=text).logits[0].double().log_softmax(-1)  # noqa: E731
        base, steered = alone(model, [], run), alone(model, steering, run)
        sums.append(float((base.exp() * (base - steered)).sum()))
    return np.array(sums)


def passes(model: Any, run: Callable[[], Any]) -> list[int]:
    """How often each layer runs."""
    architecture = architecture_of(model.config.model_type)
    counts = [0] * LAYERS

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[number] += 1

        return hook

    handles = [
        model.get_submodule(architecture.layer.format(i=i)).register_forward_hook(count(i))
        for i in range(LAYERS)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def build(tiny_model: Callable[..., Any], model_type: str) -> Any:
    changes = CHANGES.get(model_type, {})
    if model_type != "gpt_neo":
        changes = {**changes, KEYS.get(model_type, "num_hidden_layers"): LAYERS}
    return tiny_model(model_type.removesuffix("-350m"), **changes)


@pytest.fixture
def llama(tiny_model: Callable[..., Any]) -> Any:
    return build(tiny_model, "llama")


@pytest.mark.parametrize("model_type", (*MODEL_TYPES, *ODD_TYPES))
def test_margins_are_those_of_each_candidate_alone(
    model_type: str, tiny_model: Callable[..., Any]
) -> None:
    model = build(tiny_model, model_type)
    pairs = batch_pairs(model, TOKENS, 2)
    found = sweep_margins(model, pairs, CANDIDATES)
    wanted = [alone(model, steering, lambda: pairs.margins(model)) for steering in CANDIDATES]
    assert np.ptp(wanted, axis=0).min() > 0.1, "the candidates must differ"
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("model_type", [*MIXTURES, "gemma3"])
def test_mixtures_and_a_vision_language_model(
    model_type: str, tiny_model: Callable[..., Any]
) -> None:
    """A mixture is steered behind its block, and has no neuron."""
    model = build(tiny_model, model_type)
    lacking = "neuron" if model_type in MIXTURES else ""
    candidates = [
        [steered for steered in steering if steered.site.component != lacking]
        for steering in CANDIDATES
    ]
    pairs = batch_pairs(model, TOKENS, 2)
    found = sweep_margins(model, pairs, candidates)
    wanted = [alone(model, steering, lambda: pairs.margins(model)) for steering in candidates]
    assert np.ptp(wanted, axis=0).min() > 0.05, "the candidates must differ"
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_kl_is_that_of_each_candidate_alone(
    model_type: str, tiny_model: Callable[..., Any]
) -> None:
    model = build(tiny_model, model_type)
    sums, counts = sweep_kl(model, TEXT, CANDIDATES, batch_size=2)
    wanted = np.array([kl_alone(model, steering) for steering in CANDIDATES])
    assert counts.tolist() == [5, 3, 2]
    assert np.ptp(wanted, axis=0).min() > 1e-2, "the candidates must differ"
    np.testing.assert_allclose(sums, wanted, rtol=1e-5, atol=1e-5)


def test_kl_agrees_with_the_meter(llama: Any) -> None:
    architecture = architecture_of("llama")
    sums, counts = sweep_kl(llama, TEXT, CANDIDATES)
    meter = KLMeter(llama, TEXT)
    for row, steering in zip(sums, CANDIDATES, strict=True):
        mean = meter.mean(
            lambda steering=steering: steering_hooks(llama, architecture, steering)
        )
        assert row.sum() / counts.sum() == pytest.approx(mean, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize(
    ("candidates", "runs"),
    [
        # Nothing shared: each starts at the first layer.
        ([[site(0, "ffn", a)] for a in (0.1, 0.2, 0.3)], [3, 3, 3]),
        # Everything shared.
        ([[site(0, "ffn")]] * 4, [1, 1, 1]),
        # Parted by the last layer, and by what leaves it.
        ([[site(2, "neuron", a)] for a in (0.1, 0.2, 0.3)], [1, 1, 3]),
        ([[site(2, "layer", a)] for a in (0.1, 0.2, 0.3)], [1, 1, 1]),
        # The output of a layer is steered behind it: the layer itself is shared.
        ([[site(1, "layer", a)] for a in (0.1, 0.2)], [1, 1, 2]),
        # Parted inside a layer.
        ([[site(1, "ffn", a)] for a in (0.1, 0.2)], [1, 2, 2]),
        # Two branches below two stems, given in an order that alternates between them.
        (
            [
                [site(0, "attention", a), site(2, "ffn", b)]
                for b in (0.1, 0.2)
                for a in (0.3, 0.4)
            ],
            [2, 2, 4],
        ),
        # The same gains with another predictor part.
        ([[site(1, "ffn")], [site(1, "ffn", rank=1)], []], [1, 3, 3]),
    ],
)
def test_a_shared_layer_runs_once(
    candidates: list[list[SteeredSite]], runs: list[int], llama: Any
) -> None:
    pairs = PairSet([batch_pairs(llama, TOKENS, 8).batches[0]], [[0, 1, 2]])
    assert passes(llama, lambda: sweep_margins(llama, pairs, candidates)) == runs


def test_what_is_attached_already_stays_in_effect(llama: Any) -> None:
    outer = [site(0, "layer", 0.9), site(1, "attention", 0.9)]
    pairs = batch_pairs(llama, TOKENS, 8)
    found = alone(llama, outer, lambda: sweep_margins(llama, pairs, CANDIDATES))
    for row, steering in zip(found, CANDIDATES, strict=True):
        both = [*outer, *steering]
        wanted = alone(llama, both, lambda: pairs.margins(llama))
        np.testing.assert_allclose(row, wanted, rtol=0, atol=2e-6)


def state(model: Any) -> list[Any]:
    """Everything on a model that a sweep touches for a while."""
    return [
        (
            name,
            vars(module).get("forward"),
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            module.training,
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("failing", [1, 2, len(CANDIDATES) - 2])
def test_the_model_is_as_before_after_an_error(failing: int, llama: Any) -> None:
    llama.train()
    own = llama.base_model.forward
    llama.base_model.forward = own
    before, calls = state(llama), []

    def measure() -> None:
        calls.append(llama(input_ids=TEXT.input_ids, use_cache=False))
        if len(calls) == failing:
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        measure_each(llama, CANDIDATES, measure)
    assert state(llama) == before
    assert llama.base_model.forward is own


@pytest.mark.parametrize("runs", [0, 2])
@pytest.mark.parametrize("place", [0, 1])
def test_a_measure_that_runs_the_model_otherwise_is_refused(
    runs: int, place: int, llama: Any
) -> None:
    wanted = [1] * place + [runs]

    def measure() -> None:
        for _ in range(wanted.pop(0)):
            llama(input_ids=TEXT.input_ids, use_cache=False)

    with pytest.raises(ValueError, match=f"expected one run of the model, saw {runs}"):
        measure_each(llama, [[site(0, "ffn")], [site(1, "ffn")]], measure)


def test_no_candidates_no_runs(llama: Any) -> None:
    pairs = batch_pairs(llama, TOKENS, 8)
    none: Sequence[Steering] = []
    assert (
        passes(llama, lambda: measure_each(llama, none, lambda: pairs.margins(llama)))
        == [0] * LAYERS
    )
