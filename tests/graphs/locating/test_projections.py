"""Every operator that multiplies by a matrix: its activation, widths, dtype and weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from plain_graphs import MICROSOFT, PlainGraph

from austeer.adapters import Refusal
from austeer.graphs import Place
from austeer.graphs.locating.projections import (
    Projection,
    element_type,
    is_projection,
    read_projection,
    stored_weight,
)

IN, OUT = 6, 4
W = np.random.default_rng(0).normal(size=(IN, OUT)).astype(np.float32)
AT = "model.layers.0.mlp.down_proj"
Build = Callable[..., ir.Node]


def graph_with_activation() -> tuple[PlainGraph, ir.Value]:
    graph = PlainGraph()
    x = graph.input("x", ["B", "T", IN])
    return graph, graph.add("Relu", [x], "model.layers.0.mlp.act_fn")


def node_of(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def read(value: ir.Value) -> Projection:
    node = node_of(value)
    assert is_projection(node)
    found = read_projection(node)
    assert isinstance(found, Projection), found
    return found


def refusal(value: ir.Value) -> str:
    found = read_projection(node_of(value))
    assert isinstance(found, str), found
    return found


def finish(graph: PlainGraph, result: ir.Value) -> None:
    """`h + result`, as a decoder layer ends."""
    h = graph.input("h", ["B", "T", OUT])
    total = graph.add("Add", [h, result], "model.layers.0")
    graph.output(total, ["B", "T", OUT])


def plain(op: str, domain: str, **attributes: Any) -> Callable[..., ir.Value]:
    def build(graph: PlainGraph, x: ir.Value) -> ir.Value:
        weight = W.T if attributes.get("transB") else W
        weights = [graph.constant("w", np.ascontiguousarray(weight))]
        return graph.add(op, [x, *weights], AT, domain=domain, **attributes)

    return build


def blocks(op: str) -> Callable[..., ir.Value]:
    """4-bit weights: the operator's attributes say what the packed bytes do not."""

    def build(graph: PlainGraph, x: ir.Value) -> ir.Value:
        packed = graph.constant("w_Q4", np.zeros((OUT, 1, 16), np.uint8))
        scales = graph.constant("w_scales", np.ones(OUT, np.float32))
        attributes = {"K": IN, "N": OUT, "block_size": 32}
        attributes |= {"bits": 4} if op == "MatMulNBits" else {"quant_type": 1}
        return graph.add(op, [x, packed, scales], AT, domain=MICROSOFT, **attributes)

    return build


def integer(graph: PlainGraph, x: ir.Value) -> ir.Value:
    """What `quantize_dynamic` writes."""
    outputs = ["x_quantized", "x_scale", "x_zero_point"]
    quantized = graph.add("DynamicQuantizeLinear", [x], "", outputs=outputs)
    _, scale, zero = node_of(quantized).outputs
    w, w_scale = (
        graph.constant("w_quantized", np.ones((IN, OUT), np.uint8)),
        graph.constant("w_scale", np.array(0.1, np.float32)),
    )
    w_zero = graph.constant("w_zero_point", np.array(0, np.uint8))
    product = graph.add("MatMulInteger", [quantized, w, zero, w_zero], AT)
    scales = graph.add("Mul", [scale, w_scale], AT)
    wide = graph.add("Cast", [product], AT, to=1)
    return graph.add("Mul", [wide, scales], AT)


def dynamic(graph: PlainGraph, x: ir.Value) -> ir.Value:
    """What onnxruntime makes of those nodes when it saves an optimized model."""
    parts = [
        graph.constant("w_quantized", np.ones((IN, OUT), np.uint8)),
        graph.constant("w_scale", np.array([0.1], np.float32)),
        graph.constant("w_zero_point", np.array([0], np.uint8)),
    ]
    return graph.add("DynamicQuantizeMatMul", [x, *parts], AT, domain=MICROSOFT)


