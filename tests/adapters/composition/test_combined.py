"""`combine`: the same logits as its adapters attached together; what cannot be is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import random_site

from austeer.adapters import (
    AdapterError,
    Component,
    ModelError,
    Site,
    SteeredSite,
    SteeringAdapter,
    Strength,
)
from austeer.adapters.composition.combined import combine
from austeer.adapters.fingerprint import module_reader

IDS = torch.arange(3, 27).reshape(2, 12)


def adapter(
    model: Any, units: dict[tuple[int, str], Sequence[int]], rank: int = 0, seed: int = 0
) -> SteeringAdapter:
    rng, sites = np.random.default_rng(seed), []
    for (layer, component), chosen in units.items():
        sites.append(random_site(Site(layer, Component(component)), chosen, rank, rng))
    strength = Strength.ADAPTIVE if rank else Strength.FITTED
    return SteeringAdapter.from_sites(model, sites, strength)


def logits(model: Any, *attached: SteeringAdapter, scales: Sequence[float] = ()) -> Any:
    with torch.no_grad(), ExitStack() as stack:
        for one, scale in zip(attached, scales or [1.0] * len(attached), strict=True):
            stack.enter_context(one.attached(model, scale))
        return model(IDS).logits


@pytest.mark.parametrize("component", [*Component])
@pytest.mark.parametrize("ranks", [(0, 0), (1, 1), (2, 1), (0, 2)])
def test_combined_is_both_attached(
    tiny_model: Callable[..., Any], component: Component, ranks: tuple[int, int]
) -> None:
    """One site shared by disjoint units, one site of each adapter's own."""
    model = tiny_model("llama")
    first = adapter(model, {(0, component): [1, 5], (1, component): [2]}, ranks[0], seed=1)
    second = adapter(model, {(0, component): [3, 0, 7]}, ranks[1], seed=2)
    made = combine([first, second], [1.0, -0.5], model=model)
    found = logits(model, made)
    together = logits(model, first, second, scales=[1.0, -0.5])
    torch.testing.assert_close(found, together, rtol=1e-5, atol=1e-5)
    for other in (model(IDS).logits, logits(model, first), logits(model, second)):
        assert (found - other).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "gemma2"])
def test_different_components(tiny_model: Callable[..., Any], model_type: str) -> None:
    model = tiny_model(model_type)
    first = adapter(model, {(0, "attention"): [1, 5], (1, "layer"): [2, 9]}, 1, seed=1)
    second = adapter(model, {(1, "neuron"): [3], (0, "ffn"): [4]}, 0, seed=2)
    made = combine([first, second], model=model)
    torch.testing.assert_close(
        logits(model, made), logits(model, first, second), rtol=1e-5, atol=1e-5
    )
    assert made.config.components == tuple(sorted(Component))
    assert (made.config.k, made.config.rank, made.config.strength) == (6, 1, "adaptive")


def test_constant_gains_of_one_unit_add_up(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    first = SteeringAdapter.from_units(model, "ffn", [0, 1], [4, 6], [0.5, 1.0])
    second = SteeringAdapter.from_units(model, "ffn", [0, 1], [4, 7], [-2.0, 1.0])
    made = combine([first, second], [2.0, 0.25])
    by_hand = SteeringAdapter.from_units(model, "ffn", [0, 1, 1], [4, 6, 7], [0.5, 2.0, 0.25])
    assert made.config.base_model_fingerprint == by_hand.config.base_model_fingerprint
    assert torch.equal(logits(model, made), logits(model, by_hand))
    combined = made.config.fit["combined"]
    assert [row["weight"] for row in combined["adapters"]] == [2.0, 0.25]
    assert combined["conflicts"] == 1
    (overlap,) = combined["overlaps"]
    assert (overlap["site"], overlap["unit"], overlap["gamma"]) == (
        "layers.0.ffn",
        4,
        [1.0, -0.5],
    )


def test_survives_a_round_trip(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    parts = [adapter(model, {(0, "ffn"): [1, 2]}, 1), adapter(model, {(1, "ffn"): [2]}, 2)]
    made = combine(parts, model=model, names=["calm", "formal"])
    loaded = SteeringAdapter.from_pretrained(made.save_pretrained(tmp_path / "out"))
    assert torch.equal(logits(model, loaded), logits(model, made))
    names = [row["name"] for row in loaded.config.fit["combined"]["adapters"]]
    assert names == ["calm", "formal"]


def test_combinations_combine(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    one, two, three = (adapter(model, {(0, "layer"): [n]}, n, seed=n) for n in range(3))
    left = combine([combine([one, two]), three])
    flat = combine([one, two, three])
    assert torch.allclose(logits(model, left), logits(model, flat), rtol=1e-6, atol=1e-6)
    assert left.config.rank == flat.config.rank == 3


@pytest.mark.parametrize(
    ("ranks", "on_overlap", "refusal"),
    [
        ((0, 0), "sum", None),
        ((0, 0), "refuse", "choose other units"),
        ((0, 1), "sum", "on_overlap strongest"),
        ((1, 2), "sum", "on_overlap strongest"),
        ((1, 2), "strongest", None),
        ((1, 2), "refuse", "choose other units"),
    ],
)
def test_overlaps_are_summed_given_away_or_refused(
    tiny_model: Callable[..., Any],
    ranks: tuple[int, int],
    on_overlap: Any,
    refusal: str | None,
) -> None:
    model = tiny_model("llama")
    first = adapter(model, {(0, "ffn"): [1, 2, 3]}, ranks[0], seed=1)
    second = adapter(model, {(0, "ffn"): [3, 2, 4]}, ranks[1], seed=2)
    if refusal is None:
        assert combine([first, second], on_overlap=on_overlap).config.k == 4
        return
    with pytest.raises(AdapterError, match=refusal) as error:
        combine([first, second], on_overlap=on_overlap, names=["calm", "formal"])
    assert "layers.0.ffn: unit 2 (and 1 more)" in str(error.value)
    assert "calm and formal" in str(error.value)


def test_bad_input(tiny_model: Callable[..., Any]) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    first = adapter(model, {(0, "ffn"): [1]})
    second = adapter(model, {(1, "ffn"): [1]}, seed=1)
    stranger = adapter(other, {(0, "ffn"): [2]})
    distant = adapter(tiny_model("mistral"), {(0, "ffn"): [2]})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"adapters": []}, "at least one adapter"),
        ({"adapters": [first, second], "weights": [1.0]}, "one weight for each of 2"),
        ({"adapters": [first, second]}, "pass it as model="),
        ({"adapters": [first, first]}, "adapter 2 is the same adapter as adapter 1"),
        ({"adapters": [first, first], "names": ["a", "a"]}, "a is the same adapter as a"),
        ({"adapters": [first, stranger]}, "made for another base model"),
        ({"adapters": [first, stranger], "model": model}, "adapter 2 was made for another"),
        ({"adapters": [first, distant]}, "for a mistral model"),
        ({"adapters": [first], "model": tiny_model("gpt2")}, "this one is gpt2"),
        ({"adapters": [first], "on_overlap": "add"}, "'add': expected one of sum"),
        ({"adapters": [first], "names": []}, "0 names for 1"),
    ]
    for arguments, message in cases:
        with pytest.raises(AdapterError, match=message) as error:
            combine(**arguments)
        assert "\n" not in str(error.value) and "--force" not in str(error.value)
    digests = [one.config.base_model_fingerprint for one in (first, stranger)]
    with pytest.raises(AdapterError) as error:
        combine([first, stranger])
    assert all(digest in str(error.value) for digest in digests)


