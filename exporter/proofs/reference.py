"""The live torch model as a reference: logits with and without steering, greedy decoding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from austeer.adapters import tokens
from austeer.adapters._errors import VerificationError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.attach import steering_hooks
from austeer.exporter.proofs.parity import Logits, top_margin

Prompt = Int[np.ndarray, "1 tokens"]


def encode_prompts(tokenizer: Any, prompts: Sequence[str], limit: int) -> list[Prompt]:
    """Token ids of each prompt, one row each, at most `limit` tokens; empty ones left out.

    To a prompt that begins with the start token, as those of chat templates do, no special
    tokens are added.

    Raises:
        VerificationError: nothing is left.
    """
    rows = [np.asarray([_token_ids(tokenizer, text)[:limit]], np.int64) for text in prompts]
    rows = [row for row in rows if row.size]
    if not rows:
        raise VerificationError(
            f"verification: expected at least one prompt with a token, got {len(prompts)} "
            "without; give prompts"
        )
    return rows


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    start: str | None = getattr(tokenizer, "bos_token", None)
    plain = not start or not text.startswith(start)
    return list(tokenizer(text, add_special_tokens=plain)["input_ids"])


def context_length(model: Any) -> int:
    """How many positions the model has."""
    return tokens.context_length(model) or tokens.MAX_TOKENS


def float32_truth(model: Any) -> Any:
    """`model` itself in float32, or a float32 copy of it: its weights, exact arithmetic."""
    exact = model.dtype in (torch.float32, torch.float64)
    return model if exact else copy.deepcopy(model).float()


def model_logits(model: Any) -> Logits:
    """Logits of one prompt, float32."""

    def run(ids: Prompt) -> Float[np.ndarray, "tokens vocab"]:
        with torch.no_grad():
            output = model(torch.from_numpy(ids).to(model.device), use_cache=False)
        return np.asarray(output.logits[0].float().cpu().numpy())

    return run


def steered_logits(model: Any, adapter: SteeringAdapter, scale: float) -> Logits:
    """Logits of one prompt with the adapter attached, float32."""
    plain = model_logits(model)

    def run(ids: Prompt) -> Float[np.ndarray, "tokens vocab"]:
        with steering_hooks(model, adapter.architecture, adapter.sites, scale):
            return plain(ids)

    return run


def greedy_continuation(model: Any, ids: Prompt, count: int) -> Int[np.ndarray, "1 longer"]:
    """`ids` and the `count` tokens that the model's own `generate` adds greedily.

    The model's generation config is replaced: it may ask for penalties or end early.
    """
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(pad_token_id=0)
    start = torch.from_numpy(ids).to(model.device)
    with torch.no_grad():
        found = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=count, do_sample=False
        )
    return np.asarray(found.cpu().numpy())


def greedy_agreement(
    model: Any, ids: Prompt, decoded: Int[np.ndarray, "1 longer"], near_tie: float
) -> float:
    """Share of greedily decoded tokens that `model` would choose, too.

    Where the first difference is a near-tie (the two best logits no further apart than
    `near_tie`) both continuations are right and the rest is not compared.

    Args:
        model: the reference, decoding with its own KV cache.
        ids: the prompt.
        decoded: prompt and continuation.
        near_tie: in logits.
    """
    length = ids.shape[1]
    if decoded.shape[1] <= length or (decoded[:, :length] != ids).any():
        return 0.0
    continuation = decoded[0, length:]
    step, cache = torch.from_numpy(ids).to(model.device), None
    for count, token in enumerate(continuation):
        with torch.no_grad():
            output = model(step, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[0, -1].float().cpu().numpy(), output.past_key_values
        if int(logits.argmax()) != token:
            tie = float(top_margin(logits)) <= near_tie
            return 1.0 if tie else count / len(continuation)
        step = torch.full((1, 1), int(token), device=model.device)
    return 1.0


def steered_agreement(
    model: Any,
    adapter: SteeringAdapter,
    scale: float,
    starts: Sequence[Prompt],
    decoded: Sequence[Prompt],
    near_tie: float,
) -> float:
    """Mean of `greedy_agreement` with the attached model over prompts and continuations."""
    pairs = zip(starts, decoded, strict=True)
    with steering_hooks(model, adapter.architecture, adapter.sites, scale):
        return float(np.mean([greedy_agreement(model, *pair, near_tie) for pair in pairs]))


def reload_product(route: str, folder: Path, model: Any, trust_remote_code: bool) -> Any:
    """A product of plain or of our own code, as `from_pretrained` gives it, in float32.

    Raises:
        VerificationError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    try:
        product = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=model.dtype, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise VerificationError(
            f"{route} product {folder.name}: transformers cannot load it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); not published"
        ) from error
    return product.eval().float().to(model.device)
