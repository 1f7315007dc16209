"""Projections without a module path get their module back, only where nothing else fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from plain_graphs import PlainGraph

from austeer.adapters import Refusal
from austeer.graphs import Place
from austeer.graphs.locating.adopted import adopted_members, pathless_projections

D, H = 4, 6
MLP = "model.layers.0.mlp"
LAST = f"{MLP}.down_proj"


class QuantizedLayer:
    """Norm, up, ReLU, down, sum, as dynamo and then `quantize_dynamic` leave them.

    Only nodes that the quantizer did not touch carry metadata.
    """

    def __init__(self) -> None:
        self.plain = PlainGraph(named=False)
        h = self.plain.input("h", ["B", "T", D])
        self.norm = self.plain.add("Neg", [h], "model.layers.0.post_attention_layernorm")
        self.up = self.product(self.norm, "up", D, H)
        self.act = self.plain.add("Relu", [self.up], f"{MLP}.act_fn")
        self.down = self.product(self.act, "down", H, D)
        self.out = self.plain.add("Add", [h, self.down], "model.layers.0")
        self.plain.output(self.out, ["B", "T", D])

    def product(self, x: ir.Value, name: str, rows: int, columns: int) -> ir.Value:
        graph = self.plain
        outputs = [f"{name}_{part}" for part in ("quantized", "scale", "zero_point")]
        first = graph.add("DynamicQuantizeLinear", [x], outputs=outputs)
        _, scale, zero = first.producer().outputs  # type: ignore[union-attr]
        weight = graph.constant(f"{name}_w", np.ones((rows, columns), np.uint8))
        w_zero = graph.constant(f"{name}_w_zero", np.array(0, np.uint8))
        product = graph.add("MatMulInteger", [first, weight, zero, w_zero])
        w_scale = graph.constant(f"{name}_w_scale", np.array(0.1, np.float32))
        wide = graph.add("Cast", [product], to=1)
        return graph.add("Mul", [wide, graph.add("Mul", [scale, w_scale])])

    def members(self, module: str = LAST) -> list[ir.Node]:
        return adopted_members(pathless_projections(self.plain.graph), module)


@pytest.fixture
def layer() -> Callable[[], QuantizedLayer]:
    return QuantizedLayer


def test_the_last_projection_of_a_block_is_adopted_with_what_lies_behind_it(
    layer: Callable[[], QuantizedLayer],
) -> None:
    made = layer()
    members = made.members()
    first = next(node for node in made.plain.graph if node.outputs[0].name == "down_quantized")
    (product,) = first.outputs[0].consumers()
    assert members[0] is product
    assert {node.op_type for node in members[1:]} == {"Cast", "Mul"}
    assert made.down.producer() in members
    assert made.out.producer() not in members


@pytest.mark.parametrize(
    ("key", "width", "value"),
    [("neuron", H, "act"), ("ffn", D, "down"), ("layer", D, "out")],
)
def test_its_sites_are_found(
    key: str, width: int, value: str, layer: Callable[[], QuantizedLayer]
) -> None:
    made = layer()
    place = made.plain.find(f"layers.0.{key}")
    assert isinstance(place, Place)
    assert place.value is getattr(made, value)
    assert place.width == width


def test_the_other_projections_of_the_block_are_not_adopted(
    layer: Callable[[], QuantizedLayer],
) -> None:
    made = layer()
    # `up` reads what lies outside the block, so it is not the block's last projection
    up, down = pathless_projections(made.plain.graph)
    assert down in made.members()
    assert up not in made.members()


def test_two_that_fit_are_none(layer: Callable[[], QuantizedLayer]) -> None:
    made = layer()
    twin = made.product(made.act, "twin", H, D)
    made.plain.add("Add", [made.out, twin], "model.layers.0")
    assert made.members() == []
    assert isinstance(made.plain.find("layers.0.ffn"), Refusal)


def test_a_product_of_what_lies_outside_the_block_is_none_of_it(
    layer: Callable[[], QuantizedLayer],
) -> None:
    made = layer()
    expected = made.members()
    other = made.product(made.norm, "other", D, D)
    made.plain.add("Add", [made.out, other], "model.layers.0")
    assert made.members() == expected != []


def test_a_product_that_the_block_itself_reads_is_not_its_last(
    layer: Callable[[], QuantizedLayer],
) -> None:
    made = layer()
    made.plain.add("Tanh", [made.down], f"{MLP}.gate")
    assert made.members() == []


def test_a_product_that_nothing_known_reads_is_left_alone(
    layer: Callable[[], QuantizedLayer],
) -> None:
    made = layer()
    made.out.producer().metadata_props.clear()  # type: ignore[union-attr]
    assert made.members() == []


def test_another_layers_projection_is_not_adopted(layer: Callable[[], QuantizedLayer]) -> None:
    made = layer()
    assert made.members("model.layers.1.mlp.down_proj") == []
    assert isinstance(made.plain.find("layers.1.ffn"), Refusal)


def test_a_wrapper_in_front_of_every_path(layer: Callable[[], QuantizedLayer]) -> None:
    made = layer()
    for node in made.plain.graph:
        key = "pkg.torch.onnx.name_scopes"
        if text := node.metadata_props.get(key):
            node.metadata_props[key] = text.replace("'model", "'decoder.model")
    assert made.members() != []
    place = made.plain.find("layers.0.neuron")
    assert isinstance(place, Place)
    assert place.value is made.act


def test_a_projection_with_a_path_of_its_own_is_not_adopted(
    layer: Callable[[], QuantizedLayer],
) -> None:
    made = layer()
    (product,) = [node for node in made.members() if node.op_type == "MatMulInteger"]
    product.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'elsewhere', 'x']"
    assert made.members() == []


def test_half_a_module_is_completed(layer: Callable[[], QuantizedLayer]) -> None:
    """Conv1D of GPT-2 reshapes around its product; those nodes keep their path."""
    made = layer()
    graph: Any = made.plain
    shape = graph.constant("rows", np.array([-1, H]))
    flat = graph.add("Reshape", [made.act, shape], LAST)
    (first,) = [node for node in graph.graph if node.outputs[0].name == "down_quantized"]
    first.replace_input_with(0, flat)
    graph.graph.sort()
    place = graph.find("layers.0.neuron")
    assert isinstance(place, Place)
    assert place.value is flat
    ffn = graph.find("layers.0.ffn")
    assert isinstance(ffn, Place)
    assert ffn.value is made.down


def test_what_is_more_than_scale_and_shift_is_not_adopted(
    layer: Callable[[], QuantizedLayer],
) -> None:
    """A norm that an optimizer fused has no path either, and is no part of the projection."""
    quantized = layer()
    (end,) = [n for n in quantized.members() if quantized.down in n.outputs]
    norm = quantized.plain.add("SimplifiedLayerNormalization", [quantized.down])
    gate = quantized.plain.add("Mul", [norm, quantized.act])
    members = quantized.members()
    assert end in members
    assert norm.producer() not in members
    assert gate.producer() not in members
