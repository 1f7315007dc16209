"""Sites are found by rule on module paths and edges, or refused with candidates."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from builder_decoder import BuilderDecoder
from plain_graphs import NAME_SCOPES, PlainGraph

from austeer.adapters import Refusal, Site
from austeer.adapters.architectures import architecture_of
from austeer.graphs import Place, SiteLocator, graft_model

SITES = {
    "layers.1.attention": ("1.mixed", 4),
    "layers.1.neuron": ("1.act", 24),
    "layers.1.ffn": ("1.down_out", 4),
    "layers.1.layer": ("1.out", 4),
}


def find(toy: Any, key: str) -> Place | Refusal:
    return SiteLocator(toy.graph, architecture_of("llama")).find(Site.parse(key))


def refusal(toy: Any, key: str) -> str:
    found = find(toy, key)
    assert isinstance(found, Refusal)
    assert str(found).startswith(f"{key}: ")
    return str(found)


@pytest.mark.parametrize("wrapper", ["", "decoder", "outer.decoder"])
@pytest.mark.parametrize("key", SITES)
def test_every_component_under_any_wrapper(
    key: str, wrapper: str, toy: Callable[..., Any]
) -> None:
    graph = toy(wrapper=wrapper)
    place = find(graph, key)
    name, width = SITES[key]
    assert isinstance(place, Place)
    assert place.value is graph.values[name]
    assert place.width == width
    assert place.site == Site.parse(key)


def without_model(graph: Any) -> Any:
    """As optimum exports OPT: the inner model alone, without the outer one's name."""
    for node in graph.graph:
        key = "pkg.torch.onnx.name_scopes"
        node.metadata_props[key] = node.metadata_props[key].replace("model.layers", "layers")
    return graph


@pytest.mark.parametrize("key", SITES)
def test_every_component_without_the_first_name(key: str, toy: Callable[..., Any]) -> None:
    graph = without_model(toy(layers=12))
    place = find(graph, key)
    name, width = SITES[key]
    assert isinstance(place, Place)
    assert place.value is graph.values[name]
    assert (place.width, place.module.split(".")[:2]) == (width, ["layers", key.split(".")[1]])


def test_a_path_without_its_first_name_is_whole_or_none(toy: Callable[..., Any]) -> None:
    """Not behind a wrapper, where it may be another model; the whole path comes first."""
    graph = without_model(toy(layers=2))
    assert "nearest: layers." in refusal(graph, "layers.7.ffn")
    text = refusal(without_model(toy(layers=2, wrapper="vision")), "layers.0.ffn")
    assert "nearest: vision.layers." in text
    both = toy(layers=2)
    both.add("Neg", [both.values["1.out"]], "twin", "layers.0.mlp.down_proj")
    place = find(both, "layers.0.ffn")
    assert isinstance(place, Place)
    assert place.value is both.values["0.down_out"]


def test_two_projections_without_the_first_name(toy: Callable[..., Any]) -> None:
    graph = without_model(toy(layers=2))
    graph.add("Neg", [graph.values["1.out"]], "twin", "layers.0.attn.o_proj")
    text = refusal(graph, "layers.0.attention")
    assert "ambiguous" in text
    assert "layers.0.attn.o_proj, layers.0.self_attn.o_proj" in text


def test_input_sites_redirect_the_projection_only(toy: Callable[..., Any]) -> None:
    graph = toy()
    graph.add("Neg", [graph.values["0.act"]], "probe", "model.probe", 24)
    place = find(graph, "layers.0.neuron")
    assert isinstance(place, Place)
    assert place.readers is not None
    assert [reader.name for reader in place.readers] == ["node_0.product"]


@pytest.mark.parametrize("key", ["layers.0.ffn", "layers.0.layer"])
def test_output_sites_redirect_every_reader(key: str, toy: Callable[..., Any]) -> None:
    place = find(toy(), key)
    assert isinstance(place, Place)
    assert place.readers is None


def test_projection_without_bias(toy: Callable[..., Any]) -> None:
    graph = toy(bias=False)
    place = find(graph, "layers.0.ffn")
    assert isinstance(place, Place)
    assert place.value is graph.values["0.product"]


def test_layer_numbers_are_not_confused(toy: Callable[..., Any]) -> None:
    graph = toy(layers=12)
    for key, name in (("layers.1.layer", "1.out"), ("layers.11.layer", "11.out")):
        place = find(graph, key)
        assert isinstance(place, Place)
        assert place.value is graph.values[name]


