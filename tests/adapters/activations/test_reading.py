"""Reading a batch: nothing runs in vain, nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import BEST_LAYOUT, MIXTURES, sites_of

from austeer.adapters import Component, ModelError, Site
from austeer.adapters.activations.layouts import lay_out
from austeer.adapters.activations.reading import evaluating, read_sites
from austeer.adapters.tokens import PairTokens

TinyModel = Callable[..., Any]
SITES = [Site(layer, component) for layer in range(2) for component in Component]
TOKENS = [PairTokens((1, 5, 9), (7, 8), (6,)), PairTokens((4,), (3,), (4, 5, 6, 7))]
NO_PREFIX = [PairTokens((), (7,), (6,)), PairTokens((), (9,), (11,))]


def rows_of(model: Any, names: tuple[str, ...]) -> dict[str, int]:
    """Tokens that each of these modules computes, filled by every forward pass."""
    rows: dict[str, int] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: rows.__setitem__(name, out.shape[1])
        )
    return rows


@pytest.mark.parametrize("layer", [0, 1])
def test_the_last_layer_computes_the_last_tokens_alone(
    tiny_model: TinyModel, layer: int
) -> None:
    model = tiny_model("llama")
    below = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    names = tuple(f"model.layers.{i}.{name}" for i in range(layer + 1) for name in below)
    rows = rows_of(model, names)
    sites = [site for site in SITES if site.layer <= layer]
    read_sites(model, lay_out(model, TOKENS, "packed"), sites)
    last = tuple(f"model.layers.{layer}.{name}" for name in below[1:])
    assert rows == {name: 4 if name in last else 12 for name in names}


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gpt2", "gpt_neox", "phi", "opt", *MIXTURES]
)
@pytest.mark.parametrize("tokens", [TOKENS, NO_PREFIX])
def test_each_set_of_sites_reads_the_same(
    tiny_model: TinyModel, model_type: str, tokens: list[PairTokens]
) -> None:
    """A site's values do not hang on which others are read, or which layer is the last."""
    model = tiny_model(model_type)
    whole = sites_of(model_type)
    together = read_sites(model, lay_out(model, tokens, "plain"), whole)
    batch = lay_out(model, tokens, BEST_LAYOUT.get(model_type, "packed"))
    for sites in [[site] for site in whole] + [whole, whole[::-1]]:
        found = read_sites(model, batch, sites)
        assert set(found) == set(sites)
        for site in sites:
            for x, wanted in zip(found[site], together[site], strict=True):
                torch.testing.assert_close(x, wanted, rtol=1e-5, atol=2e-5)


def test_module_that_never_runs(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    down = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.forward = lambda x: down.forward(down.weight.new_zeros(1, 1, 48))
    with pytest.raises(ModelError, match=r"layers\.1\.neuron: its module never ran"):
        read_sites(model, lay_out(model, TOKENS, "plain"), [Site(1, Component.NEURON)])


def test_evaluating_restores_each_module(tiny_model: TinyModel) -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes
