"""Find the units that tell positive from negative completions: signs and sums over pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from austeer.adapters._errors import FitError, PairsError, SiteError
from austeer.adapters._numbers import check_whole
from austeer.adapters.activations.capture import Activations, Capturer
from austeer.adapters.activations.layouts import Layout, choose_layout
from austeer.adapters.activations.memory import token_budget_for
from austeer.adapters.architectures import architecture_of, text_config
from austeer.adapters.fingerprint import ends_fingerprint, module_reader, sampled_digest
from austeer.adapters.live_model import check_bare, check_tokenizer
from austeer.adapters.localization.distributed import processes
from austeer.adapters.localization.momentum import LayerValues, MomentumCounter
from austeer.adapters.localization.ranking import Ranking
from austeer.adapters.localization.ranking_file import RankingInfo
from austeer.adapters.localization.run_state import RunState
from austeer.adapters.localization.state_file import Purpose
from austeer.adapters.localization.stream import PairStream
from austeer.adapters.pairs import ContrastivePair, check_pairs, pairs_digest
from austeer.adapters.sites import Component, Site
from austeer.adapters.steered_site import site_width
from austeer.adapters.tokens import token_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MomentumCounter", "Ranking", "localize"]

notice = logging.getLogger("austeer")

# The reference implementation takes positives that hold this phrase without their prompt.
_REFUSAL = "I'm sorry, but I can't assist"


def localize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[ContrastivePair],
    components: str | Sequence[str | Component] | None = None,
    *,
    layout: Layout = "auto",
    share_prompt: bool = True,
    batch_size: int | None = None,
    token_budget: int | None = None,
    padding_side: str = "right",
    compat: str | None = None,
    state: str | Path | None = None,
    state_every: float = 3.0,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Score every unit of `components` by how it tells positives from negatives.

    Where torch.distributed is initialized, every process calls this with the same arguments
    and a copy of the model: they share the pairs, and all get the whole result.

    Args:
        model: a supported causal language model.
        tokenizer: its tokenizer.
        pairs: contrastive pairs.
        components: names of components, None for all that the model has: four, or three of a
            mixture of experts.
        layout: see `capture`; like the next four it does not change the result.
        share_prompt: compute a common prefix once; False stands for layout `plain`.
        batch_size: most pairs in a forward pass, None for as many as the tokens allow.
        token_budget: most tokens in a forward pass, None for what free memory suggests.
        padding_side: `right` or `left`.
        compat: `reference` rounds activations to float16 before comparing.
        state: folder for what is needed to go on after a stop. A call that finds a state there
            goes on, with its token budget; the folder stays, also after success.
        state_every: seconds between two writings of the state.
        progress: called with (pairs done, all pairs) after each batch.

    Raises:
        PairsError: no pairs, or one that does not fit the model.
        FitError: an activation is not finite, a bad option, or `state` is of another run.
        SiteError: unknown component, none, or one that a layer of the model lacks.
        ModelError: unsupported architecture, or a model that is steered or compiled.
        DistributedError: another process stopped, or has other arguments.
    """
    check_bare(model, "localize")
    everything = architecture_of(model.config.model_type).components
    kinds = _components(everything if components is None else components)
    _check_options(pairs, padding_side, compat, batch_size)
    check_tokenizer(tokenizer, "localize")
    stream = PairStream(pairs, tokenizer, token_limit(model))
    stream.check_lengths()
    info = _info(model, pairs, kinds, compat)
    run = _open_run(model, stream, info, kinds, token_budget, state, state_every)
    # Batches are dealt out by number: they must be the same in every process.
    run.group.check_equal({"batch size": batch_size})
    chosen = choose_layout(model, stream.sample, layout if share_prompt else "plain")
    sites = [Site(layer, kind) for layer in range(info.num_layers) for kind in kinds]
    read = Capturer(model, sites, layout=chosen, padding_side=padding_side)
    with run.kept():
        _count(stream, read, run, batch_size, progress)
        return Ranking(info, run.totals())


def _open_run(
    model: PreTrainedModel,
    stream: PairStream,
    info: RankingInfo,
    kinds: Sequence[Component],
    token_budget: int | None,
    state: str | Path | None,
    every: float,
) -> RunState:
    """Empty counters, or those that a stopped run left."""
    budget = token_budget_for(model) if token_budget is None else token_budget
    counters = {kind: _counter(model, kind, info.compat) for kind in kinds}
    facts = _facts(info, kinds, stream.digest(), sampled_digest(model))
    purpose = Purpose(facts, info.count, budget)
    return RunState(
        counters, purpose, None if state is None else Path(state), every, processes()
    )


def _count(
    stream: PairStream,
    read: Callable[..., Iterator[Activations]],
    run: RunState,
    batch_size: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Count this process's share of the pairs."""
    passed = int(run.done.sum())
    for window in stream.windows(run.done, run.token_budget, batch_size, run.group):
        seen = 0
        for found in read(tokens=window.tokens, batches=window.batches):
            run.add([window.start + number for number in found.pairs], _by_component(found))
            seen += len(found.pairs)
            if progress is not None:
                # The others are about as far.
                progress(passed + min(seen * run.group.size, window.pending), len(run.done))
        passed += window.pending


def _by_component(found: Activations) -> Mapping[Component, LayerValues]:
    values: dict[Component, dict[int, tuple[Tensor, Tensor]]] = {}
    for site, both in found.values.items():
        values.setdefault(site.component, {})[site.layer] = both
    return values


def _counter(model: PreTrainedModel, kind: Component, compat: str | None) -> MomentumCounter:
    architecture = architecture_of(model.config.model_type)
    read, count = module_reader(model), text_config(model).num_hidden_layers
    # Of every layer: one that is a mixture of experts may lack the component.
    widths = [site_width(Site(layer, kind), architecture, read) for layer in range(count)]
    return MomentumCounter(count, widths[0], model.device, compat)


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
    pairs: Sequence[ContrastivePair],
    padding_side: str,
    compat: str | None,
    batch_size: object,
) -> None:
    check_pairs(pairs)
    if not pairs:
        raise PairsError("localize: expected at least one pair, got none")
    if batch_size is not None:
        check_whole("batch size", batch_size, 1)
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
        num_layers=text_config(model).num_hidden_layers,
        dtype=str(model.dtype).removeprefix("torch."),
        base_fingerprint=ends_fingerprint(model, kinds),
        pairs_digest=pairs_digest(pairs),
        count=len(pairs),
        compat=compat,
    )


def _facts(
    info: RankingInfo, kinds: Sequence[Component], digest: str, weights: str
) -> dict[str, Any]:
    """What makes two runs one and the same, by names fit for a message."""
    return {
        "pairs (or tokenizer)": digest,
        "model": [info.model_type, info.num_layers, info.base_fingerprint, weights],
        "dtype": info.dtype,
        "components": sorted(kind.value for kind in kinds),
        "compat": info.compat,
    }
