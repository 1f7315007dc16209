"""The same prompts continued by the base and by the steered model, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.pairs import ContrastivePair
from austeer.adapters.tokens import prompt_ids

if TYPE_CHECKING:
    from austeer.exporter.products import Base


def before_and_after(
    base: Base,
    adapter: SteeringAdapter,
    pairs: Sequence[ContrastivePair],
    *,
    count: int = 4,
    new_tokens: int = 40,
) -> list[dict[str, str]]:
    """Greedy continuations of a few distinct prompts, spread over `pairs`.

    Returns:
        Entries with `prompt`, `base` and `steered`.
    """
    distinct = list({pair.prompt: pair for pair in pairs if pair.prompt}.values())
    distinct = distinct[:: max(1, len(distinct) // count)][:count]
    prompts = prompt_ids(distinct, base.tokenizer)
    before = [continue_greedily(base, ids, new_tokens) for ids in prompts]
    # The files of the base were checked; loaded in another dtype, its fingerprint differs.
    with adapter.attached(base.model, force=True):
        after = [continue_greedily(base, ids, new_tokens) for ids in prompts]
    return [
        {"prompt": pair.prompt, "base": plain, "steered": steered}
        for pair, plain, steered in zip(distinct, before, after, strict=True)
    ]


@torch.no_grad()
def continue_greedily(base: Base, prompt: Sequence[int], new_tokens: int) -> str:
    """Greedy continuation of one prompt, in token ids; the prompt itself is left out."""
    ids = torch.tensor([prompt], device=base.model.device)
    output = base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=base.tokenizer.pad_token_id or 0,
    )
    return str(base.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
