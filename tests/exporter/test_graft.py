"""Grafting jobs on real graphs: right numbers in every route, whole products or none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_sessions import FUNCTIONS_AND_KERNELS, open_session, run_session
from plain_steering import dynamo_values, steer_plainly, width_of

from austeer.adapters import (
    AusteerError,
    GraphError,
    OutputError,
    RouteError,
    SteeringAdapter,
    VerificationError,
)
from austeer.exporter.graft import GraftRequest, graft_job
from austeer.graphs import OnnxCausalLM, load_model
from austeer.graphs.custom_op import library_file

pytest.importorskip("onnxruntime")

COMPONENTS = ("attention", "ffn", "neuron", "layer")
PROMPTS = np.random.default_rng(5).integers(3, 40, (3, 7))
NEW_TOKENS = 16
Bases = Callable[..., tuple[Any, Path]]
Adapters = Callable[..., Path]


# What a product says of its making and its sums: test_provenance, test_sums.
SEAL = {"austeer.json", "SHA256SUMS"}


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in SEAL
    }


def logits(path: Path, **settings: Any) -> np.ndarray:
    model = OnnxCausalLM(path, threads=1, kernels=settings.pop("kernels", False))
    for name, value in settings.items():
        setattr(model, name, value)
    return model.logits(PROMPTS)


def job(base: Path, adapters: Path | list[Path], out: Path, **options: Any) -> dict[str, Any]:
    names = [adapters] if isinstance(adapters, Path) else adapters
    request = GraftRequest(
        base=base, adapters=tuple(str(name) for name in names), out=out, **options
    )
    return graft_job(request)


def unproved(base: Path, adapter: Path | list[Path], out: Path, **options: Any) -> None:
    """A product to compare with, whose own proof is another test's."""
    job(base, adapter, out, verify=False, **options)


