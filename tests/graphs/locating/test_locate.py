"""Sites are found by rule on module paths and edges, or refused with candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from austeer.adapters import Refusal, Site
from austeer.adapters.architectures import architecture_of
from austeer.graphs import Place, SiteLocator

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
