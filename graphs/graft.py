"""Graft a steering adapter onto an ONNX model: one node per steered site."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir

from austeer.adapters._errors import AusteerError, GraphError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.sites import Site
from austeer.adapters.steered_site import check_units
from austeer.graphs.function import steer_functions
from austeer.graphs.graft_plan import Array, GraftPlan, ScaleAs, SteeringNode, plan_graft
from austeer.graphs.locating.locate import SiteLocator, locate_sites
from austeer.graphs.locating.places import Place
from austeer.graphs.locating.scopes import NAME_SCOPES
from austeer.graphs.locating.skip_norm import split_skip_norm
from austeer.graphs.model_io import load_model, save_model
from austeer.graphs.opset import DOMAIN, SCALE_INPUT, SCALE_NAME, VERSION
from austeer.graphs.shapes import state_shapes
from austeer.graphs.ungraft import check_not_grafted, steering_nodes

_MIN_IR_VERSION = 8
"""The first ONNX file version with model-local functions."""


class GraftGainPass(ir.passes.InPlacePass):
    """Insert the `SteerAU` and `SteerAUAdaptive` nodes of a plan, each at its site.

    Requires a model without `ai.austeer` nodes in which every site is found; ensures that
    every node is there once, that it is read, and that its function body is there.

    Args:
        plan: what to insert.
    """

    def __init__(self, plan: GraftPlan) -> None:
        super().__init__()
        self._plan = plan

    def requires(self, model: ir.Model) -> None:
        """Refuse a model that is grafted already, too old, or lacks a site.

        Raises:
            GraphError: as said; names the site and the nearest candidates.
            SiteError: a unit outside the site's width.
        """
        check_not_grafted(model)
        steer_functions(_onnx_opset(model))
        _check_names(model.graph, self._plan)
        self._places(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the nodes, their constants, the functions and the opset import."""
        places = self._places(model)
        state_shapes(model, [place.value for place in places.values()])
        scale = _scale_value(model.graph, self._plan)
        for node in self._plan.nodes:
            place = places[node.site]
            # A further slot steers what the one before has steered.
            places[node.site] = _graft(model.graph, node, place, scale)
        used = {node.op.name for node in self._plan.nodes}
        for name, function in steer_functions(_onnx_opset(model)).items():
            if name in used:
                model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION
        model.ir_version = max(model.ir_version, _MIN_IR_VERSION)
        return ir.passes.PassResult(model, modified=bool(places))

    def ensures(self, model: ir.Model) -> None:
        """Check the grafted model against the plan.

        Raises:
            GraphError: a site without its node, a node that nothing reads, a missing body.
        """
        nodes = {str(node.name): node for node in steering_nodes(model)}
        wanted = {node.name for node in self._plan.nodes}
        if nodes.keys() != wanted:
            differing = ", ".join(sorted(nodes.keys() ^ wanted))
            raise GraphError(f"graft: nodes and sites differ at {differing}")
        for name, node in nodes.items():
            output = node.outputs[0]
            if not output.is_graph_output() and not output.consumers():
                raise GraphError(f"graft: nothing reads the steered activation of {name}")
            if node.op_identifier() not in model.functions:
                raise GraphError(f"graft: the body of {node.op_type} is not in the model")

    def _places(self, model: ir.Model) -> dict[Site, Place]:
        units: dict[Site, list[Array]] = {}
        for node in self._plan.nodes:
            units.setdefault(node.site, []).append(node.tensors["idx"])
        for values in self._plan.switched:
            for node in self._plan.nodes:
                index = values.get(node.constant_name("idx"))
                units[node.site] += [] if index is None else [index]
        places = locate_sites(SiteLocator(model.graph, self._plan.architecture), list(units))
        for place in places:
            for index in units[place.site]:
                check_units(place.site, index, place.width)
        return {place.site: place for place in places}


def apply_plan(model: ir.Model, plan: GraftPlan) -> None:
    """Graft a plan onto `model`, in place.

    Raises:
        GraphError: the model is grafted already, too old, or lacks a site.
        SiteError: a unit outside the site's width.
    """
    try:
        GraftGainPass(plan)(model)
    except ir.passes.InvariantError as error:
        # The pass framework wraps the reason; users want the reason itself.
        if isinstance(error.__cause__, AusteerError):
            raise error.__cause__ from None
        raise


def graft_model(
    model: ir.Model,
    adapter: SteeringAdapter,
    scale: float = 1.0,
    *,
    scale_as: ScaleAs = ScaleAs.CONSTANT,
) -> None:
    """Graft `adapter` onto `model`, in place.

    Raises:
        GraphError: the model is grafted already, too old, or lacks a site.
        SiteError: a unit outside the site's width.
    """
    apply_plan(model, plan_graft(adapter, scale, scale_as))


