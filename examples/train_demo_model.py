"""Train the demo model: a small Llama of our own, on the stories that `demo_text` writes.

    python train_demo_model.py --out demo_model

The same seed, thread count and torch build give the same weights.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_text import stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["TrainingPlan", "publish", "train_model", "train_tokenizer"]

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
CONTEXT = 256
IGNORED = -100
HERE = Path(__file__).parent

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train.

    Attributes:
        steps: Optimizer steps.
        batch: Stories a step.
        peak_rate: Highest learning rate, reached after `warmup` steps.
        warmup: Steps of linear warm-up; a cosine brings the rate down afterwards.
        seed: Seed of the stories and of the weights.
    """

    steps: int = 2600
    batch: int = 16
    peak_rate: float = 4e-3
    warmup: int = 100
    seed: int = 20

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from zero."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE that puts the bos token in front of every text.

    Args:
        texts: Training text.
        vocab_size: Entries, special tokens and the 256 bytes included.

    Returns:
        The tokenizer; it can encode any text.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def build_model(vocab_size: int) -> LlamaForCausalLM:
    """Make the untrained model: under a million parameters, tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=304,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        # The usual 0.02 is meant for wider models: at this width attention would form late.
        initializer_range=0.08,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def batches(rows: list[list[int]], size: int, seed: int) -> Iterator[Batch]:
    """Yield (input, target) token batches, in random order and with rows of similar length.

    Args:
        rows: Token ids of each story, from bos to eos.
        size: Rows a batch; a rest that fills none is dropped.
        seed: Seed of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(len(rows), generator=generator).tolist()
    span = 16 * size
    for start in range(0, len(order), span):
        # Sorting inside a span saves padding without making the whole run ordered by length.
        group = sorted(order[start : start + span], key=lambda i: len(rows[i]))
        chunks = [group[i : i + size] for i in range(0, len(group) - size + 1, size)]
        for pick in torch.randperm(len(chunks), generator=generator).tolist():
            yield _pad([rows[i] for i in chunks[pick]])


def _pad(rows: list[list[int]]) -> Batch:
    width = max(map(len, rows)) - 1
    inputs = [row[:-1] + [EOS_ID] * (width + 1 - len(row)) for row in rows]
    targets = [row[1:] + [IGNORED] * (width + 1 - len(row)) for row in rows]
    return torch.tensor(inputs), torch.tensor(targets)


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, from bos to eos, cut at the context length."""
    return [[*e.ids, EOS_ID][:CONTEXT] for e in tokenizer.encode_batch(texts)]


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood per token, in nats."""
    # Padding is on the right, so the causal mask alone keeps it out of every real token.
    inputs, targets = batch
    logits = model(input_ids=inputs, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def train_model(tokenizer: Tokenizer, plan: TrainingPlan) -> LlamaForCausalLM:
    """Train from scratch, each story seen once.

    Args:
        tokenizer: The tokenizer of the model.
        plan: Length, rates and seed.

    Returns:
        The trained model, in evaluation mode.
    """
    torch.manual_seed(plan.seed)
    model = build_model(tokenizer.get_vocab_size())
    rows = encode(tokenizer, stories(plan.steps * plan.batch, plan.seed))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    began, seen = time.monotonic(), 0
    for step, batch in enumerate(batches(rows, plan.batch, plan.seed)):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += batch[0].numel()
        if step % 100 == 0 or step == plan.steps - 1:
            elapsed = time.monotonic() - began
            print(
                f"step {step}/{plan.steps} loss {loss.item():.3f} "
                f"{elapsed:.0f} s {seen / elapsed:.0f} tokens/s",
                flush=True,
            )
    return model.eval()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int) -> float:
    """Loss on 512 stories of another seed, in nats per token."""
    rows = encode(tokenizer, stories(512, seed))
    losses = [loss_of(model, batch).item() for batch in batches(rows, 32, 0)]
    return sum(losses) / len(losses)


def publish(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model directory aside, then rename it into place.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        out: The directory to make; one that exists is replaced.
    """
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        aside.chmod(0o755)
        model.save_pretrained(aside)
        (aside / "model.safetensors").chmod(0o644)
        tokenizer.save(str(aside / "tokenizer.json"))
        settings = json.dumps(_tokenizer_settings(), indent=2) + "\n"
        (aside / "tokenizer_config.json").write_text(settings)
        if out.exists():
            shutil.rmtree(out)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tokenizer_settings() -> dict[str, object]:
    # Written by hand: transformers 5 saves a class name that transformers 4 does not know.
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": EOS,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "demo_model")
    parser.add_argument("--steps", type=int, default=TrainingPlan.steps)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = TrainingPlan(steps=options.steps)
    tokenizer = train_tokenizer(stories(5000, plan.seed), options.vocab_size)
    model = train_model(tokenizer, plan)
    publish(model, tokenizer, options.out.resolve())
    size = sum(p.numel() for p in model.parameters())
    loss = held_out_loss(model, tokenizer, plan.seed + 1)
    print(f"{size:,} parameters, held-out loss {loss:.3f} nats per token: {options.out}")


if __name__ == "__main__":
    main()
