"""The data of a fit, split by purpose, and the figures measured on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.adapters._errors import FitError
from austeer.adapters.measurement.evaluate import KLMeter, PairSet, Steered, batch_pairs
from austeer.adapters.measurement.fluency import (
    CONTINUATION,
    FluencyProbe,
    check_has_text,
    text_perplexity,
)
from austeer.adapters.measurement.intervals import Measured, grouped_interval
from austeer.adapters.measurement.neutral import (
    TokenText,
    encode_texts,
    pad_prompts,
    sample_neutral,
    start_token,
)
from austeer.adapters.pair_groups import group_keys, split_pairs, whole_texts
from austeer.adapters.pairs import ContrastivePair
from austeer.adapters.tokens import (
    PairTokens,
    check_vocabulary,
    prompt_ids,
    token_limit,
    tokenize_pairs,
)

_FLUENCY_PROMPTS = 64
_QUICK_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a steering does on the data that chooses.

    Attributes:
        margin: mean margin over the validation pairs, nats.
        kl: mean KL per token on neutral text that training does not see, nats.
        fluency: perplexity of steered continuations under the base over that of its own;
            None where it was not measured.
    """

    margin: float
    kl: float
    fluency: float | None = None


@dataclass(frozen=True, slots=True)
class Splits:
    """Pairs by purpose: to fit, to choose, to report; `apart` are test pairs from elsewhere."""

    fit: list[ContrastivePair]
    validation: list[ContrastivePair]
    test: list[ContrastivePair]
    apart: bool = False

    def whole(self, part: Sequence[ContrastivePair]) -> list[ContrastivePair]:
        """All pairs of the set that a split was taken from."""
        if self.apart and part is self.test:
            return self.test
        return [*self.fit, *self.validation, *(() if self.apart else self.test)]


def make_splits(
    pairs: Sequence[ContrastivePair],
    test_pairs: Sequence[ContrastivePair] | None = None,
    seed: int = 0,
) -> Splits:
    """Split pairs 60/20/20, or 75/25 when the test pairs come from elsewhere.

    Raises:
        PairsError: too few pairs to give every split one.
        FitError: no test pair, or one whose texts also stand among the pairs.
    """
    if test_pairs is None:
        fit, validation, test = split_pairs(pairs, (0.6, 0.2, 0.2), seed)
        return Splits(fit, validation, test)
    if not test_pairs:
        raise FitError("test pairs: expected at least one, got none")
    known = set(map(whole_texts, pairs))
    for pair in test_pairs:
        if whole_texts(pair) in known:
            raise FitError(
                f"{pair.place}: this test pair is also a training pair; remove it from one file"
            )
    fit, validation = split_pairs(pairs, (0.75, 0.25), seed)
    return Splits(fit, validation, list(test_pairs), apart=True)


