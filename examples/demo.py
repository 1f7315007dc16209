"""The main job on the embedded model: pairs in, two steered products out, text from both.

    python examples/demo.py [--out demo_out] [--behaviour mood]

Makes `fitted` gains folded into a safetensors checkpoint and `adaptive` gains grafted into an
ONNX graph, then loads both as any user of those formats would, without an adapter.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from austeer.exporter.routes import Route
from austeer.exporter.run import RunReport, run_job
from austeer.exporter.settings import BaseOptions, RunOptions

HERE = Path(__file__).resolve().parent
MODEL = HERE / "demo_model"
PROMPTS = {
    "mood": (
        "Tom found a red kite near the river. He felt",
        "On Sunday, Kate sat in the hall with a big book. She felt very",
        "Far from home, Pete kept a big ring on the stairs. Then the ring",
    ),
    "tense": ("On Monday, Nora", "On a quiet day, Dan", "Far from home, little Amy"),
}
Generate = Callable[[str], str]

console = Console(highlight=False)


def run(behaviour: str, strength: str, route: Route, out: Path) -> RunReport:
    """One `austeer-export run`; the command line that does the same is printed."""
    train, test = (HERE / "pairs" / f"{behaviour}_{part}.jsonl" for part in ("train", "test"))
    model, fit, held_out = (os.path.relpath(path) for path in (MODEL, train, test))
    command = (
        f"austeer-export run {model} {fit} --test-pairs {held_out} "
        f"--strength {strength} --to {route} -o {out}"
    )
    console.print(f"[bold]$ {command}[/bold]", soft_wrap=True)
    options = RunOptions(
        base=BaseOptions(model=str(MODEL)),
        pairs=str(train),
        test_pairs=str(test),
        out=out,
        routes=(route,),
        strength=strength,
        command=command,
    )
    with console.status("starting") as status:
        return run_job(options, showing(status.update))


def showing(update: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """Progress as one changing line."""
    return lambda stage, done, total: update(f"{stage} {done}/{total}")


def checkpoint_text(folder: Path) -> Generate:
    """Greedy text of a checkpoint, loaded with plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

    def generate(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return str(tokenizer.decode(output[0], skip_special_tokens=True))

    return generate


def onnx_text(folder: Path) -> Generate:
    """Greedy text of the ONNX model on stock onnxruntime, with a KV cache."""
    from transformers import AutoTokenizer

    from austeer.graphs import OnnxCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = OnnxCausalLM(folder / "model.onnx")

    def generate(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="np")["input_ids"]
        output = model.generate(ids, 40, eos_token_id=tokenizer.eos_token_id)
        return str(tokenizer.decode(output[0], skip_special_tokens=True))

    return generate


def forget(out: Path) -> None:
    """Remove the output of an earlier demo, and nothing else."""
    if (out / "report.json").is_file():
        shutil.rmtree(out)


def show_texts(behaviour: str, routes: dict[str, Generate]) -> None:
    """The same prompts through the base and both products."""
    for prompt in PROMPTS[behaviour]:
        table = Table(title=f'"{prompt}"', show_lines=True, show_header=False, expand=True)
        table.add_column(width=24)
        table.add_column(ratio=1)
        for name, generate in routes.items():
            table.add_row(name, generate(prompt).removeprefix(prompt).strip())
        console.print(table)


def show_figures(reports: dict[str, dict[str, Any]]) -> None:
    """Held-out figures of both runs."""
    table = Table(title="held-out pairs (templates and names that the fit has not seen)")
    for title in (
        "product",
        "accuracy",
        "margin (nats)",
        "KL (nats/token)",
        "fluency",
        "units",
    ):
        table.add_column(title)
    for name, report in reports.items():
        test = report["test"]
        table.add_row(
            name,
            f"{test['base_accuracy']:.2f} → {test['accuracy']:.2f}",
            f"{test['base_margin']:+.1f} → {test['margin']:+.1f}",
            f"{test['kl']:.3f} of {report['fit']['kl_budget']:g}",
            f"{test['fluency']:.2f}",
            str(report["selected"]["k"]),
        )
    console.print(table)


def main() -> None:
    """Run both jobs and show what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    parser.add_argument("--behaviour", choices=sorted(PROMPTS), default="mood")
    options = parser.parse_args()
    # A bar that comes and goes within a second only clutters.
    transformers.utils.logging.disable_progress_bar()
    for name in ("fitted", "adaptive"):
        forget(options.out / name)
    folded = run(options.behaviour, "fitted", Route.SAFETENSORS, options.out / "fitted")
    grafted = run(options.behaviour, "adaptive", Route.ONNX, options.out / "adaptive")
    checkpoint, graph = folded.out / "safetensors", grafted.out / "onnx"
    show_texts(
        options.behaviour,
        {
            "base": checkpoint_text(MODEL),
            "fitted, safetensors": checkpoint_text(checkpoint),
            "adaptive, ONNX": onnx_text(graph),
        },
    )
    show_figures({"fitted, safetensors": folded.values, "adaptive, ONNX": grafted.values})
    console.print(f"steered checkpoint   {checkpoint}\nsteered ONNX model   {graph}")
    console.print(f"reports              {folded.out}/report.md, {grafted.out}/report.md")


if __name__ == "__main__":
    main()
