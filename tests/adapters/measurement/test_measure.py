"""Splits by purpose, and the figures of a split against references written by hand."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from austeer.adapters import ContrastivePair, FitError, ModelError
from austeer.adapters.measurement import neutral
from austeer.adapters.measurement.measure import (
    Share,
    check_neutral_text,
    make_splits,
    neutral_perplexity,
)

NAMES = ("Tom", "Mia", "the park", "the sun", "one day", "home", "it", "rain", "so", "then")
PAIRS = [
    ContrastivePair(f"{name} was", " happy", " sad", where=f"p:{number}")
    for number, name in enumerate(NAMES)
]


def share(model: Any, tokenizer: Any, seed: int = 0) -> Share:
    return Share(model, tokenizer, PAIRS, seed=seed, sequences=8, length=10, batch_size=4)


def test_splits_are_disjoint_and_complete() -> None:
    splits = make_splits(PAIRS)
    parts = [splits.fit, splits.validation, splits.test]
    assert sorted(pair.where for part in parts for pair in part) == sorted(
        p.where for p in PAIRS
    )
    assert [len(part) for part in parts] == [6, 2, 2]


def test_given_test_pairs_are_the_test_split() -> None:
    splits = make_splits(PAIRS[:8], PAIRS[8:])
    assert splits.test == PAIRS[8:]
    assert len(splits.fit) + len(splits.validation) == 8


def test_a_test_pair_among_the_pairs_is_refused() -> None:
    with pytest.raises(FitError, match=r"p:3: this test pair is also a training pair"):
        make_splits(PAIRS, [PAIRS[3]])


def test_chat_pairs_with_equal_completions_are_not_the_same_pair() -> None:
    def chat(text: str) -> ContrastivePair:
        messages = ({"role": "user", "content": text},)
        return ContrastivePair("", " yes", " no", messages, where=text)

    splits = make_splits([chat(f"question {n}") for n in range(8)], [chat("another")])
    assert [pair.where for pair in splits.test] == ["another"]


def test_pairs_without_a_common_token_are_scored_from_the_start_token(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """GPT-2's tokenizer puts no token in front: the first token decides, so it must count."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert tokenizer("happy")["input_ids"] == tiny_tokenizer("happy")["input_ids"][1:]
    pairs = [ContrastivePair("", "happy day", "sad day", where="p:1")]
    model = tiny_model("gpt2")
    found = Share(
        model, tokenizer, pairs, seed=0, sequences=4, length=6, batch_size=4
    ).base_margins
    expected = []
    for text in ("happy day", "sad day"):
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected.append(float(sum(scores[t, ids[t + 1]] for t in range(len(ids) - 1))))
    assert found[0] == pytest.approx(expected[0] - expected[1], abs=2e-4)


