"""The proof of a graft passes on a right file, and on no file that was tampered with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_sessions import FUNCTIONS_AND_KERNELS, open_session, run_session
from steering_formula import UNITS, steering

from austeer.adapters import GraphError, RouteError, VerificationError
from austeer.graphs import (
    GraftPlan,
    OnnxCausalLM,
    ScaleAs,
    apply_plan,
    load_model,
    plan_graft,
    plan_switchable_graft,
    save_model,
)
from austeer.graphs.adapter_file import write_adapter_file
from austeer.graphs.graft import steered_values
from austeer.graphs.inline import inline_functions
from austeer.graphs.probe import GraftProof, prove_graft
from austeer.graphs.ungraft import steering_nodes

OTHERS = {"ffn": ([0, 2, 3], [0.4, 1.1, -0.3]), "layer": ([3], [-0.6])}
ONE = {"layers.0.layer": UNITS["layer"]}


def everywhere(units: dict[str, Any]) -> dict[str, Any]:
    return {f"layers.{i}.{component}": u for i in (0, 1) for component, u in units.items()}


@dataclasses.dataclass
class Case:
    """A base file, a grafted file beside it, and all that a proof asks for."""

    folder: Path
    plan: GraftPlan
    traces: dict[str, tuple[str, str]]
    active: list[tuple[Path, Any]]

    @property
    def steered(self) -> Path:
        return self.folder / "steered.onnx"

    @property
    def base(self) -> Path:
        return self.folder / "base.onnx"

    def prove(self, **changes: Any) -> GraftProof:
        """The proof; whatever comes of it, the folder is as it was."""
        before = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        arguments: dict[str, Any] = {"steered": self.steered, "base": self.base}
        arguments |= {"plan": self.plan, "traces": self.traces, "active": self.active}
        try:
            return prove_graft(**(arguments | changes))
        finally:
            after = {path.name: path.read_bytes() for path in self.folder.iterdir()}
            assert after == before

    def refused(self, says: str, **changes: Any) -> None:
        with pytest.raises(VerificationError, match=says) as error:
            self.prove(**changes)
        assert "not published" in str(error.value)
        assert "\n" not in str(error.value)

    def tamper(self, edit: Callable[[ir.Model], None]) -> None:
        model = load_model(self.steered)
        edit(model)
        self.steered.unlink()
        save_model(model, self.steered)


@pytest.fixture
def case(tmp_path: Path, toy_lm: Any) -> Callable[..., Case]:
    def build(plan: GraftPlan, *, inline: bool = False, **options: Any) -> Case:
        model = toy_lm(**options).model
        save_model(model, tmp_path / "base.onnx")
        apply_plan(model, plan)
        traces = steered_values(model)
        if inline:
            inline_functions(model)
        save_model(model, tmp_path / "steered.onnx")
        active = []
        for number, values in enumerate(plan.switched):
            active.append((tmp_path / f"{number}.onnx_adapter", values))
            write_adapter_file(*active[-1])
        return Case(tmp_path, plan, traces, active)

    return build


def set_constant(name: str, array: np.ndarray) -> Callable[[ir.Model], None]:
    def edit(model: ir.Model) -> None:
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)

    return edit


def bypass(site: str) -> Callable[[ir.Model], None]:
    """The node stays and computes, but what follows reads the activation before it."""

    def edit(model: ir.Model) -> None:
        (node,) = [n for n in steering_nodes(model) if n.name == f"austeer.{site}"]
        for reader, position in tuple(node.outputs[0].uses()):
            reader.replace_input_with(position, node.inputs[0])

    return edit


# Right grafts


@pytest.mark.parametrize("kernels", FUNCTIONS_AND_KERNELS)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("component", [*UNITS, "all"])
def test_a_right_graft_is_proved(
    component: str, rank: int, kernels: bool, case: Any, make_adapter: Any
) -> None:
    units = UNITS if component == "all" else {component: UNITS[component]}
    made = case(plan_graft(make_adapter(everywhere(units), rank), 0.7))
    proof = made.prove(kernels=kernels)
    assert proof.sites == 2 * len(units)
    assert proof.tokens == 24
    assert proof.max_site_difference <= 1.0
    assert proof.steered_vs_base > 0.01


def test_the_figure_of_the_effect(case: Any, make_adapter: Any, toy_lm: Any) -> None:
    """Recomputed from the tokens that the session was given."""
    adapter = make_adapter(everywhere(UNITS), 1)
    made = case(plan_graft(adapter))
    seen: list[np.ndarray] = []
    run = OnnxCausalLM.logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            OnnxCausalLM, "logits", lambda self, ids: seen.append(ids) or run(self, ids)
        )
        proof = made.prove()
    (ids,) = seen
    assert ids.shape == (2, 12)
    assert set(ids.flatten().tolist()) == {0, 1, 2, 3}  # of the whole vocabulary
    graph = toy_lm()
    moved = graph.logits(ids, steering(adapter)) - graph.logits(ids, {})
    assert proof.steered_vs_base == pytest.approx(np.abs(moved).max(), rel=1e-4)


@pytest.mark.parametrize("scale_as", list(ScaleAs))
def test_every_kind_of_strength(scale_as: ScaleAs, case: Any, make_adapter: Any) -> None:
    plan = plan_graft(make_adapter(everywhere(UNITS), 1), -0.4, scale_as)
    assert case(plan).prove().sites == 8


@pytest.mark.parametrize("rank", [0, 1])
def test_an_inlined_graft(rank: int, case: Any, make_adapter: Any) -> None:
    plan = plan_graft(make_adapter(everywhere(UNITS), rank))
    assert case(plan, inline=True).prove().sites == 8


@pytest.mark.parametrize("rank", [0, 1])
def test_half_precision(rank: int, case: Any, make_adapter: Any) -> None:
    made = case(plan_graft(make_adapter(everywhere(UNITS), rank)), half=True)
    proof = made.prove()
    assert 0.0 < proof.max_site_difference <= 1.0
    name = "austeer.layers.1.layer.gamma"
    made.tamper(set_constant(name, np.array([0.3, 0.92], np.float32)))
    made.refused("layers.1.layer differs from its formula")


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("scale_as", list(ScaleAs))
def test_every_adapter_of_a_switchable_graft(
    scale_as: ScaleAs, together: bool, case: Any, make_adapter: Any
) -> None:
    adapters = [make_adapter(everywhere(UNITS), 1), make_adapter(everywhere(OTHERS))]
    plan = plan_switchable_graft(adapters, 0.5, scale_as, together=together)
    proof = case(plan).prove()
    # together, each has sites of its own; else they share the larger set
    assert proof.sites == (12 if together else 8) * 2
    assert proof.steered_vs_base > 0.01


# Tampered grafts


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("component", UNITS)
def test_another_gamma_in_the_file(
    component: str, rank: int, case: Any, make_adapter: Any
) -> None:
    made = case(plan_graft(make_adapter(everywhere(UNITS), rank)))
    gamma = np.array(UNITS[component][1], np.float32) + np.float32(1e-3)
    made.tamper(set_constant(f"austeer.layers.1.{component}.gamma", gamma))
    made.refused(rf"austeer\.layers\.1\.{component} differs from its formula by")


@pytest.mark.parametrize("part", ["V", "b", "U"])
def test_another_predictor_in_the_file(part: str, case: Any, make_adapter: Any) -> None:
    adapter = make_adapter(ONE, 1)
    made = case(plan_graft(adapter))
    array = getattr(adapter.sites[0].predictor, part) + np.float32(0.01)
    made.tamper(set_constant(f"austeer.layers.0.layer.{part}", array))
    made.refused("differs from its formula")


def test_another_unit_in_the_file(case: Any, make_adapter: Any) -> None:
    made = case(plan_graft(make_adapter(ONE)))
    made.tamper(set_constant("austeer.layers.0.layer.index", np.array([1, 2])))
    made.refused("differs from its formula")


@pytest.mark.parametrize("scale", [0.999, 0.0, -1.0])
def test_another_strength_in_the_file(scale: float, case: Any, make_adapter: Any) -> None:
    made = case(plan_graft(make_adapter(ONE)))
    made.tamper(set_constant("austeer.scale", np.array([scale], np.float32)))
    made.refused("differs from its formula")


def test_a_body_that_computes_something_else(case: Any, make_adapter: Any) -> None:
    made = case(plan_graft(make_adapter(ONE)))

    def edit(model: ir.Model) -> None:
        (function,) = model.functions.values()
        (node,) = [node for node in function if node.name == "gain_node"]
        node.op_type = "Sub"

    made.tamper(edit)
    made.refused("differs from its formula")


def test_a_steered_activation_that_nothing_reads(case: Any, make_adapter: Any) -> None:
    made = case(plan_graft(make_adapter(ONE)))
    made.tamper(bypass("layers.0.layer"))
    made.refused(r"nothing reads the steered activation of austeer\.layers\.0\.layer")


def test_one_of_several_that_nothing_reads(case: Any, make_adapter: Any) -> None:
    made = case(plan_graft(make_adapter(everywhere(UNITS))))
    made.tamper(bypass("layers.0.ffn"))
    made.refused(r"layers\.0\.ffn")


@pytest.mark.parametrize("gammas", [[0.0, 0.0], [1e-6, -1e-6]])
def test_gains_too_small_to_matter(gammas: list[float], case: Any, make_adapter: Any) -> None:
    made = case(plan_graft(make_adapter({"layers.0.layer": ([1, 3], gammas)})))
    made.refused("no effect")


def test_scale_zero(case: Any, make_adapter: Any) -> None:
    case(plan_graft(make_adapter(ONE), 0.0)).refused("no effect")


def test_activations_that_are_no_numbers(case: Any, make_adapter: Any) -> None:
    made = case(plan_graft(make_adapter(ONE)))
    made.tamper(set_constant("0.w", np.full(4, np.nan, np.float32)))
    made.refused("differs from its formula by nan|no effect")


@pytest.mark.parametrize("switchable", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_activations_that_overflow_are_bad_input(
    rank: int, half: bool, switchable: bool, case: Any, make_adapter: Any
) -> None:
    """By the formula itself, and so not by a fault of the graph."""
    adapter, scale = make_adapter(everywhere(UNITS), rank), 1e6 if half else 1e38
    plan = plan_switchable_graft([adapter], scale) if switchable else plan_graft(adapter, scale)
    made = case(plan, half=half)
    with pytest.raises(RouteError, match=r"at scale .* overflow .* lower the scale") as error:
        made.prove()
    assert "\n" not in str(error.value)


def test_no_overflow_hides_a_wrong_site(case: Any, make_adapter: Any) -> None:
    made = case(plan_graft(make_adapter({"layers.0.attention": UNITS["attention"]}), 1e38))
    name = "austeer.layers.0.attention.index"
    index = made.plan.nodes[0].tensors["idx"]
    made.tamper(set_constant(name, np.array([i for i in range(4) if i not in index][:1])))
    gamma = "austeer.layers.0.attention.gamma"
    made.tamper(set_constant(gamma, np.ones(1, np.float32)))
    made.refused("differs from its formula")


def test_an_adapter_file_of_other_values(case: Any, make_adapter: Any) -> None:
    adapters = [make_adapter(everywhere(UNITS)), make_adapter(everywhere(OTHERS))]
    made = case(plan_switchable_graft(adapters))
    (first, _), (second, values) = made.active
    second.unlink()
    gamma = "austeer.layers.1.ffn.gamma"
    write_adapter_file(second, {**values, gamma: values[gamma] * np.float32(1.01)})
    made.refused(r"1\.onnx_adapter: austeer\.layers\.1\.ffn differs from its formula")
    made.active[1] = (first, values)
    made.refused("differs from its formula")


def test_an_adapter_file_that_does_nothing(case: Any, make_adapter: Any) -> None:
    adapter = make_adapter({"layers.0.layer": ([1], [0.0])})
    made = case(plan_switchable_graft([make_adapter(ONE), adapter]))
    made.refused(r"1\.onnx_adapter: steering has no effect")


def test_a_switchable_graft_that_steers_while_idle(case: Any, make_adapter: Any) -> None:
    made = case(plan_switchable_graft([make_adapter(ONE)]))
    gamma = np.array([0.5], np.float32)
    made.tamper(set_constant("austeer.layers.0.layer.gamma", gamma))
    made.refused("without an adapter, .* changes its activation")


def test_a_graft_onto_another_base(case: Any, make_adapter: Any, tmp_path: Path) -> None:
    made = case(plan_switchable_graft([make_adapter(ONE)]))
    model = load_model(made.base)
    table = model.graph.initializers["table"]
    table.const_value = ir.tensor(table.const_value.numpy() * np.float32(1.01), name="table")
    made.base.unlink()
    save_model(model, made.base)
    made.refused("without an adapter")


def test_a_file_that_does_not_load(case: Any, make_adapter: Any) -> None:
    made = case(plan_graft(make_adapter(ONE)))

    def edit(model: ir.Model) -> None:
        model.functions.clear()

    made.tamper(edit)
    with pytest.raises(GraphError, match="traced") as error:
        made.prove()
    assert "\n" not in str(error.value)


def test_external_data_stays_where_it_is(
    tmp_path: Path, toy_lm: Any, make_adapter: Any
) -> None:
    model = toy_lm().model
    ir.save(model, tmp_path / "base.onnx", external_data="w.data", size_threshold_bytes=16)
    model = load_model(tmp_path / "base.onnx")
    plan = plan_graft(make_adapter(everywhere(UNITS), 1))
    apply_plan(model, plan)
    save_model(model, tmp_path / "steered.onnx")
    made = Case(tmp_path, plan, steered_values(model), [])
    assert made.prove().sites == 8


def test_the_toy_agrees_with_numpy(toy_lm: Any) -> None:
    """The toy itself: what the tests above compare with is right."""
    graph = toy_lm()
    ids = np.array([[0, 1, 2, 3, 1]])
    empty = np.zeros((1, 1, 0, 4), np.float32)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds |= {f"past_key_values.0.{part}": empty for part in ("key", "value")}
    logits, key, value = run_session(open_session(graph.model), feeds)
    np.testing.assert_allclose(logits, graph.logits(ids, {}), rtol=1e-4, atol=1e-5)
    assert np.array_equal(key[0, 0], graph.table[ids[0]])
    assert np.array_equal(value, key)
