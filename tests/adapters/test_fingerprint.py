"""One model, one fingerprint; another model, another one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import TRANSFORMERS_4

from austeer.adapters import Component, ModelError, Site
from austeer.adapters.architectures import architecture_of
from austeer.adapters.fingerprint import checkpoint_reader, fingerprint, module_reader
from austeer.adapters.weights import Checkpoint

SITES = [Site(0, Component.FFN), Site(1, Component.ATTENTION)]


def live(model: Any, sites: list[Site] | None = None) -> str:
    row = architecture_of(model.config.model_type)
    return fingerprint(row, sites or SITES, module_reader(model))


def on_disk(folder: Path, model_type: str) -> str:
    row = architecture_of(model_type)
    return fingerprint(row, SITES, checkpoint_reader(row, Checkpoint(folder)))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_same_from_disk_and_from_loaded_models(
    tiny_model: Callable[..., Any], tmp_path: Path, model_type: str, stored: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model(model_type).to(stored).save_pretrained(tmp_path)
    expected = on_disk(tmp_path, model_type)
    for dtype in (stored, torch.float32, torch.bfloat16):
        assert live(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == expected


def test_same_without_the_prefix(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    assert on_disk(tmp_path, "gpt2") == live(model)


def test_it_is_the_documented_digest(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox")
    digest = hashlib.sha256()
    for path in ("gpt_neox.layers.0.mlp.dense_4h_to_h", "gpt_neox.layers.1.attention.dense"):
        module = model.get_submodule(path)
        for part in ("weight", "bias"):
            tensor = getattr(module, part)
            digest.update(f"{path}.{part}{tuple(tensor.shape)}".encode())
            digest.update(tensor.bfloat16().view(torch.int16).numpy().tobytes())
    assert live(model) == f"sha256:{digest.hexdigest()}"


def test_order_and_repetition_of_sites_do_not_matter(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    assert live(model, SITES[::-1]) == live(model) == live(model, [*SITES, SITES[0]])
    # ffn and neuron stand behind the same projection.
    assert live(model, [Site(0, Component.FFN)]) == live(model, [Site(0, Component.NEURON)])


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("model.layers.0.mlp.down_proj.weight", True),
        ("model.layers.1.self_attn.o_proj.weight", True),
        ("model.layers.1.mlp.down_proj.weight", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_a_changed_touched_weight_changes_it(
    tiny_model: Callable[..., Any], path: str, seen: bool
) -> None:
    model = tiny_model("llama")
    before = live(model)
    model.get_parameter(path)[3, 4] += 0.1
    assert (live(model) != before) == seen


def test_a_changed_bias_changes_it(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    before = live(model)
    model.transformer.h[0].mlp.c_proj.bias[3] += 0.1
    assert live(model) != before


def test_missing_weight_is_named(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.9\.mlp\.down_proj\.weight"):
        live(tiny_model("llama"), [Site(9, Component.FFN)])


@pytest.mark.skipif(TRANSFORMERS_4, reason="its experts are modules of their own")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_an_offloaded_tensor_is_brought_back_once(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    import accelerate.utils

    model, sites = tiny_model(model_type), [Site(0, Component.FFN), Site(1, Component.FFN)]
    whole, brought = live(model, sites), []
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.experts.down_proj.is_meta
    align = accelerate.utils.align_module_device

    def counted(module: torch.nn.Module) -> Any:
        brought.append(module)
        return align(module)

    monkeypatch.setattr(accelerate.utils, "align_module_device", counted)
    assert live(model, sites) == whole
    assert brought == [model.model.layers[layer].mlp.experts for layer in (0, 1)]
    assert all(parameter.is_meta for parameter in brought[0].parameters())