def test_layer_output_that_is_a_graph_output(toy: Callable[..., Any]) -> None:
    graph = toy()
    graph.graph.outputs.append(graph.values["0.out"])
    place = find(graph, "layers.0.layer")
    assert isinstance(place, Place)
    assert place.value is graph.values["0.out"]


def test_cache_and_shapes_that_leave_a_layer_are_not_its_output(
    toy: Callable[..., Any],
) -> None:
    graph = toy()
    present = graph.add("Neg", [graph.values["0.mixed"]], "present", "model.layers.0.self_attn")
    graph.graph.outputs.append(present)
    shape = graph.add("Shape", [graph.values["0.product"]], "s", "model.layers.0.mlp.down_proj")
    shape.dtype = ir.DataType.INT64
    graph.graph.outputs.append(shape)
    for key, name in (("layers.0.layer", "0.out"), ("layers.0.ffn", "0.down_out")):
        place = find(graph, key)
        assert isinstance(place, Place)
        assert place.value is graph.values[name]


def test_missing_layer_names_the_nearest(toy: Callable[..., Any]) -> None:
    text = refusal(toy(), "layers.7.attention")
    assert "model.layers.7.self_attn.o_proj is not in the graph" in text
    assert "model.layers.1.self_attn.o_proj" in text


def test_graph_without_module_paths(toy: Callable[..., Any]) -> None:
    graph = toy()
    for node in graph.graph:
        node.metadata_props.clear()
    assert "carry no module paths" in refusal(graph, "layers.0.ffn")


def test_malformed_module_paths_count_as_none(toy: Callable[..., Any]) -> None:
    graph = toy()
    for node in graph.graph:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model"
    assert "carry no module paths" in refusal(graph, "layers.0.ffn")


def test_two_models_in_one_graph_are_ambiguous(toy: Callable[..., Any]) -> None:
    graph = toy(wrapper="first")
    graph.wrapper = "second"
    graph.add("Neg", [graph.values["1.out"]], "twin", "model.layers.0.self_attn.o_proj")
    text = refusal(graph, "layers.0.attention")
    assert "ambiguous" in text
    assert "first.model" in text
    assert "second.model" in text


def test_projection_used_twice(toy: Callable[..., Any]) -> None:
    graph = toy()
    again = [graph.values["0.mixed"], graph.values["0.o_out"]]
    graph.add("MatMul", again, "again", "model.layers.0.self_attn.o_proj")
    assert "expected one matrix product, found 2" in refusal(graph, "layers.0.attention")


def test_projection_replaced_by_something_else(toy: Callable[..., Any]) -> None:
    graph = toy()
    producer = graph.values["0.o_out"].producer()
    producer.op_type = "Einsum"
    assert "found 0 among Einsum" in refusal(graph, "layers.0.attention")


def test_transposed_activation(toy: Callable[..., Any]) -> None:
    graph = toy()
    producer = graph.values["0.o_out"].producer()
    producer.op_type = "Gemm"
    producer.attributes["transA"] = ir.AttrInt64("transA", 1)
    assert "transposes its activation" in refusal(graph, "layers.0.attention")


def test_constant_instead_of_activation(toy: Callable[..., Any]) -> None:
    graph = toy()
    producer = graph.values["0.o_out"].producer()
    producer.replace_input_with(0, graph.graph.initializers["1.up"])
    assert "reads no activation" in refusal(graph, "layers.0.attention")


def test_width_comes_from_the_weight_where_the_graph_is_silent(toy: Callable[..., Any]) -> None:
    graph = toy()
    for value in graph.values.values():
        value.shape = value.type = None
    for key, (name, width) in SITES.items():
        place = find(graph, key)
        assert isinstance(place, Place)
        assert (place.value, place.width) == (graph.values[name], width)
        assert place.dtype == ir.DataType.FLOAT


def test_unknown_width(toy: Callable[..., Any]) -> None:
    graph = toy()
    graph.values["0.out"].shape = graph.values["0.product"].shape = None
    weight = graph.graph.initializers.pop("0.down")
    weight.const_value = weight.shape = None
    graph.graph.inputs.append(weight)
    assert "width of 0.out" in refusal(graph, "layers.0.layer")


def test_two_values_leave_the_projection(toy: Callable[..., Any]) -> None:
    graph = toy()
    graph.graph.outputs.append(graph.values["0.product"])
    text = refusal(graph, "layers.0.ffn")
    assert "0.product, 0.down_out" in text


def test_layer_whose_sum_was_fused_away(toy: Callable[..., Any]) -> None:
    graph = toy()
    graph.values["0.out"].producer().op_type = "SkipNormalization"
    assert "expected one value" in refusal(graph, "layers.0.layer")


