"""Find what to steer and how strongly; hold it as an adapter; attach it to a live model.

Here: what can be steered, the pairs, and the adapter, on disk and on a live model. In the
subpackages, each of which imports only those above it:

    activations    of pairs, each distinct token computed once
    localization   which units tell positive from negative completions
    measurement    what a steering does: margins, KL, fluency
    fitting        how strongly to steer, under a budget
    composition    several behaviours in one adapter
    analysis       what a unit does
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
from austeer.adapters.architectures import Architecture, register_architecture
from austeer.adapters.composition.combined import combine
from austeer.adapters.composition.contributions import Overlap, overlaps
from austeer.adapters.config import AdapterConfig, Strength
from austeer.adapters.pair_groups import split_pairs
from austeer.adapters.pairs import ContrastivePair, read_pairs
from austeer.adapters.predictor import Predictor
from austeer.adapters.sites import Component, Refusal, Site, UnitTable
from austeer.adapters.steered_site import SteeredSite

if TYPE_CHECKING:
    from austeer.adapters.analysis.unembedding import TokenScore
    from austeer.adapters.analysis.units import UnitAnalysis, UnitEffect, analyze_units
    from austeer.adapters.composition.budget import combine_within_budget
    from austeer.adapters.fitting.fit import fit_strength
    from austeer.adapters.loading import load_model, load_steered, load_tokenizer
    from austeer.adapters.localization.run import Ranking, localize

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "Architecture",
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
    "load_steered",
    "load_tokenizer",
    "localize",
    "overlaps",
    "read_pairs",
    "register_architecture",
    "split_pairs",
]

# These need torch; they load on first use, so that the CLI's help stays instant.
_LAZY = {
    "Ranking": "austeer.adapters.localization.run",
    "TokenScore": "austeer.adapters.analysis.unembedding",
    "UnitAnalysis": "austeer.adapters.analysis.units",
    "UnitEffect": "austeer.adapters.analysis.units",
    "analyze_units": "austeer.adapters.analysis.units",
    "combine_within_budget": "austeer.adapters.composition.budget",
    "fit_strength": "austeer.adapters.fitting.fit",
    "load_model": "austeer.adapters.loading",
    "load_steered": "austeer.adapters.loading",
    "load_tokenizer": "austeer.adapters.loading",
    "localize": "austeer.adapters.localization.run",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
