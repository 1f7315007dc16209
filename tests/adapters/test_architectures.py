"""The table of architectures against the real transformers classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import MIXTURES

from austeer.adapters import (
    Architecture,
    Component,
    ModelError,
    Site,
    SiteError,
    SteeringAdapter,
    architectures,
    register_architecture,
)
from austeer.adapters.architectures import ARCHITECTURES, architecture_of, text_config
from austeer.adapters.attach import final_modules, text_decoder
from austeer.adapters.fingerprint import module_reader
from austeer.adapters.steered_site import site_width


def head_width(config: Any) -> int:
    """Of what the heads of an attention give: their values."""
    plain = config.hidden_size // config.num_attention_heads
    for name in ("v_head_dim", "head_dim"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return int(plain)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_paths_exist_and_widths_fit(tiny_model: Callable[..., Any], model_type: str) -> None:
    model = tiny_model(model_type)
    row = architecture_of(model_type)
    config = text_config(model)
    heads = head_width(config)
    named = ("intermediate_size_mlp", "intermediate_size", "ffn_dim", "ffn_hidden_size")
    found = (getattr(config, name, None) for name in named)
    inner = next(filter(None, found), 4 * config.hidden_size)
    widths = {
        Component.ATTENTION: heads * config.num_attention_heads,
        Component.FFN: config.hidden_size,
        Component.NEURON: inner,
    }
    read = module_reader(model)
    block, dense = MIXTURES.get(model_type, ("", 2))
    for layer in range(2):
        for component, width in widths.items():
            site = Site(layer, component)
            side = "output" if component is Component.FFN else "input"
            assert row.hookpoint(site).side == side
            if layer < dense or component is not Component.NEURON:
                model.get_submodule(row.hookpoint(site).module)
            if layer >= dense and component is Component.NEURON:
                with pytest.raises(SiteError, match="mixture of experts"):
                    site_width(site, row, read)
            else:
                assert site_width(site, row, read) == width
        assert row.mixture is None or row.block(layer) == f"model.layers.{layer}.{block}"
        point = row.hookpoint(Site(layer, Component.LAYER))
        assert point.side == "output"
        assert type(model.get_submodule(point.module)).__name__.endswith(("Layer", "Block"))
    assert model.get_submodule(row.embedding) is model.get_input_embeddings()
    assert model.get_submodule(row.unembedding) is model.get_output_embeddings()
    assert final_modules(model, row)[0] is model.get_submodule(row.norm)
    for norm in (row.attention_norm, row.mlp_norm):
        assert norm is None or model.get_submodule(f"{row.layer.format(i=0)}.{norm}")
    assert row.num_layers(model.config.to_dict()) == 2
    # Llama 4's is the name that its vision-language model gives the whole of it.
    if model_type != "llama4_text":
        assert model.base_model_prefix == row.prefix.partition(".")[0]
    assert text_decoder(model) is model.get_submodule(row.prefix)
    inner = text_decoder(model)(torch.arange(3, 9)[None], use_cache=False).last_hidden_state
    assert inner.shape[:2] == (1, 6)
    assert (row.mixture is not None) == (model_type in MIXTURES)


@pytest.mark.parametrize("model_type", ["bert", "", None])
def test_unknown_architecture_is_named_with_what_to_add(model_type: str | None) -> None:
    with pytest.raises(ModelError) as error:
        architecture_of(model_type)
    assert repr(model_type) in str(error.value)
    assert "adapters/architectures.py" in str(error.value) and "llama" in str(error.value)
    assert "austeer.adapters.register_architecture" in str(error.value)


def test_names_on_disk_with_and_without_prefix() -> None:
    gpt2 = architecture_of("gpt2")
    assert gpt2.disk_names("transformer.h.0.x") == ("transformer.h.0.x", "h.0.x")
    assert gpt2.disk_names("lm_head.weight") == ("lm_head.weight",)


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 0}, {"num_hidden_layers": "2"}])
def test_number_of_layers_must_be_there(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="num_hidden_layers or n_layer"):
        architecture_of("llama").num_layers(config)


CODEGEN = Architecture(
    "codegen",
    prefix="transformer",
    layer="transformer.h.{i}",
    attention="attn.out_proj",
    mlp="mlp.fc_out",
    embedding="transformer.wte",
    norm="transformer.ln_f",
)


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    for name in ("_TABLE", "ARCHITECTURES"):
        table = dict(ARCHITECTURES) if name == "_TABLE" else architectures._TABLE
        monkeypatch.setattr(architectures, name, table)


@pytest.mark.usefixtures("own_table")
def test_a_registered_architecture_is_steered_as_any_other() -> None:
    from transformers import AutoModelForCausalLM, CodeGenConfig

    torch.manual_seed(0)
    config = CodeGenConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=4, rotary_dim=4)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = torch.arange(3, 11)[None]
    with pytest.raises(ModelError, match="'codegen': not supported"):
        SteeringAdapter.from_units(model, "neuron", [1], [3], [2.0])
    register_architecture(CODEGEN)
    assert architecture_of("codegen") is CODEGEN
    adapter = SteeringAdapter.from_units(model, "neuron", [1], [3], [2.0])
    with adapter.attached(model):
        attached = model(ids).logits
    model.transformer.h[1].mlp.fc_out.weight[:, 3] *= 3.0
    torch.testing.assert_close(attached, model(ids).logits)


@pytest.mark.usefixtures("own_table")
def test_a_known_row_is_replaced_by_request_only() -> None:
    register_architecture(ARCHITECTURES["llama"])
    other = dataclasses.replace(ARCHITECTURES["llama"], mlp="mlp.w2")
    with pytest.raises(ModelError, match=r"'llama'\): known already.* replace=True"):
        register_architecture(other)
    assert architecture_of("llama") != other
    register_architecture(other, replace=True)
    assert architecture_of("llama") is other


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model_type", "", "the model_type of a config.json"),
        ("layer", 3, "a string"),
        ("layer", "model.layers", "{i} once"),
        ("layer", "model.layers{i}", "{i} once"),
        ("layer", "model.{i}", "such as model.layers.{i}"),
        ("layer", "model.{i}.layers.{i}", "{i} once"),
        ("layer", "encoder.layers.{i}", "below the prefix 'model'"),
        ("norm", "norm", "below the prefix 'model'"),
        ("mlp", "mlp.{i}", "a module path"),
        ("mlp", ".down_proj", "a module path"),
        ("attention", None, "a string"),
        ("attention_norm", "", "a module path or None"),
        ("layer_keys", (), "a tuple of names"),
        ("layer_keys", "num_layers", "a tuple of names"),
        ("tail", ["model.out"], "a tuple of names"),
        ("masks", "two", "one of one, by_layer_type, tokens"),
    ],
)
def test_a_malformed_row_is_refused_in_one_line(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ModelError) as error:
        Architecture(**{"model_type": "mine", field: value})
    message = str(error.value)
    assert f"{field}={value!r}: expected" in message and expected in message
    assert "\n" not in message


def test_the_table_is_read_only() -> None:
    with pytest.raises(TypeError):
        ARCHITECTURES["mine"] = CODEGEN  # type: ignore[index]


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("bloom", {"n_layer": 24}),
        ("mpt", {"n_layers": 24}),
        ("gpt_neo", {"num_layers": 24}),
        ("gptj", {"n_layer": 24}),
        ("falcon", {"num_hidden_layers": 24}),
    ],
)
def test_number_of_layers_as_published(model_type: str, config: dict[str, Any]) -> None:
    assert architecture_of(model_type).num_layers(config) == 24


def test_optional_modules_and_wrong_ones(tiny_model: Callable[..., Any]) -> None:
    """OPT 350m has no final norm; a path that is wrong is no optional module."""
    row = architecture_of("opt")
    model = tiny_model("opt", do_layer_norm_before=False)
    assert final_modules(model, row) == [model.model.decoder.project_out]
    model = tiny_model("opt", word_embed_proj_dim=32)
    assert final_modules(model, row) == [model.model.decoder.final_layer_norm]
    wrong = dataclasses.replace(row, norm="model.decoder.norm")
    with pytest.raises(ModelError, match=r"has no module model\.decoder\.norm"):
        final_modules(model, wrong)
