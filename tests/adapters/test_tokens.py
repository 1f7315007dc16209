"""Tokenized pairs: common prefixes, limits, and which pairs make up a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.adapters import ContrastivePair, FitError, PairsError
from austeer.adapters.tokens import (
    PairTokens,
    context_length,
    plan_batches,
    prompt_ids,
    text_ids,
    token_limit,
    tokenize_pairs,
)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")


def pair(prompt: str, positive: str, negative: str) -> ContrastivePair:
    return ContrastivePair(prompt, positive, negative, None, "f:3")


def test_longest_common_prefix(tiny_tokenizer: Any) -> None:
    texts = "Tom felt very happy", "Tom felt very sad and so"
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    found = tokenize_pairs(
        [pair("Tom felt", " very happy", " very sad and so")], tiny_tokenizer
    )
    assert found == [PairTokens(tuple(ids[0][:4]), (ids[0][4],), tuple(ids[1][4:]), "f:3")]
    assert found[0].size == 8 and found[0].longest == 7


def test_both_branches_keep_a_token_when_one_text_begins_the_other(tiny_tokenizer: Any) -> None:
    (found,) = tokenize_pairs([pair("Tom", " felt happy", " felt")], tiny_tokenizer)
    ids = tuple(tiny_tokenizer("Tom felt happy")["input_ids"])
    assert (found.prefix, found.positive, found.negative) == (ids[:2], ids[2:], ids[2:3])


def test_empty_prompt(tiny_tokenizer: Any) -> None:
    (found,) = tokenize_pairs([pair("", "happy", "sad")], tiny_tokenizer)
    assert found.prefix == (tiny_tokenizer.bos_token_id,)


CHAT = "{% for m in messages %}{{ m.content }} and{% endfor %}"


def ending(tokenizer: Any, template: str) -> Any:
    """A copy that puts an end token behind every text, as well."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tokenizer)
    start, end = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"{start} $A {end}",
        special_tokens=[(start, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize(
    "template", [CHAT, "{{ bos_token }}" + CHAT, " {{ bos_token }}" + CHAT]
)
def test_chat_has_the_tokens_that_a_server_sends(
    tiny_tokenizer: Any, template: str, appends: bool
) -> None:
    """Those of `apply_chat_template`: the tokenizer's own start and end are not among them."""
    tokenizer = ending(tiny_tokenizer, template) if appends else copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    turns = ({"role": "user", "content": "Tom felt"},)
    sent = tokenizer.apply_chat_template(list(turns), add_generation_prompt=True)
    sent = list(sent if isinstance(sent, list) else sent["input_ids"])
    chat = ContrastivePair("", " happy", " sad", turns, "f:3")
    words = [
        tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("happy", "sad")
    ]
    found, plain = tokenize_pairs([chat, pair("Tom", " happy", " sad")], tokenizer)
    assert list(found.prefix + found.positive) == sent + words[0]
    assert list(found.prefix + found.negative) == sent + words[1]
    assert sent.count(tokenizer.bos_token_id) == template.count("bos_token")
    assert plain.prefix[0] == tokenizer.bos_token_id
    assert (plain.positive[-1] == tokenizer.eos_token_id) is appends
    ids = prompt_ids([chat, pair("Tom", " happy", " sad")], tokenizer)
    assert ids == [sent, list(plain.prefix)]


def test_an_end_token_of_the_template_stays(tiny_tokenizer: Any) -> None:
    tokenizer = ending(tiny_tokenizer, CHAT + "{{ eos_token }}")
    turns = ({"role": "user", "content": "Tom felt"},)
    (ids,) = prompt_ids([ContrastivePair("", " happy", " sad", turns)], tokenizer)
    assert ids[-1] == tokenizer.eos_token_id


def test_what_the_tokenizer_appends_can_stay_out(tiny_tokenizer: Any) -> None:
    pairs = [pair("Tom felt", " very happy", " sad")]
    tokenizer = ending(tiny_tokenizer, CHAT)
    assert tokenize_pairs(pairs, tokenizer, appended=False) == tokenize_pairs(
        pairs, tiny_tokenizer
    )
    assert tokenize_pairs(pairs, tokenizer)[0].positive[-1] == tokenizer.eos_token_id
    assert text_ids(["Tom felt"], tokenizer) == [tiny_tokenizer("Tom felt")["input_ids"]]


def test_texts_are_cut_after_the_limit(tiny_tokenizer: Any) -> None:
    (found,) = tokenize_pairs([pair("Tom", " felt very happy", " was sad")], tiny_tokenizer, 4)
    whole = tuple(tiny_tokenizer("Tom felt very happy")["input_ids"])
    assert len(whole) == 5 and found.prefix + found.positive == whole[:4]
    assert len(found.prefix + found.negative) == 4


@pytest.mark.parametrize(("limit", "fits"), [(5, False), (6, False), (7, True)])
def test_prompt_alone_fills_the_limit(tiny_tokenizer: Any, limit: int, fits: bool) -> None:
    prompt = "one day Tom went to"  # 6 tokens with bos
    pairs = [pair("Tom", " happy", " sad"), pair(prompt, " park", " home")]
    if fits:
        assert len(tokenize_pairs(pairs, tiny_tokenizer, limit)) == 2
        return
    with pytest.raises(PairsError, match="f:3: the prompt alone has 6 tokens") as caught:
        tokenize_pairs(pairs, tiny_tokenizer, limit)
    assert "\n" not in str(caught.value)


def test_same_tokens_after_the_cut_or_by_unknown_words(tiny_tokenizer: Any) -> None:
    with pytest.raises(PairsError, match=r"f:3: .*same 3 tokens"):
        tokenize_pairs([pair("Tom", " felt happy", " felt sad")], tiny_tokenizer, 3)
    with pytest.raises(PairsError, match=r"f:3: .*same"):
        tokenize_pairs([pair("Tom", " joyous", " gloomy")], tiny_tokenizer)


def test_many_pairs_keep_their_order(tiny_tokenizer: Any) -> None:
    pairs = [pair("Tom felt " * (1 + n % 7), "very happy", "sad") for n in range(150)]
    together = tokenize_pairs(pairs, tiny_tokenizer)
    assert together == [tokenize_pairs([each], tiny_tokenizer)[0] for each in pairs]


def test_no_pairs(tiny_tokenizer: Any) -> None:
    assert tokenize_pairs([], tiny_tokenizer) == []


def test_long_texts_need_no_warning(
    tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.model_max_length = 3
    tokenize_pairs([pair("Tom felt very", " happy", " sad")], tokenizer)
    assert not caplog.records


@pytest.mark.parametrize("model_type", (*MODEL_TYPES, "gptj", "gpt_neo", "opt", "mpt"))
def test_token_limit(tiny_model: Callable[..., Any], model_type: str) -> None:
    own = {"gpt2": "n_positions", "gptj": "n_positions", "mpt": "max_seq_len"}
    name = own.get(model_type, "max_position_embeddings")
    assert token_limit(tiny_model(model_type, **{name: 100})) == 100
    assert token_limit(tiny_model(model_type, **{name: 2048})) == 512


def test_no_limit_of_its_own(tiny_model: Callable[..., Any]) -> None:
    assert context_length(tiny_model("bloom")) is None
    assert token_limit(tiny_model("bloom")) == 512


def test_parts_of_a_tree() -> None:
    tokens = PairTokens((1, 5), (7, 8, 9), (6,))
    assert tokens.path() == (1, 5, 7, 8, 9, 6)
    assert tokens.positions() == [0, 1, 2, 3, 4, 2]
    assert tokens.segments() == [0, 0, 1, 1, 1, 2]
    assert (tokens.size, tokens.longest) == (6, 5)


def of_shape(prefix: int, positive: int, negative: int) -> PairTokens:
    return PairTokens((1,) * prefix, (2,) * positive, (3,) * negative)


@settings(deadline=None)
@given(
    st.lists(st.builds(of_shape, st.integers(0, 9), st.integers(1, 5), st.integers(1, 5))),
    st.integers(1, 60),
)
def test_plan_covers_every_pair_once_within_the_budget(
    tokens: list[PairTokens], token_budget: int
) -> None:
    batches = plan_batches(tokens, token_budget)
    assert sorted(number for batch in batches for number in batch) == list(range(len(tokens)))
    sizes = [[tokens[number].size for number in batch] for batch in batches]
    assert all(len(each) == 1 or sum(each) <= token_budget for each in sizes)
    flat = [size for each in sizes for size in each]
    assert flat == sorted(flat, reverse=True)
    # No batch could have taken the first pair of the next one.
    for this, following in pairwise(sizes):
        assert sum(this) + following[0] > token_budget
    assert batches == plan_batches(list(tokens), token_budget)


def test_equal_shapes_are_neighbours_in_their_own_order() -> None:
    tokens = [of_shape(3, 1, 2), of_shape(2, 2, 2), of_shape(3, 1, 2), of_shape(4, 1, 1)]
    assert plan_batches(tokens, 100) == [(3, 0, 2, 1)]


def test_budget_below_one_token() -> None:
    with pytest.raises(FitError, match=r"token budget: .* got 0"):
        plan_batches([of_shape(1, 1, 1)], 0)
