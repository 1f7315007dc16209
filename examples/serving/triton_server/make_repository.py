"""Lay an ONNX model out for Triton Inference Server, its configuration read off the graph.

    python make_repository.py FOLDER REPOSITORY --name happy --server-path /models
    docker run --rm -p 8001:8001 -v $PWD/REPOSITORY:/models \
        nvcr.io/nvidia/tritonserver:<yy.mm>-py3 tritonserver --model-repository=/models

Writes `REPOSITORY/NAME/config.pbtxt` and `REPOSITORY/NAME/1/model.onnx`; where the weights lie
in files of their own, `model.onnx` becomes a folder with all of them, as Triton expects. Needs
the package `onnx`, and nothing of austeer. Nothing is written unless all of it can be.

No Triton server ran here: the files are written and tested against its documentation and the
protobuf definition of `tritonclient`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

MODEL = "model.onnx"
BAD_INPUT = 2
TYPES = {
    "BOOL": "TYPE_BOOL",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
    "FLOAT": "TYPE_FP32",
    "DOUBLE": "TYPE_FP64",
}
"""Element types by ONNX's name → the name that Triton has for them."""
HEADER = """\
# 0: a request is one run, and says its batch in its shapes. Triton could only join requests
# itself where every input and output begins with a batch dimension, which a strength and an
# adapter's tensors do not, and where their lengths agree, which those of growing texts do not.
"""
OPTIONAL = """\
# Optional inputs hold what an .onnx_adapter file holds: a request that brings them all is
# steered by that adapter, one that brings none gets the defaults.
"""


class Refused(Exception):  # noqa: N818 - it is no fault of the program
    """Said in one line to the person who asked."""


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: in the graph.
        type: as Triton names it.
        dims: sizes; -1 where a request chooses.
        optional: whether it has a default.
    """

    name: str
    type: str
    dims: tuple[int, ...]
    optional: bool = False

    def text(self) -> str:
        """Its lines of `config.pbtxt`."""
        optional = "\n    optional: true" if self.optional else ""
        return (
            f"  {{\n    name: {json.dumps(self.name)}\n    data_type: {self.type}\n"
            f"    dims: {list(self.dims)}{optional}\n  }}"
        )


def config(name: str, model: onnx.ModelProto, library: str | None = None) -> str:
    """The text of `config.pbtxt`.

    Args:
        name: the model's name, which is that of its folder.
        model: its graph; weights are not read.
        library: path of an operator library as the server sees it.

    Raises:
        Refused: a tensor that Triton has no place for.
    """
    defaults = {item.name for item in model.graph.initializer}
    inputs = [tensor(item, item.name in defaults) for item in model.graph.input]
    outputs = [tensor(item) for item in model.graph.output]
    optional = OPTIONAL if any(item.optional for item in inputs) else ""
    operations = (
        f"model_operations {{ op_library_filename: {json.dumps(library)} }}\n"
        if library
        else ""
    )
    return (
        f'name: {json.dumps(name)}\nbackend: "onnxruntime"\n{HEADER}max_batch_size: 0\n'
        f"{optional}input {_list(inputs)}\noutput {_list(outputs)}\n{operations}"
    )


def _list(tensors: Sequence[Tensor]) -> str:
    return "[\n" + ",\n".join(tensor.text() for tensor in tensors) + "\n]"


def tensor(item: onnx.ValueInfoProto, optional: bool = False) -> Tensor:
    """What Triton has to know of a graph's input or output.

    Raises:
        Refused: a type that Triton does not have, or no shape.
    """
    kind = item.type.tensor_type
    element = onnx.TensorProto.DataType.Name(kind.elem_type)
    if element not in TYPES:
        raise Refused(f"{item.name}: Triton has no type for {element}")
    if not kind.shape.dim:
        raise Refused(f"{item.name}: has no shape, or no dimensions; Triton wants one at least")
    sizes = (
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else -1
        for dim in kind.shape.dim
    )
    return Tensor(item.name, TYPES[element], tuple(sizes), optional)


def data_files(model: onnx.ModelProto) -> list[str]:
    """Files with weights, relative to the model."""
    return sorted(
        {
            ExternalDataInfo(weight).location
            for weight in _weights(model.graph)
            if uses_external_data(weight)
        }
    )


def _weights(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Those of a graph, of its constant nodes, and of the branches of its If nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            for branch in (attribute.g, *attribute.graphs):
                yield from _weights(branch)


def write_repository(
    folder: Path,
    repository: Path,
    name: str,
    library: Path | None = None,
    server_path: str | None = None,
) -> Path:
    """Write one model of a repository.

    Args:
        folder: with `model.onnx` in it.
        repository: made where there is none.
        name: of the model in it; new.
        library: operator library to serve it with.
        server_path: where the server sees the repository; its absolute path if not given.

    Returns:
        The model's folder.

    Raises:
        Refused: a name that is taken or unfit, or files that cannot be read or served.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII):
        raise Refused(f"--name: expected letters, digits, '_', '-' and '.', got {name!r}")
    repository = repository.resolve()
    out = repository / name
    if out.exists():
        raise Refused(f"{out}: exists already; remove it or choose another --name")
    model = _read(folder / MODEL)
    seen = None
    if library is not None:
        if not library.is_file():
            raise Refused(f"{library}: no such library")
        seen = f"{(server_path or str(repository)).rstrip('/')}/{name}/{library.name}"
    text = config(name, model, seen)
    # Beside the repository: a server takes every folder in it for a model.
    repository.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{repository.name}.{name}.partial-"
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=repository.parent))
    try:
        work.chmod(0o755)
        _copy_model(folder, data_files(model), work / "1")
        if library is not None:
            shutil.copyfile(library, work / library.name)
        (work / "config.pbtxt").write_text(text, encoding="utf-8")
        repository.mkdir(parents=True, exist_ok=True)
        work.replace(out)  # at once: a server that polls never sees half of a model
    except OSError as error:
        raise Refused(f"{out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors have no class that onnx exports
        raise Refused(f"{path}: cannot read this model ({error})") from error


def _copy_model(folder: Path, data: Sequence[str], version: Path) -> None:
    target = version / MODEL if data else version
    target.mkdir(parents=True)
    for source, name in _sources(folder, data):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / name)


def _sources(folder: Path, data: Sequence[str]) -> Iterator[tuple[Path, str]]:
    for name in (MODEL, *data):
        source = folder / name
        if not source.resolve().is_relative_to(folder.resolve()):
            raise Refused(f"{source}: lies outside of the model's folder")
        if not source.is_file():
            raise Refused(f"{source}: no such file")
        yield source, name


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for."""
    parser: Any = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with model.onnx in it")
    parser.add_argument("repository", type=Path, help="a model repository, or a new one")
    parser.add_argument("--name", required=True, help="of the model in the repository")
    parser.add_argument("--library", type=Path, help="operator library, libausteer_ops.so")
    parser.add_argument(
        "--server-path", help="where the server sees the repository, such as /models"
    )
    options = parser.parse_args(arguments)
    try:
        print(write_repository(**vars(options)))
    except Refused as error:
        line = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
