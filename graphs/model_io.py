"""Load and save ONNX models: one file while it is small, external data beside it otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from austeer.adapters._errors import GraphError, OutputError
from austeer.adapters._files import final_path, publish_file

SINGLE_FILE_LIMIT = 1_500_000_000
"""Bytes of weights up to which a model is one file; protobuf cannot hold more than 2 GB."""

_RUNTIME_OPERATORS = ("SimplifiedLayerNormalization", "LayerNormalization")
"""What onnxruntime's fused graphs hold in the default domain, at opsets that lack it."""

_SOURCE = "austeer.source"
"""Where a model in memory remembers the file that it was read from."""


def load_model(path: Path) -> ir.Model:
    """Read a model; external data stays on disk and is mapped when needed.

    Raises:
        GraphError: missing, not ONNX, truncated, with sparse weights, or its external data is
            missing, truncated or outside the model's folder.
    """
    proto = _read_proto(path)
    _check_dense(path, proto)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        # The IR raises many kinds of errors for many kinds of nonsense.
        raise GraphError(f"{path}: not a valid ONNX model ({_first_line(error)})") from error
    _check_text(path, model.graph)
    model.meta[_SOURCE] = path
    ir.external_data.set_base_dir(model.graph, path.parent)
    for tensor in external_tensors(model):
        _check_external(path, tensor)
    return model


def save_model(model: ir.Model, path: Path, *, limit: int = SINGLE_FILE_LIMIT) -> None:
    """Write a model to the new file `path`, atomically, and check it.

    Weights go to `path` itself up to `limit` bytes, else to `<name>.data` beside it.
    External data that is in the same folder already stays where it is.

    Raises:
        OutputError: `path` or its data file exists, or the filesystem refuses.
        GraphError: the written model, or the one that it was read from, is not valid ONNX.
    """
    path = final_path(path)
    data = path.with_name(f"{path.name}.data")
    split = _needs_data_file(model, path, limit)
    for taken in (path, data) if split else (path,):
        if taken.exists():
            raise OutputError(f"{taken}: exists already; remove it or choose another name")
    made = data if split else None
    # Inside as well: an empty folder that the publishing made goes only without it.
    with _removed_on_failure(made), publish_file(path) as work, _removed_on_failure(made):
        # The IR moves initializers into a data file, and no constants.
        _embed_foreign(model, path, initializers=not split)
        ir.save(model, work, format="protobuf", external_data=data.name if split else None)
        _check(work, path, model.meta.get(_SOURCE))


@contextmanager
def _removed_on_failure(path: Path | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if path is not None:
            path.unlink(missing_ok=True)
        raise


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """The weights, also of branches and of constant nodes, stored outside the model file."""
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            yield tensor


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for value in _initializers(model):
        if value.const_value is not None:
            yield value.const_value
    for _, attribute in _constants(model):
        yield attribute.as_tensor()


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _constants(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Attr]]:
    """The nodes with a tensor as attribute."""
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield node, attribute


def tensor_values(tensor: ir.TensorProtocol) -> np.ndarray[Any, np.dtype[Any]]:
    """Values of a tensor; of an external one through a read-only map of its file.

    The IR's own reader refuses files that have several hard links, as backups make them.

    Raises:
        GraphError: the file cannot be read.
    """
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth % 8:
        return tensor.numpy()
    try:
        raw = np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (tensor.nbytes,))
    except (OSError, ValueError) as error:
        raise GraphError(
            f"{tensor.path}: cannot read tensor {tensor.name} ({error})"
        ) from error
    return np.asarray(raw.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy()))


def _read_proto(path: Path) -> onnx.ModelProto:
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise GraphError(f"{path}: cannot read the ONNX model ({error.strerror})") from error
    except Exception as error:
        # The parser's own error class depends on which protobuf is installed.
        raise GraphError(
            f"{path}: not an ONNX model, or truncated; export or download it again"
        ) from error
    # Some garbage, the empty file included, parses as a message without content.
    if not proto.ir_version or not proto.opset_import or not proto.graph.node:
        raise GraphError(
            f"{path}: not a complete ONNX model (no version, opset or nodes); "
            "export or download it again"
        )
    return proto