OPERATORS: dict[str, Callable[[PlainGraph, ir.Value], ir.Value]] = {
    "MatMul": plain("MatMul", ""),
    "Gemm": plain("Gemm", ""),
    "Gemm-transB": plain("Gemm", "", transB=1),
    "FusedMatMul": plain("FusedMatMul", MICROSOFT),
    "FusedMatMul-transB": plain("FusedMatMul", MICROSOFT, transB=1),
    "MatMulNBits": blocks("MatMulNBits"),
    "MatMulBnb4": blocks("MatMulBnb4"),
    "MatMulInteger": integer,
    "DynamicQuantizeMatMul": dynamic,
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_both_sides_of_every_operator_are_places(operator: str) -> None:
    graph, x = graph_with_activation()
    result = OPERATORS[operator](graph, x)
    finish(graph, result)
    before, after = graph.find("layers.0.neuron"), graph.find("layers.0.ffn")
    assert isinstance(before, Place) and isinstance(after, Place), (before, after)
    assert before.value is x
    assert before.width == IN
    assert before.dtype == after.dtype == ir.DataType.FLOAT
    assert before.readers is not None and after.readers is None
    (reader,) = before.readers
    assert x in reader.inputs
    quantizes = operator == "MatMulInteger"
    assert (reader.op_type == "DynamicQuantizeLinear") == quantizes
    assert after.value is result
    assert after.width == OUT
    assert before.module == after.module == AT


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reader_is_the_only_node_that_gets_the_steered_input(operator: str) -> None:
    graph, x = graph_with_activation()
    other = graph.add("Neg", [x], "model.layers.0.probe")
    finish(graph, OPERATORS[operator](graph, x))
    place = graph.find("layers.0.neuron")
    assert isinstance(place, Place) and place.readers is not None
    assert node_of(other) not in place.readers


@pytest.mark.parametrize("operator", ["Gemm", "FusedMatMul"])
@pytest.mark.parametrize("side", ["neuron", "ffn"])
def test_transposed_activations_are_refused(operator: str, side: str) -> None:
    graph, x = graph_with_activation()
    domain = MICROSOFT if operator == "FusedMatMul" else ""
    weight = graph.constant("w", W)
    finish(graph, graph.add(operator, [x, weight], AT, domain=domain, transA=1))
    found = graph.find(f"layers.0.{side}")
    assert isinstance(found, Refusal)
    assert "transposes its activation" in str(found)


def test_transposed_batches_are_refused() -> None:
    graph, x = graph_with_activation()
    result = graph.add(
        "FusedMatMul", [x, graph.constant("w", W)], AT, domain=MICROSOFT, transBatchA=1
    )
    assert "transposes its activation" in refusal(result)


@pytest.mark.parametrize("chain", [("Transpose",), ("Cast", "Transpose"), ("Identity",)])
@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
def test_weights_behind_other_nodes(operator: str, chain: tuple[str, ...]) -> None:
    graph, x = graph_with_activation()
    stored = np.ascontiguousarray(W.T) if "Transpose" in chain else W
    weight = graph.constant("w", stored)
    for op in chain:
        attributes: dict[str, Any] = {"to": 1} if op == "Cast" else {}
        attributes |= {"perm": [1, 0]} if op == "Transpose" else {}
        weight = graph.add(op, [weight], AT, **attributes)
    result = graph.add(operator, [x, weight], AT)
    projection = read(result)
    assert (projection.in_width, projection.out_width) == (IN, OUT)
    assert projection.dtype == ir.DataType.FLOAT
    found = stored_weight(projection.node)
    assert found is not None
    np.testing.assert_array_equal(found, W)


def test_a_weight_stored_in_another_type() -> None:
    graph, x = graph_with_activation()
    weight = graph.constant("w", W.astype(np.float16))
    wide = graph.add("Cast", [weight], AT, to=1)
    assert read(graph.add("MatMul", [x, wide], AT)).dtype == ir.DataType.FLOAT


def test_the_type_behind_an_unknown_operator_is_not_guessed() -> None:
    graph, x = graph_with_activation()
    down = graph.add("MatMul", [x, graph.constant("w", W)], AT)
    own = graph.add("Scramble", [down], AT, domain="example")
    shifted = graph.add("Add", [own, graph.constant("b", np.zeros(OUT, np.float16))], AT)
    assert element_type(own, read(down)) is None
    assert element_type(down, read(down)) == ir.DataType.FLOAT
    assert element_type(shifted, read(down)) == ir.DataType.FLOAT16


def test_two_transpositions_cancel() -> None:
    graph, x = graph_with_activation()
    weight = graph.constant("w", np.ascontiguousarray(W.T))
    weight = graph.add("Transpose", [weight], AT, perm=[1, 0])
    result = graph.add("Gemm", [x, weight], AT, transB=0)
    assert read(result).in_width == IN
    again = graph.add("Transpose", [weight], AT, perm=[1, 0])
    turned = graph.add("Gemm", [x, again], AT, transB=1)
    assert (read(turned).in_width, read(turned).out_width) == (IN, OUT)
    np.testing.assert_array_equal(stored_weight(node_of(turned)), W)


@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "Gemm-transB"])
def test_the_stored_weight_is_in_to_out(operator: str) -> None:
    graph, x = graph_with_activation()
    found = stored_weight(node_of(OPERATORS[operator](graph, x)))
    assert found is not None
    np.testing.assert_array_equal(found, W)


@pytest.mark.parametrize(
    "operator", ["MatMulNBits", "MatMulBnb4", "MatMulInteger", "DynamicQuantizeMatMul"]
)
def test_quantized_weights_cannot_be_read_back(operator: str) -> None:
    graph, x = graph_with_activation()
    OPERATORS[operator](graph, x)
    (node,) = [node for node in graph.graph if is_projection(node)]
    assert stored_weight(node) is None


