"""Folds into GGUF files: what the blocks dequantize to, bit for bit; all else is the base's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import (
    DEQUANTIZERS,
    FLOATS,
    TYPES,
    GgufModel,
    dequantize,
    package_rows_of,
    rows_of,
    write_gguf,
)
from quantized_models import nearest

from austeer.adapters import (
    AdapterError,
    OutputError,
    RouteError,
    SiteError,
    SteeringAdapter,
    VerificationError,
)
from austeer.adapters._leftovers import remove_leftovers
from austeer.exporter.copying import copy_file
from austeer.exporter.proofs import values
from austeer.exporter.quantized import gguf_merge
from austeer.exporter.quantized.gguf_check import verify_gguf_structure
from austeer.exporter.quantized.gguf_file import BLOCKS, KINDS
from austeer.exporter.quantized.gguf_merge import merge_gguf

UNITS = [5, 0, 30]
GAMMA = [0.7, -2.3, 0.013]
DOWN = "blk.{}.ffn_down.weight"
WIDE = {"intermediate_size": 256}


def tensors_of(model: Any, kind: str, output_kind: str = "F32") -> dict[str, Any]:
    """The touched tensors of a tiny Llama, and one that nothing touches."""
    found = {}
    for i, layer in enumerate(model.model.layers):
        found[DOWN.format(i)] = (layer.mlp.down_proj.weight.numpy(), kind)
        found[f"blk.{i}.attn_output.weight"] = (
            layer.self_attn.o_proj.weight.numpy(),
            output_kind,
        )
    return found | {"token_embd.weight": (model.model.embed_tokens.weight.numpy(), "F16")}


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama", **WIDE)


@pytest.fixture
def base(model: Any, tmp_path: Path) -> Callable[..., GgufModel]:
    def make(
        kind: str, output_kind: str = "F32", settings: dict[str, Any] | None = None
    ) -> GgufModel:
        path = tmp_path / f"base-{kind}.gguf"
        return write_gguf(path, "llama", tensors_of(model, kind, output_kind), settings)

    return make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.gguf"


def adapter_for(model: Any, component: str = "ffn") -> SteeringAdapter:
    return SteeringAdapter.from_units(model, component, [1, 1, 1], UNITS, GAMMA)


def gains(rows: int = 32) -> Any:
    found = np.ones(rows)
    found[UNITS] = 1 + np.float32(GAMMA).astype(np.float64)
    return found


@pytest.mark.parametrize("kind", DEQUANTIZERS)
def test_blocks_dequantize_to_scales_rounded_once(
    base: Callable[..., GgufModel], model: Any, out: Path, kind: str
) -> None:
    made = base(kind)
    summary = merge_gguf(made.path, adapter_for(model), out)
    old, new = made.tensors()[DOWN.format(1)], made.tensors(out)[DOWN.format(1)]
    blocks = 256 // TYPES[kind][1]
    gain = gains().repeat(blocks)
    wanted = dequantize(
        old.data, kind, lambda d: nearest(d.astype(np.float64) * gain, np.float16)
    )
    assert dequantize(new.data, kind).tobytes() == wanted.tobytes()
    assert summary.units == 3 and summary.tensors == (DOWN.format(1),)
    assert summary.values_changed == 3 * blocks * len(TYPES[kind][3])


@pytest.mark.parametrize("kind", [*BLOCKS, "F32", "F16", "BF16"])
def test_every_type_steers_the_rows_and_nothing_else(
    base: Callable[..., GgufModel], model: Any, out: Path, kind: str
) -> None:
    if kind not in (*DEQUANTIZERS, *FLOATS):
        pytest.importorskip("gguf", reason="only the gguf package dequantizes this type here")
    made = base(kind)
    path = made.path
    merge_gguf(path, adapter_for(model), out)
    before, after = path.read_bytes(), out.read_bytes()
    assert len(before) == len(after)
    old, new = made.tensors()[DOWN.format(1)], made.tensors(out)[DOWN.format(1)]
    start, stop = old.start, old.start + old.data.nbytes
    assert before[:start] == after[:start] and before[stop:] == after[stop:]
    weight, found = rows_of(old).astype(np.float64), rows_of(new)
    assert np.isfinite(weight).all() and weight[UNITS].any(axis=1).all()
    # Two scales a block may cancel: each is off by its own rounding.
    bound = 2**-8 * np.abs(gains()[:, None] * weight).max(axis=1, keepdims=True)
    assert (np.abs(found - gains()[:, None] * weight) <= bound).all()
    others = np.setdiff1d(np.arange(32), UNITS)
    assert found[others].tobytes() == rows_of(old)[others].tobytes()
    report = verify_gguf_structure(path, out, adapter_for(model))
    assert report.touched == (DOWN.format(1),) and report.identical == 4
    assert 0 < report.worst_error <= 1


def test_types_are_those_of_the_definitions() -> None:
    for kind, (number, length, size, places) in TYPES.items():
        assert KINDS[number] == kind
        block = BLOCKS.get(kind)
        assert block is None if not places else block is not None
        if block is not None:
            assert (block.length, block.size, block.scales) == (length, size, places)


def test_the_gguf_package_agrees(base: Callable[..., GgufModel], model: Any, out: Path) -> None:
    """On types, places and dequantized values, before and after a fold."""
    gguf = pytest.importorskip("gguf", reason="the second opinion of the gguf package")
    for kind, (number, length, size, _) in TYPES.items():
        found = gguf.GGMLQuantizationType[kind]
        assert (int(found), *gguf.GGML_QUANT_SIZES[found]) == (number, length, size)
    for kind in DEQUANTIZERS:
        made, folded = base(kind), out.with_name(f"{kind}.gguf")
        merge_gguf(made.path, adapter_for(model), folded)
        for path in (made.path, folded):
            ours = made.tensors(path)
            for tensor in gguf.GGUFReader(path).tensors:
                mine = ours[tensor.name]
                assert tensor.data_offset == mine.start and tensor.n_bytes == mine.data.nbytes
                assert tensor.data.tobytes() == mine.data.tobytes()
                assert rows_of(mine).tobytes() == package_rows_of(mine).tobytes()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("component", ["attention", "neuron"])
def test_plain_tensors_take_input_gains(
    base: Callable[..., GgufModel], model: Any, out: Path, kind: str, component: str
) -> None:
    made, adapter = base(kind, kind), adapter_for(model, component)
    path = made.path
    merge_gguf(path, adapter, out)
    name = "blk.1.attn_output.weight" if component == "attention" else DOWN.format(1)
    old, new = (rows_of(made.tensors(p)[name]) for p in (path, out))
    gain = gains(old.shape[1])
    assert new == pytest.approx(old * gain, rel=2**-8, abs=1e-6)
    assert (new[:, UNITS] != old[:, UNITS]).any(axis=0).all()
    verify_gguf_structure(path, out, adapter)
    other = "neuron" if component == "attention" else "attention"
    with pytest.raises(VerificationError):
        verify_gguf_structure(path, out, adapter_for(model, other))


@pytest.mark.parametrize("component", ["attention", "neuron"])
def test_blocks_refuse_input_gains(
    base: Callable[..., GgufModel], model: Any, out: Path, component: str
) -> None:
    path = base("Q8_0", "Q8_0").path
    with pytest.raises(RouteError, match=r"Q8_0.*cannot express it; fold the unquantized"):
        merge_gguf(path, adapter_for(model, component), out)
    with pytest.raises(VerificationError, match="cannot express it"):
        verify_gguf_structure(path, path, adapter_for(model, component))
    assert not out.exists()


@pytest.mark.parametrize("kind", ["IQ1_M", "MXFP4", "NVFP4"])
def test_blocks_without_float16_scales_are_refused(
    base: Callable[..., GgufModel], model: Any, out: Path, kind: str
) -> None:
    with pytest.raises(RouteError, match=f"{kind}: its scales cannot express a gain"):
        merge_gguf(base(kind).path, adapter_for(model), out)


def test_a_bias_is_steered_with_its_row(
    tiny_model: Callable[..., Any], tmp_path: Path, out: Path
) -> None:
    """GPT-2: stored transposed in a checkpoint, as everything else in GGUF."""
    model = tiny_model("gpt2")
    tensors = {}
    for i, layer in enumerate(model.transformer.h):
        tensors[DOWN.format(i)] = (layer.mlp.c_proj.weight.numpy().T, "F32")
        tensors[f"blk.{i}.ffn_down.bias"] = (layer.mlp.c_proj.bias.numpy(), "F32")
    made = write_gguf(tmp_path / "gpt2.gguf", "gpt2", tensors)
    path = made.path
    adapter = adapter_for(model)
    summary = merge_gguf(path, adapter, out)
    assert summary.notes == (), "stored exactly: compared by fingerprint"
    old, new = made.tensors(), made.tensors(out)
    for name in (DOWN.format(1), "blk.1.ffn_down.bias"):
        gain = gains() if name.endswith("bias") else gains()[:, None]
        assert rows_of(new[name]) == pytest.approx(rows_of(old[name]) * gain, rel=1e-6)
    with pytest.raises(AdapterError, match="fingerprint"):
        other = adapter_for(tiny_model("gpt2", seed=1))
        merge_gguf(path, other, tmp_path / "other.gguf")
    merge_gguf(path, other, tmp_path / "other.gguf", force=True)


def test_weights_are_compared_where_they_are_exact(
    base: Callable[..., GgufModel], model: Any, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    other = adapter_for(tiny_model("llama", seed=1, **WIDE))
    for kind in ("F32", "BF16"):
        with pytest.raises(AdapterError, match="fingerprint"):
            merge_gguf(base(kind).path, other, tmp_path / f"{kind}-other.gguf")
        assert not merge_gguf(
            base(kind).path, adapter_for(model), tmp_path / f"{kind}.gguf"
        ).notes
    (first, second) = merge_gguf(base("Q8_0").path, other, tmp_path / "q8.gguf").notes
    assert "weights could not be" in first and "scales: 1;" in second
    (note,) = merge_gguf(base("F16").path, adapter_for(model), tmp_path / "f16.gguf").notes
    assert "weights could not be" in note


def test_another_model_is_refused(
    base: Callable[..., GgufModel], tiny_model: Callable[..., Any], out: Path, tmp_path: Path
) -> None:
    path = base("Q8_0").path
    with pytest.raises(AdapterError, match="expected architecture qwen2"):
        merge_gguf(path, adapter_for(tiny_model("qwen2")), out)
    with pytest.raises(AdapterError, match="has no place in GGUF files"):
        merge_gguf(path, adapter_for(tiny_model("opt")), out)
    deep = tiny_model("llama", num_hidden_layers=4, **WIDE)
    with pytest.raises(SiteError, match="layer 3 outside the model's 2"):
        merge_gguf(path, SteeringAdapter.from_units(deep, "ffn", [3], [0], [1.0]), out)
    wide = tiny_model("llama", hidden_size=64, **WIDE)
    with pytest.raises(SiteError, match="unit 50 outside width 32"):
        merge_gguf(path, SteeringAdapter.from_units(wide, "ffn", [1], [50], [1.0]), out)
    bare = write_gguf(tmp_path / "bare.gguf", "llama", {"a": (np.ones((4, 4)), "F32")})
    with pytest.raises(RouteError, match=r"ffn_down\.weight is not in the file"):
        merge_gguf(bare.path, adapter_for(tiny_model("llama", **WIDE)), out, force=True)


def test_output_names(base: Callable[..., GgufModel], model: Any, tmp_path: Path) -> None:
    path, adapter = base("Q8_0").path, adapter_for(model)
    with pytest.raises(OutputError, match=r"ends in \.gguf"):
        merge_gguf(path, adapter, tmp_path / "out")
    with pytest.raises(OutputError, match="expected a new file"):
        merge_gguf(path, adapter, path)


def test_no_effect_and_failures_leave_nothing(
    base: Callable[..., GgufModel], model: Any, out: Path, tmp_path: Path
) -> None:
    path = base("Q8_0").path
    before = path.read_bytes(), sorted(tmp_path.iterdir())
    with pytest.raises(RouteError, match="changes no value"):
        merge_gguf(path, adapter_for(model), out, scale=0.0)
    with pytest.raises(RouteError, match="leaves the range of float16"):
        merge_gguf(path, adapter_for(model), out, scale=1e9)
    assert (path.read_bytes(), sorted(tmp_path.iterdir())) == before


def test_parts_that_were_joined_are_one_file(
    base: Callable[..., GgufModel], model: Any, out: Path
) -> None:
    """As llama-gguf-split --merge writes it."""
    merge_gguf(base("Q8_0", settings={"split.count": 0}).path, adapter_for(model), out)
    assert out.is_file()


def test_split_files_are_refused(base: Callable[..., GgufModel], model: Any, out: Path) -> None:
    with pytest.raises(RouteError, match="join the parts first"):
        merge_gguf(base("Q8_0", settings={"split.count": 2}).path, adapter_for(model), out)


CULPRITS = {
    "scale": "not the base times its gains",
    "integer": "its integers differ",
    "other row": "differs",
    "other tensor": "token_embd.weight differs",
    "header": "the header differs",
}


@pytest.mark.parametrize("chunk", [1 << 24, 100])
@pytest.mark.parametrize("place", CULPRITS)
def test_the_check_sees_every_change(
    base: Callable[..., GgufModel],
    model: Any,
    out: Path,
    place: str,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(values, "_CHUNK", chunk)
    made, adapter = base("Q8_0"), adapter_for(model)
    path = made.path
    merge_gguf(path, adapter, out)
    start = made.tensors()[DOWN.format(1)].start
    row = 256 // 32 * 34
    at = {
        "scale": start + 5 * row,
        "integer": start + 5 * row + 3,
        "other row": start + 6 * row,
        "other tensor": made.tensors()["token_embd.weight"].start + 250,
        "header": 40,
    }[place]
    data = bytearray(out.read_bytes())
    data[at] ^= 4
    out.write_bytes(data)
    # A chunk of all tensors names the first of them.
    with pytest.raises(VerificationError, match=CULPRITS[place] if chunk == 100 else "."):
        verify_gguf_structure(path, out, adapter)
    data[at] ^= 4
    out.write_bytes(data)
    verify_gguf_structure(path, out, adapter)
    with pytest.raises(VerificationError, match="not the base times its gains"):
        verify_gguf_structure(path, path, adapter)


def test_another_run_leaves_the_temporary_of_a_living_one(
    base: Callable[..., GgufModel], model: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def copy(source: Path, target: Path, **options: Any) -> int:
        before = target.stat().st_ino
        changed = copy_file(source, target, **options)
        remove_leftovers(out)  # as a second run for the same output begins
        seen.append((before, target.stat().st_ino))
        return changed

    monkeypatch.setattr(gguf_merge, "copy_file", copy)
    merge_gguf(base("Q8_0").path, adapter_for(model), out)
    ((before, after),) = seen
    assert before == after and out.is_file()


def test_an_output_of_a_quicker_run_stays(
    base: Callable[..., GgufModel], model: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any, **__: Any) -> None:
        out.write_bytes(b"theirs")

    monkeypatch.setattr(gguf_merge, "verify_gguf_structure", late)
    with pytest.raises(OutputError, match="expected a new file"):
        merge_gguf(base("Q8_0").path, adapter_for(model), out)
    assert out.read_bytes() == b"theirs" and not list(out.parent.glob(".*"))


@pytest.mark.parametrize("kind", ["Q8_0", "F32"])
def test_a_weight_without_inputs_is_refused(
    model: Any, tmp_path: Path, out: Path, kind: str
) -> None:
    empty = {DOWN.format(i): (np.ones((32, 0), np.float32), kind) for i in (0, 1)}
    path = write_gguf(tmp_path / "empty.gguf", "llama", empty).path
    with pytest.raises(RouteError, match=r"shape \(32, 0\), which holds no weights"):
        merge_gguf(path, adapter_for(model), out, force=True)
