"""Activations of pairs at their last tokens, with the prompt of both strings computed once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from austeer.adapters._errors import FitError, ModelError
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import find_module
from austeer.adapters.batches import PairBatch, PairTokens, plain_batch, tree_batch
from austeer.adapters.sites import Component, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

notice = logging.getLogger("austeer")

SiteValues = dict[Site, tuple[Float[Tensor, "P D"], Float[Tensor, "P D"]]]

# Relative deviation between the two layouts that rounding alone explains.
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """Activations of one batch of pairs at the last token of each string.

    Attributes:
        pairs: numbers of these pairs in the sequence given to `capture`.
        values: (positive, negative) of each site, each `[P, width]` in the model's dtype.
    """

    pairs: tuple[int, ...]
    values: SiteValues


def capture(
    model: PreTrainedModel,
    tokens: Sequence[PairTokens],
    sites: Sequence[Site],
    *,
    batch_size: int = 16,
    share_prompt: bool = True,
    padding_side: str = "right",
) -> Iterator[Activations]:
    """Yield the activations of every pair once, pairs of similar length together.

    Args:
        model: a supported causal language model; layers after the last site do not run.
        tokens: tokenized pairs.
        sites: where to read.
        batch_size: pairs in a forward pass.
        share_prompt: compute the prefix of a pair once, if the model allows it.
        padding_side: `right` or `left`.

    Raises:
        FitError: an activation is not finite; names site and pair.
        ModelError: unsupported architecture, or tokens outside the model's vocabulary.
    """
    if batch_size < 1:
        raise FitError(f"batch size: expected at least 1, got {batch_size}")
    _check_vocabulary(model, tokens)
    share = share_prompt and can_share_prompt(model, tokens)
    order = sorted(range(len(tokens)), key=lambda number: tokens[number].size)
    for start in range(0, len(order), batch_size):
        numbers = tuple(order[start : start + batch_size])
        chosen = [tokens[number] for number in numbers]
        batch = make_batch(model, chosen, share=share, padding_side=padding_side)
        values = _read(model, batch, sites)
        _check_finite(values, chosen)
        yield Activations(numbers, values)


def make_batch(
    model: PreTrainedModel,
    tokens: Sequence[PairTokens],
    *,
    share: bool,
    padding_side: str = "right",
) -> PairBatch:
    """Lay pairs out for `model`: one tree-masked row a pair if `share`, else two plain rows."""
    if share:
        return tree_batch(
            tokens, device=model.device, dtype=model.dtype, padding_side=padding_side
        )
    return plain_batch(tokens, device=model.device, padding_side=padding_side)


def can_share_prompt(model: PreTrainedModel, tokens: Sequence[PairTokens]) -> bool:
    """Whether `tree_batch` gives `model` the same activations as separate rows.

    Tried on the pair with the longest prefix, as a model may ignore a mask in silence. A "no"
    is logged with its reason.
    """
    reason = _sharing_refusal(model, tokens)
    if reason:
        notice.warning("prompts are computed twice, not shared: %s", reason)
    return reason is None


def _sharing_refusal(model: PreTrainedModel, tokens: Sequence[PairTokens]) -> str | None:
    if not tokens:
        return None
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attention implementation {attention!r} takes no mask of its caller"
    window = getattr(model.config, "sliding_window", None)
    longest = max(pair.longest for pair in tokens)
    if window is not None and window < longest:
        return f"a text has {longest} tokens, the sliding window {window}"
    probe = [max(tokens, key=lambda pair: len(pair.prefix))]
    site = Site(model.config.num_hidden_layers - 1, Component.LAYER)
    plain = torch.stack(_read(model, make_batch(model, probe, share=False), [site])[site])
    try:
        tree = torch.stack(_read(model, make_batch(model, probe, share=True), [site])[site])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"the model refuses the attention mask ({type(error).__name__})"
    deviation = float((tree - plain).float().norm() / plain.float().norm())
    # Not finite: left to the run itself, which names the site and the pair.
    if deviation > _ROUNDING.get(model.dtype, 1e-3):
        return f"the model gives other activations with it (relative deviation {deviation:.1e})"
    return None


class _AllReadError(Exception):
    """Stops a forward pass whose remaining layers nobody needs."""


class _Reader:
    """Hooks that keep the last-token activations of each site."""

    def __init__(self, batch: PairBatch, sites: Sequence[Site]) -> None:
        self.values: SiteValues = {}
        self._batch = batch
        self._sites = sites

    def hook(self, model: PreTrainedModel, site: Site) -> torch.utils.hooks.RemovableHandle:
        hookpoint = architecture_of(model.config.model_type).hookpoint(site)
        module = find_module(model, hookpoint.module)
        if hookpoint.side == "input":
            return module.register_forward_pre_hook(lambda *call: self._keep(site, call[1]))
        return module.register_forward_hook(lambda *call: self._keep(site, call[2]))

    def _keep(self, site: Site, found: Any) -> None:
        # Older decoder layers return (hidden, ...), newer ones the hidden states alone.
        x = found[0] if isinstance(found, tuple) else found
        self.values[site] = (self._batch.positive.last(x), self._batch.negative.last(x))
        if len(self.values) == len(self._sites):
            raise _AllReadError


def _read(model: PreTrainedModel, batch: PairBatch, sites: Sequence[Site]) -> SiteValues:
    """Run the decoder, without the LM head, until every site is read."""
    reader = _Reader(batch, sites)
    with ExitStack() as stack:
        for site in sites:
            stack.callback(reader.hook(model, site).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        with suppress(_AllReadError):
            model.base_model(**batch.inputs(), use_cache=False)
    for site in sites:
        if site not in reader.values:
            raise ModelError(f"{site}: its module never ran; is the Architecture row right?")
    return reader.values


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off inside the context; each module's own mode comes back after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_finite(values: SiteValues, tokens: Sequence[PairTokens]) -> None:
    finite = torch.stack(
        [torch.isfinite(torch.cat(both, 1)).all(1) for both in values.values()]
    )
    if finite.all():
        return
    for site, good in zip(values, finite.tolist(), strict=True):
        for pair, fine in zip(tokens, good, strict=True):
            if not fine:
                raise FitError(
                    f"{site}: activation is not finite for the pair {pair.where}; "
                    "are the weights sound? try --dtype float32"
                )


def _check_vocabulary(model: PreTrainedModel, tokens: Sequence[PairTokens]) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    for pair in tokens:
        largest = max(pair.prefix + pair.positive + pair.negative)
        if largest >= size:
            raise ModelError(
                f"{pair.where}: the tokenizer gives id {largest}, the model has {size} "
                "embeddings; do model and tokenizer belong together?"
            )
