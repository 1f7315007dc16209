"""Activations: both layouts give those of each string alone, and no layer runs in vain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import MODEL_TYPES, alone
from samples import some_tokens

from austeer.adapters import Component, FitError, ModelError, Site
from austeer.adapters.activations.capture import Capturer, capture
from austeer.adapters.tokens import PairTokens

TinyModel = Callable[..., Any]
SITES = [Site(layer, component) for layer in range(2) for component in Component]
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.1},
}


TOKENS = some_tokens([(40, 10, 20), (0, 30, 2), (19, 22, 32), (3, 1, 1), (50, 1, 9)])


def captured(model: Any, **options: Any) -> dict[tuple[int, Site], tuple[Any, Any]]:
    return {
        (number, site): (positive[place], negative[place])
        for batch in capture(model, TOKENS, SITES, **options)
        for site, (positive, negative) in batch.values.items()
        for place, number in enumerate(batch.pairs)
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_layout_equals_each_string_alone(
    tiny_model: TinyModel, model_type: str, attention: str, caplog: pytest.LogCaptureFixture
) -> None:
    if (model_type, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma2")
    model = tiny_model(model_type, attn_implementation=attention)
    wanted = {
        (number, side): alone(model, tokens.prefix + getattr(tokens, side))
        for number, tokens in enumerate(TOKENS)
        for side in ("positive", "negative")
    }
    for layout in ("auto", "packed", "tree", "plain"):
        for padding in ("left", "right"):
            found = captured(model, token_budget=150, layout=layout, padding_side=padding)
            assert len(found) == len(TOKENS) * len(SITES)
            for (number, site), both in found.items():
                for side, x in zip(("positive", "negative"), both, strict=True):
                    torch.testing.assert_close(
                        x, wanted[number, side][site], **TOLERANCE[torch.float32]
                    )
    assert not caplog.records, "packing was refused"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bfloat16_is_packed_and_stays_bfloat16(
    tiny_model: TinyModel, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(model_type).to(torch.bfloat16)
    plain = captured(model, layout="plain")
    for layout in ("auto", "tree"):
        for key, both in captured(model, layout=layout).items():
            for x, y in zip(both, plain[key], strict=True):
                assert x.dtype == torch.bfloat16
                torch.testing.assert_close(x, y, **TOLERANCE[torch.bfloat16])
    assert not caplog.records


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("layout", ["auto", "tree"])
def test_row_longer_than_the_context_is_shared(
    tiny_model: TinyModel, model_type: str, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Both strings fit the context of 48; their common row has 83 tokens."""
    name = "n_positions" if model_type == "gpt2" else "max_position_embeddings"
    model = tiny_model(model_type, **{name: 48})
    (tokens,) = some_tokens([(3, 45, 35)])
    (batch,) = capture(model, [tokens], SITES, layout=layout)
    for site, (positive, negative) in batch.values.items():
        for x, branch in ((positive, tokens.positive), (negative, tokens.negative)):
            wanted = alone(model, tokens.prefix + branch)[site]
            torch.testing.assert_close(x[0], wanted, **TOLERANCE[torch.float32])
    assert not caplog.records


@pytest.mark.parametrize("token_budget", [1, 80, 150, 1000])
def test_every_pair_comes_once(tiny_model: TinyModel, token_budget: int) -> None:
    batches = list(capture(tiny_model("llama"), TOKENS, SITES[:1], token_budget=token_budget))
    assert sorted(number for batch in batches for number in batch.pairs) == list(range(5))
    sizes = [sum(TOKENS[number].size for number in batch.pairs) for batch in batches]
    assert max(sizes) <= max(token_budget, max(pair.size for pair in TOKENS))
    assert len(batches) == {1: 5, 80: 4, 150: 2, 1000: 1}[token_budget]


def test_batches_of_the_caller(tiny_model: TinyModel) -> None:
    batches = [(3, 0), (4,)]
    found = capture(tiny_model("llama"), TOKENS, SITES[:1], batches=batches, token_budget=1)
    assert [batch.pairs for batch in found] == batches


def test_bad_options(tiny_model: TinyModel) -> None:
    with pytest.raises(FitError, match=r"token budget: .* got 0"):
        list(capture(tiny_model("llama"), TOKENS, SITES, token_budget=0))
    with pytest.raises(FitError, match="layout 'dense': expected one of auto"):
        list(capture(tiny_model("llama"), TOKENS, SITES, layout="dense"))  # type: ignore[arg-type]


