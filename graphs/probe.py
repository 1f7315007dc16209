"""Prove a grafted file on onnxruntime: every site does what its adapter says, and it matters.

The file itself runs, with the activations before and after each steering node made outputs.
Each pair is compared with the formula of the operator, in float64 numpy, and the logits with
those of the base file. So a graft is proved on any graph that runs, quantized or not, without
the model it came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from austeer.adapters._errors import RouteError, VerificationError
from austeer.adapters.predictor import PHI_SHIFT, Predictor
from austeer.graphs.graft_plan import Array, GraftPlan, ScaleAs
from austeer.graphs.locating.skip_norm import is_skip_norm, split_skip_norm
from austeer.graphs.model_io import load_model
from austeer.graphs.opset import SCALE_INPUT
from austeer.graphs.session import OnnxCausalLM

_EPSILON = {np.dtype(np.float16): 2.0**-10, np.dtype(np.float32): 2.0**-22}
_LOGITS_BOUND, _HALF_BOUND = 1e-4, 8 * 2.0**-10
"""Share of the largest logit by which two equal graphs may differ: a norm split from its sum
rounds once more, which half precision shows."""

_FLOAT_MAX = float(np.finfo(np.float32).max)
_SQUARED = _FLOAT_MAX**0.5
"""Norms square what they are given: a larger activation is an infinity behind the next one."""

_ROWS, _TOKENS, _SEED = 2, 12, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GraftProof:
    """What a grafted file did on onnxruntime.

    Attributes:
        sites: number of steered activations that were compared.
        max_site_difference: largest difference of a steered activation from the formula,
            in roundings of its dtype.
        steered_vs_base: largest |logit − base's logit|.
        tokens: number of compared positions.
    """

    sites: int
    max_site_difference: float
    steered_vs_base: float
    tokens: int


def prove_graft(
    steered: Path,
    base: Path,
    plan: GraftPlan,
    traces: Mapping[str, tuple[str, str]],
    *,
    active: Sequence[tuple[Path, Mapping[str, Array]]] = (),
    kernels: bool = False,
) -> GraftProof:
    """Run a grafted file against its base file and the formulas.

    Args:
        steered: the grafted model; a temporary file is written beside it.
        base: the model it was grafted onto.
        plan: what was grafted.
        traces: names of the values before and after each steering node, by node name.
        active: adapter files of a switchable graft with their values; each is activated
            alone, after a run with none, in which no site may change anything.
        kernels: run the compiled kernels instead of the function bodies.

    Raises:
        GraphError: a file does not load or run.
        VerificationError: a site differs from the formula, or steering changes nothing.
        RouteError: steered so strongly, activations are more than their dtype holds.
    """
    original = OnnxCausalLM(base, threads=1)
    ids = _token_ids(original)
    expected = original.logits(ids)
    with _traced(steered, traces) as path:
        runner = OnnxCausalLM(path, threads=1, kernels=kernels)
        scale, carried = plan.scale, any(SCALE_INPUT in values for values in plan.switched)
        if plan.scale_as is not ScaleAs.CONSTANT and not carried:
            # A default of 0 shows nothing, and a run may set another.
            scale = runner.scale = plan.scale or 1.0
        plan = dataclasses.replace(plan, scale=scale)
        if not plan.switched:
            return _compare(runner, ids, expected, plan, traces, {}, str(steered))
        with _equally_split(base, steered) as equal:
            _check_idle(
                runner, ids, OnnxCausalLM(equal, threads=1).logits(ids), traces, steered
            )
        proofs = []
        for file, values in active:
            runner.active = [file]
            proofs.append(_compare(runner, ids, expected, plan, traces, values, str(file)))
    return GraftProof(
        sites=sum(proof.sites for proof in proofs),
        max_site_difference=max(proof.max_site_difference for proof in proofs),
        steered_vs_base=min(proof.steered_vs_base for proof in proofs),
        tokens=ids.size,
    )


def _token_ids(model: OnnxCausalLM) -> Array:
    rng = np.random.default_rng(_SEED)
    return rng.integers(0, max(model.vocabulary, 2), (_ROWS, _TOKENS))


def _compare(
    runner: OnnxCausalLM,
    ids: Array,
    expected: Array,
    plan: GraftPlan,
    traces: Mapping[str, tuple[str, str]],
    values: Mapping[str, Array],
    what: str,
) -> GraftProof:
    bound = _bound(runner, expected)
    names = sorted({name for pair in traces.values() for name in pair})
    found = runner.values(ids, ["logits", *names])
    scale = float(values.get(SCALE_INPUT, np.array([plan.scale]))[0])
    sites: dict[str, _Site] = {}
    for node in plan.nodes:
        before, after = (found[name] for name in traces[node.name])
        tensors = {t: values.get(node.constant_name(t), node.tensors[t]) for t in node.tensors}
        site = sites[node.name] = _compare_site(before, after, tensors, scale)
        if not site.difference <= 1.0:
            raise VerificationError(_differs(what, node.name, site.difference))
    broken = [name for name, site in sites.items() if not site.complete]
    extreme = [name for name, site in sites.items() if site.extreme]
    if extreme and (broken or not np.isfinite(found["logits"]).all()):
        raise RouteError(
            f"{what}: at scale {scale:g} activations overflow their dtype, from {extreme[0]} "
            "on; lower the scale"
        )
    if broken:
        raise VerificationError(_differs(what, broken[0], np.nan))
    logits = found["logits"].astype(np.float32)
    moved = float(np.abs(logits - expected).max())
    if not moved > 2 * bound:
        raise VerificationError(
            f"{what}: steering has no effect: logits differ by {moved:.3g} from the base, "
            f"expected more than {2 * bound:.3g}; not published"
        )
    return GraftProof(
        sites=len(plan.nodes),
        max_site_difference=max(site.difference for site in sites.values()),
        steered_vs_base=moved,
        tokens=ids.size,
    )


def _differs(what: str, node: str, difference: float) -> str:
    return (
        f"{what}: {node} differs from its formula by {difference:.3g} roundings of its dtype; "
        "not published"
    )


def _check_idle(
    runner: OnnxCausalLM,
    ids: Array,
    expected: Array,
    traces: Mapping[str, tuple[str, str]],
    steered: Path,
) -> None:
    """Without an adapter every site passes its activation on, to the last bit."""
    names = sorted({name for pair in traces.values() for name in pair})
    found = runner.values(ids, ["logits", *names])
    for node, (before, after) in traces.items():
        if not np.array_equal(found[before], found[after]):
            raise VerificationError(
                f"{steered}: without an adapter, {node} changes its activation; not published"
            )
    difference = float(np.abs(found["logits"].astype(np.float32) - expected).max())
    bound = _bound(runner, expected)
    if not difference <= bound:
        raise VerificationError(
            f"{steered}: without an adapter, logits differ by {difference:.3g} from the base, "
            f"expected at most {bound:.3g}; not published"
        )


@contextmanager
def _equally_split(base: Path, steered: Path) -> Iterator[Path]:
    """The base with its norms split where the graft split them; itself where none was.

    A split norm rounds its sum, and quantized operators behind it make a last bit large.
    """
    model = load_model(base)
    kept = {node.name for node in load_model(steered).graph if is_skip_norm(node)}
    gone = [node for node in model.graph if is_skip_norm(node) and node.name not in kept]
    if not gone:
        yield base
        return
    for node in gone:
        split_skip_norm(node, f"{node.name}/sum")
    ir.external_data.set_base_dir(model.graph, steered.parent)
    target = steered.with_name(f".{steered.name}.split")
    try:
        ir.save(model, target, format="protobuf")
        yield target
    finally:
        target.unlink(missing_ok=True)


def _bound(runner: OnnxCausalLM, logits: Array) -> float:
    share = _HALF_BOUND if runner.half else _LOGITS_BOUND
    return share * float(np.abs(logits).max())


@dataclass(frozen=True, slots=True)
class _Site:
    """What one site did.

    Attributes:
        difference: largest |after − formula(before)| in units of what one rounding may be.
        complete: every activation could be compared: none was infinite, or became so.
        extreme: the formula makes more of one than the model can compute with.
    """

    difference: float
    complete: bool
    extreme: bool


@np.errstate(over="ignore", invalid="ignore")
def _compare_site(
    before: Array, after: Array, tensors: Mapping[str, Array], scale: float
) -> _Site:
    index = tensors["idx"]
    x, y = before.astype(np.float64), after.astype(np.float64)
    expected, gain = x.copy(), np.ones_like(x)
    selected = x[..., index]
    phi: Any = 1.0
    if "V" in tensors:
        phi = Predictor(tensors["V"], tensors["b"], tensors["U"]).phi(selected)
    strength = scale * tensors["gamma"]
    gain[..., index] = 1.0 + strength * phi
    expected *= gain
    epsilon = _EPSILON.get(before.dtype, 2.0**-7)
    allowed = np.maximum(epsilon * np.abs(expected), 2.0**-24) + 1e-5 * np.abs(x)
    if "V" in tensors:
        allowed[..., index] += np.abs(selected * strength) * _phi_error(selected, tensors)
    largest = float(np.finfo(before.dtype).max)
    held = (np.abs(expected) <= largest) & (np.abs(gain) <= _FLOAT_MAX)
    extreme = np.isfinite(x) & ~(held & (np.abs(expected) <= _SQUARED))
    share = np.abs(y - expected)[held] / allowed[held]
    return _Site(float(share.max(initial=0.0)), bool(held.all()), bool(extreme.any()))


def _phi_error(selected: Array, tensors: Mapping[str, Array]) -> Array:
    """What float32 sums may do to φ, whose slope is at most 1."""
    V, b, U = (np.abs(tensors[name].astype(np.float64)) for name in ("V", "b", "U"))
    terms = len(V) + V.shape[1] + 4
    return np.asarray(terms * 2.0**-24 * ((np.abs(selected) @ V + b) @ U + PHI_SHIFT))


@contextmanager
def _traced(path: Path, traces: Mapping[str, tuple[str, str]]) -> Iterator[Path]:
    """A file beside `path` whose graph also gives the activations at every site."""
    model = load_model(path)
    values: dict[str | None, ir.Value] = {value.name: value for value in model.graph.inputs}
    for node in model.graph:
        values |= {value.name: value for value in node.outputs}
    for steered, (_, after) in traces.items():
        value = values.get(after)
        if value is None or not (value.consumers() or value.is_graph_output()):
            raise VerificationError(
                f"{path}: nothing reads the steered activation of {steered}; not published"
            )
    wanted = {name for pair in traces.values() for name in pair}
    known = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(values[name] for name in sorted(wanted - known))
    target = path.with_name(f".{path.name}.traced")
    try:
        # Not `save_model`: the checker wants a shape of every output, onnxruntime does not.
        ir.save(model, target, format="protobuf")
        yield target
    finally:
        target.unlink(missing_ok=True)
