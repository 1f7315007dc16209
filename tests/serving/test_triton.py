"""examples/serving/triton_server: a repository that says of each model what the model says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from requirements import unavailable
from serving_models import (
    SERVING,
    TOKENS,
    DemoModels,
    Script,
    check_refused,
    package_folder,
)

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.runtimes, pytest.mark.slow]

TYPES = {"tensor(float)": "FP32", "tensor(float16)": "FP16", "tensor(int64)": "INT64"}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script("triton_server/make_repository.py", tmp_path_factory.mktemp("blocker"))


@pytest.fixture(scope="module")
def protobuf() -> Any:
    """Triton's own definition of a model configuration."""
    package_folder("tritonclient")
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        unavailable(f"a tritonclient[grpc] that can be imported ({error})")
    return model_config_pb2


def read(model: Path, protobuf: Any) -> Any:
    from google.protobuf import text_format

    return text_format.Parse((model / "config.pbtxt").read_text(), protobuf.ModelConfig())


def make(script: Script, folder: Path, repository: Path, *options: object) -> Path:
    """The model `steered` of a repository."""
    done = script(folder, repository, "--name", "steered", *options)
    assert done.returncode == 0, done.stderr
    assert (done.stderr, done.stdout) == ("", f"{repository.resolve() / 'steered'}\n")
    return repository / "steered"


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options)


def dims(item: Any) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in item.shape]


def facts(item: Any, protobuf: Any) -> tuple[str, str, list[int]]:
    kind = protobuf.DataType.Name(item.data_type).removeprefix("TYPE_")
    return item.name, kind, list(item.dims)


GRAFTS = {
    "constant": ("calm",),
    "strength": ("calm", "--strength-input"),
    "optional strength": ("keen", "--optional-strength-input"),
    "adapters": ("calm", "loud", "keen", "--as-adapter"),
    "adapters, strength": ("calm", "keen", "--as-adapter", "--strength-input"),
}


@pytest.mark.parametrize("kind", GRAFTS)
def test_config_is_what_onnxruntime_reports(
    kind: str, models: DemoModels, script: Script, protobuf: Any, tmp_path: Path
) -> None:
    model = make(script, models.graft(*GRAFTS[kind]), tmp_path / "repository")
    config = read(model, protobuf)
    assert (config.name, config.backend, config.max_batch_size) == ("steered", "onnxruntime", 0)
    loaded = session(model / "1" / "model.onnx")
    required, optional = loaded.get_inputs(), loaded.get_overridable_initializers()
    for items, reported in (
        ([item for item in config.input if not item.optional], required),
        ([item for item in config.input if item.optional], optional),
        (config.output, loaded.get_outputs()),
    ):
        found = sorted(facts(item, protobuf) for item in items)
        assert found == sorted((r.name, TYPES[r.type], dims(r)) for r in reported)
    names = [item.name for item in config.input]
    assert ("steering_scale" in names) == (kind != "constant")
    assert bool(optional) == (kind not in ("constant", "strength"))
    assert not config.model_operations.op_library_filename


def test_requests_of_a_text_fit_the_config(
    models: DemoModels, script: Script, protobuf: Any, tmp_path: Path
) -> None:
    """Every request that a text takes, with the tensors of an adapter, as a client sends it."""
    utils = pytest.importorskip("tritonclient.utils")
    folder = models.graft("calm", "loud", "keen", "--as-adapter")
    model = make(script, folder, tmp_path / "repository")
    config = {item.name: item for item in read(model, protobuf).input}
    required = {name for name, item in config.items() if not item.optional}
    adapter = onnxruntime.AdapterFormat.read_adapter(str(folder / "keen.onnx_adapter"))
    tensors = {n: np.array(value.numpy()) for n, value in adapter.get_parameters().items()}
    assert tensors.keys() <= config.keys() - required
    ids: list[int] = []
    for feeds, fresh in served(model / "1" / "model.onnx", models, tensors):
        ids += fresh
        assert feeds.keys() == required | tensors.keys()
        for name, array in feeds.items():
            kind = utils.np_to_triton_dtype(array.dtype)
            assert protobuf.DataType.Name(config[name].data_type) == f"TYPE_{kind}"
            pairs = list(zip(config[name].dims, array.shape, strict=True))
            assert [pair for pair in pairs if pair[0] not in (-1, pair[1])] == []
    assert ids == models.reference("keen")


def served(path: Path, models: DemoModels, tensors: dict[str, np.ndarray]) -> Any:
    """What a client sends with each request, and the token that it gets."""
    loaded = session(path)
    past = [item.name for item in loaded.get_inputs() if item.name.startswith("past")]
    cache = {name: np.zeros((1, 4, 0, 16), np.float32) for name in past}
    fresh = list(models.prompt)
    for _ in range(TOKENS):
        total = cache[past[0]].shape[2] + len(fresh)
        feeds = {
            "input_ids": np.array([fresh]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - len(fresh), total)[None],
            **cache,
            **tensors,
        }
        presents = [name.replace("past_key_values", "present") for name in past]
        logits, *values = loaded.run(["logits", *presents], feeds)
        cache = dict(zip(past, values, strict=True))
        fresh = [int(logits[0, -1].argmax())]
        yield feeds, fresh
        if fresh[0] == models.tokenizer.eos_token_id:
            return


