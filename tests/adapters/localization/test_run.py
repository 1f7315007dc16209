"""Localization equals an independent loop, and nothing about batching changes a counter."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import BEST_LAYOUT, MIXTURES

from austeer.adapters import (
    Component,
    ContrastivePair,
    FitError,
    PairsError,
    Ranking,
    SiteError,
    load_model,
    load_tokenizer,
    localize,
    read_pairs,
)

TinyModel = Callable[..., Any]
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")
COMPONENTS = ("attention", "ffn", "neuron", "layer")
# Written out here, not taken from the code under test: layers, attention and MLP projections.
PATHS = {
    **dict.fromkeys(MODEL_TYPES, ("model.layers", "self_attn.o_proj", "mlp.down_proj")),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
}
LAYOUTS: list[dict[str, Any]] = [
    {"batch_size": size, "layout": layout, "padding_side": side}
    for size in (7, None, 1)
    for layout, side in itertools.product(("tree", "plain", "packed"), ("left", "right"))
    if (layout, side) != ("packed", "left")  # it has no padding
]


def rows(count: int) -> list[dict[str, str]]:
    names, places = ("Tom", "Mia"), ("park", "home", "the sun", "rain")
    ends = [(" happy", " sad and so sad"), (" happy !", " sad"), (" so happy and", " it rain")]
    whole = [
        {"prompt": f"one day {name} went to {place} and", "positive": good, "negative": bad}
        for name, place, (good, bad) in itertools.product(names, places, ends)
    ]
    return whole[:count]


def pairs_of(found: list[dict[str, str]]) -> list[ContrastivePair]:
    return [ContrastivePair(row["prompt"], row["positive"], row["negative"]) for row in found]


def loop(
    model: Any, tokenizer: Any, found: list[dict[str, str]]
) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """(positive, negative) activations [N, layers, width] by one plain forward per string."""
    layers, attention, mlp = PATHS[model.config.model_type]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in COMPONENTS}

    def keep(name: str, x: Any) -> None:
        seen[name].append((x[0] if isinstance(x, tuple) else x)[0, -1])

    for layer in model.get_submodule(layers):
        o_proj, down = layer.get_submodule(attention), layer.get_submodule(mlp)
        o_proj.register_forward_pre_hook(lambda _, x: keep("attention", x))
        down.register_forward_pre_hook(lambda _, x: keep("neuron", x))
        down.register_forward_hook(lambda _, __, x: keep("ffn", x))
        layer.register_forward_hook(lambda _, __, x: keep("layer", x))
    for row, side in itertools.product(found, ("positive", "negative")):
        ids = tokenizer(row["prompt"] + row[side], return_tensors="pt").input_ids[:, :512]
        with torch.no_grad():
            model(ids)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    shape = (len(found), 2, model.config.num_hidden_layers, -1)
    whole = {name: torch.stack(x).reshape(shape).float().numpy() for name, x in seen.items()}
    return {name: (x[:, 0], x[:, 1]) for name, x in whole.items()}


def check(ranking: Ranking, wanted: dict[str, Any]) -> None:
    """Every counter and β equal; a unit with near-ties may differ by as many pairs as those."""
    for name, (x, y) in wanted.items():
        delta = x.astype(np.float64) - y
        largest = np.maximum(np.abs(x), np.abs(y)).astype(np.float64)
        near = (np.abs(delta) <= 2e-5 * np.maximum(1, largest)).sum(0)
        p, n = (x > y).sum(0), (x < y).sum(0)
        assert (near == 0).mean() > 0.85, "too many near-ties to say anything"
        assert (np.abs(ranking.positive(name) - p) <= near).all()
        assert (np.abs(ranking.negative(name) - n) <= near).all()
        beta = np.zeros(p.shape)
        for unit in np.ndindex(p.shape):
            beta[unit] = p[unit] / len(x) if p[unit] >= n[unit] else -n[unit] / len(x)
        clear = near == 0
        np.testing.assert_array_equal(ranking.beta(name)[clear], beta[clear])
        both = np.concatenate((x, y)).astype(np.float64)
        np.testing.assert_allclose(ranking.mean(name), both.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ranking.std(name), both.std(0), rtol=1e-4, atol=1e-5)
        effect = np.abs(delta.mean(0)) / both.std(0)
        np.testing.assert_allclose(ranking.effect(name), effect, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tiny_models_against_the_loop(
    tiny_model: TinyModel,
    tiny_tokenizer: Any,
    model_type: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, found = tiny_model(model_type), rows(24)
    wanted = loop(model, tiny_tokenizer, found)
    for share in (True, False):
        ranking = localize(
            model, tiny_tokenizer, pairs_of(found), batch_size=5, share_prompt=share
        )
        assert ranking.count == 24 and ranking.num_layers == 2
        check(ranking, wanted)
    assert not caplog.records


@pytest.mark.shared
def test_real_model_against_the_loop(shared: Path) -> None:
    model = load_model(shared / "models" / "stories260K")
    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    path = shared / "data" / "happy_vs_sad_train.jsonl"
    wanted = loop(
        model,
        tokenizer,
        [json.loads(line) for line in path.read_text("utf-8").strip().split("\n")],
    )
    assert {x.shape for x, _ in wanted.values()} == {(120, 5, 64), (120, 5, 172)}
    pairs = read_pairs(path)
    check(localize(model, tokenizer, pairs), wanted)
    # Each pair alone takes long, and the tiny models do it.
    for options in LAYOUTS[:10]:
        check(localize(model, tokenizer, pairs, **options), wanted)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_layout_changes_a_counter(
    tiny_model: TinyModel, tiny_tokenizer: Any, model_type: str
) -> None:
    model, pairs = tiny_model(model_type), pairs_of(rows(24))
    first = localize(model, tiny_tokenizer, pairs)
    for options in LAYOUTS:
        other = localize(model, tiny_tokenizer, pairs, **options)
        for name in COMPONENTS:
            mine, theirs = first.counts(name), other.counts(name)
            clear = (mine.near_ties == 0) & (theirs.near_ties == 0)
            assert clear.mean() > 0.9
            np.testing.assert_array_equal(mine.positive[clear], theirs.positive[clear])
            np.testing.assert_array_equal(mine.negative[clear], theirs.negative[clear])


@pytest.mark.parametrize("model_type", BEST_LAYOUT)
def test_the_chosen_layout_scores_as_plain_rows_do(
    tiny_model: TinyModel, tiny_tokenizer: Any, model_type: str
) -> None:
    model, pairs = tiny_model(model_type), pairs_of(rows(24))
    chosen = localize(model, tiny_tokenizer, pairs)
    plain = localize(model, tiny_tokenizer, pairs, layout="plain", batch_size=5)
    assert chosen.components == tuple(
        name for name in COMPONENTS if name != "neuron" or model_type not in MIXTURES
    )
    for name in chosen.components:
        clear = (chosen.counts(name).near_ties == 0) & (plain.counts(name).near_ties == 0)
        # A ReLU leaves many neurons at zero on both sides.
        assert clear.mean() > (0.3 if (model_type, name) == ("opt", "neuron") else 0.9)
        np.testing.assert_array_equal(chosen.beta(name)[clear], plain.beta(name)[clear])


def test_order_of_pairs_does_not_matter(tiny_model: TinyModel, tiny_tokenizer: Any) -> None:
    model, pairs = tiny_model("llama"), pairs_of(rows(24))
    first, second = (localize(model, tiny_tokenizer, p) for p in (pairs, pairs[::-1]))
    np.testing.assert_array_equal(first.positive("layer"), second.positive("layer"))
    assert first.info == second.info


def test_swapped_sides_swap_the_counters(tiny_model: TinyModel, tiny_tokenizer: Any) -> None:
    model, found = tiny_model("llama"), rows(9)
    swapped = [{**r, "positive": r["negative"], "negative": r["positive"]} for r in found]
    first, second = (localize(model, tiny_tokenizer, pairs_of(r)) for r in (found, swapped))
    for name in COMPONENTS:
        np.testing.assert_array_equal(first.positive(name), second.negative(name))
        np.testing.assert_array_equal(first.negative(name), second.positive(name))


def test_signs_are_taken_in_the_models_dtype(
    tiny_model: TinyModel, tiny_tokenizer: Any
) -> None:
    model, found = tiny_model("llama").to(torch.bfloat16), rows(24)
    wanted = loop(model, tiny_tokenizer, found)
    options: dict[str, Any] = {"batch_size": 1, "share_prompt": False}
    ranking = localize(model, tiny_tokenizer, pairs_of(found), ["layer"], **options)
    assert ranking.info.dtype == "bfloat16" and ranking.components == (Component.LAYER,)
    x, y = wanted["layer"]
    assert (x == y).any(), "no exact ties: bfloat16 must have some here"
    # Padding inside the batch of two may round a value differently.
    agreeing = (ranking.positive("layer") == (x > y).sum(0)).mean()
    assert agreeing > 0.9


def test_progress_and_one_component(tiny_model: TinyModel, tiny_tokenizer: Any) -> None:
    calls: list[tuple[int, int]] = []
    ranking = localize(
        tiny_model("gpt2"),
        tiny_tokenizer,
        pairs_of(rows(7)),
        "neuron",
        batch_size=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(3, 7), (6, 7), (7, 7)]
    assert ranking.components == (Component.NEURON,)
    assert ranking.beta("neuron").shape == (2, 128)  # GPT-2: four times hidden


def test_saved_ranking_is_the_same(
    tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: Any
) -> None:
    ranking = localize(tiny_model("qwen3"), tiny_tokenizer, pairs_of(rows(6)))
    loaded = Ranking.load(ranking.save(tmp_path / "r.safetensors"))
    assert loaded.info == ranking.info
    for name in COMPONENTS:
        np.testing.assert_array_equal(loaded.beta(name), ranking.beta(name))
        np.testing.assert_array_equal(loaded.effect(name), ranking.effect(name))
        assert loaded.near_ties(name) == ranking.near_ties(name)


@pytest.mark.parametrize(
    ("options", "kind", "fault"),
    [
        ({"pairs": []}, PairsError, "at least one pair"),
        ({"components": ["brain"]}, SiteError, "'brain'"),
        ({"components": []}, SiteError, "got none"),
        ({"batch_size": 0}, FitError, "got 0"),
        ({"padding_side": "top"}, FitError, "'top'"),
        ({"compat": "other"}, FitError, "'other'"),
    ],
)
def test_bad_options(
    tiny_model: TinyModel, tiny_tokenizer: Any, options: dict[str, Any], kind: Any, fault: str
) -> None:
    whole = {"pairs": pairs_of(rows(3)), **options}
    with pytest.raises(kind, match=fault):
        localize(tiny_model("llama"), tiny_tokenizer, **whole)


def test_prompt_longer_than_the_context(tiny_model: TinyModel, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama", max_position_embeddings=8)
    pairs = [ContrastivePair("Tom", " happy", " sad", None, "f:1"),
             ContrastivePair("one day " * 5, " happy", " sad", None, "f:2")]  # fmt: skip
    with pytest.raises(PairsError, match="f:2: the prompt alone has 12 tokens"):
        localize(model, tiny_tokenizer, pairs)


def reference_counts(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """The published rule, pair by pair: p, n and β of activations rounded to float16."""
    p, n = np.zeros(x.shape[1:], int), np.zeros(x.shape[1:], int)
    for good, bad in zip(x.astype(np.float16), y.astype(np.float16), strict=True):
        p += good > bad
        n += good < bad
    return p, n, np.where(p >= n, p / len(x), -n / len(x))


def check_reference(ranking: Ranking, wanted: dict[str, Any]) -> None:
    """Equal but where rounding error of float32 decides what a float16 is."""
    for name, (x, y) in wanted.items():
        p, n, beta = reference_counts(x, y)
        unsure = undecided(x, y).sum(0)
        assert (unsure == 0).mean() > 0.85
        assert (np.abs(ranking.positive(name) - p) <= unsure).all()
        assert (np.abs(ranking.negative(name) - n) <= unsure).all()
        np.testing.assert_array_equal(ranking.beta(name)[unsure == 0], beta[unsure == 0])


def undecided(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Whether another order of additions in float32 could compare otherwise in float16."""
    slack = np.float32(2e-6) * np.maximum(1, np.maximum(np.abs(x), np.abs(y)))
    low_x, high_x, low_y, high_y = (
        (side + sign * slack).astype(np.float16) for side in (x, y) for sign in (-1, 1)
    )
    tie = (low_x == high_x) & (low_y == high_y) & (low_x == low_y)
    return ~(tie | (low_x > high_y) | (high_x < low_y))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_reference_against_the_loop(
    tiny_model: TinyModel, tiny_tokenizer: Any, model_type: str
) -> None:
    model, found = tiny_model(model_type), rows(24)
    wanted = loop(model, tiny_tokenizer, found)
    ranking = localize(model, tiny_tokenizer, pairs_of(found), compat="reference")
    assert ranking.info.compat == "reference"
    check_reference(ranking, wanted)


