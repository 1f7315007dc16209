"""Models on disk: every malformed file gives one line; saving is atomic and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from austeer.adapters import AusteerError, GraphError, OutputError
from austeer.graphs import load_model, model_io, save_model

X = np.ones((1, 2, 4), np.float32)


def message(error: pytest.ExceptionInfo[AusteerError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def saved(tmp_path: Path, toy: Any) -> Path:
    path = tmp_path / "model.onnx"
    save_model(toy().model, path)
    return path


@pytest.fixture
def external(tmp_path: Path, toy: Any) -> Path:
    path = tmp_path / "model.onnx"
    save_model(toy().model, path, limit=0)
    return path


def edit_location(path: Path, location: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(proto.SerializeToString())


def test_round_trip(saved: Path, toy: Any, run_onnx: Any) -> None:
    model = load_model(saved)
    np.testing.assert_array_equal(
        run_onnx(model, {"x": X})[0], run_onnx(toy().model, {"x": X})[0]
    )
    assert [path.name for path in saved.parent.iterdir()] == ["model.onnx"]


def test_large_models_get_a_data_file(external: Path, toy: Any, run_onnx: Any) -> None:
    names = sorted(path.name for path in external.parent.iterdir())
    assert names == ["model.onnx", "model.onnx.data"]
    expected = run_onnx(toy().model, {"x": X})[0]
    np.testing.assert_array_equal(run_onnx(external, {"x": X})[0], expected)
    tensors = [v.const_value for v in load_model(external).graph.initializers.values()]
    assert any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)


def test_equal_models_give_equal_bytes(tmp_path: Path, toy: Any) -> None:
    for name in ("a", "b"):
        save_model(toy().model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("keep", [0, 1, 40, 0.5, 0.99])
def test_truncated(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(GraphError) as error:
        load_model(saved)
    assert str(saved) in message(error)


@pytest.mark.parametrize("content", [b"not a model", b"\x00" * 64, b"{}", b"\xff" * 100])
def test_garbage(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    with pytest.raises(GraphError) as error:
        load_model(saved)
    assert str(saved) in message(error)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="No such file"):
        load_model(tmp_path / "absent.onnx")
    with pytest.raises(GraphError, match="Is a directory"):
        load_model(tmp_path)


def test_missing_external_data(external: Path) -> None:
    external.with_name("model.onnx.data").unlink()
    with pytest.raises(GraphError, match=r"model\.onnx\.data.* is missing") as error:
        load_model(external)
    message(error)


def test_short_external_data(external: Path) -> None:
    data = external.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(GraphError, match="too short for tensor"):
        load_model(external)


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "sub/../../secret", "..\\secret"]
)
def test_external_data_outside_the_folder(external: Path, location: str) -> None:
    edit_location(external, location)
    with pytest.raises(GraphError, match="outside the model's folder"):
        load_model(external)


def test_no_spelling_of_a_path_overwrites(saved: Path, toy: Any) -> None:
    """A folder that is not there yet would be made, and then lead to the file."""
    content = saved.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        save_model(toy().model, saved.parent / "missing" / ".." / saved.name)
    assert saved.read_bytes() == content
    assert not (saved.parent / "missing").exists()


def test_existing_files_are_not_overwritten(saved: Path, toy: Any, tmp_path: Path) -> None:
    content = saved.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        save_model(toy().model, saved)
    assert saved.read_bytes() == content
    (tmp_path / "other.onnx.data").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        save_model(toy().model, tmp_path / "other.onnx", limit=0)
    assert (tmp_path / "other.onnx.data").read_bytes() == b"mine"


@pytest.mark.parametrize("limit", [0, 10**9])
def test_invalid_models_leave_nothing_behind(tmp_path: Path, toy: Any, limit: int) -> None:
    graph = toy()
    graph.values["0.act"].producer().op_type = "NoSuchOperator"
    with pytest.raises(GraphError, match="not valid ONNX") as error:
        save_model(graph.model, tmp_path / "model.onnx", limit=limit)
    message(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, 10**9])
def test_full_disk_leaves_nothing_behind(
    tmp_path: Path, toy: Any, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ir.save

    def full(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_io.ir, "save", full)
    with pytest.raises(OutputError, match="no space left") as error:
        save_model(toy().model, tmp_path / "model.onnx", limit=limit)
    message(error)
    assert list(tmp_path.iterdir()) == []


def add_branches(graph: Any) -> None:
    """An If node whose branches have a weight each."""
    branches = []
    for name in ("then", "else"):
        tensor = ir.tensor(np.ones(4, np.float32), name=f"{name}_weight")
        weight = ir.val(f"{name}_weight", tensor.dtype, [4], const_value=tensor)
        node = ir.node("Identity", [weight])
        node.outputs[0].name, node.outputs[0].dtype = f"{name}_out", ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape([4])
        branches.append(
            ir.Graph([], [node.outputs[0]], nodes=[node], initializers=[weight], name=name)
        )
    choice = ir.tensor(np.array(True), name="choice")
    condition = ir.val("choice", ir.DataType.BOOL, [], const_value=choice)
    graph.graph.register_initializer(condition)
    attributes = {f"{g.name}_branch": g for g in branches}
    graph.graph.append(ir.node("If", [condition], attributes))


def external_names(path: Path) -> set[str]:
    return {str(tensor.name) for tensor in model_io.external_tensors(load_model(path))}


def test_external_data_of_a_branch(tmp_path: Path, toy: Any) -> None:
    """Tensors of an If node's branches count, too: checked, and kept where they are."""
    graph = toy()
    add_branches(graph)
    path = tmp_path / "model.onnx"
    ir.save(graph.model, path, external_data="model.data", size_threshold_bytes=8)
    names = external_names(path)
    assert {"then_weight", "else_weight"} <= names
    save_model(load_model(path), tmp_path / "again.onnx")
    assert external_names(tmp_path / "again.onnx") == names
    (tmp_path / "model.data").write_bytes(b"short")
    with pytest.raises(GraphError, match="too short"):
        load_model(path)


