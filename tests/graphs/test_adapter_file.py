"""Adapter files hold exactly the given inputs, as onnxruntime itself reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_sessions import open_session, run_session
from steering_formula import UNITS

from austeer.adapters import GraphError
from austeer.graphs import plan_switchable_graft
from austeer.graphs.adapter_file import holds_adapter, read_adapter_file, write_adapter_file

ort = pytest.importorskip("onnxruntime")

TENSORS: dict[str, Any] = {
    "austeer.layers.0.ffn.index": np.array([5, 0, 3]),
    "austeer.layers.0.ffn.gamma": np.array([0.5, -1.5, 1e-8], np.float32),
    "austeer.layers.0.ffn.V": np.arange(6, dtype=np.float32).reshape(3, 2),
    "steering_scale": np.array([0.25], np.float32),
}


def read(path: Path) -> dict[str, np.ndarray]:
    found = ort.AdapterFormat.read_adapter(str(path))
    assert found.get_adapter_version() == found.get_model_version() == 1
    # A copy: the values live in memory of `found`.
    return {name: np.array(value.numpy()) for name, value in found.get_parameters().items()}


def test_round_trip(tmp_path: Path) -> None:
    write_adapter_file(tmp_path / "a.onnx_adapter", TENSORS)
    found = read(tmp_path / "a.onnx_adapter")
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()
        assert found[name].shape == array.shape
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx_adapter"]


def test_views_and_columns_are_written_in_order(tmp_path: Path) -> None:
    turned = TENSORS["austeer.layers.0.ffn.V"].T
    write_adapter_file(tmp_path / "a.onnx_adapter", {"U": turned, "every": turned[:, ::2]})
    found = read(tmp_path / "a.onnx_adapter")
    assert np.array_equal(found["U"], turned)
    assert np.array_equal(found["every"], turned[:, ::2])


def test_the_order_of_tensors_does_not_matter(tmp_path: Path) -> None:
    write_adapter_file(tmp_path / "a", TENSORS)
    write_adapter_file(tmp_path / "b", dict(reversed(TENSORS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_run_takes_its_inputs_from_the_file(tmp_path: Path) -> None:
    write_adapter_file(tmp_path / "a.onnx_adapter", {"b": np.array([10, 20], np.float32)})
    a, b = (ir.val(name, ir.DataType.FLOAT, ["n"]) for name in "ab")
    total = ir.node("Add", [a, b])
    total.outputs[0].name, total.outputs[0].dtype = "total", ir.DataType.FLOAT
    total.outputs[0].shape = ir.Shape(["n"])
    b.const_value = ir.tensor(np.zeros(2, np.float32), name="b")
    graph = ir.Graph([a, b], total.outputs, nodes=[total], opset_imports={"": 20}, name="g")
    graph.register_initializer(b)
    session = open_session(ir.Model(graph, ir_version=10))
    feeds = {"a": np.array([1, 2], np.float32)}
    (found,) = run_session(session, feeds, [tmp_path / "a.onnx_adapter"])
    assert found.tolist() == [11, 22]
    (found,) = run_session(session, feeds)
    assert found.tolist() == [1, 2]


def test_an_older_onnxruntime_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = type("onnxruntime", (), {"__version__": "1.19.2"})
    monkeypatch.setattr("austeer.graphs.adapter_file.onnxruntime_module", lambda: old)
    with pytest.raises(GraphError, match=r"1\.19\.2 has no adapter files; 1\.20"):
        write_adapter_file(tmp_path / "a.onnx_adapter", TENSORS)
    with pytest.raises(GraphError, match=r"1\.19\.2 has no adapter files; 1\.20"):
        read_adapter_file(tmp_path / "a.onnx_adapter")
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_adapter_file(tmp_path / "a.onnx_adapter", TENSORS)
    found = read_adapter_file(tmp_path / "a.onnx_adapter")
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


@pytest.mark.parametrize("content", [None, b"", b"not an adapter" * 9])
def test_files_that_are_no_adapters(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx_adapter"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GraphError, match=r"a\.onnx_adapter: cannot read") as error:
        read_adapter_file(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_each_adapter_is_recognized_and_no_other(
    rank: int, together: bool, make_adapter: Any
) -> None:
    units = {f"layers.{i}.{c}": u for i in (0, 1) for c, u in UNITS.items()}
    ffn = {"layers.0.ffn": UNITS["ffn"]}
    index, gamma = UNITS["ffn"]
    adapters = [
        make_adapter(units, rank),
        make_adapter(ffn, rank),
        make_adapter({"layers.0.ffn": (index, [2 * g for g in gamma])}, rank),
        make_adapter({"layers.1.ffn": UNITS["ffn"]}, rank),
        make_adapter(ffn, 2 - rank),
    ]
    plan = plan_switchable_graft(adapters, together=together)
    found = [[holds_adapter(values, a) for a in adapters] for values in plan.switched]
    assert np.array_equal(found, np.eye(len(adapters), dtype=bool))
    assert not holds_adapter({}, adapters[0])
