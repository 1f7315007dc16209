"""Sampling from the model: paired, reproducible, and from the right distribution."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from austeer.adapters import ModelError
from austeer.adapters.measurement.neutral import (
    TokenText,
    continue_texts,
    encode_prompts,
    encode_texts,
    sample_neutral,
)
from austeer.adapters.tokens import appended_tokens


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_greedy_continuation_equals_generate(
    model_type: str, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model(model_type)
    prompt = encode_prompts(["one day Tom felt", "Mia"], tiny_tokenizer, 64)
    found = continue_texts(model, prompt, steps=10, seed=0, temperature=0.0)
    for row in range(2):
        ids = prompt.input_ids[row][prompt.valid[row]][None]
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
        )[0, ids.shape[1] :]
        real = found.input_ids[row][found.valid[row]]
        assert real.tolist() == expected.tolist()[: len(real)]
        assert len(real) == len(expected)


def test_samples_repeat_with_the_seed_and_differ_without(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model("llama")
    first, same, other = (
        sample_neutral(model, tiny_tokenizer, sequences=4, length=12, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.input_ids, same.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert (first.input_ids[:, 0] == tiny_tokenizer.bos_token_id).all()
    assert first.input_ids.shape == (4, 12)


def test_neutral_text_ends_before_the_end_token(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    text = sample_neutral(model, tiny_tokenizer, sequences=64, length=40, seed=0)
    ends = text.input_ids[:, 1:] == model.config.eos_token_id
    assert ends.any(), "no sample ended: the test sees nothing"
    after = ends.cumsum(1).bool()
    assert not text.valid[:, 1:][after].any()
    assert text.valid[:, 1:][~after].all()


def test_draws_follow_the_models_distribution(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    prompt = encode_prompts(["one day"] * 4000, tiny_tokenizer, 8)
    found = continue_texts(model, prompt, steps=1, seed=5).input_ids[:, 0]
    with torch.no_grad():
        p = model(prompt.input_ids[:1]).logits[0, -1].double().softmax(-1).numpy()
    share = np.bincount(found.numpy(), minlength=len(p)) / 4000
    assert np.abs(share - p).max() < 5 * np.sqrt(p.max() / 4000)
    assert p.max() < 0.9


def test_a_model_without_start_token_starts_from_its_end_token(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = None
    text = sample_neutral(tiny_model("gpt2"), tokenizer, sequences=2, length=5)
    assert (text.input_ids[:, 0] == tokenizer.eos_token_id).all()


def test_encoding_pads_on_the_named_side_and_cuts(tiny_tokenizer: Any) -> None:
    left = encode_prompts(["one day Tom felt very", "Mia"], tiny_tokenizer, 3)
    assert left.valid.tolist() == [[True] * 3, [False, True, True]]
    assert (
        left.input_ids[0].tolist() == tiny_tokenizer("one day Tom felt very")["input_ids"][-3:]
    )
    right = encode_texts(["one day Tom felt very", "Mia"], tiny_tokenizer, 3)
    assert right.valid.tolist() == [[True] * 3, [True, True, False]]
    assert right.input_ids[0].tolist() == tiny_tokenizer("one day")["input_ids"]
    assert isinstance(left, TokenText)


def leaning(model: Any, token: int, amount: float) -> Any:
    """The model, made to give `token` after its first one."""
    states: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([[1]]))
        handle.remove()
        direction = states[0][0, 0]
        model.lm_head.weight[token] = amount * direction / direction.norm()
    return model


def test_a_model_that_ends_at_once_gives_whole_texts(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Else the KL of every steering is that of one token, and no budget means anything."""
    model = leaning(tiny_model("llama"), tiny_tokenizer.eos_token_id, 20.0)
    first = continue_texts(model, encode_prompts([""], tiny_tokenizer, 8), steps=1, seed=0)
    assert first.input_ids.item() == model.generation_config.eos_token_id
    text = sample_neutral(model, tiny_tokenizer, sequences=8, length=12, seed=0)
    assert text.valid.all()
    assert not (text.input_ids[:, 1:] == model.generation_config.eos_token_id).any()
    assert len({tuple(row) for row in text.input_ids.tolist()}) > 1


def test_a_start_token_that_the_model_does_not_know(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<new>"})
    while tokenizer.bos_token_id < 40:
        tokenizer.add_tokens([f"<filler {len(tokenizer)}>"])
        tokenizer.add_special_tokens({"bos_token": f"<new {len(tokenizer)}>"})
    with pytest.raises(ModelError, match="start token: the tokenizer gives id"):
        sample_neutral(tiny_model("llama"), tokenizer, sequences=2, length=5)


def test_nothing_goes_on_behind_an_appended_end_token(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    assert appended_tokens(tokenizer) == (end,) and appended_tokens(tiny_tokenizer) == ()
    text = "one day Tom felt"
    assert tokenizer(text)["input_ids"][-1] == end
    plain, found = (encode_prompts([text, ""], t, 8) for t in (tiny_tokenizer, tokenizer))
    assert found.input_ids[found.valid][-1] != end
    assert torch.equal(plain.input_ids[0], found.input_ids[0])