def test_a_dequantized_weight_has_widths_and_no_values() -> None:
    graph, x = graph_with_activation()
    quantized = graph.constant("w", np.ones((IN, OUT), np.int8))
    scale = graph.constant("s", np.array(0.1, np.float32))
    weight = graph.add("DequantizeLinear", [quantized, scale], AT)
    projection = read(graph.add("MatMul", [x, weight], AT))
    assert (projection.in_width, projection.out_width) == (IN, OUT)
    assert stored_weight(projection.node) is None


def test_a_computed_weight_has_neither_values_nor_widths() -> None:
    graph, x = graph_with_activation()
    stored = graph.constant("w", np.ones((IN, OUT), np.float32))
    weight = graph.add("Neg", [stored], AT)
    result = graph.add("MatMul", [x, weight], AT)
    projection = read(result)
    assert (projection.in_width, projection.out_width) == (None, None)
    assert stored_weight(projection.node) is None
    finish(graph, result)
    assert isinstance(found := graph.find("layers.0.neuron"), Refusal)
    assert "width" in str(found)


def test_known_shapes_stand_in_for_a_computed_weight() -> None:
    graph, x = graph_with_activation()
    x.shape = ir.Shape(["B", "T", IN])
    weight = graph.add("Identity", [graph.input("w", [IN, OUT])], AT)
    finish(graph, graph.add("MatMul", [x, weight], AT))
    place = graph.find("layers.0.neuron")
    assert isinstance(place, Place)
    assert place.width == IN


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_weight_tells_the_dtype_where_values_say_nothing(dtype: Any) -> None:
    graph, x = graph_with_activation()
    assert x.dtype is None
    result = graph.add("MatMul", [x, graph.constant("w", W.astype(dtype))], AT)
    assert read(result).dtype == ir.DataType.from_numpy(np.dtype(dtype))


def test_the_scales_tell_the_dtype_of_block_quantized_weights() -> None:
    graph, x = graph_with_activation()
    graph.constant("w_scales", np.ones(OUT, np.float16))
    assert read(blocks("MatMulNBits")(graph, x)).dtype == ir.DataType.FLOAT16


def test_a_product_of_activations_is_no_projection_to_steer() -> None:
    graph, x = graph_with_activation()
    scores = graph.constant("scores", np.zeros((2, 3, IN, OUT), np.float32))
    assert "4 dimensions" in refusal(graph.add("MatMul", [x, scores], AT))


@pytest.mark.parametrize("operator", ["MatMul", "DynamicQuantizeMatMul"])
def test_a_constant_is_no_activation(operator: str) -> None:
    graph, _ = graph_with_activation()
    constant = graph.constant("c", np.zeros((3, IN), np.float32))
    assert "reads no activation" in refusal(OPERATORS[operator](graph, constant))


def test_shared_quantized_activations_are_refused_by_name() -> None:
    graph, x = graph_with_activation()
    finish(graph, integer(graph, x))
    (node,) = [node for node in graph.graph if is_projection(node)]
    twin = graph.add("MatMulInteger", list(node.inputs), "model.layers.0.mlp.twin")
    found = graph.find("layers.0.neuron")
    assert isinstance(found, Refusal)
    assert "shares its quantized activation" in str(found)
    assert str(node_of(twin).name) in str(found)


def test_an_integer_product_without_a_quantizer_is_refused() -> None:
    graph = PlainGraph()
    x = graph.input("x", ["B", "T", IN], ir.DataType.UINT8)
    weight = graph.constant("w", np.ones((IN, OUT), np.uint8))
    assert "no activation that DynamicQuantizeLinear makes" in refusal(
        graph.add("MatMulInteger", [x, weight], AT)
    )


@pytest.mark.parametrize(
    ("op", "domain"), [("MatMul", MICROSOFT), ("Conv", ""), ("Einsum", ""), ("Gemm", "other")]
)
def test_other_operators_are_no_projections(op: str, domain: str) -> None:
    graph, x = graph_with_activation()
    weight = graph.constant("w", W)
    assert not is_projection(node_of(graph.add(op, [x, weight], AT, domain=domain)))


@pytest.mark.parametrize("inputs", [0, 1])
@pytest.mark.parametrize("operator", sorted({name.partition("-")[0] for name in OPERATORS}))
def test_nodes_that_lack_inputs_are_refused(operator: str, inputs: int) -> None:
    graph, x = graph_with_activation()
    default = operator in ("MatMul", "Gemm", "MatMulInteger")
    domain = "" if default else MICROSOFT
    finish(graph, graph.add(operator, [x][:inputs], AT, domain=domain))
    found = graph.find("layers.0.neuron")
    assert isinstance(found, Refusal)
    assert str(found).startswith("layers.0.neuron: ")
