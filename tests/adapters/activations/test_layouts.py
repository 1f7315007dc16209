"""The layout a model can take is found by trying, and a refusal names its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import BEST_LAYOUT, alone, sites_of
from samples import some_tokens

from austeer.adapters import Component, FitError, ModelError, Site
from austeer.adapters.activations.capture import capture
from austeer.adapters.activations.layouts import can_share_prompt, choose_layout, lay_out

TinyModel = Callable[..., Any]
SITES = [Site(layer, component) for layer in range(2) for component in Component]
WINDOWED = ("mistral", "phi3", "gemma2", "qwen2", "qwen3", "gemma3_text", "starcoder2")
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


TOKENS = some_tokens([(40, 10, 20), (0, 30, 2), (19, 22, 32), (3, 1, 1), (50, 1, 9)])


def windowed(tiny_model: TinyModel, model_type: str, **changes: Any) -> Any:
    """A model whose window of 16 is shorter than most strings, and than some branches."""
    if model_type.startswith("qwen"):
        # One layer of full attention below one with the window.
        changes |= {"use_sliding_window": True, "max_window_layers": 1}
    return tiny_model(model_type, sliding_window=16, **changes)


def check_against_single_strings(model: Any, **options: Any) -> None:
    seen, sites = 0, sites_of(model.config.model_type)
    for batch in capture(model, TOKENS, sites, **options):
        for place, number in enumerate(batch.pairs):
            pair = TOKENS[number]
            for side, ids in enumerate((pair.positive, pair.negative)):
                wanted = alone(model, pair.prefix + ids)
                for site in sites:
                    found = batch.values[site][side][place]
                    torch.testing.assert_close(found, wanted[site], **TOLERANCE)
                    seen += 1
    assert seen == 2 * len(TOKENS) * len(sites)


@pytest.mark.parametrize("model_type", BEST_LAYOUT)
def test_each_architecture_takes_the_best_layout_it_can(
    tiny_model: TinyModel, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, best = tiny_model(model_type), BEST_LAYOUT[model_type]
    assert choose_layout(model, TOKENS) == best
    assert len(caplog.records) == (best != "packed")
    check_against_single_strings(model)
    check_against_single_strings(model, layout="plain", padding_side="left", token_budget=120)


VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon with ALiBi": ("falcon", {"alibi": True}, "plain"),
    "falcon 40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "tree"),
    "falcon in sequence": (
        "falcon",
        {"parallel_attn": False, "multi_query": False, "bias": True},
        "tree",
    ),
    "opt 350m": ("opt", {"do_layer_norm_before": False}, BEST_LAYOUT["opt"]),
    "parallel stablelm": (
        "stablelm",
        {"use_parallel_residual": True},
        BEST_LAYOUT["stablelm"],
    ),
    "biased granite": ("granite", {"mlp_bias": True, "attention_bias": True}, "packed"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_an_architecture(tiny_model: TinyModel, name: str) -> None:
    model_type, changes, best = VARIANTS[name]
    model = tiny_model(model_type, **changes)
    assert choose_layout(model, TOKENS) == best
    check_against_single_strings(model)


@pytest.mark.parametrize("layout", ["packed", "tree"])
@pytest.mark.parametrize("model_type", ["bloom", "mpt", "gpt_neo"])
def test_distances_by_place_are_known_beforehand(
    tiny_model: TinyModel, model_type: str, layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In bfloat16 a trial on short pairs would take the deviation for rounding."""
    model = tiny_model(model_type).to(torch.bfloat16)
    short = some_tokens([(3, 1, 1), (2, 1, 2)])
    assert choose_layout(model, short) == "plain"
    assert "neither packed nor shared: the model counts distances" in caplog.text
    assert not can_share_prompt(model, short)
    with pytest.raises(ModelError, match=f"'{layout}': the model counts distances"):
        list(capture(model, short, SITES, layout=layout))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", WINDOWED)
