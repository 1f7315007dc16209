"""Untrained baselines from their papers: ITI, CAA, SADI.

Each turns last-token activations of the fit pairs into a few `Setting`s: a steering whose only
open number is its strength. `baselines_tuned` finds both on validation data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from austeer.adapters import Component, Site, SteeredSite
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import steering_hooks, transformed

Sides = tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N D"]]

HEADS = (1, 2, 4, 8)
UNITS = (4, 8, 16, 64)
_FOLDS = 5


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a method: what it does at a strength, and what that costs.

    Attributes:
        name: of the setting.
        at: makes the steering context of a strength; strength 0 is the base model.
        touched: activations changed per token.
        parameters: numbers to store, without indices.
    """

    name: str
    at: Callable[[float], AbstractContextManager[None]]
    touched: int
    parameters: int


def iti_settings(
    model: PreTrainedModel, activations: Mapping[Site, Sides], head_dim: int
) -> Iterator[Setting]:
    """Inference-time intervention (arXiv 2306.03341): add α·σ·θ to the best heads.

    Heads of the input of o_proj are ranked by the held-out accuracy of a logistic probe
    (five folds of the fit pairs); θ is the unit mean difference, σ the standard deviation of
    all activations along it. Equal accuracies are ordered by held-out likelihood, of which
    the paper says nothing.
    """
    heads = [
        ((site, slice(start, start + head_dim)), _part(sides, start, head_dim))
        for site, sides in activations.items()
        if site.component is Component.ATTENTION
        for start in range(0, sides[0].shape[1], head_dim)
    ]
    worth = probe_worth(np.stack([np.concatenate(sides) for _, sides in heads]))
    ranked = sorted(range(len(heads)), key=lambda head: worth[head], reverse=True)
    for count in HEADS:
        vectors: dict[Site, np.ndarray] = {}
        for head in ranked[:count]:
            (site, place), sides = heads[head]
            whole = vectors.setdefault(site, np.zeros(activations[site][0].shape[1]))
            whole[place] = iti_direction(*sides)
        touched = head_dim * len(ranked[:count])
        yield Setting(f"{count} heads", adder(model, vectors), touched, touched)


def iti_direction(
    positive: Float[np.ndarray, "N d"], negative: Float[np.ndarray, "N d"]
) -> Float[np.ndarray, " d"]:
    """σ·θ of one head."""
    theta = positive.mean(0) - negative.mean(0)
    theta = theta / max(float(np.linalg.norm(theta)), 1e-12)
    sigma = (np.concatenate([positive, negative]) @ theta).std()
    return np.asarray(sigma * theta)


def probe_worth(x: Float[np.ndarray, "H 2N d"]) -> list[tuple[float, float]]:
    """Held-out (accuracy, mean log-likelihood) of a logistic probe on each of H heads.

    Rows are the positives of all pairs, then their negatives; both sides of a pair are held
    out together.
    """
    n = x.shape[1] // 2
    fold = np.tile(np.arange(n) % _FOLDS, 2)
    label = np.repeat([1.0, 0.0], n)
    logits = np.empty(x.shape[:2])
    for held in range(min(_FOLDS, n)):
        seen = fold != held
        mean, std = x[:, seen].mean(1, keepdims=True), x[:, seen].std(1, keepdims=True)
        z = (x - mean) / np.maximum(std, 1e-9)
        z = np.concatenate([z, np.ones_like(z[..., :1])], axis=-1)
        weight = _logistic(z[:, seen], label[seen])
        logits[:, ~seen] = np.einsum("hnd,hd->hn", z[:, ~seen], weight)
    signed = logits * (2 * label - 1)
    accuracy, likelihood = (signed > 0).mean(1), -np.logaddexp(0.0, -signed).mean(1)
    return list(zip(accuracy.tolist(), likelihood.tolist(), strict=True))


def _logistic(
    x: Float[np.ndarray, "H n d"], label: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "H d"]:
    """Ridge logistic regression of every head at once, by Newton's method."""
    weight = np.zeros((x.shape[0], x.shape[2]))
    for _ in range(12):
        chance = 1 / (1 + np.exp(-np.einsum("hnd,hd->hn", x, weight)))
        slope = np.einsum("hnd,hn->hd", x, label - chance) - weight
        curve = np.einsum("hnd,hn,hne->hde", x, chance * (1 - chance), x)
        step = np.linalg.solve(curve + np.eye(x.shape[2]), slope[..., None])[..., 0]
        weight += step
    return weight