class Share:
    """One split with its own neutral text; everything is computed on first use.

    Args:
        model: the base model, unsteered while the parts are built.
        tokenizer: its tokenizer.
        pairs: the pairs of this split.
        seed: of its neutral text.
        sequences: texts in the neutral sample.
        length: tokens of each.
        batch_size: pairs or texts per forward pass.
        whole: all pairs of which these are some, None where these are all.
        like: the share whose neutral text decides whether end tokens are drawn in this one's:
            what a budget is kept on and reported on must be text of one kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[ContrastivePair],
        *,
        seed: int,
        sequences: int,
        length: int,
        batch_size: int,
        whole: Sequence[ContrastivePair] | None = None,
        like: Share | None = None,
    ) -> None:
        self.pairs = list(pairs)
        keys = group_keys(self.pairs, whole)
        self._prompts = len(set(keys))
        # One group has no interval: over its pairs, it is one for that prompt.
        self._groups = keys if self._prompts > 1 else [pair.content for pair in self.pairs]
        self._model, self._tokenizer = model, tokenizer
        self._seed, self._batch_size = seed, batch_size
        self._sequences, self._length = sequences, length
        self._like = like

    @cached_property
    def tokens(self) -> list[PairTokens]:
        """The pairs, tokenized."""
        limit = token_limit(self._model)
        # An end token behind a completion is no part of it.
        tokens = tokenize_pairs(self.pairs, self._tokenizer, limit, appended=False)
        tokens = self._started(tokens)
        for pair in tokens:
            check_vocabulary(self._model, pair.where, pair.path())
        return tokens

    @cached_property
    def pair_set(self) -> PairSet:
        """The pairs, tokenized and batched."""
        return batch_pairs(self._model, self.tokens, self._batch_size)

    def _started(self, tokens: Sequence[PairTokens]) -> list[PairTokens]:
        """Give pairs that share no first token the start token to be predicted from."""
        start, room = start_token(self._tokenizer), token_limit(self._model) - 1
        if start is None:
            return list(tokens)
        return [
            pair
            if pair.prefix
            else replace(
                pair,
                prefix=(start,),
                positive=pair.positive[:room],
                negative=pair.negative[:room],
            )
            for pair in tokens
        ]

    @cached_property
    def neutral(self) -> TokenText:
        """Text sampled from the base model."""
        length = min(self._length, token_limit(self._model))
        return sample_neutral(
            self._model,
            self._tokenizer,
            sequences=self._sequences,
            length=length,
            seed=self._seed,
            ends=None if self._like is None else self._like.neutral.ends,
        )

    @cached_property
    def meter(self) -> KLMeter:
        """KL on the neutral text."""
        return KLMeter(self._model, self.neutral, self._batch_size)

    @cached_property
    def screening_text(self) -> TokenText:
        """A quarter of the neutral text, for searches."""
        return self.neutral.rows(slice(0, max(8, len(self.neutral) // 4)))

    @cached_property
    def screen(self) -> KLMeter:
        """KL on the screening text."""
        return KLMeter(self._model, self.screening_text, self._batch_size)

    @cached_property
    def base_margins(self) -> Float[np.ndarray, " n"]:
        """Margins of the unsteered model, nats."""
        return self.pair_set.margins(self._model)

    def mean_margin(self, steered: Steered) -> float:
        """Mean margin of a steered model, nats."""
        pairs = self.pair_set  # built, if need be, by the unsteered model
        with steered():
            return float(pairs.margins(self._model).mean())

    @cached_property
    def probe(self) -> FluencyProbe:
        """Fluency of steered continuations of the pairs' prompts."""
        return FluencyProbe(self._model, self.prompts, seed=self._seed)

    @cached_property
    def quick_probe(self) -> FluencyProbe:
        """Fluency from half as many continuations, for searches."""
        return FluencyProbe(self._model, self.prompts, seed=self._seed, samples=_QUICK_SAMPLES)

    def judge(self, steered: Steered) -> Judgement:
        """Mean margin and KL of a steered model; fluency is left out."""
        return Judgement(self.mean_margin(steered), self.meter.mean(steered))

    def figures(self, steered: Steered) -> dict[str, Any]:
        """Every figure of `report.json` for this split, with `*_ci95`."""
        base = self.base_margins
        with steered():
            values = self.pair_set.margins(self._model)

        def mean(found: Float[np.ndarray, " n"]) -> Measured:
            return grouped_interval(found, self._groups, self._seed)

        measured = {
            "accuracy": mean((values > 0).astype(np.float64)),
            "base_accuracy": mean((base > 0).astype(np.float64)),
            "margin": mean(values),
            "base_margin": mean(base),
            "margin_gain": mean(values - base),
            "kl": self.meter.measure(steered, self._seed),
            "fluency": self.probe.measure(steered),
        }
        # Intervals are those over prompts: of few they say little.
        counts = {"pairs": len(self.pairs), "prompts": self._prompts}
        cut = sum(pair.cut for pair in self.tokens)
        return counts | ({"cut": cut} if cut else {}) | as_report(measured)

    @cached_property
    def prompts(self) -> TokenText:
        """Prompts of the pairs, for continuations."""
        prompts = dict.fromkeys(map(tuple, prompt_ids(self.pairs, self._tokenizer)))
        room = token_limit(self._model) - CONTINUATION
        chosen = list(prompts)[:_FLUENCY_PROMPTS]
        found = pad_prompts(chosen, self._tokenizer, max(room, 1))
        check_vocabulary(self._model, "prompts", found.input_ids[found.valid].tolist())
        return found


def as_report(measured: dict[str, Measured]) -> dict[str, Any]:
    """`{name: value, name_ci95: [low, high]}` for every figure."""
    found: dict[str, Any] = {}
    for name, figure in measured.items():
        found[name] = figure.value
        found[f"{name}_ci95"] = [figure.low, figure.high]
    return found


def check_neutral_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> None:
    """Refuse what `neutral_perplexity` could not measure, before a fit that it would cost.

    Raises:
        FitError: one text instead of a list, a text that is none, or no text of two tokens.
        ModelError: a token that the model does not know.
    """
    listed = not isinstance(texts, str) and all(isinstance(text, str) for text in texts)
    if not listed or not texts:
        raise FitError("neutral text: expected a list of texts, at least one")
    encoded = encode_texts(texts, tokenizer, token_limit(model))
    check_has_text(encoded)
    check_vocabulary(model, "neutral text", encoded.input_ids[encoded.valid].tolist())


def neutral_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    steered: Callable[[], Any],
) -> dict[str, float]:
    """Perplexity of the user's own neutral text, base and steered."""
    encoded = encode_texts(texts, tokenizer, token_limit(model))
    return {
        "neutral_perplexity": text_perplexity(model, encoded, steered),
        "base_neutral_perplexity": text_perplexity(model, encoded, nullcontext),
    }