@pytest.fixture
def own_base(base_folder: Bases, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the exported base that a test may write into, with data files or without."""

    def build(data: bool = False, name: str = "model.onnx", **options: Any) -> Path:
        _, source = base_folder(**options)
        folder = tmp_path / "base"
        folder.mkdir()
        shutil.copyfile(source / "config.json", folder / "config.json")
        model = load_model(source / "model.onnx")
        external = f"{name}.data" if data else None
        ir.save(model, folder / name, external_data=external, size_threshold_bytes=256)
        return folder / name

    return build


def reference_graph(
    base: Path, values: dict[str, str], adapter: SteeringAdapter, model: Any, out: Path
) -> Path:
    """The base with γ applied by standard nodes at values found without our locator."""
    proto = onnx.load(base)
    steer_plainly(
        proto,
        {
            values[steered.site.key]: (steered, width_of(model, steered.site.component))
            for steered in adapter.sites
        },
    )
    onnx.save(proto, out)
    return out


# The numbers


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    ("model_type", "int8"), [("llama", False), ("llama", True), ("gpt2", True)]
)
def test_a_graft_equals_nodes_put_in_by_hand(
    model_type: str,
    int8: bool,
    component: str,
    rank: int,
    base_folder: Bases,
    exported_base: Bases,
    adapter_folder: Adapters,
    tmp_path: Path,
) -> None:
    model, folder = base_folder(model_type, int8=int8)
    adapter = adapter_folder(model_type, component, rank)
    row = job(folder, adapter, tmp_path / "out")
    assert row["base_weights"] == ("not comparable" if int8 else "equal")
    values = dynamo_values(exported_base(model_type)[1], model_type)
    made = SteeringAdapter.from_pretrained(adapter)
    expected = reference_graph(
        folder / "model.onnx", values, made, model, tmp_path / "reference.onnx"
    )
    reference = OnnxCausalLM(expected, threads=1)
    wanted, tokens = reference.logits(PROMPTS), reference.generate(PROMPTS, NEW_TOKENS)
    base = logits(folder)
    assert np.abs(wanted - base).max() > 0.05
    for kernels in [False, True] if library_file() else [False]:
        steered = OnnxCausalLM(tmp_path / "out", threads=1, kernels=kernels)
        found = steered.logits(PROMPTS)
        assert np.abs(found - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())
        assert np.array_equal(steered.generate(PROMPTS, NEW_TOKENS), tokens)
    if not int8:
        with torch.no_grad(), made.attached(model):
            truth = model(torch.from_numpy(PROMPTS)).logits.numpy()
        assert np.abs(wanted - truth).max() <= 1e-4 * max(1.0, np.abs(truth).max())


# What comes out, and where


def test_a_directory_is_a_whole_product(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base()
    companions = {
        "tokenizer.json": '{"a": 1}',
        "vocab.txt": "one\ntwo\n",
        "chat_template.jinja": "{{ messages }}",
        "spiece.model": "binary",
    }
    for name, text in companions.items():
        (base.parent / name).write_text(text)
    for name in ("README.md", "weights.safetensors", "notes.py"):
        (base.parent / name).write_text("stays")
    (base.parent / "folder.json").mkdir()
    before = content(base.parent)
    row = job(base.parent, adapter_folder(), tmp_path / "out")
    assert content(base.parent) == before
    made = content(tmp_path / "out")
    assert made.keys() == {"model.onnx", "config.json", "README.md", *companions}
    for name in ("config.json", *companions):
        assert made[name] == before[name]
    card = made["README.md"].decode()
    assert card.startswith("---\n")
    assert 'library_name: "onnx"' in card
    assert "`model.onnx` runs on stock onnxruntime" in card
    assert row["path"] == str(tmp_path / "out")
    assert (row["route"], row["nodes"], row["adapter_files"]) == ("graft", 2, [])
    assert row["verified"] and row["base_weights"] == "equal"
    assert row["sites"] == 2
    assert 0.0 <= row["max_site_difference"] <= 1.0
    assert row["steered_vs_base"] > 0.01
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_in_a_directory_keeps_its_name(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base(name="decoder_q.onnx")
    job(base.parent, adapter_folder(), tmp_path / "out")
    assert content(tmp_path / "out").keys() == {"decoder_q.onnx", "config.json", "README.md"}


def test_a_file_beside_the_base_shares_its_data(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base(data=True)
    before = content(base.parent)
    status = {path.name: path.stat() for path in base.parent.iterdir()}
    adapter = adapter_folder("llama", "layer", 1)
    job(base, adapter, base.with_name("steered.onnx"))
    after = content(base.parent)
    assert after.keys() == {*before, "steered.onnx"}
    assert {name: after[name] for name in before} == before
    for name, old in status.items():
        new = (base.parent / name).stat()
        assert (new.st_nlink, new.st_mtime_ns, new.st_ino) == (
            old.st_nlink,
            old.st_mtime_ns,
            old.st_ino,
        )
    tensors = [
        tensor
        for tensor in onnx.load(
            base.with_name("steered.onnx"), load_external_data=False
        ).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    assert len(tensors) > 10
    assert {e.value for t in tensors for e in t.external_data if e.key == "location"} == {
        "model.onnx.data"
    }
    assert len(after["steered.onnx"]) < len(before["model.onnx.data"])
    unproved(base, adapter, tmp_path / "alone", copy_data=True)
    assert np.array_equal(logits(base.with_name("steered.onnx")), logits(tmp_path / "alone"))


def test_a_file_anywhere_of_a_base_in_one_file(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base()
    job(base, adapter_folder(), tmp_path / "new" / "steered.onnx")
    assert content(tmp_path / "new").keys() == {"steered.onnx"}
    unproved(base, adapter_folder(), tmp_path / "folder")
    assert np.array_equal(
        logits(tmp_path / "new" / "steered.onnx"), logits(tmp_path / "folder")
    )


@pytest.mark.parametrize("out", ["elsewhere/steered.onnx", "folder"])
def test_data_is_neither_copied_nor_lost_unasked(
    out: str, own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base(data=True)
    before = content(tmp_path)
    with pytest.raises(OutputError, match="--copy-data") as error:
        job(base, adapter_folder(), tmp_path / out)
    assert str(base.parent) in str(error.value)
    assert content(tmp_path) == before


@pytest.mark.parametrize("location", ["model.onnx.data", "sub/weights.bin"])
def test_copied_data_makes_a_directory_of_its_own(
    location: str, own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base(data=True)
    if location != "model.onnx.data":
        proto = onnx.load(base, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        base.write_bytes(proto.SerializeToString())
        (base.parent / "sub").mkdir()
        (base.parent / "model.onnx.data").rename(base.parent / location)
    job(base, adapter_folder(), tmp_path / "out", copy_data=True)
    data = (tmp_path / "out" / location).stat()
    assert data.st_nlink == 1
    made = content(tmp_path / "out")
    assert made.keys() == {"model.onnx", location, "config.json", "README.md"}
    assert made[location] == (base.parent / location).read_bytes()
    expected = logits(tmp_path / "out")
    shutil.rmtree(base.parent)
    assert np.array_equal(logits(tmp_path / "out"), expected)


@pytest.mark.unchecked
@pytest.mark.parametrize("out", ["base/steered.onnx", "out"])
def test_a_model_too_large_for_one_file(
    out: str,
    own_base: Any,
    adapter_folder: Adapters,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Protobuf holds 2 GB; here, by decree, much less."""
    from austeer.graphs import model_io

    base = own_base()
    unproved(base, adapter_folder(), tmp_path / "expected")
    monkeypatch.setitem(model_io.save_model.__kwdefaults__, "limit", 1000)
    target = tmp_path / out
    job(base, adapter_folder(), target)
    path = target if target.suffix else target / "model.onnx"
    names = {p.name for p in path.parent.iterdir()} - SEAL
    # A file alone is what was asked for in the one case, a whole product in the other.
    expected = {"steered.onnx"} if target.suffix else {"model.onnx.data", "README.md"}
    assert names == expected | {"config.json", "model.onnx"}
    assert np.array_equal(logits(path), logits(tmp_path / "expected"))


def test_links_to_a_base_are_followed(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    """As in the cache of the Hub, whose snapshots are links."""
    base = own_base(data=True)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in base.parent.iterdir():
        blob = blobs / f"sha-{path.name}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    job(snapshot, adapter_folder(), tmp_path / "out", copy_data=True)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]
    unproved(base.parent, adapter_folder(), tmp_path / "other", copy_data=True)
    assert content(tmp_path / "out") == content(tmp_path / "other")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "weights"])
