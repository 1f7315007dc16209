"""Which layout of pairs a model can take: packed, else one tree a row, else two plain rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from austeer.adapters._errors import AusteerError, FitError, ModelError
from austeer.adapters.activations.batches import PairBatch, plain_batch, tree_batch
from austeer.adapters.activations.memory import out_of_memory, release_memory, too_large
from austeer.adapters.activations.packing import PackedBatch, packed_batch
from austeer.adapters.activations.reading import read_sites
from austeer.adapters.architectures import architecture_of, text_config
from austeer.adapters.sites import Component, Site
from austeer.adapters.tokens import PairTokens, token_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

notice = logging.getLogger("austeer")

Layout = Literal["auto", "packed", "tree", "plain"]

# Relative deviation between two layouts that rounding alone explains.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# What a model raises that cannot take a layout.
_REFUSALS = (
    AusteerError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)


def choose_layout(
    model: PreTrainedModel, tokens: Sequence[PairTokens], layout: Layout = "auto"
) -> Layout:
    """The best layout whose activations are those of plain rows; a refusal is logged.

    Each is tried on pairs out of `tokens` first, as a model may ignore a mask or an attention
    function in silence. Call it once where `capture` runs several times.

    Args:
        model: a supported causal language model.
        tokens: tokenized pairs.
        layout: `auto`, or a layout that is returned as it is.

    Raises:
        FitError: unknown layout, or a pair that does not fit in memory.
        ModelError: unsupported architecture, or a layout asked for that cannot be right.
    """
    if layout not in get_args(Layout):
        raise FitError(f"layout {layout!r}: expected one of {', '.join(get_args(Layout))}")
    if layout != "auto":
        refusal = _requested_refusal(model, tokens, layout)
        if refusal:
            raise ModelError(f"layout {layout!r}: {refusal}; let layout 'auto' choose")
        return layout
    reason = _places_refusal(model)
    if reason is not None:
        notice.warning("pairs are neither packed nor shared: %s", reason)
        return "plain"
    reason = _trial(model, tokens, "packed", _beyond_window(model, tokens))
    if reason is None:
        return "packed"
    notice.warning("pairs are not packed: %s", reason)
    # Pairs that come later may be as long as the limit.
    return "tree" if _can_share(model, tokens, token_limit(model)) else "plain"


def can_share_prompt(model: PreTrainedModel, tokens: Sequence[PairTokens]) -> bool:
    """Whether `tree_batch` gives `model` the activations of plain rows; a "no" is logged."""
    return _can_share(model, tokens, max((pair.longest for pair in tokens), default=0))


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


def lay_out(
    model: PreTrainedModel,
    tokens: Sequence[PairTokens],
    layout: Layout,
    padding_side: str = "right",
) -> PairBatch | PackedBatch:
    """One batch of `tokens` in any layout but `auto`; `packed` has no padding."""
    if layout == "packed":
        return packed_batch(tokens, model.device)
    return make_batch(model, tokens, share=layout == "tree", padding_side=padding_side)


def _can_share(model: PreTrainedModel, tokens: Sequence[PairTokens], longest: int) -> bool:
    reason = _sharing_refusal(model, tokens, longest)
    if reason:
        notice.warning("prompts are computed twice, not shared: %s", reason)
    return reason is None


def _sharing_refusal(
    model: PreTrainedModel, tokens: Sequence[PairTokens], longest: int
) -> str | None:
    attention = getattr(text_config(model), "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attention implementation {attention!r} takes no mask of its caller"
    return (
        _places_refusal(model)
        or _window_refusal(model, longest)
        or _trial(model, tokens, "tree")
    )


def _requested_refusal(
    model: PreTrainedModel, tokens: Sequence[PairTokens], layout: Layout
) -> str | None:
    if layout == "plain":
        return None
    longest = max((pair.longest for pair in tokens), default=0)
    window = _window_refusal(model, longest) if layout == "tree" else None
    return _places_refusal(model) or window


def _places_refusal(model: PreTrainedModel) -> str | None:
    """Known beforehand: low precision, or short pairs, can hide it from a trial."""
    counts = architecture_of(model.config.model_type).counts_places
    if not counts and not getattr(model.config, "alibi", False):
        return None
    return "the model counts distances by places in a row, not by position_ids"


def _window(model: PreTrainedModel) -> int | None:
    """Positions that a token of some layer sees, where they are bounded."""
    names = ("sliding_window", "attention_chunk_size")
    found = [getattr(text_config(model), name, None) for name in names]
    # Qwen2-MoE's is 0 where it has none.
    return min((int(size) for size in found if size), default=None)


def _window_refusal(model: PreTrainedModel, longest: int) -> str | None:
    window = _window(model)
    if window is None or window >= longest:
        return None
    return f"a text has {longest} tokens, the sliding window {window}"


def _beyond_window(model: PreTrainedModel, tokens: Sequence[PairTokens]) -> list[PairTokens]:
    """A pair that the sliding window cuts, made of another where all are shorter.

    Some models have the window in their mask alone, which packing does without; pairs that
    come later may be as long as the limit.
    """
    window, limit = _window(model), token_limit(model)
    longest = max(tokens, key=lambda pair: pair.longest, default=None)
    if longest is None or window is None or not longest.longest <= window < limit:
        return []
    path = longest.path()
    length = min(limit, 2 * window + 2) - 1
    prefix = (path * (1 + length // len(path)))[:length]
    return [PairTokens(prefix, longest.positive[-1:], longest.negative[-1:], longest.where)]


def _probe(tokens: Sequence[PairTokens]) -> list[PairTokens]:
    """Pairs on which a layout is tried: the longest, that with most to share, the smallest."""
    if not tokens:
        return []
    numbers = range(len(tokens))
    longest = max(numbers, key=lambda number: tokens[number].longest)
    shared = max(numbers, key=lambda number: len(tokens[number].prefix))
    smallest = min(numbers, key=lambda number: tokens[number].size)
    return [tokens[number] for number in dict.fromkeys((longest, shared, smallest))]


def _trial(
    model: PreTrainedModel,
    tokens: Sequence[PairTokens],
    layout: Layout,
    more: Sequence[PairTokens] = (),
) -> str | None:
    """Why `layout` does not give `model` the activations of plain rows.

    Args:
        model: the model.
        tokens: pairs, of which a few are tried.
        layout: what is tried.
        more: pairs that are tried besides.
    """
    probe = [*_probe(tokens), *more]
    if not probe:
        return None
    try:
        # One pair at a time: two rows each are the least that the run itself needs.
        plain = torch.cat([_last_states(model, [pair], "plain") for pair in probe], dim=1)
        return _difference(model, plain, probe, layout)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    raise too_large(max(probe, key=lambda pair: pair.longest).where)


def _difference(
    model: PreTrainedModel, plain: Tensor, probe: Sequence[PairTokens], layout: Layout
) -> str | None:
    try:
        other = _together_or_one_by_one(model, probe, layout)
    except _REFUSALS as error:
        if out_of_memory(error):
            raise
        asked = "attention mask" if layout == "tree" else "attention function"
        line = next(iter(str(error).splitlines()), "")
        return f"the model refuses the {asked} ({type(error).__name__}: {line})"
    distance = (other - plain).float().norm(dim=-1) / plain.float().norm(dim=-1)
    # Not finite: left to the run itself, which names the site and the pair.
    if (deviation := float(distance.max())) > _ROUNDING.get(model.dtype, 1e-4):
        return f"the model gives other activations with it (relative deviation {deviation:.1e})"
    return None


def _together_or_one_by_one(
    model: PreTrainedModel, probe: Sequence[PairTokens], layout: Layout
) -> Float[Tensor, "2 P D"]:
    """Together they show more; where they do not fit together, each may fit alone."""
    try:
        return _last_states(model, probe, layout)
    except (RuntimeError, MemoryError) as error:
        if len(probe) == 1 or not out_of_memory(error):
            raise
    release_memory()
    return torch.cat([_last_states(model, [pair], layout) for pair in probe], dim=1)


def _last_states(
    model: PreTrainedModel, tokens: Sequence[PairTokens], layout: Layout
) -> Float[Tensor, "2 P D"]:
    """Final hidden states at the last tokens of positives and negatives."""
    site = Site(text_config(model).num_hidden_layers - 1, Component.LAYER)
    return torch.stack(read_sites(model, lay_out(model, tokens, layout), [site])[site])