def starve(model: Any, tokens: int, error: Exception) -> list[int]:
    """Make the model fail above so many tokens; the sizes it ran come into the list."""
    ran: list[int] = []

    def check(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        if (size := inputs["input_ids"].numel()) > tokens:
            raise error
        ran.append(size)

    model.model.register_forward_pre_hook(check, with_kwargs=True)
    return ran


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
     RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")],
)  # fmt: skip
def test_out_of_memory_halves_the_budget_and_loses_nothing(
    tiny_model: TinyModel, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    tokens = some_tokens([(5 + n % 3, 1 + n % 4, 2) for n in range(40)])
    sizes = [pair.size for pair in tokens]
    whole = sum(sizes)
    plenty = list(capture(model, tokens, SITES, layout="packed", token_budget=whole))
    assert len(plenty) == 1
    values = {number: place for place, number in enumerate(plenty[0].pairs)}
    ran = starve(model, 110, error)
    read = Capturer(model, SITES, layout="packed", token_budget=whole)
    batches = list(read(tokens))
    assert sorted(n for batch in batches for n in batch.pairs) == list(range(40))
    assert sum(ran) == whole and max(ran) <= 110
    for batch in batches:
        places = [values[number] for number in batch.pairs]
        for site, both in batch.values.items():
            for side in range(2):
                wanted = plenty[0].values[site][side][places]
                torch.testing.assert_close(both[side], wanted, **TOLERANCE[torch.float32])
    # A half, a quarter: two failures, and none in a later part.
    assert len(caplog.records) == 2 and f"{whole // 2} tokens at most" in caplog.text
    assert sum(len(batch.pairs) for batch in read(tokens, [range(40)])) == 40
    assert len(caplog.records) == 2


def test_one_pair_that_does_not_fit(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    starve(model, 65, MemoryError())
    largest = max(TOKENS, key=lambda pair: pair.size)
    found = []
    with pytest.raises(FitError, match=f"{largest.where}: this pair alone does not fit"):
        for batch in capture(model, TOKENS, SITES, layout="packed", token_budget=100):
            found.append(batch)
    assert not found, "the largest pair runs first"


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    starve(model, 65, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(capture(model, TOKENS, SITES, layout="packed"))


@pytest.mark.parametrize("layout", ["packed", "tree", "plain"])
def test_layers_after_the_last_site_and_the_head_do_not_run(
    tiny_model: TinyModel, layout: Any
) -> None:
    model = tiny_model("llama")
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    list(capture(model, TOKENS, [Site(0, Component.ATTENTION)], layout=layout))
    assert "model.layers.0.self_attn.q_proj" in ran
    assert not any(name.startswith(("model.layers.0.mlp", "model.layers.1")) for name in ran)
    list(capture(model, TOKENS, [Site(1, Component.LAYER)], layout=layout))
    assert "lm_head" not in ran and "model.norm" not in ran


def hooks(model: Any) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in model.modules()
    )


def test_hooks_modes_and_gradients_are_as_before(tiny_model: TinyModel) -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    with torch.enable_grad():
        first, second = (captured(model) for _ in range(2))
        assert torch.is_grad_enabled()
    # Dropout is on by default in GPT-2: equal runs show that it was off.
    assert all(torch.equal(first[key][0], second[key][0]) for key in first)
    assert not first[0, SITES[0]][0].requires_grad
    assert [module.training for module in model.modules()] == modes
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_exception(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    broken = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(capture(model, TOKENS, SITES, layout="plain"))
    broken.remove()
    assert hooks(model) == 0


def poison(model: Any, value: float) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[37] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["auto", "tree", "plain"])
def test_not_finite_names_site_and_pair(
    tiny_model: TinyModel, value: float, layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    poison(model, value)
    tokens = [PairTokens((1, 5), (6,), (7,), "f:1"), PairTokens((1, 5), (6,), (37,), "f:2")]
    with pytest.raises(FitError, match=r"layers\.0\.attention: .*not finite.* f:2") as caught:
        list(capture(model, tokens, SITES, layout=layout))
    assert "\n" not in str(caught.value)
    assert not caplog.records


def test_large_but_finite_is_no_error(tiny_model: TinyModel) -> None:
    """Values of 1e38 overflow any sum over them."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e18)
        model.model.layers[1].mlp.down_proj.weight.mul_(1e37)
    (found,) = capture(model, TOKENS, SITES)
    assert found.values[Site(1, Component.FFN)][0].abs().max() > 1e37


def test_ids_outside_the_vocabulary(tiny_model: TinyModel) -> None:
    tokens = [PairTokens((1, 5), (6,), (40,), "f:9")]
    with pytest.raises(ModelError, match=r"f:9: .*id 40.* 40 embeddings"):
        list(capture(tiny_model("llama"), tokens, SITES))


def test_unsupported_architecture() -> None:
    from transformers import AutoModelForCausalLM, CodeGenConfig

    config = CodeGenConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=4, rotary_dim=4)
    with pytest.raises(ModelError, match="'codegen'"):
        list(capture(AutoModelForCausalLM.from_config(config), TOKENS, SITES))