def test_a_link_brings_no_foreign_file_into_a_product(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path, name: str
) -> None:
    base = own_base(data=True)
    if name == "weights":
        (name,) = (x.name for x in base.parent.iterdir() if x.name.endswith(".data"))
        (base.parent / name).rename(tmp_path / "secret")
    else:
        (tmp_path / "secret").write_text("secret")
        (base.parent / name).unlink(missing_ok=True)
    (base.parent / name).symlink_to(tmp_path / "secret")
    with pytest.raises(GraphError, match="link out of the model's directory"):
        job(base.parent, adapter_folder(), tmp_path / "out", copy_data=True)
    assert not (tmp_path / "out").exists()


# Options


@pytest.mark.parametrize("rank", [0, 1])
def test_inline(rank: int, own_base: Any, adapter_folder: Adapters, tmp_path: Path) -> None:
    base, adapter = own_base(), adapter_folder("llama", "neuron", rank)
    unproved(base, adapter, tmp_path / "plain")
    row = job(base, adapter, tmp_path / "inlined", inline=True)
    assert row["verified"]
    proto = onnx.load(tmp_path / "inlined" / "model.onnx")
    assert not proto.functions
    assert "ai.austeer" not in {entry.domain for entry in proto.opset_import}
    assert "ai.austeer" not in {node.domain for node in proto.graph.node}
    expected = logits(tmp_path / "plain")
    assert np.abs(logits(tmp_path / "inlined") - expected).max() <= 1e-5
    for options in ({}, {"replace": True}):
        with pytest.raises(GraphError, match=r"steered already|inlined graft"):
            job(tmp_path / "inlined", adapter, tmp_path / "again", **options)


