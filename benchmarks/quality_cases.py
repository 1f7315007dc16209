"""Cases of the quality comparison: a model, a behaviour, and what all methods share on them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from baselines import Sides

from austeer.adapters import (
    Component,
    FitError,
    Ranking,
    Site,
    load_model,
    load_tokenizer,
    localize,
    read_pairs,
)
from austeer.adapters.activations.capture import capture
from austeer.adapters.fitting.candidates import FitOptions
from austeer.adapters.fitting.fit import fit_shares
from austeer.adapters.measurement.measure import Splits, make_splits
from austeer.adapters.pair_groups import split_pairs
from austeer.adapters.pairs import ContrastivePair, iter_pairs
from austeer.adapters.tokens import token_limit, tokenize_pairs

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SUBSET = 240  # pairs of a set of a thousand: 160 to fit and choose, 80 to report


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a behaviour; without test pairs, a fixed subset of `train` is split."""

    name: str
    model: Path
    train: Path
    test: Path | None = None

    def pairs(self) -> tuple[list[ContrastivePair], list[ContrastivePair], int]:
        """Pairs to fit and choose by, pairs to report on, and how many repeats were dropped."""
        if self.test is not None:
            return read_pairs(self.train), read_pairs(self.test), 0
        rows = list(iter_pairs(self.train))
        distinct = list({pair.content: pair for pair in rows}.values())
        chosen = random.Random(0).sample(distinct, min(SUBSET, len(distinct)))
        train, test = split_pairs(chosen, (2 / 3, 1 / 3), seed=0)
        return train, test, len(rows) - len(distinct)


def all_cases(shared: Path | None) -> Iterator[Case]:
    """The demo's behaviours, and those of the shared real model when its folder is given."""
    if shared is not None:
        data, model = shared / "data", shared / "models" / "stories260K"
        for name in ("happy_vs_sad", "dialogue_vs_narration"):
            files = (data / f"{name}_{part}.jsonl" for part in ("train", "test"))
            yield Case(f"stories260K/{name}", model, *files)
        for name in ("anaphor_gender_agreement", "regular_plural_subject_verb_agreement_1"):
            yield Case(f"stories260K/blimp_{name}", model, data / f"blimp_{name}.jsonl")
    for name in ("mood", "tense"):
        files = (EXAMPLES / "pairs" / f"{name}_{part}.jsonl" for part in ("train", "test"))
        yield Case(f"demo/{name}", EXAMPLES / "demo_model", *files)


class Bench:
    """What every method of a case shares: splits, neutral text, activations, ranking.

    Args:
        case: the case.
        seed: of splits and neutral samples, used as `fit_strength` uses it.
    """

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.seed = case, seed
        self.model = load_model(str(case.model))
        self.tokenizer = load_tokenizer(str(case.model))
        self.train, self.test_pairs, self.dropped = case.pairs()
        self.splits: Splits = make_splits(self.train, self.test_pairs, seed)
        self.fit, self.validation, self.test = fit_shares(
            self.model, self.tokenizer, self.splits, FitOptions(seed=seed)
        )

    @cached_property
    def ranking(self) -> Ranking:
        """Units ranked on the fit split, every component."""
        return localize(
            self.model, self.tokenizer, self.splits.fit, components=tuple(Component)
        )

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.model.config.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        config = self.model.config
        found = getattr(config, "head_dim", None)
        return int(found or config.hidden_size // config.num_attention_heads)

    @cached_property
    def activations(self) -> dict[Site, Sides]:
        """(positive, negative) last-token activations of the fit pairs at every site."""
        return last_token_activations(self)


def last_token_activations(bench: Bench) -> dict[Site, Sides]:
    """Capture every site of every fit pair, in the pairs' own order, as float64.

    Raises:
        FitError: a pair was not captured.
    """
    sites = [Site(layer, kind) for layer in range(bench.layers) for kind in Component]
    limit = token_limit(bench.model)
    tokens = tokenize_pairs(bench.splits.fit, bench.tokenizer, limit)
    numbers: list[int] = []
    found: dict[Site, tuple[list[np.ndarray], list[np.ndarray]]] = {s: ([], []) for s in sites}
    for part in capture(bench.model, tokens, sites):
        numbers += part.pairs
        for site in sites:
            for side, values in zip(found[site], part.values[site], strict=True):
                side.append(values.double().cpu().numpy())
    if sorted(numbers) != list(range(len(tokens))):
        raise FitError(f"capture: expected {len(tokens)} pairs, got {len(numbers)}")
    order = np.argsort(numbers)
    return {
        site: (np.concatenate(sides[0])[order], np.concatenate(sides[1])[order])
        for site, sides in found.items()
    }
