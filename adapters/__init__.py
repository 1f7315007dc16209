"""Find what to steer and how strongly; hold it as an adapter; attach it to a live model.

The modules, in the order in which a run needs them:

    sites, architectures, tensors, fingerprint       what can be steered, in which model
    pairs, tokens, batches, packing, layouts         contrastive pairs, laid out for a model
    reading, capture, memory                         their activations, each token once
    momentum, stream, run_state, state_file,
    distributed, localization, ranking               which units tell positive from negative
    neutral, evaluate, fluency, intervals, measure   what a steering does, for good and bad
    strength, resumable, sweep, halving, choice,
    untrained                                        strengths without training
    gains, objective, train, checkpointing, trained  strengths by gradient
    candidates, search, fit, outcome                 the fit, and its report
    predictor, steered_site, config, adapter, card,
    loading, attach                                  the adapter, on disk and on a live model
    contributions, composition, composition_budget   several behaviours in one adapter
    unembedding, analysis                            what a unit does
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from austeer.adapters._errors import (
    AdapterError,
    AusteerError,
    DistributedError,
    FitError,
    GraphError,
    ModelError,
    NoEffectError,
    OutputError,
    PairsError,
    RouteError,
    SiteError,
    VerificationError,
)
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.composition import combine
from austeer.adapters.config import AdapterConfig, Strength
from austeer.adapters.contributions import Overlap, overlaps
from austeer.adapters.pairs import ContrastivePair, read_pairs, split_pairs
from austeer.adapters.predictor import Predictor
from austeer.adapters.sites import Component, Refusal, Site, UnitTable
from austeer.adapters.steered_site import SteeredSite

if TYPE_CHECKING:
    from austeer.adapters.analysis import UnitAnalysis, UnitEffect, analyze_units
    from austeer.adapters.composition_budget import combine_within_budget
    from austeer.adapters.fit import fit_strength
    from austeer.adapters.loading import load_model, load_tokenizer
    from austeer.adapters.localization import Ranking, localize
    from austeer.adapters.unembedding import TokenScore

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "AusteerError",
    "Component",
    "ContrastivePair",
    "DistributedError",
    "FitError",
    "GraphError",
    "ModelError",
    "NoEffectError",
    "OutputError",
    "Overlap",
    "PairsError",
    "Predictor",
    "Ranking",
    "Refusal",
    "RouteError",
    "Site",
    "SiteError",
    "SteeredSite",
    "SteeringAdapter",
    "Strength",
    "TokenScore",
    "UnitAnalysis",
    "UnitEffect",
    "UnitTable",
    "VerificationError",
    "analyze_units",
    "combine",
    "combine_within_budget",
    "fit_strength",
    "load_model",
    "load_tokenizer",
    "localize",
    "overlaps",
    "read_pairs",
    "split_pairs",
]

# These need torch; they load on first use, so that the CLI's help stays instant.
_LAZY = {
    "Ranking": "austeer.adapters.localization",
    "TokenScore": "austeer.adapters.unembedding",
    "UnitAnalysis": "austeer.adapters.analysis",
    "UnitEffect": "austeer.adapters.analysis",
    "analyze_units": "austeer.adapters.analysis",
    "combine_within_budget": "austeer.adapters.composition_budget",
    "fit_strength": "austeer.adapters.fit",
    "load_model": "austeer.adapters.loading",
    "load_tokenizer": "austeer.adapters.loading",
    "localize": "austeer.adapters.localization",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