@pytest.mark.parametrize("scale_as", ["required", "optional"])
def test_strength_as_an_input(
    scale_as: str, own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base, adapter = own_base(), adapter_folder("llama", "ffn", 1)
    default = 0.5 if scale_as == "optional" else 1.0
    job(base, adapter, tmp_path / "out", scale=default, scale_as=scale_as)
    steered = OnnxCausalLM(tmp_path / "out", threads=1)
    assert steered.adjustable and not steered.switchable
    plain = logits(base)
    assert np.array_equal(logits(tmp_path / "out", scale=0.0), plain)
    for scale in (0.5, -1.0):
        unproved(base, adapter, tmp_path / f"at{scale}", scale=scale)
        expected = logits(tmp_path / f"at{scale}")
        assert np.array_equal(logits(tmp_path / "out", scale=scale), expected)
    if scale_as == "optional":
        assert np.array_equal(logits(tmp_path / "out"), logits(tmp_path / "at0.5"))
    else:
        with pytest.raises(GraphError, match="steering_scale"):
            logits(tmp_path / "out")


def feeds_of(session: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of a prefill, written out for plain onnxruntime."""
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["position_ids"] = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
    for item in session.get_inputs():
        if item.name.startswith("past_key_values."):
            _, heads, _, size = item.shape
            feeds[item.name] = np.zeros((len(ids), heads, 0, size), np.float32)
    return feeds


@pytest.mark.parametrize("kernels", FUNCTIONS_AND_KERNELS)
@pytest.mark.parametrize(
    ("int8", "ranks"), [(False, (0, 0)), (False, (0, 1)), (True, (0, 0)), (True, (1, 1))]
)
def test_adapters_switch_on_one_session(
    int8: bool,
    ranks: tuple[int, int],
    kernels: bool,
    base_folder: Bases,
    adapter_folder: Adapters,
    tmp_path: Path,
) -> None:
    _, base = base_folder(int8=int8)
    adapters = [
        adapter_folder("llama", component, rank)
        for component, rank in zip(("neuron", "layer"), ranks, strict=True)
    ]
    row = job(base, adapters, tmp_path / "out", as_adapter=True)
    files = [tmp_path / "out" / f"{adapter.name}.onnx_adapter" for adapter in adapters]
    assert row["adapter_files"] == [file.name for file in files]
    names = {"model.onnx", "config.json", "README.md", *row["adapter_files"]}
    assert content(tmp_path / "out").keys() == names
    expected = []
    for number, adapter in enumerate(adapters):
        unproved(base, adapter, tmp_path / str(number))
        expected.append(logits(tmp_path / str(number), kernels=kernels))
    plain = logits(base)
    # By function bodies, constant matrices and fed ones may be multiplied in another order.
    exact = kernels or not any(ranks)
    bound = 0.0 if exact else 1e-5 * np.abs(expected).max()

    model = OnnxCausalLM(tmp_path / "out", threads=1, kernels=kernels)
    assert model.switchable
    for active, wanted in (
        ([], plain),
        ([files[0]], expected[0]),
        ([files[1]], expected[1]),
        ([files[0]], expected[0]),
        ([], plain),
    ):
        model.active = active
        limit = bound if active else 0.0
        assert np.abs(model.logits(PROMPTS) - wanted).max() <= limit
    assert np.abs(expected[0] - expected[1]).max() > 0.05

    session = open_session(tmp_path / "out" / "model.onnx", kernels=kernels)
    feeds = feeds_of(session, PROMPTS)
    for file, wanted in zip(files, expected, strict=True):
        assert np.abs(run_session(session, feeds, [file])[0] - wanted).max() <= bound
    assert np.array_equal(run_session(session, feeds)[0], plain)


def test_adapters_of_one_name_get_files_of_their_own(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    first, second = adapter_folder(seed=1), adapter_folder(seed=2)
    for number, adapter in enumerate((first, second)):
        shutil.copytree(adapter, tmp_path / str(number) / "mood.v1")
    adapters = [tmp_path / str(number) / "mood.v1" for number in (0, 1)]
    row = job(own_base(), adapters, tmp_path / "out", as_adapter=True)
    one, two = row["adapter_files"]
    assert one == "mood.v1.onnx_adapter"
    assert one != two
    found = [logits(tmp_path / "out", active=[tmp_path / "out" / name]) for name in (one, two)]
    for number, adapter in enumerate((first, second)):
        unproved(tmp_path / "base", adapter, tmp_path / f"alone{number}")
        assert np.array_equal(found[number], logits(tmp_path / f"alone{number}"))


def test_the_strength_of_adapters_that_switch(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base()
    adapters = [adapter_folder(seed=1), adapter_folder("llama", "ffn", 0)]
    row = job(base, adapters, tmp_path / "out", as_adapter=True, scale=-0.5)
    for name, adapter in zip(row["adapter_files"], adapters, strict=True):
        unproved(base, adapter, tmp_path / f"alone-{name}", scale=-0.5)
        found = logits(tmp_path / "out", active=[tmp_path / "out" / name])
        assert np.array_equal(found, logits(tmp_path / f"alone-{name}"))


def test_together_multiplies_gains(
    base_folder: Bases, adapter_folder: Adapters, tmp_path: Path
) -> None:
    """Both steer the same units of the same sites: (1 + γ)·(1 + γ′), in torch."""
    model, base = base_folder()
    adapters = [adapter_folder(seed=1), adapter_folder(seed=2)]
    job(base, adapters, tmp_path / "out", as_adapter=True, together=True)
    files = [tmp_path / "out" / f"{adapter.name}.onnx_adapter" for adapter in adapters]
    made = [SteeringAdapter.from_pretrained(adapter) for adapter in adapters]
    handles = []
    for layer in (0, 1):
        gain = torch.ones(width_of(model, "attention"))
        for adapter in made:
            site = adapter.sites[layer]
            gain[torch.from_numpy(site.index)] *= 1 + torch.from_numpy(site.gamma)
        projection = model.get_submodule(f"model.layers.{layer}.self_attn.o_proj")
        handles.append(
            projection.register_forward_pre_hook(lambda _, x, g=gain: (x[0] * g, *x[1:]))
        )
    with torch.no_grad():
        truth = model(torch.from_numpy(PROMPTS)).logits.numpy()
    for handle in handles:
        handle.remove()
    found = logits(tmp_path / "out", active=files)
    assert np.abs(found - truth).max() <= 1e-4 * max(1.0, np.abs(truth).max())
    for file in files:
        assert np.abs(logits(tmp_path / "out", active=[file]) - truth).max() > 0.05
    assert np.array_equal(logits(tmp_path / "out"), logits(base))


@pytest.mark.parametrize("out", ["out", "base/next.onnx"])
@pytest.mark.parametrize("data", [False, True])
def test_replace_takes_the_earlier_graft_out(
    data: bool, out: str, own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base(data=data)
    first, second = adapter_folder("llama", "layer", 1), adapter_folder("llama", "ffn", 0)
    steered = base.with_name("steered.onnx")
    unproved(base, first, steered)
    with pytest.raises(GraphError, match="--replace"):
        job(steered, second, tmp_path / "no", copy_data=data)
    copies = data and out == "out"
    row = job(steered, second, tmp_path / out, replace=True, copy_data=copies)
    assert row["verified"] and row["base_weights"] == "equal"
    unproved(base, second, base.with_name("expected.onnx"))
    path = tmp_path / out / "steered.onnx" if out == "out" else tmp_path / out
    assert path.read_bytes() == base.with_name("expected.onnx").read_bytes()
    hidden = [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    assert hidden == []


def test_replace_where_there_is_nothing_to_replace(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base()
    job(base, adapter_folder(), tmp_path / "one", replace=True)
    unproved(base, adapter_folder(), tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("as_adapter", [False, True])
def test_a_replaced_graft_is_compared_with_the_unsteered_base(
    as_adapter: bool, own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    """The same graft again moves nothing against the file that it replaces."""
    base = own_base()
    unproved(base, adapter_folder(), tmp_path / "once")
    once, twice = tmp_path / "once", tmp_path / "twice"
    row = job(once, adapter_folder(), twice, replace=True, as_adapter=as_adapter)
    active = [twice / name for name in row["adapter_files"]]
    assert np.array_equal(logits(twice, active=active), logits(once))
    moved = np.abs(logits(once) - logits(base)).max()
    assert row["steered_vs_base"] > 0.01
    assert moved > 0.01


def test_replacing_a_switchable_graft(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base()
    adapters = [adapter_folder("llama", "layer", 1), adapter_folder("llama", "ffn", 0)]
    unproved(base, adapters, tmp_path / "switch", as_adapter=True, together=True)
    job(tmp_path / "switch", adapters[0], tmp_path / "fixed", replace=True)
    unproved(base, adapters[0], tmp_path / "expected")
    found, expected = ((tmp_path / n / "model.onnx") for n in ("fixed", "expected"))
    assert found.read_bytes() == expected.read_bytes()
    assert not list((tmp_path / "fixed").glob("*.onnx_adapter"))


@pytest.fixture
def some_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library = tmp_path / "libs" / "libausteer_ops.so"
    library.parent.mkdir()
    library.write_bytes(b"built elsewhere")
    monkeypatch.setattr("austeer.graphs.custom_op.library_file", lambda: library)
    return library


GENAI: dict[str, Any] = {"model": {"decoder": {"filename": "model.onnx"}, "type": "llama"}}


def genai_base(base: Path, config: Any = GENAI) -> Path:
    (base.parent / "genai_config.json").write_text(json.dumps(config))
    return base


@pytest.mark.parametrize("options", [{}, {"session_options": {"log_id": "x"}}])
def test_the_library_is_copied_and_genai_told(
    options: dict[str, Any],
    own_base: Any,
    adapter_folder: Adapters,
    some_library: Path,
    tmp_path: Path,
) -> None:
    config = {"model": {**GENAI["model"], "decoder": {**GENAI["model"]["decoder"], **options}}}
    base = genai_base(own_base(), config)
    job(base, adapter_folder(), tmp_path / "out", library=True)
    assert (tmp_path / "out" / some_library.name).read_bytes() == b"built elsewhere"
    found = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    settings = found["model"]["decoder"].pop("session_options")
    told = {"custom_ops_library": some_library.name}
    assert settings == {**options.get("session_options", {}), **told}
    config["model"]["decoder"].pop("session_options", None)
    assert found == config
    assert json.loads((base.parent / "genai_config.json").read_text())["model"]["type"]


def test_the_library_without_a_genai_config(
    own_base: Any, adapter_folder: Adapters, some_library: Path, tmp_path: Path
) -> None:
    job(own_base(), adapter_folder(), tmp_path / "out", library=True)
    names = {"model.onnx", "config.json", "README.md", some_library.name}
    assert content(tmp_path / "out").keys() == names


@pytest.mark.skipif(library_file() is None, reason="no operator library built")
def test_the_copied_library_runs_the_graft(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    import onnxruntime

    job(own_base(), adapter_folder("llama", "ffn", 1), tmp_path / "out", library=True)
    library = library_file()
    assert library is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(tmp_path / "out" / library.name))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", options)
    found = run_session(session, feeds_of(session, PROMPTS))[0]
    assert np.array_equal(found, logits(tmp_path / "out", kernels=True))


def test_no_library(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("austeer.graphs.custom_op.library_file", lambda: None)
    base = own_base()
    before = content(tmp_path)
    with pytest.raises(GraphError, match="none was built"):
        job(base, adapter_folder(), tmp_path / "out", library=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("config", [{}, {"model": {}}, {"model": {"decoder": 3}}, {"model": 1}])
def test_a_genai_config_without_a_decoder(
    config: Any, own_base: Any, adapter_folder: Adapters, some_library: Path, tmp_path: Path
) -> None:
    base = genai_base(own_base(), config)
    before = content(tmp_path)
    with pytest.raises(GraphError, match=r"genai_config\.json: expected model\.decoder"):
        job(base, adapter_folder(), tmp_path / "out", library=True)
    assert content(tmp_path) == before


def test_a_library_of_another_abi_is_named(
    own_base: Any, adapter_folder: Adapters, some_library: Path, tmp_path: Path
) -> None:
    """Copying it loads nothing; running by it does."""
    job(own_base(), adapter_folder(), tmp_path / "out", library=True)
    with pytest.raises(GraphError, match="onnxruntime cannot load it") as error:
        logits(tmp_path / "out", kernels=True)
    assert str(some_library) in str(error.value)


def test_a_base_with_other_weights_by_force(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base()
    model = load_model(base)
    values = dynamo_values(base, "llama")
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[0].name == values["layers.0.neuron"]:
            weight = node.inputs[1]
            doubled = weight.const_value.numpy() * np.float32(2)
            weight.const_value = ir.tensor(doubled, name=weight.name)
    base.unlink()
    ir.save(model, base)
    adapter = adapter_folder("llama", "neuron", 0)
    with pytest.raises(AusteerError, match="another base model"):
        job(base, adapter, tmp_path / "no")
    row = job(base, adapter, tmp_path / "out", force=True)
    assert row["verified"] and row["base_weights"] == "different"
    assert "another model than" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "no").exists()


def test_the_card_states_figures_of_the_fitted_strength(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base, adapter = own_base(), tmp_path / "adapter"
    shutil.copytree(adapter_folder(), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["fit"] = {"test": {"margin": 4.0756}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for scale, told in ((1.0, True), (0.5, False)):
        job(base, adapter, tmp_path / str(scale), scale=scale)
        card = (tmp_path / str(scale) / "README.md").read_text()
        assert ("| margin | 4.076 |" in card) is told


# Proof


def test_a_job_without_proof_runs_nothing(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = own_base()
    job(base, adapter_folder(), tmp_path / "proved")
    monkeypatch.setattr(
        "austeer.graphs.session.onnxruntime_module", lambda: pytest.fail("onnxruntime ran")
    )
    row = job(base, adapter_folder(), tmp_path / "unproved", verify=False)
    assert not row["verified"]
    assert "steered_vs_base" not in row
    assert content(tmp_path / "unproved") == content(tmp_path / "proved")


@pytest.mark.parametrize("out", ["out", "base/steered.onnx"])
def test_a_graft_that_fails_its_proof_leaves_nothing(
    out: str, own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    base = own_base()
    before = content(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(VerificationError, match="no effect"):
        job(base, adapter_folder(), tmp_path / out, scale=1e-9)
    assert (content(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_every_adapter_of_a_switchable_graft_is_proved(
    own_base: Any, adapter_folder: Adapters, tmp_path: Path
) -> None:
    idle = SteeringAdapter.from_pretrained(adapter_folder()).scaled(1e-9)
    idle.save_pretrained(tmp_path / "idle")
    base = own_base()
    with pytest.raises(VerificationError, match=r"idle\.onnx_adapter.*no effect"):
        job(base, [adapter_folder(), tmp_path / "idle"], tmp_path / "out", as_adapter=True)
    assert not (tmp_path / "out").exists()


# Options that exclude one another


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"adapters": ("a", "b")}, "expected one adapter, got 2; take --as-adapter"),
        ({"adapters": ()}, "expected one adapter, got 0"),
        ({"together": True}, "--together"),
        ({"scale": float("nan")}, "finite number, got nan"),
        ({"scale": float("-inf")}, "finite number, got -inf"),
        ({"out": "x.onnx", "as_adapter": True}, "x.onnx: --as-adapter"),
        ({"out": "x.onnx", "library": True}, "give a directory"),
        ({"out": "x.onnx", "copy_data": True}, "give a directory"),
    ],
)
def test_requests_that_mean_nothing(options: dict[str, Any], says: str) -> None:
    values: dict[str, Any] = {"base": "base", "adapters": ("a",), "out": "out", **options}
    paths = {name: Path(values[name]) for name in ("base", "out")}
    with pytest.raises(RouteError, match=says.replace("(", r"\(")):
        GraftRequest(**{**values, **paths})