def test_a_weight_too_large_is_refused(tiny_model: Callable[..., Any]) -> None:
    from austeer.adapters import SiteError

    one = adapter(tiny_model("llama"), {(0, "ffn"): [1]})
    with pytest.raises(SiteError, match="finite gammas"):
        combine([one], [1e300])


def test_strength_and_revision_of_the_combination(tiny_model: Callable[..., Any]) -> None:
    import dataclasses

    model = tiny_model("llama")

    def made(unit: int, strength: Strength, revision: str) -> SteeringAdapter:
        site = SteeredSite(Site(0, Component.FFN), np.array([unit]), np.ones(1, np.float32))
        plain = SteeringAdapter.from_sites(model, [site], strength, alpha=2.0)
        return SteeringAdapter(
            dataclasses.replace(plain.config, revision=revision), plain.sites
        )

    same = combine([made(1, Strength.PAPER, "v1"), made(2, Strength.PAPER, "v1")])
    assert (same.config.strength, same.config.alpha, same.config.revision) == (
        Strength.PAPER,
        None,
        "v1",
    )
    mixed = combine([made(1, Strength.PAPER, "v1"), made(2, Strength.ORIENTED, "v2")])
    assert (mixed.config.strength, mixed.config.revision) == (Strength.FITTED, None)


def test_the_files_of_the_base_decide_where_they_are_given(
    tiny_model: Callable[..., Any],
) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    parts = [adapter(model, {(layer, "ffn"): [layer, 4]}, seed=layer) for layer in (0, 1)]
    wanted = combine(parts, model=model).config.base_model_fingerprint
    read = module_reader(model)
    assert combine(parts, read=read).config.base_model_fingerprint == wanted
    with pytest.raises(AdapterError, match="made for another base model"):
        combine(parts, read=module_reader(other))
    with pytest.raises(AdapterError, match="made for another base model"):
        combine(parts, model=model, read=module_reader(other))


def test_a_scaled_combination_keeps_no_figures(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    both = [adapter(model, {(layer, "ffn"): [1]}) for layer in (0, 1)]
    made = combine(both, model=model)
    report = made.config.fit["combined"] | {"kl": 0.05, "factor": 0.5, "behaviours": {}}
    known = dataclasses.replace(made.config, fit={"combined": report})
    fit = SteeringAdapter(known, made.sites).scaled(3.0).config.fit
    assert fit == {"combined": made.config.fit["combined"], "scaled_by": 3.0}


@pytest.mark.parametrize("what", ["one", "paths", "iterator", "text weight", "model name"])
def test_what_is_no_list_of_adapters(what: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    one = adapter(model, {(0, "ffn"): [1, 2]})
    calls: dict[str, Callable[[], Any]] = {
        "one": lambda: combine(one),  # type: ignore[arg-type]
        "paths": lambda: combine(["a", "b"]),  # type: ignore[list-item]
        "iterator": lambda: combine(iter([one])),  # type: ignore[arg-type]
        "text weight": lambda: combine([one], ["1"]),  # type: ignore[list-item]
        "model name": lambda: combine([one], model="s260"),  # type: ignore[arg-type]
    }
    with pytest.raises((AdapterError, ModelError), match="expected a") as error:
        calls[what]()
    assert "\n" not in str(error.value)
