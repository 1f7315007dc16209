"""Activations: both layouts give those of each string alone, and no layer runs in vain."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from austeer.adapters import Component, FitError, ModelError, Site
from austeer.adapters.batches import PairTokens
from austeer.adapters.capture import can_share_prompt, capture

TinyModel = Callable[..., Any]
SITES = [Site(layer, component) for layer in range(2) for component in Component]
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")
# Written out here, not taken from the code under test: layer, attention and MLP projections.
PATHS = {
    **dict.fromkeys(MODEL_TYPES, ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj")),
    "gpt2": ("transformer.h.{}", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}", "attention.dense", "mlp.dense_4h_to_h"),
}
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.1},
}


def some_tokens(lengths: Sequence[tuple[int, int, int]]) -> list[PairTokens]:
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 40, (count,), generator=generator).tolist())

    return [
        PairTokens(ids(prefix), ids(positive), ids(negative), f"f:{number}")
        for number, (prefix, positive, negative) in enumerate(lengths)
    ]


TOKENS = some_tokens([(40, 10, 20), (0, 30, 2), (19, 22, 32), (3, 1, 1), (50, 1, 9)])


def alone(model: Any, ids: Sequence[int]) -> dict[Site, torch.Tensor]:
    """The last token's activations of one string, by hooks of our own on the whole model."""
    layer_path, attention, mlp = PATHS[model.config.model_type]
    found: dict[Site, torch.Tensor] = {}
    handles = []

    def keep(site: Site, x: Any) -> None:
        found[site] = (x[0] if isinstance(x, tuple) else x)[0, -1]

    for number in range(2):
        layer = model.get_submodule(layer_path.format(number))
        attention_in, ffn, neuron, out = (Site(number, component) for component in Component)
        handles += [
            layer.get_submodule(attention).register_forward_pre_hook(
                lambda _, x, site=attention_in: keep(site, x)
            ),
            layer.get_submodule(mlp).register_forward_pre_hook(
                lambda _, x, site=neuron: keep(site, x)
            ),
            layer.get_submodule(mlp).register_forward_hook(
                lambda _, __, x, site=ffn: keep(site, x)
            ),
            layer.register_forward_hook(lambda _, __, x, site=out: keep(site, x)),
        ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found


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
    for share in (True, False):
        for padding in ("left", "right"):
            found = captured(model, batch_size=3, share_prompt=share, padding_side=padding)
            assert len(found) == len(TOKENS) * len(SITES)
            for (number, site), both in found.items():
                for side, x in zip(("positive", "negative"), both, strict=True):
                    torch.testing.assert_close(
                        x, wanted[number, side][site], **TOLERANCE[torch.float32]
                    )
    assert not caplog.records, "sharing was refused"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bfloat16_is_shared_and_stays_bfloat16(
    tiny_model: TinyModel, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(model_type).to(torch.bfloat16)
    plain = captured(model, share_prompt=False)
    for key, both in captured(model, share_prompt=True).items():
        for x, y in zip(both, plain[key], strict=True):
            assert x.dtype == torch.bfloat16
            torch.testing.assert_close(x, y, **TOLERANCE[torch.bfloat16])
    assert not caplog.records


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_row_longer_than_the_context_is_shared(
    tiny_model: TinyModel, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Both strings fit the context of 48; their common row has 83 tokens."""
    name = "n_positions" if model_type == "gpt2" else "max_position_embeddings"
    model = tiny_model(model_type, **{name: 48})
    (tokens,) = some_tokens([(3, 45, 35)])
    (batch,) = capture(model, [tokens], SITES)
    for site, (positive, negative) in batch.values.items():
        for x, branch in ((positive, tokens.positive), (negative, tokens.negative)):
            wanted = alone(model, tokens.prefix + branch)[site]
            torch.testing.assert_close(x[0], wanted, **TOLERANCE[torch.float32])
    assert not caplog.records


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_every_pair_comes_once(tiny_model: TinyModel, batch_size: int) -> None:
    batches = list(capture(tiny_model("llama"), TOKENS, SITES[:1], batch_size=batch_size))
    assert sorted(number for batch in batches for number in batch.pairs) == list(range(5))
    assert max(len(batch.pairs) for batch in batches) == min(batch_size, 5)


def test_bad_batch_size(tiny_model: TinyModel) -> None:
    with pytest.raises(FitError, match="got 0"):
        list(capture(tiny_model("llama"), TOKENS, SITES, batch_size=0))


def test_layers_after_the_last_site_and_the_head_do_not_run(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    list(capture(model, TOKENS, [Site(0, Component.ATTENTION)], share_prompt=False))
    assert "model.layers.0.self_attn.q_proj" in ran
    assert not any(name.startswith(("model.layers.0.mlp", "model.layers.1")) for name in ran)
    list(capture(model, TOKENS, [Site(1, Component.LAYER)]))
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
        list(capture(model, TOKENS, SITES, share_prompt=False))
    broken.remove()
    assert hooks(model) == 0


def poison(model: Any, value: float) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[37] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("share", [True, False])
def test_not_finite_names_site_and_pair(
    tiny_model: TinyModel, value: float, share: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    poison(model, value)
    tokens = [PairTokens((1, 5), (6,), (7,), "f:1"), PairTokens((1, 5), (6,), (37,), "f:2")]
    with pytest.raises(FitError, match=r"layers\.0\.attention: .*not finite.* f:2") as caught:
        list(capture(model, tokens, SITES, share_prompt=share))
    assert "\n" not in str(caught.value)
    assert not caplog.records


def test_ids_outside_the_vocabulary(tiny_model: TinyModel) -> None:
    tokens = [PairTokens((1, 5), (6,), (40,), "f:9")]
    with pytest.raises(ModelError, match=r"f:9: .*id 40.* 40 embeddings"):
        list(capture(tiny_model("llama"), tokens, SITES))


@pytest.mark.parametrize("model_type", ["mistral", "phi3", "gemma2", "qwen2"])
def test_sliding_window_shorter_than_a_text_is_not_shared(
    tiny_model: TinyModel, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    extra = (
        {"use_sliding_window": True, "max_window_layers": 0} if model_type == "qwen2" else {}
    )
    model = tiny_model(model_type, sliding_window=16, **extra)
    with caplog.at_level(logging.WARNING, "austeer"):
        found = captured(model, batch_size=2, share_prompt=True)
    assert "sliding window 16" in caplog.text
    for number, tokens in enumerate(TOKENS):
        wanted = alone(model, tokens.prefix + tokens.positive)
        for site in SITES:
            torch.testing.assert_close(
                found[number, site][0], wanted[site], **TOLERANCE[torch.float32]
            )


def test_sliding_window_that_holds_every_text_is_shared(tiny_model: TinyModel) -> None:
    longest = max(len(t.prefix) + max(len(t.positive), len(t.negative)) for t in TOKENS)
    assert can_share_prompt(tiny_model("mistral", sliding_window=longest), TOKENS)
    assert not can_share_prompt(tiny_model("mistral", sliding_window=longest - 1), TOKENS)


def test_model_that_ignores_the_mask_is_not_shared(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    forward = model.model.forward

    def careless(attention_mask: torch.Tensor, **inputs: Any) -> Any:
        return forward(
            attention_mask=None if attention_mask.ndim == 4 else attention_mask, **inputs
        )

    monkeypatch.setattr(model.model, "forward", careless)
    assert not can_share_prompt(model, TOKENS)
    assert "other activations" in caplog.text


def test_model_that_refuses_the_mask_is_not_shared(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    forward = model.model.forward

    def strict(attention_mask: torch.Tensor, **inputs: Any) -> Any:
        if attention_mask.ndim != 2:
            raise ValueError("2-D masks only")
        return forward(attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(model.model, "forward", strict)
    assert not can_share_prompt(model, TOKENS)
    assert "refuses the attention mask" in caplog.text
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    assert not can_share_prompt(model, TOKENS)
    assert "flash_attention_2" in caplog.text


def test_unsupported_architecture() -> None:
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=128,
    )  # fmt: skip
    with pytest.raises(ModelError, match="'opt'"):
        list(capture(AutoModelForCausalLM.from_config(config), TOKENS, SITES))
