"""What localization costs against a bare batched forward pass over the same strings.

    python benchmarks/localize.py                    # all; twenty minutes on one core
    python benchmarks/localize.py --rounds 3 --only choice

A round draws new pairs and runs the base and every way of localizing on them, in an order
that turns from round to round; CPU time of this process, one thread, float32. The base gets
its tensors ready made: both strings of 8 successive pairs, right-padded. The trial of a
layout, once a run, is left out. Lengths follow those of real question sets at 4.2 characters
a token; ids and weights are random. Every round has the same number of distinct tokens, so
that batches are as full as they are in a long run; a style's last row takes all its sets
together. Prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from austeer.adapters import Component, ContrastivePair, Site, localize
from austeer.adapters.activations.batches import plain_batch
from austeer.adapters.activations.capture import Activations, capture
from austeer.adapters.activations.layouts import Layout
from austeer.adapters.localization.momentum import MomentumCounter
from austeer.adapters.tokens import PairTokens

VOCABULARY = 4096


@dataclass(frozen=True, slots=True)
class Lengths:
    """Distribution of token counts: log-normal prompts, uniform completions."""

    median: float
    spread: float
    completion: tuple[int, int]

    def pairs(self, tokens: int) -> int:
        """About how many pairs have so many distinct tokens."""
        return max(8, round(tokens / (self.median + sum(self.completion))))

    def draw(self, count: int, seed: int) -> list[PairTokens]:
        """Pairs of random ids that differ from the first token of the completion on."""
        generator = np.random.default_rng(seed)
        prompts = np.exp(generator.normal(np.log(self.median), self.spread, count))
        low, high = self.completion
        return [
            PairTokens(
                _ids(generator, 2, int(min(max(prompt, 4), 400))),
                _ids(generator, 2, generator.integers(low, high, endpoint=True)),
                # Other ids than the positive's, so that nothing more is shared.
                _ids(generator, VOCABULARY // 2, generator.integers(low, high, endpoint=True)),
            )
            for prompt in prompts
        ]


def _ids(generator: np.random.Generator, first: int, count: int) -> tuple[int, ...]:
    return tuple(generator.integers(first, first + VOCABULARY // 2 - 2, count).tolist())


# Median and spread of the log length as measured in the sets named.
SETS = {
    "choice, as CAA hallucination": Lengths(153, 0.40, (1, 1)),
    "choice, as CAA refusal": Lengths(65, 0.27, (1, 1)),
    "choice, as SVAMP": Lengths(41, 0.24, (1, 1)),
    "choice, as BoolQ questions": Lengths(12, 0.13, (1, 1)),
    "open, prompts as CAA hallucination": Lengths(153, 0.40, (30, 95)),
    "open, prompts as CAA refusal": Lengths(65, 0.27, (30, 95)),
    "open, prompts as SVAMP": Lengths(41, 0.24, (30, 95)),
}
TARGET = {"choice": 0.45, "open": 0.52}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to localize: the layout, and the components read in one pass."""

    layout: Layout
    components: tuple[Component, ...] = tuple(Component)


PACKED, ONE_PACKED = "packed, 4 components", "packed, attention"
WAYS = {
    PACKED: Way("packed"),
    ONE_PACKED: Way("packed", (Component.ATTENTION,)),
    "tree, 4 components": Way("tree"),
    "plain, 4 components": Way("plain"),
}


def make_model() -> LlamaForCausalLM:
    """A random Llama of 30 M parameters, 2.1 M of them in the head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process for `work`."""
    started = time.process_time()
    work()
    return time.process_time() - started


