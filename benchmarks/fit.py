"""Cost of choosing among 25 candidates: one by one, and with everything shared.

    python benchmarks/fit.py                     # the demo model
    python benchmarks/fit.py --shared ../shared  # and stories260K, happy against sad
    python benchmarks/fit.py --large             # and a random 26 M Llama, for the cost alone

Candidates are 5 unit counts × 5 strengths α of `oriented` around the KL budget, judged on 64
pairs and on neutral text sampled from the model. The ways alternate; CPU time at one thread.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from austeer.adapters import Strength, load_model, load_tokenizer, localize, read_pairs
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import steering_hooks
from austeer.adapters.fitting.choice import choose
from austeer.adapters.fitting.strength import AlphaSearch, constant_sites, unit_direction
from austeer.adapters.fitting.sweep import sweep_kl, sweep_margins
from austeer.adapters.measurement.evaluate import KLMeter, batch_pairs
from austeer.adapters.measurement.intervals import mean_interval
from austeer.adapters.measurement.neutral import TokenText, sample_neutral
from austeer.adapters.steered_site import SteeredSite
from austeer.adapters.tokens import PairTokens, tokenize_pairs

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
COUNTS = (4, 8, 16, 32, 64)
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the α that brings the middle count to the KL budget
PAIRS, TEXTS, LENGTH, BATCH = 64, 32, 64, 16


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A model, 25 candidates, and the data to choose on."""

    name: str
    model: Any
    tokens: list[PairTokens]
    text: TokenText
    labels: list[str]
    candidates: list[list[SteeredSite]]
    limit: float


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a way of choosing came to; NaN where it did not look."""

    best: int
    margins: np.ndarray[Any, np.dtype[np.float64]]
    kl: np.ndarray[Any, np.dtype[np.float64]]


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The demo model, and the real and the large one when asked for."""
    mood = EXAMPLES / "pairs" / "mood_train.jsonl"
    demo = (
        load_model(str(EXAMPLES / "demo_model")),
        load_tokenizer(str(EXAMPLES / "demo_model")),
    )
    yield case("demo model, mood, `ffn`", *demo, mood, "ffn", options)
    if options.shared is not None:
        folder = str(options.shared / "models" / "stories260K")
        happy = options.shared / "data" / "happy_vs_sad_train.jsonl"
        real = (load_model(folder), load_tokenizer(folder))
        for component in ("attention", "neuron"):
            name = f"stories260K, happy_vs_sad, `{component}`"
            yield case(name, *real, happy, component, options)
    if options.large:
        name = "random Llama (26 M), `attention`"
        yield case(name, random_llama(), demo[1], mood, "attention", options)


def case(
    name: str,
    model: Any,
    tokenizer: Any,
    path: Path,
    component: str,
    options: argparse.Namespace,
) -> Case:
    """Rank units on some pairs, choose on 64 others."""
    pairs = read_pairs(path)
    shuffled = [pairs[n] for n in np.random.default_rng(options.seed).permutation(len(pairs))]
    ranking = localize(model, tokenizer, shuffled[PAIRS:], components=[component])

    def sites(k: int, alpha: float) -> list[SteeredSite]:
        table = ranking.top(component, k)
        return constant_sites(table, alpha * unit_direction(table, ranking, Strength.ORIENTED))

    text = sample_neutral(model, tokenizer, sequences=TEXTS, length=LENGTH, seed=options.seed)
    search = AlphaSearch(options.kl_budget)
    while not search.done:
        sums, counts = sweep_kl(model, text, [sites(COUNTS[2], search.propose())])
        search.tell(float(sums.sum() / counts.sum()))
    grid = [(k, round(share * search.best, 3)) for k in COUNTS for share in SHARES]
    return Case(
        name,
        model,
        tokenize_pairs(shuffled[:PAIRS], tokenizer),
        text,
        [f"k = {k}, α = {alpha:g}" for k, alpha in grid],
        [sites(k, alpha) for k, alpha in grid],
        options.kl_budget,
    )


