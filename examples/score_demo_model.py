"""Show what the unsteered demo model does: its accuracy on the pairs, and how it goes on.

python score_demo_model.py --model demo_model --pairs pairs
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

__all__ = ["PROMPTS", "continuation", "log_likelihood", "margins"]

HERE = Path(__file__).parent
PROMPTS = (
    "One day, Mia",
    "Tom found a red kite near the river. He felt",
    "Anna has a little box in the garden. The box",
    'Look, a green boat! "What is this?" asked Jack. Then',
)


@torch.no_grad()
def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> float:
    """Log-probability of a completion given its prompt, in nats.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompt: Text before the completion; no separator is added.
        completion: Text to score.

    Returns:
        The sum over the tokens of the completion.
    """
    ids = tokenizer(prompt + completion, return_tensors="pt").input_ids
    start = len(tokenizer(prompt).input_ids)
    scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return float(scores[start - 1 :].gather(-1, ids[0, start:, None]).sum())


def margins(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Mapping[str, str]],
) -> list[float]:
    """Log-probability of the positive minus that of the negative, in nats, one a pair."""
    return [
        log_likelihood(model, tokenizer, pair["prompt"], pair["positive"])
        - log_likelihood(model, tokenizer, pair["prompt"], pair["negative"])
        for pair in pairs
    ]


def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, sample: bool
) -> str:
    """Finish a story.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompt: How the story begins.
        sample: Draw tokens at temperature 1 instead of taking the likeliest.

    Returns:
        The prompt and what follows it.
    """
    encoded = tokenizer(prompt, return_tensors="pt")
    # The default top_k of 50 would cut the tail of the distribution off.
    how = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    ids = model.generate(**encoded, **how, max_new_tokens=150)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def main() -> None:
    """Print the figures and a few stories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "demo_model")
    parser.add_argument("--pairs", type=Path, default=HERE / "pairs")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    for path in sorted(options.pairs.glob("*.jsonl")):
        pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = margins(model, tokenizer, pairs)
        accuracy = sum(margin > 0 for margin in found) / len(found)
        size = statistics.fmean(map(abs, found))
        print(f"{path.stem}: {len(found)} pairs, accuracy {accuracy:.2f}, |margin| {size:.2f}")
    for prompt in PROMPTS:
        for sample in (False, True):
            print("sampled:" if sample else "greedy: ", end=" ")
            print(continuation(model, tokenizer, prompt, sample=sample))


if __name__ == "__main__":
    main()