def caa_settings(
    model: PreTrainedModel, activations: Mapping[Site, Sides]
) -> Iterator[Setting]:
    """Contrastive activation addition (arXiv 2312.06681): add α·(mean difference) at a layer.

    The difference is that of the layer's output at the last token; it is added at every
    position. Every layer is a setting.
    """
    for site, (positive, negative) in activations.items():
        if site.component is Component.LAYER:
            vector = (positive - negative).mean(0)
            width = len(vector)
            yield Setting(f"layer {site.layer}", adder(model, {site: vector}), width, width)


def sadi_settings(
    model: PreTrainedModel, activations: Mapping[Site, Sides], head_dim: int
) -> Iterator[Setting]:
    """SADI (arXiv 2410.12299): x + δ·(mask ⊙ x), its step 3, "adaptive steering".

    The mask keeps the K elements of all layers with the largest mean difference (step 2,
    signed, as in the authors' code). Elements are hidden states (layer outputs, and MLP
    outputs, which the authors' code takes for them), neurons, or whole heads by their mean.
    """
    for kind in (Component.LAYER, Component.FFN, Component.NEURON):
        for count in UNITS:
            sites = sadi_mask(_differences(activations, kind), count)
            yield _scaled(model, f"{kind.value} K={count}", sites)
    attention = _differences(activations, Component.ATTENTION)
    means = {site: d.reshape(-1, head_dim).mean(1) for site, d in attention.items()}
    for count in HEADS:
        heads = sadi_mask(means, count)
        dims = {
            site: (h[:, None] * head_dim + np.arange(head_dim)).ravel()
            for site, h in heads.items()
        }
        yield _scaled(model, f"{count} heads", dims)


def sadi_mask(
    differences: Mapping[Site, Float[np.ndarray, " D"]], count: int
) -> dict[Site, Int[np.ndarray, " k"]]:
    """The `count` elements with the largest mean difference over all sites."""
    sites = list(differences)
    owner = np.repeat(np.arange(len(sites)), [len(differences[site]) for site in sites])
    inside = np.concatenate([np.arange(len(differences[site])) for site in sites])
    values = np.concatenate([differences[site] for site in sites])
    best = np.argsort(-values, kind="stable")[:count]
    return {
        sites[number]: np.sort(inside[best[owner[best] == number]])
        for number in np.unique(owner[best])
    }


def _differences(
    activations: Mapping[Site, Sides], kind: Component
) -> dict[Site, Float[np.ndarray, " D"]]:
    return {
        site: (positive - negative).mean(0)
        for site, (positive, negative) in activations.items()
        if site.component is kind
    }


def _part(sides: Sides, start: int, width: int) -> Sides:
    positive, negative = (side[:, start : start + width] for side in sides)
    return positive, negative


def _scaled(
    model: PreTrainedModel, name: str, units: Mapping[Site, Int[np.ndarray, " k"]]
) -> Setting:
    architecture = architecture_of(model.config.model_type)

    def at(strength: float) -> AbstractContextManager[None]:
        sites = [
            SteeredSite(site, index, np.full(len(index), strength, np.float32))
            for site, index in units.items()
        ]
        return steering_hooks(model, architecture, sites)

    return Setting(name, at, sum(map(len, units.values())), 1)


def adder(
    model: PreTrainedModel, vectors: Mapping[Site, Float[np.ndarray, " D"]]
) -> Callable[[float], AbstractContextManager[None]]:
    """Steering that adds strength · vector at every token of each site."""
    architecture = architecture_of(model.config.model_type)
    tensors = {
        site: torch.tensor(vector, dtype=torch.float32) for site, vector in vectors.items()
    }

    @contextmanager
    def at(strength: float) -> Iterator[None]:
        with ExitStack() as stack:
            for site, vector in tensors.items():
                amount = strength * vector

                def steer(x: torch.Tensor, amount: torch.Tensor = amount) -> torch.Tensor:
                    return x + amount.to(x)

                hookpoint = architecture.hookpoint(site)
                stack.enter_context(transformed(model, hookpoint, steer))
            yield

    return at