def graft_file(
    base_onnx: Path,
    adapter: SteeringAdapter,
    out_onnx: Path,
    *,
    scale: float = 1.0,
    scale_as: ScaleAs = ScaleAs.CONSTANT,
) -> None:
    """Write the model at `base_onnx`, steered by `adapter`, to the new file `out_onnx`.

    Nothing is compared with the adapter's base model, and nothing is run: `graft_job` of
    `austeer.exporter` does both. External data beside `base_onnx` is shared when `out_onnx`
    is in the same folder, and copied otherwise.

    Raises:
        GraphError: the base cannot be read, is grafted already, or lacks a site.
        SiteError: a unit outside a site's width.
        OutputError: `out_onnx` exists or cannot be written.
    """
    model = load_model(base_onnx)
    graft_model(model, adapter, scale, scale_as=scale_as)
    save_model(model, out_onnx)


def steered_values(model: ir.Model) -> dict[str, tuple[str, str]]:
    """Names of the activations before and after each steering node, by node name."""
    return {
        str(node.name): (str(x.name), str(node.outputs[0].name))
        for node in steering_nodes(model)
        if (x := node.inputs[0]) is not None
    }


def _check_names(graph: ir.Graph, plan: GraftPlan) -> None:
    if plan.scale_as is ScaleAs.CONSTANT:
        return
    taken = {str(value.name) for value in graph.inputs} | set(graph.initializers)
    if SCALE_INPUT in taken:
        raise GraphError(
            f"the model has an input {SCALE_INPUT} of its own; graft onto the base model "
            "instead, or leave the strength constant"
        )


def _onnx_opset(model: ir.Model) -> int:
    imports = model.opset_imports
    return imports.get("", imports.get("ai.onnx", 0))


def _scale_value(graph: ir.Graph, plan: GraftPlan) -> ir.Value:
    array = np.array([plan.scale], np.float32)
    if plan.scale_as is ScaleAs.CONSTANT:
        return _registered(graph, SCALE_NAME, array)
    if plan.scale_as is ScaleAs.OPTIONAL:
        return _with_default(graph, SCALE_INPUT, array)
    value = ir.val(SCALE_INPUT, ir.DataType.FLOAT, [1])
    graph.inputs.append(value)
    return value


def _graft(graph: ir.Graph, node: SteeringNode, place: Place, scale: ir.Value) -> Place:
    """Insert one node; the place of what it makes."""
    if place.skip_norm is not None:
        name = f"/{place.module.replace('.', '/')}/Add"
        total = split_skip_norm(place.skip_norm, name)
        place = dataclasses.replace(place, value=total, skip_norm=None)
    register = _with_default if node.switchable else _registered
    constants = [
        register(graph, name, array) for name, array in node.named(node.tensors).items()
    ]
    x = place.value
    if x.type is None and place.dtype is not None:
        x.type = ir.TensorType(place.dtype)
    y = ir.Value(name=f"{node.name}.output", shape=_copy(x.shape), type=x.type)
    fresh = ir.Node(
        DOMAIN,
        node.op.name,
        [x, *constants, scale],
        outputs=[y],
        name=node.name,
        metadata_props={NAME_SCOPES: str(["", place.module, node.name])},
    )
    producer = x.producer()
    if producer is None:
        graph.insert_before(graph[0], fresh)
    else:
        graph.insert_after(producer, fresh)
    _redirect(place, fresh, y)
    return dataclasses.replace(place, value=y)


def _redirect(place: Place, node: ir.Node, y: ir.Value) -> None:
    x = place.value
    for reader, position in tuple(x.uses()):
        if reader is not node and (place.readers is None or reader in place.readers):
            reader.replace_input_with(position, y)
    if place.readers is None and x.is_graph_output():
        _take_over_outputs(node, x, y)


def _take_over_outputs(node: ir.Node, x: ir.Value, y: ir.Value) -> None:
    """Let the graph output `y` in the place and under the name of `x`."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise GraphError(f"{x.name}: expected a value of the main graph")
    x.name, y.name = f"{node.name}.unsteered", x.name
    for position, output in enumerate(graph.outputs):
        if output is x:
            graph.outputs[position] = y


def constant(name: str, array: Array) -> ir.Value:
    """An initializer that no graph holds yet."""
    tensor = ir.tensor(array, name=name)
    shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    return ir.Value(name=name, shape=shape, type=kind, const_value=tensor)


def _registered(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    value = constant(name, array)
    graph.register_initializer(value)
    return value


def _with_default(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A graph input that may be left out; a run may give another number of units or rank."""
    value = _registered(graph, name, array)
    if name != SCALE_INPUT:
        value.shape = ir.Shape([f"{name}.{axis}" for axis in range(array.ndim)])
    graph.inputs.append(value)
    return value


def _copy(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape(shape.dims)
