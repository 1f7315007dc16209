"""Sums that fused norms hide: taken out with every value kept, and steered like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builder_decoder import BuilderDecoder
from plain_graphs import MICROSOFT, PlainGraph
from steering_formula import steering

from austeer.adapters import Refusal
from austeer.graphs import Place, apply_plan, graft_model, plan_switchable_graft
from austeer.graphs.locating.skip_norm import is_skip_norm, norm_width, split_skip_norm

WIDTH = 5
SIMPLE, FULL = "SkipSimplifiedLayerNormalization", "SkipLayerNormalization"
RNG = np.random.default_rng(3)
X, SKIP = (RNG.normal(size=(2, 3, WIDTH)).astype(np.float32) for _ in range(2))
GAMMA, BETA, BIAS = (RNG.normal(size=WIDTH).astype(np.float32) for _ in range(3))
# norm, beta, bias
VARIANTS = [
    (SIMPLE, False, False),
    (SIMPLE, False, True),
    (FULL, False, False),
    (FULL, True, False),
    (FULL, False, True),
    (FULL, True, True),
]
Run = Callable[..., list[np.ndarray]]


class OneNorm(PlainGraph):
    """`out = norm(x + skip)`, with the sum as a second output, read by a node, or absent."""

    def __init__(
        self, norm: str, beta: bool, bias: bool, total: str, opset: int = 20, **settings: Any
    ) -> None:
        super().__init__(opset)
        self.parts = (norm, beta, bias, settings.get("epsilon", 1e-12))
        inputs: list[ir.Value | None] = [
            self.input("x", ["B", "T", WIDTH]),
            self.input("skip", ["B", "T", WIDTH]),
            self.constant("gamma", GAMMA),
        ]
        if norm == FULL:
            inputs.append(self.constant("beta", BETA) if beta else None)
        inputs.append(self.constant("bias", BIAS) if bias else None)
        while inputs[-1] is None:
            inputs.pop()
        outputs = ["out", *([] if total == "absent" else ["", "", "sum"])]
        out = self.add(
            norm, inputs, "model.norm", outputs=outputs, domain=MICROSOFT, **settings
        )
        self.node = out.producer()
        self.output(out, ["B", "T", WIDTH])
        if total == "output":
            self.output(self.node.outputs[3], ["B", "T", WIDTH])
        if total == "read":
            self.output(self.add("Neg", [self.node.outputs[3]], "x"), ["B", "T", WIDTH])

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The norm and the sum in float64."""
        norm, beta, bias, epsilon = self.parts
        total = X.astype(np.float64) + SKIP + (BIAS if bias else 0)
        centred = total if norm == SIMPLE else total - total.mean(-1, keepdims=True)
        size = np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        return centred / size * GAMMA + (BETA if beta else 0), total


