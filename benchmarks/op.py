"""What a steering node costs on onnxruntime: compiled kernel against function bodies.

    python benchmarks/op.py
    python benchmarks/op.py --provider CUDAExecutionProvider --dtype float16

A chain of nodes over float32 activations [tokens, 4096], 100 units, one thread; all ways take
turns in one run, CPU time. A turn begins with a run that is not timed: the other ways have
written over the caches since the last one, and a session that serves works on memory of its
own that it has just used. Costs are those of one node: the chain's, less that of one without
nodes. `dense` is the other possible body, one multiplication by a constant vector;
`copy` is the kernel with no units where it may not work in place. The first table is that of
several adapters at one site, where a node finds in a cache what the one before it left there;
in the second an Abs stands between any two nodes, as what writes activations does in a model.
On a GPU it is wall time, inputs and outputs lie in its memory, and each turn ends when it is
done.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime

from austeer.graphs import STEER_AU, STEER_AU_ADAPTIVE, SteerOp, register, steer_function
from austeer.graphs.graft import constant
from austeer.graphs.opset import DOMAIN

WIDTH, UNITS, RANK, NODES, OPSET = 4096, 100, 1, 16, 20
TOKENS = (1, 17, 512)
KERNEL, ADAPTIVE = "kernel : fastest body", "adaptive : constant kernel"

CPU = "CPUExecutionProvider"

Append = Callable[[ir.Graph, ir.Value, int], ir.Value]
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the chain runs, and in what."""

    provider: str = CPU
    dtype: str = "float32"
    apart: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether it is a CPU, whose own time counts."""
        return self.provider == CPU


def constants() -> dict[str, np.ndarray]:
    """A site's tensors; gains so close to 1 that a chain of them stays in range."""
    rng = np.random.default_rng(0)
    shapes = {"gamma": (UNITS,), "V": (UNITS, RANK), "b": (RANK,), "U": (RANK, UNITS)}
    found = {
        name: (rng.normal(size=shape) * 0.01).astype(np.float32)
        for name, shape in shapes.items()
    }
    found["idx"] = np.sort(rng.choice(WIDTH, UNITS, replace=False))
    return found | {"scale": np.ones(1, np.float32)}


def chain(setting: Setting, append: Append | None, functions: list[ir.Function]) -> bytes:
    """Abs, then the nodes, then Abs: what lies between may be overwritten.

    With `apart`, an Abs behind each node, and as many without nodes.
    """
    dtype = ir.DataType.from_numpy(np.dtype(setting.dtype))
    x, y = (ir.val(name, dtype, ["tokens", WIDTH]) for name in "xy")
    graph = ir.Graph([x], [y], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name="chain")
    value = _add(graph, ir.node("Abs", [x]))
    for number in range(NODES):
        value = append(graph, value, number) if append else value
        value = _add(graph, ir.node("Abs", [value])) if setting.apart else value
    graph.append(ir.node("Abs", [value], outputs=[y]))
    model = ir.Model(graph, ir_version=10, functions=functions)
    return ir.to_proto(model).SerializeToString()


def steering(op: SteerOp, units: int = UNITS) -> Append:
    """Appends one steering node."""
    arrays = constants()
    arrays |= {"idx": arrays["idx"][:units], "gamma": arrays["gamma"][:units]}

    def append(graph: ir.Graph, value: ir.Value, _: int) -> ir.Value:
        inputs = [_constant(graph, name, arrays[name]) for name in op.inputs[1:]]
        return _add(graph, ir.node(op.name, [value, *inputs], domain=DOMAIN))

    return append


def dense(graph: ir.Graph, value: ir.Value, _: int) -> ir.Value:
    """Multiply everything by a constant vector."""
    arrays = constants()
    gain = np.ones(WIDTH, np.float32)
    gain[arrays["idx"]] += arrays["gamma"]
    assert value.dtype is not None
    gain = gain.astype(value.dtype.numpy())
    return _add(graph, ir.node("Mul", [value, _constant(graph, "gain", gain)]))


def copying(graph: ir.Graph, value: ir.Value, number: int) -> ir.Value:
    """A node that must copy, because the graph's output also reads what it reads."""
    found = steering(STEER_AU, 0)(graph, value, number)
    value.name = f"kept{number}"
    graph.outputs.append(value)
    return found