def bare_batches(tokens: Sequence[PairTokens]) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches of 16 strings, pairs in their own order."""
    batches = [plain_batch(tokens[start : start + 8]) for start in range(0, len(tokens), 8)]
    return [
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        for batch in batches
    ]


@torch.no_grad()
def bare_forward(model: LlamaForCausalLM, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    for batch in batches:
        model(**batch, use_cache=False, logits_to_keep=1)


class Scoring:
    """Counters of each component, and the CPU seconds they took."""

    def __init__(self, model: LlamaForCausalLM, components: Sequence[Component]) -> None:
        config, self.seconds = model.config, 0.0
        self._counters = {
            kind: MomentumCounter(
                config.num_hidden_layers,
                config.intermediate_size if kind is Component.NEURON else config.hidden_size,
            )
            for kind in components
        }

    def add(self, found: Activations) -> None:
        """Count one batch."""
        started = time.process_time()
        for kind, counter in self._counters.items():
            layers = {
                site.layer: both
                for site, both in found.values.items()
                if site.component is kind
            }
            counter.update_layers(layers)
        self.seconds += time.process_time() - started


def localized(
    model: LlamaForCausalLM, tokens: Sequence[PairTokens], way: Way
) -> tuple[float, float]:
    """CPU seconds of localizing as `localize` does once it has tokens; those of scoring."""
    layers = range(model.config.num_hidden_layers)
    sites = [Site(layer, kind) for layer in layers for kind in way.components]
    scoring = Scoring(model, way.components)

    def work() -> None:
        for found in capture(model, tokens, sites, layout=way.layout):
            scoring.add(found)

    return cpu_seconds(work), scoring.seconds


Costs = dict[str, float]


def measure(model: LlamaForCausalLM, lengths: Lengths, size: int, rounds: int) -> list[Costs]:
    """CPU seconds of every round by way, `base` included; those of scoring; counts of tokens.

    `distinct` tokens are those that any way must compute, `computed` those that the base does,
    padding and both copies of a prompt included. A round has about `size` distinct tokens.
    """
    found: list[Costs] = []
    for turn in range(rounds):
        tokens = lengths.draw(lengths.pairs(size), turn)
        batches = bare_batches(tokens)
        order = ["base", *WAYS]
        costs: Costs = {
            "distinct": sum(pair.size for pair in tokens),
            "computed": sum(batch["input_ids"].numel() for batch in batches),
        }
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if name == "base":
                costs[name] = cpu_seconds(lambda: bare_forward(model, batches))  # noqa: B023
            else:
                costs[name], scoring = localized(model, tokens, WAYS[name])
            if name == PACKED:
                costs["scoring"] = scoring
        found.append(costs)
    return found


def total(rounds: Sequence[Costs]) -> Costs:
    """The costs of several sets together, in one round."""
    return {name: sum(costs[name] for costs in rounds) for name in rounds[0]}


def cells(rounds: Sequence[Costs]) -> Iterator[str]:
    """Median of each ratio, with its smallest and largest."""
    pairs = {
        "tokens": ("distinct", "computed"),
        **{name: (name, "base") for name in WAYS},
        "4 : 1": (PACKED, ONE_PACKED),
        "scoring": ("scoring", PACKED),
    }
    for name, (part, whole) in pairs.items():
        form = ".2%" if name == "scoring" else ".3f"
        ratios = [costs[part] / costs[whole] for costs in rounds]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        yield f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the ids of the vocabulary in decimal."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {str(number): number for number in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="0")


def peak_memory(pairs: int) -> float:
    """Peak resident memory of this process after localizing so many pairs, in MB."""
    drawn = SETS["choice, as SVAMP"].draw(pairs, 0)
    texts = [
        ContrastivePair(*(" ".join(map(str, (*ids, ""))) for ids in parts), where=f"pair {n}")
        for n, pair in enumerate(drawn)
        for parts in [(pair.prefix, pair.positive, pair.negative)]
    ]
    localize(make_model(), word_tokenizer(), texts)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def print_memory() -> None:
    """Peak memory of fresh processes for 200 and for 2 000 pairs, in turn."""
    peaks: dict[int, list[float]] = {200: [], 2000: []}
    for _ in range(5):
        for pairs, found in peaks.items():
            command = [sys.executable, __file__, "--peak-memory", str(pairs)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(float(done.stdout))
    few, many = (statistics.median(found) for found in peaks.values())
    ratios = sorted(b / a for a, b in zip(*peaks.values(), strict=True))
    print(
        "\nPeak memory (VmHWM of a fresh process, four components, medians of 5): "
        f"{few:.0f} MB for 200 pairs, {many:.0f} MB for 2 000, ratio {many / few:.3f} "
        f"[{ratios[0]:.3f}, {ratios[-1]:.3f}]."
    )


def print_row(name: str, rounds: Sequence[Costs]) -> None:
    """One line of the table."""
    target = TARGET[name.split(",")[0]]
    print(f"| {name} | {target} | " + " | ".join(cells(rounds)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4608, help="distinct tokens of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="sets whose name holds this, or memory")
    parser.add_argument("--peak-memory", type=int, metavar="PAIRS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_memory:
        print(peak_memory(options.peak_memory))
        return
    model = make_model()
    print(f"{datetime.date.today()}, {os.cpu_count()} × {platform.machine()} cores,", end=" ")
    print(
        f"1 thread, torch {torch.__version__}, transformers {transformers.__version__};",
        end=" ",
    )
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, float32;",
        end=" ",
    )
    print(f"{options.rounds} rounds of {options.tokens} tokens, median [least, most]\n")
    print(
        "| lengths | target | tokens | "
        + " | ".join((*WAYS, "4 : 1 components", "scoring"))
        + " |"
    )
    print("|---|" + "---|" * (len(WAYS) + 4))
    found: dict[str, list[list[Costs]]] = {}
    for name, lengths in SETS.items():
        if options.only in name:
            style = name.split(",")[0]
            rounds = measure(model, lengths, options.tokens, options.rounds)
            found.setdefault(style, []).append(rounds)
            print_row(name, rounds)
    for style, sets in found.items():
        if len(sets) > 1:
            print_row(f"{style}, all", [total(same) for same in zip(*sets, strict=True)])
    if options.only in ("", "memory"):
        print_memory()


if __name__ == "__main__":
    main()