def test_figures_of_the_unsteered_model_are_the_base(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    figures = share(tiny_model("llama"), tiny_tokenizer).figures(nullcontext)
    assert figures["accuracy"] == figures["base_accuracy"]
    assert figures["margin_gain"] == 0.0
    assert figures["kl"] == pytest.approx(0.0, abs=1e-9)
    assert figures["fluency"] == 1.0
    assert figures["pairs"] == len(PAIRS)
    assert figures["prompts"] == len(PAIRS)
    names = {name for name in figures if not name.endswith("_ci95")} - {"pairs", "prompts"}
    assert all(f"{name}_ci95" in figures for name in names)


def test_pairs_that_are_cut_are_counted(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    long = ContrastivePair("Tom", " very" * 200 + " happy", " so sad", where="p:1")
    found = Share(
        model, tiny_tokenizer, [*PAIRS, long], seed=0, sequences=4, length=8, batch_size=4
    ).figures(nullcontext)
    assert found["cut"] == 1
    assert "cut" not in share(model, tiny_tokenizer).figures(nullcontext)


def test_figures_see_a_steered_head(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """A bias on one word's logit moves margins by its count of that word: known exactly."""
    model = tiny_model("llama")
    happy = tiny_tokenizer("happy")["input_ids"][-1]

    class Bias:
        def __enter__(self) -> None:
            bump = torch.zeros(model.config.vocab_size)
            bump[happy] = 50.0
            self.handle = model.lm_head.register_forward_hook(lambda *args: args[-1] + bump)

        def __exit__(self, *error: object) -> None:
            self.handle.remove()

    figures = share(model, tiny_tokenizer).figures(Bias)
    assert figures["accuracy"] == 1.0
    assert figures["base_accuracy"] < 1.0
    assert figures["margin_gain"] == pytest.approx(50.0, abs=1e-3)
    assert figures["kl"] > 1.0
    low, high = figures["margin_gain_ci95"]
    assert low <= figures["margin_gain"] <= high


def test_every_share_has_its_own_neutral_text(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    first, second = (share(model, tiny_tokenizer, seed).neutral.input_ids for seed in (0, 1))
    assert not torch.equal(first, second)


def test_users_neutral_text_is_measured(tiny_model: Any, tiny_tokenizer: Any) -> None:
    found = neutral_perplexity(
        tiny_model("gpt2"), tiny_tokenizer, ["one day Tom felt", "Mia was sad"], nullcontext
    )
    assert found["neutral_perplexity"] == found["base_neutral_perplexity"]
    assert np.isfinite(found["neutral_perplexity"])


@pytest.mark.parametrize("prompt", ["", "the same for all"])
def test_pairs_of_one_prompt_still_have_an_interval(
    prompt: str, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """One group of all pairs would give every figure an interval without width."""
    words = ("happy", "sad", "very", "home", "sun", "rain", "park", "day")
    pairs = [
        ContrastivePair(prompt, f" {a} so", f" {b} so", where=f"p:{a}{b}")
        for a, b in pairwise(words)
    ]
    model = tiny_model("llama")
    share = Share(model, tiny_tokenizer, pairs, seed=0, sequences=4, length=8, batch_size=4)
    figures = share.figures(torch.no_grad)
    low, high = figures["margin_ci95"]
    assert high - low > 0.1


@pytest.mark.parametrize(
    "other",
    [
        ContrastivePair("rain", " was happy", " was sad"),
        ContrastivePair("rain was ", "happy ", "sad"),
        ContrastivePair("rain\nwas", " happy", " sad"),
    ],
)
def test_the_same_texts_cut_elsewhere_are_the_same_pair(other: ContrastivePair) -> None:
    with pytest.raises(FitError, match=r"positive .*happy.*: this test pair is also"):
        make_splits(PAIRS, [other])


def test_no_test_pairs_are_refused() -> None:
    with pytest.raises(FitError, match="test pairs: expected at least one"):
        make_splits(PAIRS, [])


def test_what_is_independent_is_decided_on_the_whole_set(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Most pairs of a split may have one prompt that is one of many in the whole set."""
    pairs = [
        ContrastivePair(f"{name} was", ending, " sad", where=f"{name}{ending}")
        for name, count in (("Tom", 6), ("Mia", 3), ("it", 6), ("so", 6))
        for ending in (" happy", " so happy", " and happy", " !", " so", " very")[:count]
    ]
    sizes: dict[str, int] = {"seed": 0, "sequences": 4, "length": 8, "batch_size": 4}
    model, split = tiny_model("llama"), pairs[:9]
    few, each = (
        Share(model, tiny_tokenizer, split, whole=whole, **sizes).figures(nullcontext)
        for whole in (pairs, None)
    )
    assert few["pairs"] == each["pairs"] == 9
    assert (few["prompts"], each["prompts"]) == (2, 7)
    margins = Share(model, tiny_tokenizer, split, **sizes).base_margins
    wanted = [margins[:6].mean(), margins[6:].mean()]
    np.testing.assert_allclose(few["margin_ci95"], sorted(wanted), rtol=1e-6)


def test_one_prompt_has_an_interval_over_its_pairs(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """One group would give an interval without width, which looks like certainty."""
    endings = (" happy", " so happy", " and happy", " !", " so", " very")
    pairs = [ContrastivePair("Tom was", one, " sad", where=one) for one in endings]
    whole = [
        *pairs,
        *(ContrastivePair(f"{n} was", one, " sad") for n in NAMES for one in endings),
    ]
    sizes: dict[str, int] = {"seed": 0, "sequences": 4, "length": 8, "batch_size": 4}
    found = Share(tiny_model("llama"), tiny_tokenizer, pairs, whole=whole, **sizes)
    figures = found.figures(nullcontext)
    assert figures["prompts"] == 1
    low, high = figures["margin_ci95"]
    assert low < figures["margin"] < high


def test_samples_of_one_fit_are_of_one_kind(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    first = share(model, tiny_tokenizer)
    monkeypatch.setattr(neutral, "_ENOUGH", 1.0)
    assert not first.neutral.ends and first.neutral.valid.all()
    monkeypatch.setattr(neutral, "_ENOUGH", 0.0)
    sizes: dict[str, int] = {"sequences": 8, "length": 10, "batch_size": 4}
    alone, like = (
        Share(model, tiny_tokenizer, PAIRS, seed=1, like=other, **sizes)
        for other in (None, first)
    )
    assert alone.neutral.ends and not like.neutral.ends


def test_test_pairs_from_elsewhere_are_a_set_of_their_own() -> None:
    splits = make_splits(PAIRS[:8], PAIRS[8:])
    assert splits.whole(splits.test) == splits.test
    assert len(splits.whole(splits.fit)) == len(splits.whole(splits.validation)) == 8


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "expected a list of texts"),
        ([None], "expected a list of texts"),
        ([], "at least one"),
        ([""], "two tokens or more"),
    ],
)
def test_neutral_text_is_checked_beforehand(
    texts: Any, message: str, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    with pytest.raises(FitError, match=message):
        check_neutral_text(tiny_model("llama"), tiny_tokenizer, texts)


def test_a_token_of_a_pair_that_the_model_does_not_know(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(40)])
    pairs = [*PAIRS, ContrastivePair("it was", " <extra39>", " sad", where="p:99")]
    found = Share(
        tiny_model("llama"), tokenizer, pairs, seed=0, sequences=4, length=8, batch_size=4
    )
    with pytest.raises(ModelError, match="p:99: the tokenizer gives id"):
        found.figures(nullcontext)