def test_served_file_is_the_model(models: DemoModels, script: Script, tmp_path: Path) -> None:
    folder = models.graft("calm")
    model = make(script, folder, tmp_path)
    assert models.runner(model / "1") == models.reference("calm")
    assert sorted(path.name for path in model.iterdir()) == ["1", "config.pbtxt"]
    assert [path.name for path in (model / "1").iterdir()] == ["model.onnx"]


def test_weights_in_files_of_their_own(
    models: DemoModels, script: Script, protobuf: Any, tmp_path: Path
) -> None:
    import onnx

    shutil.copytree(models.graft("calm"), folder := tmp_path / "model")
    content = onnx.load(folder / "model.onnx")
    (folder / "model.onnx").unlink()
    (folder / "weights").mkdir()
    options = {"save_as_external_data": True, "location": "weights/model.data"}
    onnx.save(content, folder / "model.onnx", **options)
    model = make(script, folder, tmp_path / "repository")
    version = model / "1" / "model.onnx"
    files = sorted(path.relative_to(version).as_posix() for path in version.rglob("*.*"))
    assert files == ["model.onnx", "weights/model.data"]
    assert models.runner(version) == models.reference("calm")
    assert len(read(model, protobuf).input) == 13


def test_operator_library(
    models: DemoModels, script: Script, protobuf: Any, tmp_path: Path
) -> None:
    from austeer.graphs.custom_op import library_file

    library = library_file()
    if library is None:
        pytest.skip("no operator library was built with this installation")
    for name, options, seen in (
        ("here", (), (tmp_path / "here").resolve()),
        ("docker", ("--server-path", "/models/"), "/models"),
    ):
        folder = models.graft("calm")
        model = make(script, folder, tmp_path / name, "--library", library, *options)
        operations = read(model, protobuf).model_operations
        assert operations.op_library_filename == [f"{seen}/steered/{library.name}"]
        assert (model / library.name).read_bytes() == library.read_bytes()


def test_what_cannot_be_is_refused_and_nothing_is_written(
    models: DemoModels, script: Script, tmp_path: Path
) -> None:
    folder = models.graft("calm")
    repository = tmp_path / "repository"
    for name in ("a/b", "..", "", "a b", ".hidden"):
        check_refused(script(folder, repository, f"--name={name}"), "--name: expected")
    named = ("--name", "steered")
    check_refused(script(folder / "none", repository, *named), "cannot read this model")
    check_refused(script(folder, repository, *named, "--library", "x.so"), "x.so: no such")
    assert list(tmp_path.iterdir()) == []
    make(script, folder, repository)
    check_refused(script(folder, repository, *named), "exists already")


def test_weights_of_branches_and_constants_come_along(script: Script, tmp_path: Path) -> None:
    import onnx
    from onnx import helper, numpy_helper

    def outside(name: str) -> onnx.TensorProto:
        weight = numpy_helper.from_array(np.ones(4, np.float32), name)
        onnx.external_data_helper.set_external_data(weight, f"{name}.data", 0, 16)
        (tmp_path / "base" / f"{name}.data").write_bytes(weight.raw_data)
        weight.ClearField("raw_data")
        return weight

    (tmp_path / "base").mkdir()
    info = helper.make_tensor_value_info
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Identity", [name], [f"{name}_out"])],
            name,
            [],
            [info(f"{name}_out", onnx.TensorProto.FLOAT, [4])],
            [outside(name)],
        )
        for name in ("then", "else")
    }
    nodes = [
        helper.make_node("If", ["choice"], ["chosen"], **branches),
        helper.make_node("Constant", [], ["more"], value=outside("constant")),
        helper.make_node("Add", ["chosen", "more"], ["sum"]),
    ]
    choice, total = (
        info("choice", onnx.TensorProto.BOOL, [1]),
        info("sum", onnx.TensorProto.FLOAT, [4]),
    )
    opsets = [helper.make_opsetid("", 20)]
    graph = helper.make_graph(nodes, "branches", [choice], [total])
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    onnx.save(model, tmp_path / "base" / "model.onnx")
    path = make(script, tmp_path / "base", tmp_path / "repository") / "1" / "model.onnx"
    assert sorted(file.name for file in path.iterdir()) == [
        "constant.data",
        "else.data",
        "model.onnx",
        "then.data",
    ]
    (found,) = session(path / "model.onnx").run(None, {"choice": np.array([True])})
    assert found.tolist() == [2.0] * 4


def test_incomplete_or_foreign_weights_are_refused(
    models: DemoModels, script: Script, tmp_path: Path
) -> None:
    import onnx

    for number, (location, message) in enumerate(
        (("gone.data", "no such file"), ("../gone.data", "lies outside"))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        content = onnx.load(models.graft("calm") / "model.onnx")
        onnx.external_data_helper.convert_model_to_external_data(content, location="gone.data")
        onnx.save(content, folder / "model.onnx")
        content = onnx.load(folder / "model.onnx", load_external_data=False)
        for initializer in content.graph.initializer:
            for entry in initializer.external_data:
                entry.value = location if entry.key == "location" else entry.value
        (folder / "model.onnx").write_bytes(content.SerializeToString())
        (folder / "gone.data").unlink()
        check_refused(script(folder, tmp_path / "repository", "--name", "m"), message)
    assert not (tmp_path / "repository").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_it_explains_itself() -> None:
    words = [sys.executable, str(SERVING / "triton_server/make_repository.py"), "--help"]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=True)
    assert "--server-path" in done.stdout