def random_llama() -> LlamaForCausalLM:
    """A model of the cost of a small real one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@torch.no_grad()
def one_by_one(case: Case) -> Outcome:
    """A: attach each candidate; both strings of a pair as rows, all logits; then the KL."""
    numbers = sorted(range(PAIRS), key=lambda n: case.tokens[n].longest)
    meter = KLMeter(case.model, case.text, BATCH)

    def evaluate(sites: list[SteeredSite]) -> tuple[Any, float]:
        margins = np.empty(PAIRS)
        with steered(case, sites):
            for start in range(0, PAIRS, BATCH // 2):
                part = numbers[start : start + BATCH // 2]
                margins[part] = plain_margins(case.model, [case.tokens[n] for n in part])
        return margins, meter.mean(lambda: steered(case, sites))

    return exhaustive(case, [evaluate(sites) for sites in case.candidates])


def plain_margins(model: Any, tokens: Sequence[PairTokens]) -> Any:
    """Margins from ordinary rows, right-padded, logits at every position."""
    rows = [[*p.prefix, *side] for p in tokens for side in (p.positive, p.negative)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    scored = torch.zeros(ids.shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        scored[number, len(tokens[number // 2].prefix) : len(row)] = True
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    log_probs = logits[:, :-1].float().log_softmax(-1)
    picked = log_probs.gather(-1, ids[:, 1:, None])[..., 0] * scored[:, 1:]
    total = picked.double().sum(1).numpy()
    return total[::2] - total[1::2]


def shared_prompts(case: Case) -> Outcome:
    """A′: one by one still, but prompts shared within a pair and only the logits needed."""
    pairs = batch_pairs(case.model, case.tokens, BATCH)
    meter = KLMeter(case.model, case.text, BATCH)

    def evaluate(sites: list[SteeredSite]) -> tuple[Any, float]:
        with steered(case, sites):
            margins = pairs.margins(case.model)
        return margins, meter.mean(lambda: steered(case, sites))

    return exhaustive(case, [evaluate(sites) for sites in case.candidates])


def shared_layers(case: Case) -> Outcome:
    """A″: all candidates on all data, shared layers once."""
    pairs = batch_pairs(case.model, case.tokens, BATCH)
    margins = sweep_margins(case.model, pairs, case.candidates)
    sums, counts = sweep_kl(case.model, case.text, case.candidates, BATCH)
    return exhaustive(case, list(zip(margins, sums.sum(1) / counts.sum(), strict=True)))


def halving(case: Case) -> Outcome:
    """B: shared layers, and hopeless candidates dropped early."""
    found = choose(
        case.model, case.candidates, case.tokens, case.text, case.limit, batch_size=BATCH
    )
    return Outcome(found.best, found.margins, found.kl)


def steered(case: Case, sites: list[SteeredSite]) -> Any:
    """Context in which a candidate is attached."""
    return steering_hooks(case.model, architecture_of(case.model.config.model_type), sites)


def exhaustive(case: Case, found: list[tuple[Any, float]]) -> Outcome:
    """The largest mean margin within the limit."""
    margins, kl = np.stack([row for row, _ in found]), np.array([value for _, value in found])
    inside = np.where(kl <= case.limit, margins.mean(1), -np.inf)
    best = inside.argmax() if np.isfinite(inside).any() else kl.argmin()
    return Outcome(int(best), margins, kl)


WAYS: dict[str, Callable[[Case], Outcome]] = {
    "A  one by one": one_by_one,
    "A′ + prompts shared, unused logits dropped": shared_prompts,
    "A″ + layers shared between candidates": shared_layers,
    "B  + successive halving": halving,
}


def measure(case: Case, repeats: int) -> tuple[dict[str, list[float]], dict[str, Outcome]]:
    """CPU seconds of each way, alternating, and what each chose."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    outcomes = {}
    for _ in range(repeats):
        for name, way in WAYS.items():
            started = time.process_time()
            outcomes[name] = way(case)
            seconds[name].append(time.process_time() - started)
    return seconds, outcomes


def report(case: Case, repeats: int) -> None:
    """Print one case."""
    seconds, outcomes = measure(case, repeats)
    first, *_, last = WAYS
    truth, ours = outcomes[first], outcomes[last]
    print(f"\n### {case.name}\n")
    print(
        f"{(truth.kl <= case.limit).sum()} of {len(truth.kl)} candidates keep the budget; ",
        end="",
    )
    print(f"pairs of {np.mean([p.longest for p in case.tokens]):.0f} tokens, ", end="")
    print(f"{np.mean([len(p.prefix) for p in case.tokens]):.0f} of them shared.\n")
    print("| way | CPU s, median | of A, median [least, largest] | chosen | margin | KL |")
    print("|---|---|---|---|---|---|")
    for name in WAYS:
        ratios = [b / a for a, b in zip(seconds[first], seconds[name], strict=True)]
        share = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        best, kl = outcomes[name].best, outcomes[name].kl[outcomes[name].best]
        margin = interval(outcomes[name].margins[best])
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {share} ", end="")
        print(f"| {case.labels[best]} | {margin} | {kl:.4f} |")
    print(f"\n{agreement(truth, ours)}", flush=True)


def agreement(truth: Outcome, ours: Outcome) -> str:
    """Whether both chose the same, else by how much their margins differ."""
    seen = ~np.isnan(ours.margins)
    worst = np.abs(ours.margins - truth.margins)[seen].max()
    same = (
        f"Figures differ by {worst:.1e} nats at most; B saw {seen.mean():.0%} of the margins."
    )
    if ours.best == truth.best:
        return f"A and B choose the same candidate. {same}"
    lead = truth.margins[truth.best] - truth.margins[ours.best]
    span = mean_interval(truth.margins[truth.best])
    inside = span.low <= truth.margins[ours.best].mean() <= span.high
    return (
        f"A and B differ: {interval(lead)} nats between them, B's choice "
        f"{'inside' if inside else 'OUTSIDE'} the interval of A's. {same}"
    )


def interval(values: Any) -> str:
    """Mean with its 95 % bootstrap interval."""
    found = mean_interval(np.asarray(values))
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="folder with models/ and data/")
    parser.add_argument("--large", action="store_true", help="a random 26 M Llama as well")
    parser.add_argument("--kl-budget", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{datetime.date.today()}, {os.cpu_count()} × {platform.machine()} cores, 1 thread, ",
        end="",
    )
    print(
        f"torch {torch.__version__}; {PAIRS} pairs, {TEXTS} neutral texts × {LENGTH} tokens, ",
        end="",
    )
    print(f"KL budget {options.kl_budget:g} nats/token, float32")
    for found in cases(options):
        report(found, options.repeats)


if __name__ == "__main__":
    main()