def session(model: bytes, setting: Setting, *, kernels: bool) -> onnxruntime.InferenceSession:
    """A session at one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if kernels:
        register(options)
    return onnxruntime.InferenceSession(model, options, providers=[setting.provider])


def sessions(setting: Setting) -> dict[str, onnxruntime.InferenceSession]:
    """Every way, and the chain without nodes; with `apart` the constant ones."""
    bodies = {op.name: steer_function(op, OPSET) for op in (STEER_AU, STEER_AU_ADAPTIVE)}
    constant, adaptive = (
        chain(setting, steering(op), [bodies[op.name]]) for op in (STEER_AU, STEER_AU_ADAPTIVE)
    )
    found = {
        "nothing": session(chain(setting, None, []), setting, kernels=False),
        "body": session(constant, setting, kernels=False),
        "dense": session(chain(setting, dense, []), setting, kernels=False),
        "kernel": session(constant, setting, kernels=True),
    }
    if setting.apart:
        return found
    copied = chain(setting, copying, [bodies["SteerAU"]])
    return found | {
        "copy": session(copied, setting, kernels=True),
        "adaptive body": session(adaptive, setting, kernels=False),
        "adaptive kernel": session(adaptive, setting, kernels=True),
    }


def running(way: onnxruntime.InferenceSession, setting: Setting, x: np.ndarray) -> Run:
    """One run, with nothing moved between memories where a GPU computes."""
    if setting.on_cpu:
        return lambda: way.run(["y"], {"x": x})
    binding = way.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x, "cuda", 0))
    binding.bind_output("y", "cuda")

    def run() -> None:
        way.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def measure(tokens: int, rounds: int, setting: Setting) -> dict[str, np.ndarray]:
    """Microseconds a node, for each way and round: CPU time, or a GPU's wall time."""
    x = np.random.default_rng(1).normal(size=(tokens, WIDTH)).astype(setting.dtype)
    ways = {name: running(way, setting, x) for name, way in sessions(setting).items()}
    clock = time.process_time if setting.on_cpu else time.perf_counter
    repeats = max(1, 256 // tokens)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            run()
            started = clock()
            for _ in range(repeats):
                run()
            if number:  # the first round warms up
                seconds[name].append((clock() - started) / repeats)
    base = np.array(seconds.pop("nothing"))
    return {name: (np.array(spent) - base) / NODES * 1e6 for name, spent in seconds.items()}


def row(tokens: int, cost: dict[str, np.ndarray]) -> str:
    """One line of the table: microseconds, then ratios with their quartiles."""
    fastest = np.minimum(cost["body"], cost["dense"])
    ratios = {KERNEL: cost["kernel"] / fastest}
    if "adaptive kernel" in cost:
        ratios[ADAPTIVE] = cost["adaptive kernel"] / cost["kernel"]
    cells = [f"{np.median(values):.2f}" for values in cost.values()]
    for values in ratios.values():
        low, middle, high = np.percentile(values, [25, 50, 75])
        cells.append(f"{middle:.3f} [{low:.3f}, {high:.3f}]")
    return f"| {tokens} | {' | '.join(cells)} |"


def _add(graph: ir.Graph, node: ir.Node) -> ir.Value:
    graph.append(node)
    value = node.outputs[0]
    before = node.inputs[0]
    assert before is not None
    value.dtype, value.shape = before.dtype, ir.Shape(["tokens", WIDTH])
    return value


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(constant(name, array))
    return graph.initializers[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--provider", default=CPU)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    options = parser.parse_args()
    if options.provider not in onnxruntime.get_available_providers():
        parser.error(f"{options.provider}: this onnxruntime does not have it")
    settings = [Setting(options.provider, options.dtype, apart) for apart in (False, True)]
    kind = "CPU time" if settings[0].on_cpu else "wall time"
    print(
        f"{datetime.date.today()}, {platform.machine()}, "
        f"onnxruntime {onnxruntime.__version__}, {options.provider}, {options.dtype}, "
        f"width {WIDTH}, {UNITS} units, microseconds of {kind} a node, medians\n"
    )
    for setting in settings:
        print("\nNodes apart:\n" if setting.apart else "Nodes one behind another:\n")
        for number, tokens in enumerate(TOKENS):
            cost = measure(tokens, options.rounds, setting)
            if number == 0:
                names = (*cost, KERNEL) if setting.apart else (*cost, KERNEL, ADAPTIVE)
                print(f"| tokens | {' | '.join(names)} |")
                print("|---" * (len(names) + 1) + "|")
            print(row(tokens, cost), flush=True)


if __name__ == "__main__":
    main()