def test_sliding_window_shorter_than_a_text_is_packed(
    tiny_model: TinyModel,
    model_type: str,
    attention: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if (model_type, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma2")
    model = windowed(tiny_model, model_type, attn_implementation=attention)
    assert choose_layout(model, TOKENS) == "packed"
    check_against_single_strings(model, token_budget=120)
    assert not caplog.records


def test_softcap_that_bites_is_kept(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = windowed(
        tiny_model, "gemma2", attn_logit_softcapping=0.3, attn_implementation="eager"
    )
    check_against_single_strings(model)
    assert not caplog.records


def bypassing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every attention module use an attention of its own, ALiBi-like: none asks ours."""
    from transformers.models.llama import modeling_llama

    real = modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def biased(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        length = query.shape[2]
        place = torch.arange(length)
        bias = (0.2 * (place[None] - place[:, None])).expand(1, 1, length, length)
        bias = bias.masked_fill(place[None] > place[:, None], torch.finfo(bias.dtype).min)
        if mask is not None:
            mask = torch.where(mask, 0.0, bias.min()) if mask.dtype == torch.bool else mask
            bias = bias + mask
        return real(module, query, key, value, bias, **options)

    class Own(dict[str, Any]):
        def get_interface(self, *_: Any) -> Any:
            return biased

        def __getitem__(self, _: str) -> Any:
            return biased

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Own())


def test_attention_that_bypasses_the_interface_falls_back_to_plain(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Distances in the row are not those of the strings, so ALiBi rules the tree out too."""
    model = tiny_model("llama")
    bypassing(model, monkeypatch)
    with caplog.at_level(logging.WARNING, "austeer"):
        check_against_single_strings(model)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("pairs are not packed: ") and "bypasses" in messages[0]
    assert "expected one call from each of 2 layers, got 0" in messages[0]
    assert messages[1].startswith("prompts are computed twice") and "other" in messages[1]


def test_packed_by_request_never_passes_in_silence(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    bypassing(model, monkeypatch)
    with pytest.raises(ModelError, match="got 0 in all; the model bypasses"):
        list(capture(model, TOKENS, SITES, layout="packed"))


def test_a_single_layer_that_bypasses_the_interface_is_noticed(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", attn_implementation="eager")
    config = model.model.layers[1].self_attn.config
    own = type(config).from_dict(config.to_dict())
    own._attn_implementation = "eager"
    model.model.layers[1].self_attn.config = own
    assert choose_layout(model, TOKENS) == "tree"
    assert "2 layers, got 1 in all" in caplog.text
    check_against_single_strings(model)


def test_model_that_ignores_positions_is_not_packed(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every layer asks for our attention; only comparing activations tells."""
    model = tiny_model("llama")
    forward = model.model.forward

    def careless(position_ids: torch.Tensor, **inputs: Any) -> Any:
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", careless)
    assert choose_layout(model, TOKENS) == "plain"
    assert "not packed: the model gives other activations" in caplog.text


def test_model_that_refuses_packing_is_given_trees(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    forward = model.model.forward

    def strict(attention_mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        if attention_mask is None:
            raise ValueError("a mask, please\nand a second line")
        return forward(attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(model.model, "forward", strict)
    with caplog.at_level(logging.WARNING, "austeer"):
        assert len(list(capture(model, TOKENS, SITES, token_budget=100))) > 1
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("pairs are not packed: the model refuses the attention function")
    assert message.endswith("(ValueError: a mask, please)")


def test_tree_and_a_short_window(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    longest = max(pair.longest for pair in TOKENS)
    assert can_share_prompt(tiny_model("mistral", sliding_window=longest), TOKENS)
    model = tiny_model("mistral", sliding_window=longest - 1)
    assert not can_share_prompt(model, TOKENS)
    assert f"sliding window {longest - 1}" in caplog.text
    with pytest.raises(ModelError, match=f"'tree': a text has {longest} tokens"):
        list(capture(model, TOKENS, SITES, layout="tree"))
    # Without packing: pairs to come may be longer than these.
    monkeypatch.setattr("austeer.adapters.activations.layouts.packed_batch", lambda *_: 1 / 0)
    model = tiny_model("mistral", sliding_window=longest)
    monkeypatch.setattr("austeer.adapters.activations.layouts._REFUSALS", (ZeroDivisionError,))
    assert choose_layout(model, TOKENS) == "plain"


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


def test_out_of_memory_while_trying_is_no_refusal(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("austeer.adapters.activations.layouts.packed_batch", fails)
    longest = max(TOKENS, key=lambda pair: pair.longest).where
    with pytest.raises(FitError, match=f"{longest}: this pair alone does not fit in memory"):
        choose_layout(tiny_model("llama"), TOKENS)
    assert not caplog.records


def test_unknown_layout_and_no_pairs(tiny_model: TinyModel) -> None:
    with pytest.raises(FitError, match="layout 'dense': expected one of auto, packed, tree"):
        choose_layout(tiny_model("llama"), TOKENS, "dense")  # type: ignore[arg-type]
    assert choose_layout(tiny_model("llama"), []) == "packed"


def test_rows_of_each_layout(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    shapes = {
        layout: lay_out(model, TOKENS, layout).input_ids.shape  # type: ignore[arg-type]
        for layout in ("packed", "tree", "plain")
    }
    sizes = [pair.size for pair in TOKENS]
    longest = max(pair.longest for pair in TOKENS)
    assert shapes == {
        "packed": (1, sum(sizes)),
        "tree": (5, max(sizes)),
        "plain": (10, longest),
    }


def test_a_window_that_only_later_pairs_exceed(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen2-MoE has its window in the mask alone, which packing does without."""
    changes = {"use_sliding_window": True, "max_window_layers": 1}
    model = tiny_model("qwen2_moe", sliding_window=16, **changes)
    short = some_tokens([(4, 1, 2), (6, 2, 1)])
    assert choose_layout(model, short) == "plain"
    assert "pairs are not packed" in caplog.text
    honoured = windowed(tiny_model, "qwen3")
    assert choose_layout(honoured, short) == "packed"
