"""Graft a steering adapter onto an ONNX model: one node per steered site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from austeer.adapters._errors import AusteerError, GraphError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.sites import Refusal
from austeer.adapters.steered_site import SteeredSite
from austeer.graphs.function import steer_functions
from austeer.graphs.locate import NAME_SCOPES, Place, SiteLocator
from austeer.graphs.model_io import load_model, save_model
from austeer.graphs.opset import (
    DOMAIN,
    PREFIX,
    SCALE_NAME,
    STEER_AU,
    STEER_AU_ADAPTIVE,
    VERSION,
    SteerOp,
    initializer_name,
    node_name,
)

_MIN_IR_VERSION = 8
"""The first ONNX file version with model-local functions."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class GraftGainPass(ir.passes.InPlacePass):
    """Insert a `SteerAU` or `SteerAUAdaptive` node at every site of an adapter.

    Requires a model without `ai.austeer` nodes in which every site is found; ensures that
    every site has exactly one node, that it is read, and that its function body is there.

    Args:
        adapter: what to steer.
        scale: strength factor, stored in the shared initializer `austeer.scale`.
    """

    def __init__(self, adapter: SteeringAdapter, scale: float = 1.0) -> None:
        super().__init__()
        self._adapter = adapter
        self._scale = scale

    def requires(self, model: ir.Model) -> None:
        """Refuse a model that is grafted already, too old, or lacks a site.

        Raises:
            GraphError: as said; names the site and the nearest candidates.
            SiteError: a unit outside the site's width.
        """
        check_not_grafted(model)
        steer_functions(_onnx_opset(model))
        locate_sites(model.graph, self._adapter)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the nodes, their constants, the functions and the opset import."""
        places = locate_sites(model.graph, self._adapter)
        scale = _registered(model.graph, SCALE_NAME, np.array([self._scale], np.float32))
        for steered, place in zip(self._adapter.sites, places, strict=True):
            _graft(model.graph, steered, place, scale)
        used = {_operator(steered).name for steered in self._adapter.sites}
        for name, function in steer_functions(_onnx_opset(model)).items():
            if name in used:
                model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION
        model.ir_version = max(model.ir_version, _MIN_IR_VERSION)
        return ir.passes.PassResult(model, modified=bool(places))

    def ensures(self, model: ir.Model) -> None:
        """Check the grafted model against the adapter.

        Raises:
            GraphError: a site without its node, a node that nothing reads, a missing body.
        """
        nodes = {str(node.name): node for node in _steering_nodes(model)}
        wanted = {_node_name(steered): steered for steered in self._adapter.sites}
        if nodes.keys() != wanted.keys():
            differing = ", ".join(sorted(nodes.keys() ^ wanted.keys()))
            raise GraphError(f"graft: nodes and sites differ at {differing}")
        for name, node in nodes.items():
            output = node.outputs[0]
            if not output.is_graph_output() and not output.consumers():
                raise GraphError(f"graft: nothing reads the steered activation of {name}")
            if node.op_identifier() not in model.functions:
                raise GraphError(f"graft: the body of {node.op_type} is not in the model")


def graft_model(model: ir.Model, adapter: SteeringAdapter, scale: float = 1.0) -> None:
    """Graft `adapter` onto `model`, in place.

    Raises:
        GraphError: the model is grafted already, too old, or lacks a site.
        SiteError: a unit outside the site's width.
    """
    try:
        GraftGainPass(adapter, scale)(model)
    except ir.passes.InvariantError as error:
        # The pass framework wraps the reason; users want the reason itself.
        if isinstance(error.__cause__, AusteerError):
            raise error.__cause__ from None
        raise


def graft_file(
    base_onnx: Path, adapter: SteeringAdapter, out_onnx: Path, *, scale: float = 1.0
) -> None:
    """Write the model at `base_onnx`, steered by `adapter`, to the new file `out_onnx`.

    External data beside `base_onnx` is shared when `out_onnx` is in the same folder, and
    copied otherwise.

    Raises:
        GraphError: the base cannot be read, is grafted already, or lacks a site.
        SiteError: a unit outside a site's width.
        OutputError: `out_onnx` exists or cannot be written.
    """
    model = load_model(base_onnx)
    graft_model(model, adapter, scale)
    save_model(model, out_onnx)


def check_not_grafted(model: ir.Model) -> None:
    """Refuse a model that holds steering nodes or their constants already.

    Raises:
        GraphError: it does; names one.
    """
    marks = [str(node.name) for node in _steering_nodes(model)]
    # An inlined graft has no node of ours left, but its constants.
    marks += [name for name in model.graph.initializers if name.startswith(f"{PREFIX}.")]
    if marks:
        raise GraphError(
            f"the model is steered already, see {marks[0]}; graft onto the base model instead"
        )


def locate_sites(graph: ir.Graph, adapter: SteeringAdapter) -> list[Place]:
    """Places of the adapter's sites, in the adapter's order.

    Raises:
        GraphError: a site is not found, or cannot be steered here.
        SiteError: a unit outside the site's width.
    """
    locator = SiteLocator(graph, adapter.architecture)
    places: list[Place] = []
    for steered in adapter.sites:
        place = locator.find(steered.site)
        if isinstance(place, Refusal):
            raise GraphError(str(place))
        steered.check_width(place.width)
        _check_place(place, places)
        places.append(place)
    return places


def _check_place(place: Place, others: list[Place]) -> None:
    if place.value.dtype not in _FLOATS:
        raise GraphError(
            f"{place.site}: {place.value.name} is {place.value.dtype}, expected float, "
            "float16 or bfloat16; graft onto a model with floating activations"
        )
    for other in others:
        if other.value is place.value:
            raise GraphError(
                f"{place.site}: is the same value as {other.site} in this graph "
                f"({place.value.name}); steer only one of them"
            )


def _steering_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.domain == DOMAIN]


def _onnx_opset(model: ir.Model) -> int:
    return model.opset_imports.get("", 0)


def _operator(steered: SteeredSite) -> SteerOp:
    return STEER_AU if steered.predictor is None else STEER_AU_ADAPTIVE


def _node_name(steered: SteeredSite) -> str:
    return node_name(steered.site.key)


def _graft(graph: ir.Graph, steered: SteeredSite, place: Place, scale: ir.Value) -> None:
    constants = [
        _registered(graph, initializer_name(steered.site.key, name), array)
        for name, array in _site_tensors(steered).items()
    ]
    x, name = place.value, _node_name(steered)
    y = ir.Value(name=f"{name}.output", shape=_copy(x.shape), type=x.type)
    node = ir.Node(
        DOMAIN,
        _operator(steered).name,
        [x, *constants, scale],
        outputs=[y],
        name=name,
        metadata_props={NAME_SCOPES: str(["", place.module, name])},
    )
    producer = x.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    _redirect(place, node, y)


def _redirect(place: Place, node: ir.Node, y: ir.Value) -> None:
    x = place.value
    for reader, position in tuple(x.uses()):
        if reader is not node and (place.readers is None or reader in place.readers):
            reader.replace_input_with(position, y)
    if place.readers is None and x.is_graph_output():
        _take_over_outputs(node.graph, x, y)


def _take_over_outputs(graph: ir.Graph | ir.Function | None, x: ir.Value, y: ir.Value) -> None:
    """Let the graph output `y` in the place and under the name of `x`."""
    if not isinstance(graph, ir.Graph):
        raise GraphError(f"{x.name}: expected a value of the main graph")
    x.name, y.name = f"{x.name}.unsteered", x.name
    for position, output in enumerate(graph.outputs):
        if output is x:
            graph.outputs[position] = y


def _site_tensors(steered: SteeredSite) -> Mapping[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {
        "idx": steered.index.astype(np.int64),
        "gamma": steered.gamma.astype(np.float32),
    }
    if steered.predictor is not None:
        for part in ("V", "b", "U"):
            tensors[part] = np.ascontiguousarray(getattr(steered.predictor, part), np.float32)
    return {name: tensors[name] for name in _operator(steered).tensors}


def constant(name: str, array: np.ndarray) -> ir.Value:
    """An initializer that no graph holds yet."""
    tensor = ir.tensor(array, name=name)
    shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    return ir.Value(name=name, shape=shape, type=kind, const_value=tensor)


def _registered(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = constant(name, array)
    graph.register_initializer(value)
    return value


def _copy(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape(shape.dims)
