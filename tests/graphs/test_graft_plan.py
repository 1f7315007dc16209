"""Plans: strength that a run sets, and sites that a run fills with one of several adapters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_sessions import FUNCTIONS_AND_KERNELS, open_session, run_session
from steering_formula import UNITS, steering

from austeer.adapters import AdapterConfig, GraphError, SiteError, SteeringAdapter
from austeer.graphs import (
    GraftPlan,
    ScaleAs,
    apply_plan,
    graft_model,
    plan_graft,
    plan_switchable_graft,
)
from austeer.graphs.adapter_file import write_adapter_file
from austeer.graphs.opset import MAX_RANK

X = np.random.default_rng(7).normal(size=(2, 5, 4)).astype(np.float32)
FEEDS = {"x": X}
OTHERS = {
    "attention": ([1, 2, 0, 3], [0.75, -0.5, 1.25, 0.1]),
    "neuron": ([20, 5], [-1.5, 0.5]),
    "ffn": ([0, 2, 3], [0.4, 1.1, -0.3]),
    "layer": ([3], [-0.6]),
}
SCALE = "steering_scale"
EXACT = {"prepack": False}


def everywhere(units: dict[str, Any], layers: Sequence[int] = (0, 1)) -> dict[str, Any]:
    return {f"layers.{i}.{component}": u for i in layers for component, u in units.items()}


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def inputs_of(model: ir.Model) -> list[str]:
    return [str(value.name) for value in model.graph.inputs]


@pytest.fixture
def adapters(make_adapter: Any) -> Callable[[int], list[SteeringAdapter]]:
    """Two adapters that share sites and units, with k and rank of their own."""

    def make(rank: int) -> list[SteeringAdapter]:
        first = make_adapter(everywhere(UNITS), rank)
        second = make_adapter(everywhere(OTHERS, [1]), rank + 2 if rank else 0)
        return [first, second]

    return make


@pytest.fixture
def separately(toy: Any) -> Callable[..., np.ndarray]:
    """What a model grafted with one adapter alone says."""

    def run(
        adapter: SteeringAdapter, scale: float = 1.0, kernels: bool = False, **options: Any
    ) -> np.ndarray:
        graph = toy()
        graft_model(graph.model, adapter, scale)
        session = open_session(graph.model, kernels=kernels, **(EXACT | options))
        return run_session(session, FEEDS)[0]

    return run


@pytest.fixture
def switchable(
    toy: Any, tmp_path: Path
) -> Callable[..., tuple[ir.Model, GraftPlan, list[Path]]]:
    """A switchable toy and one adapter file for each adapter."""

    def build(adapters: Sequence[SteeringAdapter], *args: Any, **options: Any) -> Any:
        plan = plan_switchable_graft(adapters, *args, **options)
        model = toy().model
        apply_plan(model, plan)
        onnx.checker.check_model(ir.to_proto(model))
        files = []
        for number, values in enumerate(plan.switched):
            files.append(tmp_path / f"{number}.onnx_adapter")
            write_adapter_file(files[-1], values)
        return model, plan, files

    return build


@pytest.mark.parametrize("switchable", [False, True])
def test_a_rank_that_the_kernels_do_not_take(switchable: bool, make_adapter: Any) -> None:
    def plan(rank: int) -> GraftPlan:
        adapter = make_adapter({"layers.0.ffn": UNITS["ffn"]}, rank)
        return plan_switchable_graft([adapter]) if switchable else plan_graft(adapter)

    assert plan(MAX_RANK).nodes
    with pytest.raises(GraphError, match=r"layers\.0\.ffn: .* rank 65, .* kernels .* 64"):
        plan(MAX_RANK + 1)


def test_the_largest_rank_is_that_of_the_kernels() -> None:
    sources = Path(__file__).resolve().parents[2] / "graphs" / "csrc"
    (named,) = re.findall(r"kMaxRank = (\d+);", (sources / "steer.h").read_text())
    assert int(named) == MAX_RANK
    assert f"a rank r from 1 to {MAX_RANK}" in (sources / "kernel.cc").read_text()


# Strength as an input


@pytest.mark.parametrize("kernels", FUNCTIONS_AND_KERNELS)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("scale_as", [ScaleAs.REQUIRED, ScaleAs.OPTIONAL])
def test_a_fed_strength_is_the_strength(
    scale_as: ScaleAs, rank: int, kernels: bool, toy: Any, make_adapter: Any, separately: Any
) -> None:
    adapter = make_adapter(everywhere(UNITS), rank)
    graph = toy()
    base = run_session(open_session(graph.model, **EXACT), FEEDS)[0]
    apply_plan(graph.model, plan_graft(adapter, 0.25, scale_as))
    onnx.checker.check_model(ir.to_proto(graph.model))
    session = open_session(graph.model, kernels=kernels, **EXACT)
    for scale in (0.6, -1.0, 3.0):
        feeds = FEEDS | {SCALE: np.array([scale], np.float32)}
        found = run_session(session, feeds)[0]
        assert np.array_equal(found, separately(adapter, scale, kernels))
        close(found, graph.compute(X, steering(adapter, scale=scale)))
    zero = FEEDS | {SCALE: np.zeros(1, np.float32)}
    assert np.array_equal(run_session(session, zero)[0], base)


def test_an_optional_strength_has_the_plans_default(
    toy: Any, make_adapter: Any, separately: Any
) -> None:
    adapter = make_adapter(everywhere(UNITS), 1)
    graph = toy()
    apply_plan(graph.model, plan_graft(adapter, 0.25, ScaleAs.OPTIONAL))
    found = run_session(open_session(graph.model, **EXACT), FEEDS)[0]
    assert np.array_equal(found, separately(adapter, 0.25))
    assert not np.array_equal(found, separately(adapter, 1.0))


def test_a_required_strength_must_be_fed(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    adapter = make_adapter({"layers.0.ffn": UNITS["ffn"]})
    apply_plan(graph.model, plan_graft(adapter, scale_as=ScaleAs.REQUIRED))
    assert SCALE not in graph.graph.initializers
    with pytest.raises(Exception, match=SCALE):
        run_session(open_session(graph.model), FEEDS)


@pytest.mark.parametrize("scale_as", list(ScaleAs))
def test_inputs_and_constants_of_a_fixed_graft(
    scale_as: ScaleAs, toy: Any, make_adapter: Any
) -> None:
    graph = toy()
    apply_plan(graph.model, plan_graft(make_adapter(everywhere(UNITS)), 2.0, scale_as))
    fed = scale_as is not ScaleAs.CONSTANT
    assert inputs_of(graph.model) == ["x", *([SCALE] if fed else [])]
    assert ("austeer.scale" in graph.graph.initializers) != fed
    if fed:
        value = graph.graph.inputs[1]
        assert value.dtype == ir.DataType.FLOAT
        assert [int(dim) for dim in value.shape] == [1]
    default = graph.graph.initializers.get(SCALE)
    assert (default is not None) == (scale_as is ScaleAs.OPTIONAL)
    if default is not None:
        assert default.const_value.numpy().tolist() == [2.0]


def test_a_model_with_such_an_input_of_its_own_is_refused(toy: Any, make_adapter: Any) -> None:
    graph = toy()
    own = ir.val(SCALE, ir.DataType.FLOAT, ["B", "T", 4])
    graph.graph.inputs.append(own)
    graph.graph.outputs.append(graph.add("Neg", [own], "probe", "model.probe"))
    before = ir.to_proto(graph.model).SerializeToString()
    adapter = make_adapter({"layers.0.ffn": UNITS["ffn"]})
    for scale_as in (ScaleAs.REQUIRED, ScaleAs.OPTIONAL):
        with pytest.raises(GraphError, match=f"input {SCALE} of its own"):
            apply_plan(graph.model, plan_graft(adapter, scale_as=scale_as))
    assert ir.to_proto(graph.model).SerializeToString() == before
    apply_plan(graph.model, plan_graft(adapter))
    assert inputs_of(graph.model) == ["x", SCALE]


# Switchable: one adapter at a time


@pytest.mark.parametrize("kernels", FUNCTIONS_AND_KERNELS)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_active_is_its_own_graft_and_none_is_the_base(
    rank: int,
    together: bool,
    kernels: bool,
    adapters: Any,
    switchable: Any,
    separately: Any,
    toy: Any,
) -> None:
    made = adapters(rank)
    base = run_session(open_session(toy().model, **EXACT), FEEDS)[0]
    model, _, files = switchable(made, together=together)
    session = open_session(model, kernels=kernels, **EXACT)
    results = [run_session(session, FEEDS, [file])[0] for file in files]
    for found, adapter in zip(results, made, strict=True):
        assert np.array_equal(found, separately(adapter, kernels=kernels))
        assert np.abs(found - base).max() > 0.1
    assert not np.array_equal(*results)
    # idle again after a run with an adapter
    assert np.array_equal(run_session(session, FEEDS)[0], base)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_default_session_differs_by_roundings_at_most(
    rank: int, adapters: Any, switchable: Any, separately: Any, toy: Any
) -> None:
    made = adapters(rank)
    model, _, files = switchable(made)
    session = open_session(model)
    for file, adapter in zip(files, made, strict=True):
        expected = separately(adapter, prepack=True)
        bound = 2.0**-20 * np.abs(expected).max()
        assert np.abs(run_session(session, FEEDS, [file])[0] - expected).max() <= bound
    base = run_session(open_session(toy().model), FEEDS)[0]
    assert np.array_equal(run_session(session, FEEDS)[0], base)


@pytest.mark.parametrize("kernels", FUNCTIONS_AND_KERNELS)
@pytest.mark.parametrize("together", [False, True])
def test_constant_and_adaptive_adapters_share_a_graph(
    together: bool, kernels: bool, make_adapter: Any, switchable: Any, toy: Any
) -> None:
    made = [make_adapter(everywhere(UNITS), 2), make_adapter(everywhere(OTHERS), 0)]
    model, plan, files = switchable(made, together=together)
    kinds = {node.op.name for node in plan.nodes}
    assert kinds == ({"SteerAU", "SteerAUAdaptive"} if together else {"SteerAUAdaptive"})
    session = open_session(model, kernels=kernels)
    graph = toy()
    for file, adapter in zip(files, made, strict=True):
        found = run_session(session, FEEDS, [file])[0]
        expected = graph.compute(X, steering(adapter))
        # φ = 1 comes of a sigmoid there, within a rounding
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    base = run_session(open_session(graph.model), FEEDS)[0]
    assert np.array_equal(run_session(session, FEEDS)[0], base)


def test_a_site_of_one_adapter_alone_is_idle_for_the_others(
    make_adapter: Any, switchable: Any, separately: Any
) -> None:
    first = make_adapter({"layers.0.ffn": UNITS["ffn"]})
    second = make_adapter({"layers.1.layer": UNITS["layer"]})
    model, plan, files = switchable([first, second])
    assert len(plan.nodes) == 2
    session = open_session(model, **EXACT)
    for file, adapter in zip(files, (first, second), strict=True):
        assert np.array_equal(run_session(session, FEEDS, [file])[0], separately(adapter))


@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_the_strength_is_part_of_what_makes_an_adapter_active(
    scale: float, adapters: Any, switchable: Any, separately: Any
) -> None:
    made = adapters(1)
    model, plan, files = switchable(made, scale)
    assert [values[SCALE].tolist() for values in plan.switched] == [[scale]] * 2
    session = open_session(model, **EXACT)
    for file, adapter in zip(files, made, strict=True):
        assert np.array_equal(
            run_session(session, FEEDS, [file])[0], separately(adapter, scale)
        )


@pytest.mark.parametrize("scale_as", [ScaleAs.REQUIRED, ScaleAs.OPTIONAL])
def test_a_strength_of_the_run_beside_an_active_adapter(
    scale_as: ScaleAs, adapters: Any, switchable: Any, separately: Any
) -> None:
    made = adapters(0)
    model, plan, files = switchable(made, 0.5, scale_as)
    assert all(SCALE not in values for values in plan.switched)
    session = open_session(model, **EXACT)
    feeds = FEEDS | {SCALE: np.array([1.5], np.float32)}
    for file, adapter in zip(files, made, strict=True):
        found = run_session(session, feeds, [file])[0]
        assert np.array_equal(found, separately(adapter, 1.5))
    if scale_as is ScaleAs.OPTIONAL:
        found = run_session(session, FEEDS, [files[0]])[0]
        assert np.array_equal(found, separately(made[0], 0.5))


def test_values_fit_the_inputs_of_the_graph(adapters: Any, switchable: Any) -> None:
    model, plan, _ = switchable(adapters(1))
    inputs = {str(value.name): value for value in model.graph.inputs}
    assert set(inputs) > {"x", SCALE}
    for values in plan.switched:
        for name, array in values.items():
            assert len(inputs[name].shape) == array.ndim
            assert inputs[name].dtype.numpy() == array.dtype
    for name, value in inputs.items():
        if name.startswith("austeer."):
            # any number of units, any rank; what is not fed has a default
            assert all(not isinstance(dim, int) for dim in value.shape)
            assert name in model.graph.initializers
    assert sum(len(values) for values in plan.switched) > len(plan.nodes)


# Switchable: several together


@pytest.mark.parametrize("kernels", FUNCTIONS_AND_KERNELS)
@pytest.mark.parametrize("ranks", [(0, 0), (0, 1), (2, 0), (1, 3)])
def test_several_active_multiply_their_gains(
    ranks: tuple[int, int], kernels: bool, make_adapter: Any, switchable: Any, toy: Any
) -> None:
    first = make_adapter(everywhere(UNITS), ranks[0])
    second = make_adapter(everywhere(OTHERS, [1]), ranks[1])
    model, _, files = switchable([first, second], together=True)
    session = open_session(model, kernels=kernels)
    found = run_session(session, FEEDS, files)[0]
    graph = toy()
    # adaptive gains of the second read what the first has steered
    close(found, graph.compute(X, steering(first, second)))
    for adapter in (first, second):
        assert np.abs(found - graph.compute(X, steering(adapter))).max() > 0.05


def test_three_in_a_row_at_one_unit(make_adapter: Any, switchable: Any, toy: Any) -> None:
    made = [make_adapter({"layers.0.layer": ([2], [gamma])}) for gamma in (1.0, -0.5, 3.0)]
    model, plan, files = switchable(made, together=True)
    names = [node.name for node in plan.nodes]
    assert names[0] == "austeer.layers.0.layer"
    assert len(set(names)) == 3
    session = open_session(model)
    graph = toy()
    for chosen, gain in (((0, 1), 1.0), ((0, 2), 8.0), ((1, 2), 2.0), ((0, 1, 2), 4.0)):
        found = run_session(session, FEEDS, [files[i] for i in chosen])[0]
        expected = graph.compute(X, {"0.layer": lambda h, g=gain: h * [1, 1, g, 1]})
        close(found, expected)


def test_together_has_one_strength_for_all(
    make_adapter: Any, switchable: Any, toy: Any
) -> None:
    made = [make_adapter({f"layers.{i}.ffn": UNITS["ffn"]}) for i in (0, 1)]
    model, plan, files = switchable(made, 2.0, together=True)
    assert all(SCALE not in values for values in plan.switched)
    found = run_session(open_session(model), FEEDS, files)[0]
    close(found, toy().compute(X, steering(*made, scale=2.0)))


def test_together_at_a_graph_output_keeps_names_unique(make_adapter: Any, toy: Any) -> None:
    graph = toy()
    graph.graph.outputs.append(graph.values["0.out"])
    made = [make_adapter({"layers.0.layer": ([unit], [1.0])}) for unit in (1, 2)]
    plan = plan_switchable_graft(made, together=True)
    apply_plan(graph.model, plan)
    assert [value.name for value in graph.graph.outputs] == ["logits", "0.out"]
    names = [value.name for node in graph.graph for value in node.outputs]
    assert len(names) == len(set(names))
    feeds = FEEDS | plan.switched[0] | plan.switched[1]
    found = run_session(open_session(graph.model), feeds)[1]
    base = run_session(open_session(graph.model), FEEDS)[1]
    np.testing.assert_allclose(found, base * [1, 2, 2, 1], rtol=1e-6)


# Refusals


def test_no_adapter() -> None:
    with pytest.raises(GraphError, match="at least one adapter"):
        plan_switchable_graft([])


def test_adapters_for_different_architectures(make_adapter: Any) -> None:
    llama = make_adapter({"layers.0.ffn": UNITS["ffn"]})
    config = AdapterConfig(**{**fields(llama.config), "model_type": "gpt2"})
    with pytest.raises(GraphError, match="llama and gpt2"):
        plan_switchable_graft([llama, SteeringAdapter(config, llama.sites)])


def fields(config: AdapterConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_every_adapters_sites_and_units_are_checked(make_adapter: Any, toy: Any) -> None:
    good = make_adapter({"layers.0.ffn": UNITS["ffn"]})
    graph = toy()
    before = ir.to_proto(graph.model).SerializeToString()
    for bad, error, says in (
        ({"layers.0.ffn": ([4], [1.0])}, SiteError, "unit 4 outside width 4"),
        ({"layers.9.ffn": UNITS["ffn"]}, GraphError, r"layers\.9\.ffn"),
    ):
        for together in (False, True):
            plan = plan_switchable_graft([good, make_adapter(bad)], together=together)
            with pytest.raises(error, match=says):
                apply_plan(graph.model, plan)
    assert ir.to_proto(graph.model).SerializeToString() == before
