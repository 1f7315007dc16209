"""Sample texts go on where the prompt ends, from the tokens that a server sends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from austeer.adapters import ContrastivePair, SteeringAdapter
from austeer.adapters.pairs import render_pairs
from austeer.exporter.products import Base
from austeer.exporter.samples import before_and_after

TURNS = ({"role": "user", "content": "Tom felt"},)
PAIRS = [
    ContrastivePair("one day Mia", " happy", " sad"),
    ContrastivePair("", " happy", " sad", TURNS),
]


def greedy(model: Any, tokenizer: Any, ids: list[int], count: int) -> str:
    """Without a cache and without `generate`."""
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and ids[-1] != model.config.eos_token_id:
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.mark.parametrize("appends", [False, True])
def test_samples(tiny_model: Callable[..., Any], tiny_tokenizer: Any, appends: bool) -> None:
    model, tokenizer = tiny_model("llama"), copy.deepcopy(tiny_tokenizer)
    start, end = tokenizer.bos_token, tokenizer.eos_token
    if appends:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            f"{start} $A {end}",
            special_tokens=[(start, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)],
        )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} and{% endfor %}"
    adapter = SteeringAdapter.from_units(model, "layer", [0, 1], [1, 2], [40.0, -40.0])
    base = Base(model, tokenizer, Path("unused"))
    rows = before_and_after(base, adapter, render_pairs(PAIRS, tokenizer), new_tokens=8)
    encode = tokenizer.backend_tokenizer.encode
    sent = [
        [tokenizer.bos_token_id, *encode("one day Mia", add_special_tokens=False).ids],
        encode("Tom felt and", add_special_tokens=False).ids,
    ]
    for row, ids in zip(rows, sent, strict=True):
        assert row["base"] == greedy(model, tokenizer, ids, 8)
        with adapter.attached(model):
            assert row["steered"] == greedy(model, tokenizer, ids, 8)
    assert any(row["base"] != row["steered"] for row in rows)