def _check_dense(path: Path, proto: onnx.ModelProto) -> None:
    for graph in (proto.graph, *_branches(proto.graph)):
        # The IR drops them without a word.
        for tensor in graph.sparse_initializer:
            raise GraphError(
                f"{path}: tensor {tensor.values.name} is a sparse initializer, which is not "
                "supported; store it dense"
            )


def _check_text(path: Path, graph: ir.Graph) -> None:
    """Refuse names that are not UTF-8: what reads such a file cannot write one."""
    named: list[Any] = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        named += [node, *node.outputs]
    for item in named:
        if isinstance(item.name, bytes):
            raise GraphError(
                f"{path}: not a valid ONNX model (the name {item.name!r} is not UTF-8)"
            )


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    location = PurePosixPath(str(tensor.location).replace("\\", "/"))
    if location.is_absolute() or ".." in location.parts:
        raise GraphError(
            f"{path}: tensor {tensor.name} points to {location}, outside the model's folder; "
            "such a file is refused"
        )
    data = path.parent / location
    if not data.is_file():
        raise GraphError(
            f"{path}: external data {data} of tensor {tensor.name} is missing; "
            "put it beside the model"
        )
    offset = tensor.offset or 0
    needed = offset + (tensor.nbytes if tensor.length is None else tensor.length)
    if tensor.length not in (None, tensor.nbytes) or needed > data.stat().st_size:
        raise GraphError(
            f"{path}: external data {data} is too short for tensor {tensor.name} "
            f"({needed} bytes needed, {data.stat().st_size} there); download it again"
        )


def _needs_data_file(model: ir.Model, path: Path, limit: int) -> bool:
    return sum(t.nbytes for t in _tensors(model) if not _is_beside(t, path)) > limit


def _embed_foreign(model: ir.Model, path: Path, *, initializers: bool) -> None:
    """Read what would be missed in the folder of `path` into memory, constants anyhow."""
    for value in _initializers(model) if initializers else ():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and not _is_beside(tensor, path):
            value.const_value = _embedded(tensor)
    for node, attribute in list(_constants(model)):
        tensor = attribute.as_tensor()
        if isinstance(tensor, ir.ExternalTensor) and not _is_beside(tensor, path):
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _embedded(tensor))


def _embedded(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(tensor_values(tensor), dtype=tensor.dtype, name=tensor.name)


def _is_beside(tensor: ir.TensorProtocol, path: Path) -> bool:
    """Whether the tensor is stored in the folder that `path` will be in."""
    if not isinstance(tensor, ir.ExternalTensor):
        return False
    return Path(tensor.base_dir).resolve() == path.parent.resolve()


def _check(work: Path, path: Path, source: Path | None) -> None:
    reason = _checked(work)
    if reason is None:
        return
    if source is not None and source.is_file() and (own := _checked(source)) is not None:
        raise GraphError(
            f"{source}: not a valid ONNX model itself ({own}), and so nothing made of it would "
            "be; export it again, or run onnx.shape_inference on it where a shape is missing"
        )
    raise GraphError(f"{path}: the written model is not valid ONNX ({reason})")


def _checked(path: Path) -> str | None:
    """What onnx's checker says against a model; None where it is valid."""
    try:
        onnx.checker.check_model(_without_data(onnx.load(path, load_external_data=False)))
    except onnx.checker.ValidationError as error:
        if not any(f"No Op registered for {op} " in str(error) for op in _RUNTIME_OPERATORS):
            return _first_line(error)
    return None


def _without_data(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with inputs in place of external data.

    The checker refuses data files that have several hard links, and data is checked already.
    """
    branches = list(_branches(proto.graph))
    # Neither a branch of an If node nor a constant takes an input in its place.
    inner = [tensor for branch in branches for tensor in branch.initializer]
    for graph in (proto.graph, *branches):
        inner += [attribute.t for node in graph.node for attribute in node.attribute]
    for tensor in inner:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            small = np.zeros((1,) * len(tensor.dims), np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(small, tensor.name))
    kept = []
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            kept.append(tensor)
            continue
        stands_in = onnx.helper.make_tensor_value_info(
            tensor.name, tensor.data_type, tensor.dims
        )
        if all(value.name != tensor.name for value in proto.graph.input):
            proto.graph.input.append(stands_in)
    if len(kept) < len(proto.graph.initializer):
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
    return proto


def _branches(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            for branch in (attribute.g, *attribute.graphs):
                if branch.node or branch.initializer:
                    yield branch
                    yield from _branches(branch)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