@pytest.fixture
def constant(tmp_path: Path, toy: Any) -> Path:
    """A model with every weight in a constant node, and its data outside."""
    proto = ir.to_proto(toy().model)
    for weight in proto.graph.initializer:
        node = onnx.helper.make_node("Constant", [], [weight.name], value=weight)
        proto.graph.node.insert(0, node)
    del proto.graph.initializer[:]
    path = tmp_path / "constant" / "model.onnx"
    path.parent.mkdir()
    onnx.save_model(
        proto,
        path,
        save_as_external_data=True,
        location="model.data",
        size_threshold=0,
        convert_attribute=True,
    )
    return path


def test_external_data_of_constants(constant: Path, toy: Any, run_onnx: Any) -> None:
    names = external_names(constant)
    assert names == set(toy().weights)
    again = constant.with_name("again.onnx")
    save_model(load_model(constant), again)
    assert external_names(again) == names
    expected = run_onnx(toy().model, {"x": X})[0]
    np.testing.assert_array_equal(run_onnx(again, {"x": X})[0], expected)
    constant.with_name("model.data").unlink()
    with pytest.raises(GraphError, match=r"model\.data of tensor .* is missing"):
        load_model(constant)


def test_constants_outside_the_folder(constant: Path) -> None:
    proto = onnx.load(constant, load_external_data=False)
    for entry in proto.graph.node[0].attribute[0].t.external_data:
        entry.value = "../model.data" if entry.key == "location" else entry.value
    constant.write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match="outside the model's folder"):
        load_model(constant)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_weights_move_with_the_model(
    limit: int, tmp_path: Path, constant: Path, toy: Any, run_onnx: Any
) -> None:
    """Those of branches and of constants, too: the old folder may be gone."""
    graph = toy()
    add_branches(graph)
    branch = tmp_path / "branch" / "model.onnx"
    branch.parent.mkdir()
    ir.save(graph.model, branch, external_data="model.data", size_threshold_bytes=8)
    expected = run_onnx(toy().model, {"x": X})[0]
    for path in (branch, constant):
        out = tmp_path / f"from-{path.parent.name}" / "moved.onnx"
        save_model(load_model(path), out, limit=limit)
        path.with_name("model.data").unlink()
        load_model(out)
        np.testing.assert_array_equal(run_onnx(out, {"x": X})[0], expected)
        assert out.with_name("moved.onnx.data").exists() == (limit == 0)


def test_weights_of_branches_alone_may_need_a_data_file(tmp_path: Path, toy: Any) -> None:
    graph = toy()
    outer = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    add_branches(graph)
    save_model(graph.model, tmp_path / "model.onnx", limit=outer + 1)
    assert (tmp_path / "model.onnx.data").exists()


def test_a_base_that_is_not_valid_is_what_is_blamed(tmp_path: Path, toy: Any) -> None:
    graph, base = toy(), tmp_path / "base.onnx"
    graph.graph.outputs[0].shape = None
    ir.save(graph.model, base)
    with pytest.raises(GraphError, match="not a valid ONNX model itself") as error:
        save_model(load_model(base), tmp_path / "out.onnx")
    assert message(error).startswith(f"{base}: ") and "'shape'" in message(error)
    base.unlink()
    with pytest.raises(GraphError, match=r"out\.onnx: the written model"):
        save_model(graph.model, tmp_path / "out.onnx")


def test_sparse_weights_are_refused(saved: Path) -> None:
    proto = onnx.load(saved)
    values = onnx.helper.make_tensor("thin", onnx.TensorProto.FLOAT, [1], [2.0])
    places = onnx.helper.make_tensor("places", onnx.TensorProto.INT64, [1], [3])
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, places, [4]))
    saved.write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match="tensor thin is a sparse initializer") as error:
        load_model(saved)
    message(error)
