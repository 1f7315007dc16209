"""What each steered unit does by itself.

After arXiv 2602.04428, by which single units control distinct token distributions. Ours: how
distinct is measured by KL, the units are an adapter's strongest, each steered as the adapter
steers it, and the text is sampled from the base model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.adapters._numbers import check_whole
from austeer.adapters._progress import Progress
from austeer.adapters.activations.reading import evaluating
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.analysis.unembedding import TokenScore, top_tokens, unit_logits
from austeer.adapters.architectures import architecture_of, text_config
from austeer.adapters.attach import SiteSteer, steering_hooks, text_decoder, transformed
from austeer.adapters.composition.combined import check_base
from austeer.adapters.fingerprint import ReadTensor
from austeer.adapters.live_model import check_bare, check_tokenizer
from austeer.adapters.measurement.neutral import TokenText, sample_neutral
from austeer.adapters.sites import Site
from austeer.adapters.steered_site import SteeredSite
from austeer.adapters.tokens import token_limit

_BYTES = 1 << 28  # of logits, and of log-probabilities, kept at a time
_STAGE = "units one by one"


@dataclass(frozen=True, slots=True)
class UnitEffect:
    """What one unit does.

    Attributes:
        site: where.
        unit: its number.
        gamma: its γ.
        mean_activation: mean x over the text's tokens, by the base.
        mean_change: mean γ · φ(x) · x, by which the adapter moves it there.
        kl: mean KL(base ‖ this unit steered alone), nats per token.
        promotes: tokens that the mean change raises most.
        suppresses: tokens that it lowers most.
    """

    site: Site
    unit: int
    gamma: float
    mean_activation: float
    mean_change: float
    kl: float
    promotes: list[TokenScore]
    suppresses: list[TokenScore]


@dataclass(frozen=True, slots=True, eq=False)
class UnitAnalysis:
    """The strongest units of an adapter, one by one and against each other.

    Attributes:
        units: by |γ|, largest first.
        kl: KL(unit i steered alone ‖ unit j steered alone), nats per token; not symmetric.
        tokens: tokens of text behind every mean.
    """

    units: tuple[UnitEffect, ...]
    kl: Float[np.ndarray, "n n"]
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """JSON values for machines."""
        rows = [dataclasses.asdict(unit) | {"site": unit.site.key} for unit in self.units]
        return {"units": rows, "kl": self.kl.tolist(), "tokens": self.tokens}


def analyze_units(
    adapter: SteeringAdapter,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    units: int = 16,
    tokens: int = 6,
    sequences: int = 16,
    length: int = 64,
    seed: int = 0,
    read: ReadTensor | None = None,
    progress: Progress | None = None,
) -> UnitAnalysis:
    """Say what the strongest units of `adapter` do.

    Args:
        adapter: an adapter of `model`.
        model: its base model.
        tokenizer: the model's.
        units: how many at most.
        tokens: tokens named for each unit, each way.
        sequences: texts sampled from the base.
        length: tokens of each at most.
        seed: of the sample.
        read: reads the base's tensors, from its files say; None for those of `model`.
        progress: called with (stage, done, total).

    Raises:
        AdapterError: `model` is not the adapter's base.
        FitError: fewer than one unit, token or text asked for, or texts of one token.
        ModelError: a model that is steered or compiled.
    """
    check_bare(model, "analyze")
    check_tokenizer(tokenizer, "analyze")
    given: dict[str, object] = {
        "units": units, "tokens": tokens, "sequences": sequences, "length": length,
    }  # fmt: skip
    for name, value in given.items():
        check_whole(name, value, 2 if name == "length" else 1)
    check_base(adapter, model, "the adapter", read)
    chosen = strongest_units(adapter, units)
    with evaluating(model):
        length = min(length, token_limit(model))
        text = sample_neutral(model, tokenizer, sequences=sequences, length=length, seed=seed)
        means = mean_activations(model, adapter.sites, text)
        alone = [[steered_alone(steered, row)] for steered, row in chosen]
        to_base, between = pairwise_kl(model, alone, text, progress)
        effects = []
        for (steered, row), kl in zip(chosen, to_base, strict=True):
            site, unit = steered.site, int(steered.index[row])
            activation, change = (float(value[row]) for value in means[site])
            logits = unit_logits(model, site, unit) * (-1.0 if change < 0 else 1.0)
            best = top_tokens(logits, tokenizer, tokens)
            gamma = float(steered.gamma[row])
            effects.append(UnitEffect(site, unit, gamma, activation, change, float(kl), *best))
    return UnitAnalysis(tuple(effects), between, int(text.valid.sum()))


def strongest_units(adapter: SteeringAdapter, count: int) -> list[tuple[SteeredSite, int]]:
    """The units with the largest |γ|, as steered sites and rows in them."""
    rows = [(steered, row) for steered in adapter.sites for row in range(len(steered.index))]
    rows.sort(key=lambda place: -abs(float(place[0].gamma[place[1]])))
    return rows[:count]


def steered_alone(steered: SteeredSite, row: int) -> SteeredSite:
    """The site with γ = 0 at every other unit; its predictor still reads all of them."""
    gamma = np.zeros_like(steered.gamma)
    gamma[row] = steered.gamma[row]
    return dataclasses.replace(steered, gamma=gamma)


@torch.no_grad()
def pairwise_kl(
    model: PreTrainedModel,
    steerings: Sequence[Sequence[SteeredSite]],
    text: TokenText,
    progress: Progress | None = None,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n n"]]:
    """KL(base ‖ i) and KL(i ‖ j) of every steering, means over the text's tokens in nats.

    Args:
        model: the base model.
        steerings: what is steered, for each of n steerings.
        text: the text; logits of one batch of it are kept at a time.
        progress: called with (stage, done, total).
    """
    row = architecture_of(model.config.model_type)
    n = len(steerings)
    sums = torch.zeros(n + 1, n).double()
    batches = list(_batches(text, (n + 1) * text_config(model).vocab_size * 4))
    for done, part in enumerate(batches):
        logits = [_logits(model, part)]
        for sites in steerings:
            with steering_hooks(model, row, sites):
                logits.append(_logits(model, part))
        sums += _summed_kl(logits)
        if progress:
            progress(_STAGE, done + 1, len(batches))
    means = (sums / int(text.valid.sum())).numpy()
    return means[0], means[1:]


@torch.no_grad()
def mean_activations(
    model: PreTrainedModel, sites: Sequence[SteeredSite], text: TokenText
) -> dict[Site, tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]]:
    """Mean activation of each steered unit in the base, and mean change by its steering.

    Every site is read in the unsteered model.
    """
    row = architecture_of(model.config.model_type)
    sums = {steered.site: torch.zeros(2, len(steered.index)).double() for steered in sites}
    for part in _batches(text, 1):
        with ExitStack() as stack:
            for steered in sites:
                reader = _reader(steered, part, sums[steered.site])
                hookpoint = row.hookpoint(steered.site)
                stack.enter_context(transformed(model, hookpoint, reader))
            text_decoder(model)(**_inputs(model, part))
    count = int(text.valid.sum())
    return {site: tuple((both / count).numpy()) for site, both in sums.items()}


def _reader(steered: SteeredSite, part: TokenText, into: Tensor) -> Any:
    steer, index = SiteSteer(steered, 1.0), torch.from_numpy(steered.index)

    def read(x: Tensor) -> Tensor:
        # Some models flatten rows and positions into one axis.
        before = x.reshape(*part.valid.shape, -1)[part.valid.to(x.device)].float()
        change = steer(before) - before
        for row, values in enumerate((before, change)):
            into[row] += values[:, index.to(x.device)].double().sum(0).cpu()
        return x

    return read


def _summed_kl(logits: Sequence[Float[Tensor, "tokens vocab"]]) -> Float[Tensor, "m n"]:
    """Σ KL(i ‖ j) over tokens, of m distributions to all but the first."""
    total = torch.zeros(len(logits), len(logits) - 1).double()
    size = max(1, _BYTES // (8 * len(logits) * logits[0].shape[1]))
    for tokens in zip(*(torch.split(each, size) for each in logits), strict=True):
        # One unit moves the logits by little: in float32, rounding would drown its KL.
        scores = torch.stack(tokens).double().log_softmax(-1)
        for number, one in enumerate(scores):
            total[number] += (one.exp() * (one - scores[1:])).sum((-1, -2)).cpu()
    return total


def _logits(model: PreTrainedModel, part: TokenText) -> Float[Tensor, "tokens vocab"]:
    logits: Tensor = model(**_inputs(model, part)).logits
    return logits[part.valid.to(logits.device)]


def _inputs(model: PreTrainedModel, part: TokenText) -> dict[str, Any]:
    return {
        "input_ids": part.input_ids.to(model.device),
        "attention_mask": part.valid.to(model.device).long(),
        "use_cache": False,
    }


def _batches(text: TokenText, bytes_per_token: int) -> Iterator[TokenText]:
    size = max(1, min(16, _BYTES // (bytes_per_token * text.input_ids.shape[1])))
    yield from (text.rows(slice(i, i + size)) for i in range(0, len(text), size))
