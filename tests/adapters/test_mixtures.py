"""Mixtures of experts: which stored tensors carry a gain, in every way they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import memory_limit
from reference import TRANSFORMERS_4
from safetensors.torch import load_file, save_file

from austeer.adapters import ModelError, RouteError, Site, SiteError, SteeringAdapter
from austeer.adapters.architectures import Architecture, architecture_of
from austeer.adapters.fingerprint import checkpoint_reader, fingerprint, module_reader
from austeer.adapters.mixtures import Carrier, Experts, Mixture, carriers, projections_of
from austeer.adapters.sites import Component, Refusal
from austeer.adapters.weights import Checkpoint
from austeer.exporter.merge import merge_checkpoint
from austeer.exporter.proofs.fold_check import verify_fold_structure

Saved = Callable[..., Path]
FFN = Site(1, Component.FFN)
IDS = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(1))
FUSED = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def shapes(**found: tuple[int, ...]) -> Callable[[str], tuple[int, ...] | None]:
    below = {name.replace("__", "."): shape for name, shape in found.items()}
    return lambda name: below.get(name.removeprefix("model.layers.1."))


def names(found: tuple[Carrier, ...] | Refusal) -> list[tuple[str, int, int | None]]:
    assert not isinstance(found, Refusal), found
    return [(c.name.removeprefix("model.layers.1."), c.axis, c.part) for c in found]


def test_experts_in_files_of_their_own_and_a_shared_one() -> None:
    there = {f"mlp__experts__{e}__down_proj__weight": (32, 24) for e in range(3)}
    shape = shapes(
        mlp__gate__weight=(3, 32), mlp__shared_expert__down_proj__weight=(32, 40), **there
    )
    assert names(carriers(architecture_of("qwen2_moe"), FFN, shape)) == [
        *((f"mlp.experts.{e}.down_proj.weight", 0, None) for e in range(3)),
        ("mlp.shared_expert.down_proj.weight", 0, None),
    ]


def test_transposed_experts_in_one_tensor_with_biases() -> None:
    shape = shapes(
        mlp__router__weight=(2, 32),
        mlp__experts__down_proj=(2, 48, 32),
        mlp__experts__down_proj_bias=(2, 32),
    )
    found = carriers(architecture_of("gpt_oss"), FFN, shape)
    assert names(found) == [
        ("mlp.experts.down_proj", 1, 0),
        ("mlp.experts.down_proj_bias", 0, 0),
        ("mlp.experts.down_proj", 1, 1),
        ("mlp.experts.down_proj_bias", 0, 1),
    ]
    assert not isinstance(found, Refusal) and [c.stored_axis for c in found] == [2, 1, 2, 1]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama4_text", "qwen2_moe"])
def test_a_dense_layer_of_a_mixed_stack(model_type: str) -> None:
    row = architecture_of(model_type)
    shape = shapes(**{f"{row.mlp}.weight": (32, 48)})
    for component, axis in (("ffn", 0), ("neuron", 1)):
        found = carriers(row, Site(1, Component(component)), shape)
        assert names(found) == [(f"{row.mlp}.weight", axis, None)]


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"mlp__experts__0__down_proj__weight": (32, 24)}, r"experts\.1\.down_proj.*not there"),
        ({"mlp__experts__down_proj": (3, 32, 24)}, "holds 3 experts, the router has 2 rows"),
        ({}, r"experts\.0\.down_proj\.weight is not there"),
        (
            {"mlp__experts__0__down_proj__weight": (1,), "mlp__experts__down_proj": (2, 1, 1)},
            "the same experts twice",
        ),
        ({"mlp__experts__down_proj": ()}, r"down_proj has shape \(\).*2 rows"),
        ({"mlp__experts__down_proj": (2,)}, r"down_proj has shape \(2,\)"),
        (
            {
                "mlp__experts__0__down_proj__weight": (),
                "mlp__experts__1__down_proj__weight": (),
            },
            r"experts\.0\.down_proj\.weight has shape \(\)",
        ),
    ],
)
def test_experts_that_are_not_whole_are_refused(
    there: dict[str, tuple[int, ...]], message: str
) -> None:
    shape = shapes(mlp__gate__weight=(2, 32), **there)
    for component in ("ffn", "layer"):
        site = Site(1, Component(component))
        found = projections_of(architecture_of("qwen3_moe"), site, shape)
        assert isinstance(found, Refusal)
        with pytest.raises(AssertionError, match=message):
            names(found)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("router", [(), (0, 32), (2**16 + 1, 32), (10**9, 0)])
@pytest.mark.parametrize("fused", [True, False])
def test_rows_that_no_router_has(router: tuple[int, ...], fused: bool) -> None:
    """A header of a hundred bytes can claim any number of experts."""
    rows = router[0] if router else 0
    own = {f"mlp__experts__{e}__down_proj__weight": (32, 24) for e in range(2)}
    there = {"mlp__experts__down_proj": (rows, 32, 24)} if fused else own
    shape = shapes(mlp__gate__weight=router, **there)
    with memory_limit(1 << 30):
        found = carriers(architecture_of("qwen3_moe"), FFN, shape)
    assert isinstance(found, Refusal) and "expected one for each expert" in str(found)


@pytest.mark.timeout(20)
def test_the_first_missing_expert_ends_the_search() -> None:
    asked = []

    def shape(name: str) -> tuple[int, ...] | None:
        asked.append(name)
        return (2**16, 32) if name.endswith("mlp.gate.weight") else None

    assert isinstance(carriers(architecture_of("qwen3_moe"), FFN, shape), Refusal)
    assert len(asked) < 20


@pytest.mark.parametrize("router", [(), (0, 32), (10**9, 0)])
def test_a_broken_router_on_disk(
    saved_model: Saved, tiny_model: Any, tmp_path: Path, router: tuple[int, ...]
) -> None:
    base = saved_model("qwen3_moe")
    adapter = SteeringAdapter.from_units(tiny_model("qwen3_moe"), "ffn", [1], [3], [1.0])
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight"] = torch.zeros(router)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with memory_limit(1 << 32), pytest.raises(SiteError, match="one for each expert"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "mixture",
    [
        "mlp.experts",
        Mixture(()),
        Mixture((Experts("mlp.gate.weight", "mlp.experts.{e}.{e}.weight"),)),
        Mixture((Experts("mlp.gate.weight", "mlp.{e}.weight", "mlp.bias"),)),
        Mixture((Experts("mlp.gate.weight", "mlp.{number}.weight"),)),
        Mixture((Experts("", "mlp.{e}.weight"),)),
        Mixture((Experts("mlp.gate.weight", "mlp.{e}.weight"),), shared="mlp..down"),
    ],
)
def test_malformed_rows(mixture: Any) -> None:
    with pytest.raises(ModelError, match=r"mixture=.*expected a Mixture of paths"):
        Architecture("mine", mixture=mixture)


def fuse(folder: Path, model_type: str) -> Path:
    """Store the experts of a checkpoint as transformers 5 holds them in memory."""
    block, gate, up, down = FUSED[model_type]
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 1):
        own = f"model.layers.{layer}.{block}.experts"
        if f"{own}.0.{down}.weight" not in tensors:
            continue
        parts = {
            part: torch.stack([tensors.pop(f"{own}.{e}.{part}.weight") for e in range(4)])
            for part in (gate, up, down)
        }
        there = f"model.layers.{layer}.mlp"
        tensors[f"{there}.experts.gate_up_proj"] = torch.cat((parts[gate], parts[up]), 1)
        tensors[f"{there}.experts.down_proj"] = parts[down]
        router = tensors.pop(f"model.layers.{layer}.{block}.gate.weight")
        tensors[f"{there}.gate.weight"] = router
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.skipif(TRANSFORMERS_4, reason="its experts are modules of their own")
@pytest.mark.parametrize("model_type", FUSED)
def test_fused_experts_on_disk(saved_model: Saved, tmp_path: Path, model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    base = fuse(saved_model(model_type), model_type)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    adapter = SteeringAdapter.from_units(model, "ffn", [0, 1, 1], [3, 0, 31], [1.0, -2.0, 0.5])
    summary = merge_checkpoint(base, adapter, tmp_path / "out")
    assert "model.layers.1.mlp.experts.down_proj" in summary.tensors
    assert verify_fold_structure(base, tmp_path / "out", adapter).worst_error <= 1.0
    with adapter.attached(model):
        wanted = logits(model)
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    assert float((got - logits(model)).abs().max()) > 0.1


@pytest.mark.parametrize("model_type", FUSED)
def test_one_fingerprint_however_the_experts_are_stored(
    saved_model: Saved, model_type: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, row = saved_model(model_type), architecture_of(model_type)
    model = AutoModelForCausalLM.from_pretrained(folder)

    def digests() -> set[str]:
        readers = (checkpoint_reader(row, Checkpoint(folder)), module_reader(model))
        return {fingerprint(row, [FFN, Site(0, Component.LAYER)], r) for r in readers}

    found = digests()
    fuse(folder, model_type)
    assert len(found | digests()) == 1


def test_the_fingerprint_reads_every_expert(saved_model: Saved) -> None:
    folder, row = saved_model("qwen2_moe"), architecture_of("qwen2_moe")
    tensors = load_file(folder / "model.safetensors")
    touched = [n for n in tensors if n.startswith("model.layers.1.mlp.") and "down" in n]
    assert len(touched) == 5
    seen = set()
    for name in (None, *touched):
        changed = tensors if name is None else tensors | {name: tensors[name] * 2}
        save_file(changed, folder / "model.safetensors")
        seen.add(fingerprint(row, [FFN], checkpoint_reader(row, Checkpoint(folder))))
    assert len(seen) == 6


def test_a_lost_expert_is_named(saved_model: Saved, tiny_model: Any, tmp_path: Path) -> None:
    base = saved_model("mixtral")
    adapter = SteeringAdapter.from_units(tiny_model("mixtral"), "ffn", [1], [3], [1.0])
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(SiteError, match=r"experts\.3\.w2\.weight is not there.*4 rows"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantized_experts_are_refused(
    saved_model: Saved, tiny_model: Any, tmp_path: Path
) -> None:
    """gpt-oss as published: experts in MXFP4, in tensors of other names."""
    base = saved_model("gpt_oss")
    adapter = SteeringAdapter.from_units(tiny_model("gpt_oss"), "ffn", [1], [3], [1.0])
    tensors = load_file(base / "model.safetensors")
    for layer in (0, 1):
        own = f"model.layers.{layer}.mlp.experts.down_proj"
        del tensors[own]
        tensors[f"{own}_blocks"] = torch.zeros(4, 32, 2, 16, dtype=torch.uint8)
        tensors[f"{own}_scales"] = torch.zeros(4, 32, 2, dtype=torch.uint8)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(SiteError, match=r"not there.*not quantized"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    config = base / "config.json"
    text = config.read_text().replace(
        "{", '{"quantization_config": {"quant_method": "mxfp4"},', 1
    )
    config.write_text(text)
    with pytest.raises(RouteError, match=r"mxfp4.*fold the unquantized model"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_a_part_of_a_stored_tensor(tmp_path: Path) -> None:
    values = torch.arange(24.0).reshape(3, 2, 4)
    save_file({"before": torch.zeros(5), "w": values}, tmp_path / "model.safetensors")
    entry = Checkpoint(tmp_path)["w"]
    for part in range(3):
        np.testing.assert_array_equal(entry.read(part), values[part].numpy())
