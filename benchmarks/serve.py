"""What steering costs a served model: decoding and prefill against the unsteered graph.

    python benchmarks/serve.py                      # a random Llama of 123 M parameters, CPU
    python benchmarks/serve.py --provider CUDAExecutionProvider --dtype float16 --hidden 4096

Every layer is steered, 100 units each. The graphs share one file of weights; all take turns in
one run, their order turning from round to round. CPU time of this process (wall time on a
GPU), one thread; a figure is the median of the rounds' ratios to the unsteered graph of the
same round, with the bootstrap interval of that median. Prints Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from austeer.adapters import Predictor, SteeredSite, SteeringAdapter, Strength
from austeer.exporter.onnx_export import export_graph
from austeer.graphs import graft_file, register, save_model

UNITS = 100
Feeds = dict[str, Any]


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = options.hidden // 64
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, options.dtype))
    return model.eval()


def make_adapter(model: LlamaForCausalLM, component: str, rank: int) -> SteeringAdapter:
    """100 units at each layer; gains so small that activations keep their range."""
    rng = np.random.default_rng(rank)
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    plain = SteeringAdapter.from_units(
        model,
        component=component,
        layers=np.repeat(np.arange(layers), UNITS).tolist(),
        units=[unit for _ in range(layers) for unit in rng.permutation(width)[:UNITS]],
        gamma=(0.01 * rng.normal(size=layers * UNITS)).tolist(),
    )
    if not rank:
        return plain
    shapes = ((UNITS, rank), (rank,), (rank, UNITS))
    sites = [
        SteeredSite(
            site.site,
            site.index,
            site.gamma,
            Predictor(*(rng.normal(size=shape).astype(np.float32) * 0.1 for shape in shapes)),
        )
        for site in plain.sites
    ]
    config = dataclasses.replace(plain.config, strength=Strength.ADAPTIVE, rank=rank)
    return SteeringAdapter(config, sites)


def session(path: Path, options: argparse.Namespace, *, kernels: bool) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    if kernels:
        register(settings)
    return onnxruntime.InferenceSession(str(path), settings, providers=[options.provider])


def feeds(found: Any, past: list[Any] | None, tokens: int, device: str) -> Feeds:
    """Inputs of one run behind `past`; an empty cache without it."""
    inputs = {item.name: item for item in found.get_inputs()}
    names = [name for name in inputs if name.startswith("past_key_values")]
    if past is None:
        half = inputs[names[0]].type == "tensor(float16)"
        shape = [1, inputs[names[0]].shape[1], 0, inputs[names[0]].shape[3]]
        empty = np.zeros(shape, np.float16 if half else np.float32)
        past = [onnxruntime.OrtValue.ortvalue_from_numpy(empty, device) for _ in names]
    before = past[0].shape()[2]
    arrays = {
        "input_ids": np.full((1, tokens), 7, np.int64),
        "attention_mask": np.ones((1, before + tokens), np.int64),
        "position_ids": np.arange(before, before + tokens, dtype=np.int64)[None],
    }
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a, device) for n, a in arrays.items()}
    return values | dict(zip(names, past, strict=True))


def runs(found: Any, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Prefill of a prompt, and decoding of one token behind it."""
    device = "cuda" if "CUDA" in options.provider else "cpu"
    outputs = [item.name for item in found.get_outputs()]

    def bound(given: Feeds) -> Callable[[], Any]:
        binding = found.io_binding()
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)

        def run() -> Any:
            for name in outputs:
                binding.bind_output(name, device)
            binding.synchronize_inputs()
            found.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return binding.get_outputs()

        return run

    prefill = bound(feeds(found, None, options.prompt, device))
    past = prefill()[1:]
    return {"prefill": prefill, "decode": bound(feeds(found, past, 1, device))}


def ratios(
    ways: dict[str, Callable[[], Any]], rounds: int, repeat: int, clock: Callable[[], float]
) -> dict[str, np.ndarray]:
    """Time of each way over that of the first, round by round."""
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    for way in ways.values():
        way()
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = clock()
            for _ in range(repeat):
                ways[name]()
            times[name].append((clock() - started) / repeat)
    base = np.array(times[names[0]])
    print(f"unsteered: {1000 * np.median(base):.1f} ms", end="; ")
    return {name: np.array(times[name]) / base for name in names[1:]}


def interval(values: np.ndarray) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"])
    parser.add_argument("--component", default="attention", choices=["attention", "layer"])
    parser.add_argument("--provider", default="CPUExecutionProvider")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model(options)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    clock = time.perf_counter if "CUDA" in options.provider else time.process_time
    print(
        f"{datetime.date.today()}, {os.cpu_count()} × {platform.machine()} cores, 1 thread, "
        f"onnxruntime {onnxruntime.__version__}, {options.provider}; random Llama of "
        f"{size:.0f} M parameters, {options.dtype}, {options.layers} layers steered at "
        f"{options.component}, {UNITS} units each; {options.rounds} rounds\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.onnx"
        save_model(export_graph(model), base, limit=0)
        paths = {"unsteered": base}
        for name, rank in (("constant", 0), ("adaptive, r = 1", 1)):
            paths[name] = base.with_name(f"rank{rank}.onnx")
            graft_file(base, make_adapter(model, options.component, rank), paths[name])
        del model
        found: dict[str, dict[str, Callable[[], Any]]] = {}
        for name, path in paths.items():
            for kernels in (False, True) if name != "unsteered" else (False,):
                way = f"{name}, {'kernel' if kernels else 'function'}" * (name != "unsteered")
                found[way or name] = runs(session(path, options, kernels=kernels), options)
        for stage, repeat in (("decode", 4), ("prefill", 1)):
            ways = {name: stages[stage] for name, stages in found.items()}
            print(f"{stage}: ", end="")
            measured = ratios(ways, options.rounds, repeat, clock)
            print(f"\n\n| {stage} | of unsteered, median | 95 % interval |\n|---|---|---|")
            for name, values in measured.items():
                low, high = interval(values)
                print(f"| {name} | {np.median(values):.4f} | [{low:.4f}, {high:.4f}] |")
            print()


if __name__ == "__main__":
    main()
