"""A second way to steer a graph: standard nodes, put in with plain onnx, at named values."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from reference import PATHS
from samples import random_site

from austeer.adapters import Component, Site, SteeredSite, SteeringAdapter, Strength

UNITS = 6


def width_of(model: Any, component: str) -> int:
    """Length of a site's axis, off the weights of the live model."""
    layer, attention, mlp = PATHS[model.config.model_type]
    below = attention if component == "attention" else mlp
    rows, columns = model.get_submodule(f"{layer.format(0)}.{below}").weight.shape
    if model.config.model_type == "gpt2":
        rows, columns = columns, rows
    return int(columns if component in ("attention", "neuron") else rows)


def random_adapter(
    model: Any, component: str, rank: int = 0, seed: int = 0, layers: tuple[int, ...] = (0, 1)
) -> SteeringAdapter:
    """Six random units a layer with large random gains, and predictors for rank > 0."""
    rng = np.random.default_rng((seed, rank, *component.encode()))
    sites = []
    for layer in layers:
        units = np.sort(rng.choice(width_of(model, component), UNITS, replace=False))
        sites.append(random_site(Site(layer, Component(component)), units.tolist(), rank, rng))
    strength = Strength.ADAPTIVE if rank else Strength.FITTED
    return SteeringAdapter.from_sites(model, sites, strength)


def dynamo_values(path: Path, model_type: str) -> dict[str, str]:
    """Name of the value at each `layers.{i}.{component}` of a float graph of torch.

    Quantizing keeps these names, though not the metadata that they are found by.
    """
    layer_path, attention, mlp = PATHS[model_type]
    found: dict[str, str] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        text = {entry.key: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(text.get("pkg.torch.onnx.name_scopes", "['']"))[:-1]
        for i in (0, 1):
            layer = layer_path.format(i)
            product = node.op_type in ("MatMul", "Gemm")
            if product and f"{layer}.{attention}" in scopes:
                found[f"layers.{i}.attention"] = node.input[0]
            if product and f"{layer}.{mlp}" in scopes:
                found[f"layers.{i}.neuron"] = node.input[0]
            # Nodes are in order: what comes last stays.
            if f"{layer}.{mlp}" in scopes:
                found[f"layers.{i}.ffn"] = node.output[0]
            if scopes[-1:] == [layer] and node.op_type == "Add":
                found[f"layers.{i}.layer"] = node.output[0]
    assert len(found) == 8, found
    return found


def steer_plainly(proto: onnx.ModelProto, sites: Mapping[str, tuple[SteeredSite, int]]) -> None:
    """Multiply named values by their gains; every node that read one reads the product.

    Args:
        proto: changed in place.
        sites: site and width of its axis, by name of the value.
    """
    for value, (site, width) in sites.items():
        nodes = _Nodes(f"reference.{value}")
        gain = _constant_gain(nodes, site, width)
        if site.predictor is not None:
            gain = _adaptive_gain(nodes, site, width, value)
        steered = nodes.add("Mul", value, gain)
        for node in proto.graph.node:
            for position, name in enumerate(node.input):
                if name == value:
                    node.input[position] = steered
        producers = [i for i, node in enumerate(proto.graph.node) if value in node.output]
        for offset, node in enumerate(nodes.nodes):
            proto.graph.node.insert(producers[0] + 1 + offset, node)
        proto.graph.initializer.extend(nodes.constants)


class _Nodes:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self.prefix}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"{self.prefix}.c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name


def _constant_gain(nodes: _Nodes, site: SteeredSite, width: int) -> str:
    gain = np.ones(width, np.float32)
    gain[site.index] += site.gamma
    return nodes.constant(gain)


def _adaptive_gain(nodes: _Nodes, site: SteeredSite, width: int, value: str) -> str:
    p = site.predictor
    assert p is not None
    selected = nodes.add("Gather", value, nodes.constant(site.index, np.int64), axis=-1)
    t = nodes.add("MatMul", selected, nodes.constant(p.V))
    t = nodes.add("Add", t, nodes.constant(p.b))
    t = nodes.add("MatMul", t, nodes.constant(p.U))
    t = nodes.add("Sub", t, nodes.constant(np.log(3.0)))
    phi = nodes.add("Mul", nodes.add("Sigmoid", t), nodes.constant(4.0))
    amount = nodes.add("Mul", nodes.constant(site.gamma), phi)
    gains = nodes.add("Add", amount, nodes.constant(1.0))
    # Each gain to its unit: one of the summands is the gain, the others are zero.
    spread, rest = np.zeros((len(site.index), width)), np.ones(width)
    spread[np.arange(len(site.index)), site.index] = 1
    rest[site.index] = 0
    dense = nodes.add("MatMul", gains, nodes.constant(spread))
    return nodes.add("Add", dense, nodes.constant(rest))
