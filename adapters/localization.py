"""Find the units that tell positive from negative completions: signs and sums over pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from austeer.adapters._errors import FitError, PairsError, SiteError
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import find_module
from austeer.adapters.batches import token_limit, tokenize_pairs
from austeer.adapters.capture import capture
from austeer.adapters.fingerprint import ends_fingerprint
from austeer.adapters.pairs import ContrastivePair, pairs_digest
from austeer.adapters.ranking import Counts, Ranking, RankingInfo
from austeer.adapters.sites import Component, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MomentumCounter", "Ranking", "localize"]

notice = logging.getLogger("austeer")

NEAR_TIE = 1e-5
# The reference implementation takes positives that hold this phrase without their prompt.
_REFUSAL = "I'm sorry, but I can't assist"


class MomentumCounter:
    """Sums over pairs for every unit of one component; they merge by addition.

    Args:
        num_layers: decoder layers of the model.
        width: units of the component in each layer.
        device: where the sums are kept.
        compat: `reference` rounds activations to float16 before comparing.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        device: torch.device | str = "cpu",
        compat: str | None = None,
    ) -> None:
        # Rows: positive, negative, near ties; and ΣΔ, Σx, Σx².
        self._integers = torch.zeros(3, num_layers, width, dtype=torch.int64, device=device)
        self._sums = torch.zeros(3, num_layers, width, dtype=torch.float64, device=device)
        self._compat = compat
        self._seen = [0] * num_layers

    @property
    def count(self) -> int:
        """Pairs added so far to every layer."""
        return min(self._seen)

    def update(
        self, layer: int, positive: Float[Tensor, "P D"], negative: Float[Tensor, "P D"]
    ) -> None:
        """Add P pairs of one layer; signs are taken in the dtype the values come in."""
        self._seen[layer] += len(positive)
        wide = torch.stack((positive, negative)).double()
        delta = wide[0] - wide[1]
        near = delta.abs() <= NEAR_TIE * wide.abs().amax(0).clamp(min=1.0)
        if self._compat == "reference":
            positive, negative = positive.half(), negative.half()
        signs = (positive > negative, positive < negative, near)
        self._integers[:, layer] += torch.stack([hits.sum(0) for hits in signs])
        self._sums[:, layer] += torch.stack(
            (delta.sum(0), wide.sum((0, 1)), wide.square().sum((0, 1)))
        )

    def merge(self, other: MomentumCounter) -> None:
        """Add the sums over other pairs."""
        self._seen = [sum(both) for both in zip(self._seen, other._seen, strict=True)]
        self._integers += other._integers.to(self._integers.device)
        self._sums += other._sums.to(self._sums.device)

    def counts(self) -> Counts:
        """The sums as numpy arrays."""
        return Counts(*self._integers.cpu().numpy(), *self._sums.cpu().numpy())


def localize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[ContrastivePair],
    components: str | Sequence[str | Component] = tuple(Component),
    *,
    batch_size: int = 16,
    share_prompt: bool = True,
    padding_side: str = "right",
    compat: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Score every unit of `components` by how it tells positives from negatives.

    Args:
        model: a supported causal language model.
        tokenizer: its tokenizer.
        pairs: contrastive pairs.
        components: names of components, all four by default.
        batch_size: pairs in a forward pass; like the next two it does not change the result.
        share_prompt: compute a pair's common prefix once.
        padding_side: `right` or `left`.
        compat: `reference` rounds activations to float16 before comparing, as the reference
            implementation does.
        progress: called with (pairs done, all pairs) after each batch.

    Raises:
        PairsError: no pairs, or one that does not fit the model.
        FitError: an activation is not finite, or a bad option.
        SiteError: unknown component, or none.
        ModelError: unsupported architecture.
    """
    kinds = _components(components)
    _check_options(pairs, padding_side, compat)
    tokens = tokenize_pairs(pairs, tokenizer, token_limit(model))
    counters = {kind: _counter(model, kind, compat) for kind in kinds}
    layers = range(model.config.num_hidden_layers)
    sites = [Site(layer, kind) for layer in layers for kind in kinds]
    done = 0
    for batch in capture(
        model,
        tokens,
        sites,
        batch_size=batch_size,
        share_prompt=share_prompt,
        padding_side=padding_side,
    ):
        for site, (positive, negative) in batch.values.items():
            counters[site.component].update(site.layer, positive, negative)
        done += len(batch.pairs)
        if progress is not None:
            progress(done, len(tokens))
    counts = {kind: counter.counts() for kind, counter in counters.items()}
    return Ranking(_info(model, pairs, kinds, compat), counts)


def _counter(model: PreTrainedModel, kind: Component, compat: str | None) -> MomentumCounter:
    architecture = architecture_of(model.config.model_type)
    projection = find_module(model, architecture.projection(Site(0, kind)))
    width = projection.get_parameter("weight").shape[architecture.width_axis(kind)]
    return MomentumCounter(model.config.num_hidden_layers, width, model.device, compat)


def _components(names: str | Sequence[str | Component]) -> list[Component]:
    names = [names] if isinstance(names, str) else names
    known = [component.value for component in Component]
    for name in names:
        if name not in known:
            raise SiteError(f"component {str(name)!r}: expected one of {', '.join(known)}")
    if not names:
        raise SiteError(f"components: expected at least one of {', '.join(known)}, got none")
    return list(dict.fromkeys(Component(name) for name in names))


def _check_options(
    pairs: Sequence[ContrastivePair], padding_side: str, compat: str | None
) -> None:
    if not pairs:
        raise PairsError("localize: expected at least one pair, got none")
    if padding_side not in ("left", "right"):
        raise FitError(f"padding side {padding_side!r}: expected left or right")
    if compat not in (None, "reference"):
        raise FitError(
            f"compat {compat!r}: expected 'reference', or None for austeer's own rule"
        )
    dropped = sum(_REFUSAL in pair.positive for pair in pairs)
    if compat == "reference" and dropped:
        notice.warning(
            "the reference implementation would drop the prompt of %d positives that say %r; "
            "it is kept here, so scores differ from its own",
            dropped,
            _REFUSAL,
        )


def _info(
    model: PreTrainedModel,
    pairs: Sequence[ContrastivePair],
    kinds: Sequence[Component],
    compat: str | None,
) -> RankingInfo:
    return RankingInfo(
        model_type=model.config.model_type,
        num_layers=model.config.num_hidden_layers,
        dtype=str(model.dtype).removeprefix("torch."),
        base_fingerprint=ends_fingerprint(model, kinds),
        pairs_digest=pairs_digest(pairs),
        count=len(pairs),
        compat=compat,
    )
