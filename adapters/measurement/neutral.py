"""Text sampled from a model: the neutral text of the KL budget, and steered continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.adapters.architectures import text_config
from austeer.adapters.tokens import check_vocabulary, text_ids

# Share of the tokens asked for below which a sample says too little of what steering does.
_ENOUGH = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class TokenText:
    """Token sequences of different lengths, padded: prompts on the left, texts on the right.

    Attributes:
        input_ids: token ids.
        valid: True where a token is real.
        ends: whether an end token could be drawn, of a sample.
    """

    input_ids: Int[Tensor, "n length"]
    valid: Bool[Tensor, "n length"]
    ends: bool = True

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, chosen: slice | Sequence[int] | Tensor) -> TokenText:
        """Some of the sequences."""
        return TokenText(self.input_ids[chosen], self.valid[chosen], self.ends)


def sample_neutral(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int = 96,
    length: int = 96,
    seed: int = 0,
    ends: bool | None = None,
) -> TokenText:
    """Sample text from the model itself at temperature 1, from its start token.

    A model without a start token begins with its end token (as GPT-2 does), else with a
    token drawn uniformly. Sequences end at the end token; where that leaves less than half of
    the tokens asked for, as of a chat model that has nothing to answer, none is drawn.

    Args:
        model: the base model.
        tokenizer: says which token starts a text.
        sequences: number of texts.
        length: tokens of each at most, the first included.
        seed: of the noise; equal seeds give equal text.
        ends: whether end tokens may be drawn; None for as said.

    Raises:
        ModelError: the model does not know the start token.
    """
    start = start_token(tokenizer)
    if start is None:
        noise = torch.Generator().manual_seed(seed)
        size = (sequences, 1)
        vocabulary = text_config(model).vocab_size
        first = torch.randint(vocabulary, size, generator=noise, device="cpu")
    else:
        check_vocabulary(model, "start token", [start])
        first = torch.full((sequences, 1), int(start), device="cpu")
    text = _continued(model, first, length - 1, seed, ends=ends is not False)
    if ends is None and int(text.valid.sum()) < _ENOUGH * sequences * length:
        text = _continued(model, first, length - 1, seed, ends=False)
    return text


def _continued(
    model: PreTrainedModel, first: Int[Tensor, "n 1"], steps: int, seed: int, *, ends: bool
) -> TokenText:
    prompt = TokenText(first, torch.ones_like(first, dtype=torch.bool))
    generated = continue_texts(model, prompt, steps=steps, seed=seed, ends=ends)
    # What follows an end token means nothing, so nothing is predicted from it.
    inside = generated.valid & ~torch.isin(generated.input_ids, end_tokens(model))
    return TokenText(
        torch.cat([first.to(generated.input_ids), generated.input_ids], dim=1),
        torch.cat([prompt.valid.to(inside), inside], dim=1),
        ends,
    )


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that starts a text: the start token, else the end token, else None."""
    start: int | None = tokenizer.bos_token_id
    end: int | None = tokenizer.eos_token_id
    return end if start is None else start


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> TokenText:
    """Tokenize prompts, left-padded, the last `limit` tokens of each.

    What the tokenizer appends to a text is left out: nothing goes on behind an end token.
    """
    return pad_prompts(text_ids(prompts, tokenizer), tokenizer, limit)


def pad_prompts(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, limit: int
) -> TokenText:
    """The last `limit` tokens of each prompt, left-padded; of none, the start token."""
    start = start_token(tokenizer) or 0
    return _padded([ids[-limit:] or [start] for ids in prompts], left=True)


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> TokenText:
    """Tokenize texts, right-padded, the first `limit` tokens of each."""
    return _padded([tokenizer(text)["input_ids"][:limit] for text in texts], left=False)


@torch.no_grad()
def continue_texts(
    model: PreTrainedModel,
    prompt: TokenText,
    *,
    steps: int,
    seed: int,
    temperature: float = 1.0,
    ends: bool = True,
) -> TokenText:
    """Sample `steps` tokens after each left-padded prompt, with a KV cache.

    The noise depends on `seed` alone, not on the model, so that base and steered samples
    are paired. Temperature 0 is greedy. Without `ends` no end token is drawn.

    Returns:
        The continuations only; `valid` ends after the first end token.
    """
    device = model.device
    uniform = torch.rand(
        len(prompt),
        steps,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
        device="cpu",
    )
    last = end_tokens(model)
    ids, mask = prompt.input_ids.to(device), prompt.valid.to(device).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alive = torch.ones(len(prompt), dtype=torch.bool, device=device)
    cache, tokens, valid = None, [], []
    for step in range(steps):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        logits = output.logits[:, -1]
        if not ends:
            logits[:, last[last < logits.shape[-1]].to(logits.device)] = -torch.inf
        chosen = _draw(logits, uniform[:, step], temperature).to(device)
        tokens.append(chosen)
        valid.append(alive)
        alive = alive & ~torch.isin(chosen, last)
        if not alive.any():
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return TokenText(torch.stack(tokens, dim=1), torch.stack(valid, dim=1))


def end_tokens(model: PreTrainedModel) -> Int[Tensor, " ends"]:
    """The model's end-of-text token ids, maybe none."""
    ends = (
        model.generation_config.eos_token_id
        if model.generation_config
        else text_config(model).eos_token_id
    )
    listed = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return torch.tensor(listed, dtype=torch.long, device=model.device)


def _draw(
    logits: Float[Tensor, "n vocab"], uniform: Float[Tensor, " n"], temperature: float
) -> Int[Tensor, " n"]:
    """Inverse-CDF sampling: the first token at which the cumulative probability passes u."""
    if temperature == 0.0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.double().cpu() / temperature, dim=-1)
    cumulative = probabilities.cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(
        max=logits.shape[-1] - 1
    )


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> TokenText:
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(0, len(row))
        input_ids[number, place] = torch.tensor(row)
        valid[number, place] = True
    return TokenText(input_ids, valid)