@pytest.mark.shared
def test_reference_against_the_loop_on_the_real_model(shared: Path) -> None:
    model = load_model(shared / "models" / "stories260K")
    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    path = shared / "data" / "happy_vs_sad_train.jsonl"
    found = [json.loads(line) for line in path.read_text("utf-8").strip().split("\n")]
    wanted = loop(model, tokenizer, found)
    check_reference(localize(model, tokenizer, read_pairs(path), compat="reference"), wanted)
    rounded = [x.astype(np.float16) == y.astype(np.float16) for x, y in wanted.values()]
    assert sum(int(ties.sum()) for ties in rounded) > 100, "rounding made no ties to tell by"


def test_reference_warns_about_prompts_it_drops(
    tiny_model: TinyModel, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, pairs = tiny_model("llama"), pairs_of(rows(3))
    refusing = ContrastivePair("Tom", " I'm sorry, but I can't assist.", " happy")
    localize(model, tiny_tokenizer, pairs, compat="reference")
    localize(model, tiny_tokenizer, [*pairs, refusing])
    assert not caplog.records
    localize(model, tiny_tokenizer, [*pairs, refusing], compat="reference")
    assert "drop the prompt of 1 positives" in caplog.text


@pytest.mark.parametrize("model_type", MIXTURES)
def test_neuron_of_a_mixture_is_refused_before_anything_runs(
    tiny_model: TinyModel, tiny_tokenizer: Any, model_type: str
) -> None:
    model = tiny_model(model_type)
    model.model.forward = None
    with pytest.raises(SiteError, match=r"mixture of experts.*steer ffn"):
        localize(model, tiny_tokenizer, pairs_of(rows(3)), "neuron")


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.self_attn.q_proj"])
def test_a_state_of_other_weights_is_refused(
    name: str, tiny_model: TinyModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The fingerprint covers what is steered; everything below it counts here, too."""
    model, pairs = tiny_model("llama"), pairs_of(rows(6))
    options: dict[str, Any] = {"components": ["ffn"], "state": tmp_path / "state"}
    localize(model, tiny_tokenizer, pairs, state_every=0.0, **options)
    with torch.no_grad():
        model.model.get_submodule(name).weight.mul_(1.5)
    with pytest.raises(FitError, match="made with other model"):
        localize(model, tiny_tokenizer, pairs, **options)
