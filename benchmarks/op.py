"""What a steering node costs on onnxruntime: compiled kernel against function bodies.

    python benchmarks/op.py

A chain of nodes over float32 activations [tokens, 4096], 100 units, one thread; all ways take
turns in one run, CPU time. A turn begins with a run that is not timed: the other ways have
written over the caches since the last one, and a session that serves works on memory of its
own that it has just used. Costs are those of one node: the chain's, less that of one without
nodes. `dense` is the other possible body, one multiplication by a constant vector;
`copy` is the kernel with no units where it may not work in place. The first table is that of
several adapters at one site, where a node finds in a cache what the one before it left there;
in the second an Abs stands between any two nodes, as what writes activations does in a model.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime

from austeer.graphs import STEER_AU, STEER_AU_ADAPTIVE, SteerOp, register, steer_function
from austeer.graphs.graft import constant
from austeer.graphs.opset import DOMAIN

WIDTH, UNITS, RANK, NODES, OPSET = 4096, 100, 1, 16, 20
TOKENS = (1, 17, 512)
KERNEL, ADAPTIVE = "kernel : fastest body", "adaptive : constant kernel"

Append = Callable[[ir.Graph, ir.Value, int], ir.Value]


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


def chain(append: Append | None, functions: list[ir.Function], *, apart: bool = False) -> bytes:
    """Abs, then the nodes, then Abs: what lies between may be overwritten.

    With `apart`, an Abs behind each node, and as many without nodes.
    """
    x = ir.val("x", ir.DataType.FLOAT, ["tokens", WIDTH])
    y = ir.val("y", ir.DataType.FLOAT, ["tokens", WIDTH])
    graph = ir.Graph([x], [y], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name="chain")
    value = _add(graph, ir.node("Abs", [x]))
    for number in range(NODES):
        value = append(graph, value, number) if append else value
        value = _add(graph, ir.node("Abs", [value])) if apart else value
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
    return _add(graph, ir.node("Mul", [value, _constant(graph, "gain", gain)]))


def copying(graph: ir.Graph, value: ir.Value, number: int) -> ir.Value:
    """A node that must copy, because the graph's output also reads what it reads."""
    found = steering(STEER_AU, 0)(graph, value, number)
    value.name = f"kept{number}"
    graph.outputs.append(value)
    return found


def session(model: bytes, *, kernels: bool) -> onnxruntime.InferenceSession:
    """A session at one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if kernels:
        register(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def sessions(*, apart: bool) -> dict[str, onnxruntime.InferenceSession]:
    """Every way, and the chain without nodes; with `apart` the constant ones."""
    bodies = {op.name: steer_function(op, OPSET) for op in (STEER_AU, STEER_AU_ADAPTIVE)}
    constant, adaptive = (
        chain(steering(op), [bodies[op.name]], apart=apart)
        for op in (STEER_AU, STEER_AU_ADAPTIVE)
    )
    found = {
        "nothing": session(chain(None, [], apart=apart), kernels=False),
        "body": session(constant, kernels=False),
        "dense": session(chain(dense, [], apart=apart), kernels=False),
        "kernel": session(constant, kernels=True),
    }
    if apart:
        return found
    return found | {
        "copy": session(chain(copying, [bodies["SteerAU"]]), kernels=True),
        "adaptive body": session(adaptive, kernels=False),
        "adaptive kernel": session(adaptive, kernels=True),
    }


def measure(tokens: int, rounds: int, *, apart: bool) -> dict[str, np.ndarray]:
    """Microseconds of CPU time a node, for each way and round."""
    x = np.random.default_rng(1).normal(size=(tokens, WIDTH)).astype(np.float32)
    ways = sessions(apart=apart)
    repeats = max(1, 256 // tokens)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            way.run(["y"], {"x": x})
            started = time.process_time()
            for _ in range(repeats):
                way.run(["y"], {"x": x})
            if number:  # the first round warms up
                seconds[name].append((time.process_time() - started) / repeats)
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
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(["tokens", WIDTH])
    return value


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(constant(name, array))
    return graph.initializers[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}, {platform.machine()}, "
        f"onnxruntime {onnxruntime.__version__}, "
        f"width {WIDTH}, {UNITS} units, microseconds of CPU time a node, medians\n"
    )
    for apart in (False, True):
        print("\nNodes apart:\n" if apart else "Nodes one behind another:\n")
        for number, tokens in enumerate(TOKENS):
            cost = measure(tokens, options.rounds, apart=apart)
            if number == 0:
                names = (*cost, KERNEL) if apart else (*cost, KERNEL, ADAPTIVE)
                print(f"| tokens | {' | '.join(names)} |")
                print("|---" * (len(names) + 1) + "|")
            print(row(tokens, cost), flush=True)


if __name__ == "__main__":
    main()
