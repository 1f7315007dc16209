"""A graft rescales exactly its sites, and refuses what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
from steering_formula import UNITS, steering

from austeer.adapters import GraphError, OutputError, SiteError
from austeer.graphs import (
    GraftGainPass,
    graft_file,
    graft_model,
    load_model,
    plan_graft,
    save_model,
)

X = np.random.default_rng(7).normal(size=(2, 5, 4)).astype(np.float32)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("component", [*UNITS, "all"])
@pytest.mark.parametrize("wrapper", ["", "decoder"])
def test_graft_equals_the_formula(
    component: str, rank: int, wrapper: str, toy: Any, make_adapter: Any, run_onnx: Any
) -> None:
    graph = toy(wrapper=wrapper)
    kinds = UNITS if component == "all" else [component]
    adapter = make_adapter({f"layers.{i}.{c}": UNITS[c] for i in (0, 1) for c in kinds}, rank)
    (base,) = run_onnx(graph.model, {"x": X})
    np.testing.assert_allclose(base, graph.compute(X, {}), rtol=1e-4, atol=1e-5)

    graft_model(graph.model, adapter, scale=0.6)
    onnx.checker.check_model(ir.to_proto(graph.model))
    (steered,) = run_onnx(graph.model, {"x": X})
    expected = graph.compute(X, steering(adapter, scale=0.6))
    np.testing.assert_allclose(steered, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(steered - base).max() > 0.1


def test_scale_zero_is_the_base(toy: Any, make_adapter: Any, run_onnx: Any) -> None:
    graph = toy()
    (base,) = run_onnx(graph.model, {"x": X})
    graft_model(graph.model, make_adapter({"layers.0.layer": UNITS["layer"]}, 1), scale=0.0)
    (steered,) = run_onnx(graph.model, {"x": X})
    assert np.array_equal(steered, base)


def test_other_readers_of_an_input_site_see_the_base(
    toy: Any, make_adapter: Any, run_onnx: Any
) -> None:
    graph = toy()
    probe = graph.add("Identity", [graph.values["1.act"]], "probe", "model.probe", 24)
    graph.graph.outputs.append(probe)
    before = run_onnx(graph.model, {"x": X})
    graft_model(graph.model, make_adapter({"layers.1.neuron": UNITS["neuron"]}))
    after = run_onnx(graph.model, {"x": X})
    assert np.array_equal(before[1], after[1])
    assert np.abs(before[0] - after[0]).max() > 0.1


def test_output_site_that_is_a_graph_output_keeps_its_name(
    toy: Any, make_adapter: Any, run_onnx: Any
) -> None:
    graph = toy()
    graph.graph.outputs.append(graph.values["0.out"])
    before = run_onnx(graph.model, {"x": X})
    graft_model(graph.model, make_adapter({"layers.0.layer": ([1], [1.0])}))
    onnx.checker.check_model(ir.to_proto(graph.model))
    assert [value.name for value in graph.graph.outputs] == ["logits", "0.out"]
    after = run_onnx(graph.model, {"x": X})
    np.testing.assert_allclose(after[1], before[1] * [1, 2, 1, 1], rtol=1e-6)
    assert np.abs(before[0] - after[0]).max() > 0.1


def test_names_functions_opset_and_metadata(toy: Any, make_adapter: Any) -> None:
    graph = toy(wrapper="decoder")
    adapter = make_adapter({"layers.0.attention": UNITS["attention"]}, rank=2)
    base = set(graph.graph.initializers)
    graft_model(graph.model, adapter, scale=1.5)

    model = graph.model
    key = "austeer.layers.0.attention"
    names = [f"{key}.{part}" for part in ("index", "gamma", "V", "b", "U")] + ["austeer.scale"]
    assert set(model.graph.initializers) - base == set(names)
    shapes = [tuple(model.graph.initializers[name].shape) for name in names]
    assert shapes == [(2,), (2,), (2, 2), (2,), (2, 2), (1,)]
    assert model.graph.initializers["austeer.scale"].const_value.numpy() == [1.5]
    (node,) = [node for node in model.graph if node.domain == "ai.austeer"]
    assert node.op_type == "SteerAUAdaptive"
    assert [v.name for v in node.inputs] == ["0.mixed", *names]
    assert model.opset_imports == {"": 20, "ai.austeer": 1}
    assert list(model.functions) == [("ai.austeer", "SteerAUAdaptive", "")]
    assert next(iter(model.functions.values())).opset_imports == {"": 20}
    output = node.outputs[0]
    assert output.dtype == ir.DataType.FLOAT
    assert [str(dim) for dim in output.shape] == ["B", "T", "4"]
    scopes = node.metadata_props["pkg.torch.onnx.name_scopes"]
    assert "decoder.model.layers.0.self_attn.o_proj" in scopes


def test_all_sites_share_one_scale(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    graft_model(graph.model, make_adapter({f"layers.0.{c}": u for c, u in UNITS.items()}))
    nodes = [node for node in graph.graph if node.domain == "ai.austeer"]
    assert len(nodes) == 4
    assert {id(node.inputs[-1]) for node in nodes} == {
        id(graph.graph.initializers["austeer.scale"])
    }


def test_pass_reports_what_it_did(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    plan = plan_graft(make_adapter({"layers.0.ffn": UNITS["ffn"]}))
    result = GraftGainPass(plan)(graph.model)
    assert result.modified
    assert result.model is graph.model


def test_ensures_notices_a_graft_that_nothing_reads(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    graft = GraftGainPass(plan_graft(make_adapter({"layers.0.layer": UNITS["layer"]})))
    graft(graph.model)
    (node,) = [node for node in graph.graph if node.domain == "ai.austeer"]
    for reader, position in list(node.outputs[0].uses()):
        reader.replace_input_with(position, node.inputs[0])
    with pytest.raises(GraphError, match="nothing reads"):
        graft.ensures(graph.model)


def test_grafting_twice_is_refused(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    adapter = make_adapter({"layers.0.ffn": UNITS["ffn"]})
    graft_model(graph.model, adapter)
    before = ir.to_proto(graph.model).SerializeToString()
    with pytest.raises(GraphError, match=r"steered already, see austeer\.layers\.0\.ffn"):
        graft_model(graph.model, adapter)
    assert ir.to_proto(graph.model).SerializeToString() == before


def test_grafting_an_inlined_graft_is_refused(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    adapter = make_adapter({"layers.0.ffn": UNITS["ffn"]})
    graft_model(graph.model, adapter)
    inlined = onnx.inliner.inline_local_functions(ir.to_proto(graph.model))
    model = ir.from_proto(inlined)
    assert not [node for node in model.graph if node.domain == "ai.austeer"]
    with pytest.raises(GraphError, match="steered already"):
        graft_model(model, adapter)


def test_unknown_site_is_refused_and_changes_nothing(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    before = ir.to_proto(graph.model).SerializeToString()
    adapter = make_adapter({"layers.0.ffn": UNITS["ffn"], "layers.9.ffn": UNITS["ffn"]})
    with pytest.raises(GraphError, match=r"layers\.9\.ffn: .*nearest: model\.layers"):
        graft_model(graph.model, adapter)
    assert ir.to_proto(graph.model).SerializeToString() == before


def test_unit_outside_the_width_is_refused(toy: Any, make_adapter: Any) -> None:
    with pytest.raises(SiteError, match=r"layers\.0\.ffn: unit 4 outside width 4"):
        graft_model(toy().model, make_adapter({"layers.0.ffn": ([4], [1.0])}))


def test_old_opset_is_refused(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    graph.model.opset_imports[""] = 13
    with pytest.raises(GraphError, match="opset 13"):
        graft_model(graph.model, make_adapter({"layers.0.ffn": UNITS["ffn"]}))


def test_the_default_domain_by_its_other_name(
    tmp_path: Path, toy: Any, make_adapter: Any, run_onnx: Any
) -> None:
    graph, base, out = toy(), tmp_path / "base.onnx", tmp_path / "out.onnx"
    proto = ir.to_proto(graph.model)
    (opset,) = proto.opset_import
    opset.domain = "ai.onnx"
    onnx.save(proto, base)
    adapter = make_adapter({"layers.0.ffn": UNITS["ffn"]})
    graft_file(base, adapter, out)
    expected = graph.compute(X, steering(adapter))
    np.testing.assert_allclose(run_onnx(out, {"x": X})[0], expected, rtol=1e-4, atol=1e-4)


def test_a_projection_cast_in_a_silent_graph(
    tmp_path: Path, toy: Any, make_adapter: Any, run_onnx: Any
) -> None:
    """Its result is in another type than its weight, and the graph states neither."""
    graph = toy(bias=False)
    product = graph.values["0.product"]
    readers = list(product.uses())
    half = graph.add("Cast", [product], "half", "model.layers.0.mlp.down_proj")
    full = graph.add("Cast", [half], "full", "model.layers.0")
    for value, kind in ((half, ir.DataType.FLOAT16), (full, ir.DataType.FLOAT)):
        value.producer().attributes["to"] = ir.AttrInt64("to", int(kind))
    for reader, position in readers:
        reader.replace_input_with(position, full)
    graph.graph.sort()
    for value in (value for node in graph.graph for value in node.outputs):
        if not value.is_graph_output():
            value.type = value.shape = None
    adapter = make_adapter({"layers.0.ffn": UNITS["ffn"]})
    graft_model(graph.model, adapter)
    expected = graph.compute(X, steering(adapter))
    found = run_onnx(graph.model, {"x": X})[0]
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3)


def test_integer_activations_are_refused(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    graph.values["0.mixed"].dtype = ir.DataType.INT8
    with pytest.raises(GraphError, match=r"0\.mixed is INT8"):
        graft_model(graph.model, make_adapter({"layers.0.attention": UNITS["attention"]}))


def test_two_sites_at_one_value_are_refused(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    down = graph.values["0.product"].producer()
    down.replace_input_with(0, graph.values["0.mixed"])
    adapter = make_adapter(
        {"layers.0.attention": ([1], [1.0]), "layers.0.neuron": ([1], [1.0])}
    )
    with pytest.raises(GraphError, match="same value"):
        graft_model(graph.model, adapter)


def test_file_to_file(tmp_path: Path, toy: Any, make_adapter: Any, run_onnx: Any) -> None:
    graph = toy()
    base, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    save_model(graph.model, base)
    bytes_before = base.read_bytes()
    adapter = make_adapter({"layers.1.layer": UNITS["layer"]}, rank=1)
    graft_file(base, adapter, out, scale=2.0)
    (steered,) = run_onnx(out, {"x": X})
    expected = graph.compute(X, steering(adapter, scale=2.0))
    np.testing.assert_allclose(steered, expected, rtol=1e-4, atol=1e-4)
    assert base.read_bytes() == bytes_before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.onnx", "out.onnx"]


def test_file_refusals_write_nothing(tmp_path: Path, toy: Any, make_adapter: Any) -> None:
    base = tmp_path / "base.onnx"
    save_model(toy().model, base)
    adapter = make_adapter({"layers.1.layer": UNITS["layer"]})
    with pytest.raises(OutputError, match="exists already"):
        graft_file(base, adapter, base)
    with pytest.raises(GraphError, match=r"layers\.5\.layer"):
        bad = make_adapter({"layers.5.layer": UNITS["layer"]})
        graft_file(base, bad, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["base.onnx"]
    assert not [node for node in load_model(base).graph if node.domain == "ai.austeer"]


def test_external_data_in_the_same_folder_is_shared(
    tmp_path: Path, toy: Any, make_adapter: Any, run_onnx: Any
) -> None:
    graph = toy()
    base, near, far = tmp_path / "b.onnx", tmp_path / "near.onnx", tmp_path / "sub" / "far.onnx"
    ir.save(graph.model, base, external_data="b.onnx.data", size_threshold_bytes=0)
    adapter = make_adapter({"layers.1.layer": UNITS["layer"]})
    far.parent.mkdir()
    graft_file(base, adapter, near)
    graft_file(base, adapter, far)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "b.onnx", "b.onnx.data", "near.onnx", "sub"
    ]  # fmt: skip
    (tmp_path / "sub" / "b.onnx.data").unlink(missing_ok=True)
    expected = graph.compute(X, steering(adapter, scale=1.0))
    for path in (near, far):
        (steered,) = run_onnx(path, {"x": X})
        np.testing.assert_allclose(steered, expected, rtol=1e-4, atol=1e-4)
