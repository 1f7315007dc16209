"""Packed rows: attention inside each pair, whatever lies beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from austeer.adapters import Component, ModelError, Site
from austeer.adapters.activations.packed_attention import PackedAttention
from austeer.adapters.activations.packing import ATTENTION, packed_attention, packed_batch
from austeer.adapters.activations.reading import read_sites
from austeer.adapters.tokens import PairTokens

TinyModel = Callable[..., Any]
LAST = [Site(1, Component.LAYER)]


def some_tokens(lengths: Sequence[tuple[int, int, int]]) -> list[PairTokens]:
    generator = torch.Generator().manual_seed(3)
    return [
        PairTokens(
            *(tuple(torch.randint(4, 40, (n,), generator=generator).tolist()) for n in shape)
        )
        for shape in lengths
    ]


TOKENS = some_tokens([(12, 3, 7), (12, 3, 7), (0, 9, 4), (5, 1, 1), (5, 1, 1), (6, 1, 15)])


def attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal attention of one string, one query and one head at a time, in float64."""
    heads, length, width = query.shape
    out = torch.empty(length, heads, value.shape[-1])
    for head in range(heads):
        shared = head * key.shape[0] // heads
        for place in range(length):
            first = 0 if sliding_window is None else max(0, place + 1 - sliding_window)
            seen = slice(first, place + 1)
            scores = key[shared, seen].double() @ query[head, place].double()
            scores *= width**-0.5 if scaling is None else scaling
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            weights = scores.exp() / scores.exp().sum()
            out[place, head] = (weights @ value[shared, seen].double()).float()
    return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": 0.7},
        {"softcap": 1.5},
        {"sliding_window": 4},
        {"sliding_window": 1},
        {"sliding_window": 21},
        {"scaling": 0.9, "softcap": 0.8, "sliding_window": 6},
    ],
)
def test_attention_equals_that_of_each_string(
    options: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 query heads on 2 key heads; `padded` is the form for devices other than the CPU."""
    if padded:
        monkeypatch.setattr(PackedAttention, "_one_group", staticmethod(lambda device: True))
    torch.manual_seed(0)
    size = sum(pair.size for pair in TOKENS)
    query = 2 * torch.randn(1, size, 4, 8).transpose(1, 2)
    key, value = (2 * torch.randn(1, size, 2, 8).transpose(1, 2) for _ in range(2))
    attention = PackedAttention(TOKENS)
    found = attention(query, key, value, **options)
    assert found.shape == (1, size, 4, 8) and attention.calls == 1
    start = 0
    for pair in TOKENS:
        p, n = len(pair.prefix), len(pair.positive)
        whole = list(range(start, start + pair.size))
        for path in (whole[: p + n], whole[:p] + whole[p + n :]):
            wanted = attended(query[0, :, path], key[0, :, path], value[0, :, path], **options)
            torch.testing.assert_close(found[0, path], wanted, rtol=1e-5, atol=1e-5)
        start += pair.size


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sliding_window": 4}])
def test_where_only_ends_are_read_the_last_call_gives_no_more(
    options: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if padded:
        monkeypatch.setattr(PackedAttention, "_one_group", staticmethod(lambda device: True))
    torch.manual_seed(1)
    size = sum(pair.size for pair in TOKENS)
    query = torch.randn(1, 4, size, 8)
    key, value = torch.randn(1, 2, size, 8), torch.randn(1, 2, size, 6)
    whole = PackedAttention(TOKENS)(query, key, value, **options)
    attention = PackedAttention(TOKENS, 2)
    first, second = (attention(query, key, value, **options) for _ in range(2))
    torch.testing.assert_close(first, whole)
    batch = packed_batch(TOKENS)
    ends = torch.cat([batch.positive.last_position, batch.negative.last_position])
    torch.testing.assert_close(second[0, ends], whole[0, ends], rtol=1e-5, atol=1e-6)
    others = torch.ones(size, dtype=torch.bool)
    others[ends] = False
    assert whole[0, others].abs().amin(-1).amin(-1).gt(0).all()
    assert not second[0, others].any()


def test_equal_shapes_share_a_call() -> None:
    size = sum(pair.size for pair in TOKENS)
    x = torch.randn(1, 2, size, 8)
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(len(query))
        return real(query, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        PackedAttention(TOKENS)(x, x, x)
    assert calls == [2, 1, 2, 1]


def test_layout_of_a_row() -> None:
    batch = packed_batch([PairTokens((1, 5), (7, 8), (6,)), PairTokens((), (3,), (4, 9))])
    assert batch.input_ids.tolist() == [[1, 5, 7, 8, 6, 3, 4, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 0, 1]]
    assert batch.positive.last_position.tolist() == [3, 5]
    assert batch.negative.last_position.tolist() == [4, 7]
    assert batch.positive.last_row.tolist() == [0, 0] and len(batch) == 2
    assert batch.positive.position.tolist() == [1, 2] and batch.positive.target.tolist() == [
        7,
        8,
    ]


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_the_models_attention_comes_back(tiny_model: TinyModel, own: str) -> None:
    model = tiny_model("llama", attn_implementation=own)
    batch = packed_batch(TOKENS)
    with packed_attention(model, batch) as attention:
        assert model.config._attn_implementation == ATTENTION
        model(**batch.inputs(), use_cache=False)
    assert attention.calls == 2
    assert model.config._attn_implementation == own

    with pytest.raises(ZeroDivisionError), packed_attention(model, batch):
        raise ZeroDivisionError
    assert model.config._attn_implementation == own
    broken = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_sites(model, batch, LAST)
    broken.remove()
    assert model.config._attn_implementation == own


def test_logits_inside_the_context_are_those_of_each_string(tiny_model: TinyModel) -> None:
    """What `margins` needs: the whole model, LM head included."""
    model = tiny_model("qwen3")
    batch = packed_batch(TOKENS)
    with packed_attention(model, batch):
        logits = model(**batch.inputs(), use_cache=False).logits[0]
    for place, pair in enumerate(TOKENS):
        for branch, ids in ((batch.positive, pair.positive), (batch.negative, pair.negative)):
            wanted = model(torch.tensor([pair.prefix + ids])).logits[0, -1]
            found = logits[branch.last_position[place]]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


def call(mask: Any = None, **others: Any) -> Any:
    from transformers import AttentionInterface

    x = torch.randn(1, 2, sum(pair.size for pair in TOKENS), 8)
    return AttentionInterface()[ATTENTION](torch.nn.Identity(), x, x, x, mask, **others)


def test_what_packing_cannot_honour_is_refused(tiny_model: TinyModel) -> None:
    with packed_attention(tiny_model("llama"), packed_batch(TOKENS)) as attention:
        assert call()[0].shape[1] == sum(pair.size for pair in TOKENS)
        with pytest.raises(ModelError, match="mask or position bias of its own"):
            call(mask=torch.zeros(1))
        with pytest.raises(ModelError, match="s_aux"):
            call(s_aux=torch.zeros(2))
        with pytest.raises(ModelError, match="no causality"):
            call(is_causal=False)
        with pytest.raises(ModelError, match="expected 93 queries and keys, got 3 and 3"):
            attention(*(torch.randn(1, 2, 3, 8) for _ in range(3)))
    with pytest.raises(ModelError, match=r"outside packed_attention"):
        call()