# Graphs of the onnxruntime-genai builder and of optimum


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("last", ["down_proj", "fc2"])
@pytest.mark.parametrize("bias", ["", "add"])
def test_names_of_the_genai_builder_for_every_architecture(
    last: str, bias: str, model_type: str
) -> None:
    decoder = BuilderDecoder(last=last, bias=bias)
    for layer in (0, 1):
        for component, name, width in (
            ("attention", "mixed", 4),
            ("neuron", "act", 24),
            ("ffn", "down", 4),
        ):
            place = decoder.find(f"layers.{layer}.{component}", model_type)
            assert isinstance(place, Place), place
            assert place.value is decoder.values[f"{layer}.{name}"]
            assert place.width == width
        place = decoder.find(f"layers.{layer}.layer", model_type)
        assert isinstance(place, Place), place
        assert place.skip_norm is not None


def test_a_missing_layer_of_a_built_graph_names_the_nearest() -> None:
    found = BuilderDecoder().find("layers.7.attention")
    assert isinstance(found, Refusal)
    assert "nearest: model.layers." in str(found)


@pytest.mark.parametrize("key", SITES)
def test_node_names_do_what_metadata_does(key: str, toy: Callable[..., Any]) -> None:
    """Optimum's way: the path is in the name, with the layer number behind a dot."""
    graph = toy()
    for node in graph.graph:
        scopes = ast.literal_eval(node.metadata_props.pop(NAME_SCOPES))
        folder = re.sub(r"\.(?!\d)", "/", scopes[-2])
        node.name = f"/{folder}/{node.op_type}"
    place = find(graph, key)
    name, width = SITES[key]
    assert isinstance(place, Place)
    assert place.value is graph.values[name]
    assert place.width == width


def test_the_bias_of_a_projection(toy: Callable[..., Any]) -> None:
    graph = toy()
    locator = SiteLocator(graph.graph, architecture_of("llama"))
    bias = locator.bias(Site.parse("layers.1.ffn"))
    assert bias is not None
    assert bias.numpy().tolist() == graph.weights["1.bias"].tolist()
    assert locator.bias(Site.parse("layers.1.attention")) is None
    assert locator.bias(Site.parse("layers.5.ffn")) is None


def test_the_bias_of_a_gemm() -> None:
    graph = PlainGraph()
    x = graph.input("x", ["rows", 3])
    weight, bias = np.zeros((3, 2), np.float32), np.array([5, 7], np.float32)
    parts = [x, graph.constant("w", weight), graph.constant("b", bias)]
    result = graph.add("Gemm", parts, "transformer.h.0.mlp.c_proj")
    graph.output(result, ["rows", 2])
    locator = SiteLocator(graph.graph, architecture_of("gpt2"))
    found = locator.bias(Site.parse("layers.0.ffn"))
    assert found is not None
    assert found.numpy().tolist() == [5, 7]


def test_steering_nodes_are_not_part_of_a_module(
    toy: Callable[..., Any], make_adapter: Callable[..., Any]
) -> None:
    """A graft carries its module's path; what is found does not depend on it."""
    graph = toy()
    graft_model(graph.model, make_adapter({"layers.1.ffn": ([1], [0.5])}))
    place = find(graph, "layers.1.ffn")
    assert isinstance(place, Place)
    assert place.value is graph.values["1.down_out"]


def test_an_output_quantized_with_a_fixed_range_is_refused() -> None:
    graph = PlainGraph()
    x = graph.input("x", ["B", "T", 4])
    weight = graph.constant("w", np.eye(4, dtype=np.float32))
    down = graph.add("MatMul", [x, weight], "model.layers.0.mlp.down_proj")
    limits = [
        graph.constant("s", np.array(0.1, np.float32)),
        graph.constant("z", np.array(0, np.uint8)),
    ]
    quantized = graph.add("QuantizeLinear", [down, *limits])
    graph.output(graph.add("DequantizeLinear", [quantized, *limits]), ["B", "T", 4])
    found = graph.find("layers.0.ffn")
    assert isinstance(found, Refusal)
    assert "range that was fixed without steering" in str(found)


def test_layers_in_the_branches_of_a_merged_model() -> None:
    graph = PlainGraph(named=False)
    x = graph.input("x", ["B", "T", 4])
    graph.output(graph.add("If", [x]), ["B", "T", 4])
    found = graph.find("layers.0.ffn")
    assert isinstance(found, Refusal)
    assert "before it was merged" in str(found)