def check(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("total", ["output", "read", "absent"])
@pytest.mark.parametrize(("norm", "beta", "bias"), VARIANTS)
def test_a_split_keeps_every_value(
    norm: str, beta: bool, bias: bool, total: str, run_onnx: Run
) -> None:
    graph = OneNorm(norm, beta, bias, total, epsilon=0.01)
    feeds = {"x": X, "skip": SKIP}
    before = run_onnx(graph.model, feeds)
    normed, added = graph.expected()
    value = split_skip_norm(graph.node, "/model/norm/Add")
    assert not [node for node in graph.graph if is_skip_norm(node)]
    after = run_onnx(graph.model, feeds)
    for found in (before, after):
        check(found[0], normed)
        if total != "absent":
            check(found[1], added if total == "output" else -added)
    assert graph.graph.outputs[0].name == "out"
    graph.graph.outputs.append(value)
    check(run_onnx(graph.model, feeds)[-1], added)


@pytest.mark.parametrize("norm", [SIMPLE, FULL])
def test_a_norm_without_epsilon_has_onnxruntimes(norm: str, run_onnx: Run) -> None:
    graph = OneNorm(norm, False, False, "absent")
    tiny = {"x": X * 1e-7, "skip": SKIP * 1e-7}  # whose square is no larger than epsilon
    (before,) = run_onnx(graph.model, tiny)
    split_skip_norm(graph.node, "sum")
    (after,) = run_onnx(graph.model, tiny)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("opset", [15, 16, 17, 22])
@pytest.mark.parametrize("norm", [SIMPLE, FULL])
def test_a_split_runs_at_every_opset(norm: str, opset: int, run_onnx: Run) -> None:
    graph = OneNorm(norm, norm == FULL, True, "output", opset)
    split_skip_norm(graph.node, "sum")
    found = run_onnx(graph.model, {"x": X, "skip": SKIP})
    for value, expected in zip(found, graph.expected(), strict=True):
        check(value, expected)


def test_a_skip_that_broadcasts(run_onnx: Run) -> None:
    graph = OneNorm(FULL, True, False, "output")
    graph.graph.inputs[1].shape = ir.Shape(["T", WIDTH])
    feeds = {"x": X, "skip": SKIP[0]}
    before = run_onnx(graph.model, feeds)
    split_skip_norm(graph.node, "sum")
    for found, expected in zip(run_onnx(graph.model, feeds), before, strict=True):
        check(found, expected)


def test_the_sum_keeps_the_name_that_readers_know(run_onnx: Run) -> None:
    graph = OneNorm(SIMPLE, False, True, "output")
    split_skip_norm(graph.node, "sum")
    assert [value.name for value in graph.graph.outputs] == ["out", "sum"] or [
        value.name for value in graph.graph.outputs
    ] == ["out", "sum/output_0"]
    names = [value.name for node in graph.graph for value in node.outputs]
    assert len(names) == len(set(names))


def test_recognition() -> None:
    graph = OneNorm(SIMPLE, False, False, "absent")
    assert is_skip_norm(graph.node)
    assert norm_width(graph.node) == WIDTH
    graph.node.inputs[2].shape = None
    assert norm_width(graph.node) is None
    for op, domain in ((SIMPLE, ""), ("LayerNormalization", ""), ("SkipGroupNorm", MICROSOFT)):
        assert not is_skip_norm(ir.node(op, [], domain=domain))


# Whole decoders whose sums are all hidden

DECODER_X = np.random.default_rng(7).normal(size=(2, 5, 4)).astype(np.float32)
UNITS = {
    "attention": ([3, 0], [0.5, -1.5]),
    "neuron": ([5, 1, 2], [2.0, -0.25, 1.0]),
    "ffn": ([2, 0], [-0.8, 1.4]),
    "layer": ([1, 3], [0.3, 1.9]),
}
NORMS = [(SIMPLE, False), (FULL, False), (FULL, True)]


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("component", [*UNITS, "all"])
@pytest.mark.parametrize(("norm", "beta"), NORMS)
def test_every_component_equals_the_formula(
    norm: str, beta: bool, component: str, rank: int, make_adapter: Any, run_onnx: Run
) -> None:
    decoder = BuilderDecoder(norm=norm, beta=beta, bias="add")
    (base,) = run_onnx(decoder.model, {"x": DECODER_X})
    agree(base, decoder.compute(DECODER_X, {}))
    kinds = UNITS if component == "all" else [component]
    adapter = make_adapter({f"layers.{i}.{c}": UNITS[c] for i in (0, 1) for c in kinds}, rank)
    graft_model(decoder.model, adapter, 0.7)
    (steered,) = run_onnx(decoder.model, {"x": DECODER_X})
    agree(steered, decoder.compute(DECODER_X, steering(adapter, scale=0.7)))
    assert np.abs(steered - base).max() > 0.05


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("bias", ["", "add", "fused"])
@pytest.mark.parametrize(("norm", "beta"), NORMS)
def test_each_layers_output_alone(
    norm: str, beta: bool, bias: str, layer: int, make_adapter: Any, run_onnx: Run
) -> None:
    """The last layer's sum has no output of its own: only the final norm computes it."""
    decoder = BuilderDecoder(3, norm, beta=beta, bias=bias)
    adapter = make_adapter({f"layers.{layer}.layer": UNITS["layer"]}, rank=1)
    graft_model(decoder.model, adapter)
    hidden = [node for node in decoder.graph if is_skip_norm(node)]
    assert len(hidden) == 5  # of six, one was split
    (steered,) = run_onnx(decoder.model, {"x": DECODER_X})
    agree(steered, decoder.compute(DECODER_X, steering(adapter)))
    assert np.abs(steered - decoder.compute(DECODER_X, {})).max() > 0.05


@pytest.mark.parametrize("norm", [SIMPLE, FULL])
def test_a_bias_that_the_norm_adds_is_no_part_of_the_value(norm: str) -> None:
    """onnxruntime's optimizer moves it there; the site is the projection's whole output."""
    decoder = BuilderDecoder(norm=norm, bias="fused")
    found = decoder.find("layers.0.ffn")
    assert isinstance(found, Refusal)
    assert f"bias is added inside /model/layers.1/input_layernorm/{norm}" in str(found)
    for component in ("attention", "neuron", "layer"):
        assert isinstance(decoder.find(f"layers.0.{component}"), Place)


def test_two_slots_at_a_hidden_sum_split_it_once(make_adapter: Any, run_onnx: Run) -> None:
    decoder = BuilderDecoder()
    first = make_adapter({"layers.0.layer": UNITS["layer"]})
    second = make_adapter({"layers.0.layer": ([1, 2], [-0.5, 0.75])})
    plan = plan_switchable_graft([first, second], together=True)
    apply_plan(decoder.model, plan)
    assert len([node for node in decoder.graph if is_skip_norm(node)]) == 3
    feeds = {"x": DECODER_X}
    agree(run_onnx(decoder.model, feeds)[0], decoder.compute(DECODER_X, {}))
    feeds |= plan.switched[0] | plan.switched[1]
    expected = decoder.compute(DECODER_X, steering(first, second))
    agree(run_onnx(decoder.model, feeds)[0], expected)


def test_the_grafted_decoder_is_valid_and_names_stay_unique(make_adapter: Any) -> None:
    decoder = BuilderDecoder(norm=FULL, beta=True)
    adapter = make_adapter({f"layers.{i}.layer": UNITS["layer"] for i in (0, 1)})
    graft_model(decoder.model, adapter)
    onnx.checker.check_model(ir.to_proto(decoder.model))
    names = [value.name for node in decoder.graph for value in node.outputs if value.name]
    assert len(names) == len(set(names))


def test_the_place_of_a_hidden_sum_names_its_norm() -> None:
    decoder = BuilderDecoder()
    place = decoder.find("layers.1.layer")
    assert isinstance(place, Place)
    assert place.skip_norm is not None
    assert place.skip_norm.name == "/model/layers.2/final_norm_layernorm/" + SIMPLE
    assert place.module == "model.layers.1"
    assert place.width == 4
    shown = decoder.find("layers.1.ffn")
    assert isinstance(shown, Place)
    assert shown.skip_norm is None
    assert shown.value is decoder.values["1.down"]


def test_a_norm_behind_the_projection_is_on_the_way(make_adapter: Any, run_onnx: Run) -> None:
    """Gemma normalizes what the MLP made before it is added."""
    decoder = BuilderDecoder(layers=1, last="down_proj")
    down = decoder.values["0.down"]
    (norm,) = down.consumers()
    gamma = decoder.constant("post", np.full(4, 2.0, np.float32))
    scaled = ir.node(
        "SimplifiedLayerNormalization",
        [down, gamma],
        {"axis": -1, "epsilon": 1e-5},
        name="/model/layers.0/post_feedforward_layernorm/LayerNorm",
        outputs=[ir.Value(name="post_out")],
    )
    norm.replace_input_with(1, scaled.outputs[0])
    decoder.graph.insert_before(norm, scaled)
    place = decoder.find("layers.0.layer")
    assert isinstance(place, Place)
    assert place.skip_norm is norm
    assert place.value is scaled.outputs[0]


def test_a_sum_of_something_else_is_not_taken_for_the_layers() -> None:
    decoder = BuilderDecoder()
    (norm,) = decoder.values["1.down"].consumers()
    other = ir.node("Tanh", [decoder.values["1.down"]], name="/model/other/Tanh")
    other.outputs[0].name = "other"
    decoder.graph.insert_before(norm, other)
    norm.replace_input_with(1, other.outputs[0])
    found = decoder.find("layers.1.layer")
    assert isinstance(found, Refusal)
    assert "expected one value" in str(found)


def test_a_projection_that_two_nodes_read_hides_no_sum() -> None:
    decoder = BuilderDecoder()
    decoder.add("Neg", [decoder.values["1.down"]], "probe")
    assert isinstance(decoder.find("layers.1.layer"), Refusal)


@pytest.mark.parametrize("inputs", [1, 2])
def test_a_norm_that_lacks_inputs_is_refused(inputs: int) -> None:
    decoder = BuilderDecoder()
    (norm,) = decoder.values["1.down"].consumers()
    norm.replace_input_with(0, norm.inputs[1])
    norm.resize_inputs(inputs)
    assert isinstance(decoder.find("layers.1.layer"), Refusal)


def test_a_sum_inside_the_layer_is_not_its_output() -> None:
    """A parallel residual: attention + MLP is a node of its own, the residual sum is hidden."""
    graph = PlainGraph()
    h = graph.input("h", ["B", "T", WIDTH])
    weight = graph.constant("w", np.eye(WIDTH, dtype=np.float32))
    attention = graph.add("MatMul", [h, weight], "model.layers.0.self_attn.o_proj")
    mlp = graph.add("MatMul", [h, weight], "model.layers.0.mlp.down_proj")
    inner = graph.add("Add", [attention, mlp], "model.layers.0")
    parts = [inner, h, graph.constant("gamma", GAMMA)]
    out = graph.add(SIMPLE, parts, outputs=["out", "", "", "sum"], domain=MICROSOFT)
    graph.output(out, ["B", "T", WIDTH])
    place = graph.find("layers.0.layer")
    assert isinstance(place, Place)
    assert place.skip_norm is out.producer()


def test_a_hidden_sum_that_the_graph_gives_out_keeps_its_name(
    make_adapter: Any, run_onnx: Run
) -> None:
    decoder = BuilderDecoder()
    place = decoder.find("layers.0.layer")
    assert isinstance(place, Place)
    assert place.skip_norm is not None
    hidden = place.skip_norm.outputs[3]
    hidden.shape, hidden.dtype = ir.Shape(["B", "T", 4]), ir.DataType.FLOAT
    decoder.graph.outputs.append(hidden)
    names = [value.name for value in decoder.graph.outputs]
    before = run_onnx(decoder.model, {"x": DECODER_X})
    graft_model(decoder.model, make_adapter({"layers.0.layer": ([1], [1.0])}))
    assert [value.name for value in decoder.graph.outputs] == names
    after = run_onnx(decoder.model, {"x": DECODER_X})
    np.testing.assert_allclose(after[1], before[1] * [1, 2, 1, 1], rtol=1e-5)
