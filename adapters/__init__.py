"""Find what to steer and how strongly; hold it as an adapter; attach it to a live model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from austeer.adapters._errors import (
    AdapterError,
    AusteerError,
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
from austeer.adapters.config import AdapterConfig, Strength
from austeer.adapters.pairs import ContrastivePair, read_pairs, split_pairs
from austeer.adapters.predictor import Predictor
from austeer.adapters.sites import Component, Refusal, Site, UnitTable
from austeer.adapters.steered_site import SteeredSite

if TYPE_CHECKING:
    from austeer.adapters.fit import fit_strength
    from austeer.adapters.loading import load_model, load_tokenizer
    from austeer.adapters.localization import Ranking, localize

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "AusteerError",
    "Component",
    "ContrastivePair",
    "FitError",
    "GraphError",
    "ModelError",
    "NoEffectError",
    "OutputError",
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
    "UnitTable",
    "VerificationError",
    "fit_strength",
    "load_model",
    "load_tokenizer",
    "localize",
    "read_pairs",
    "split_pairs",
]

# These need torch; they load on first use, so that the CLI's help stays instant.
_LAZY = {
    "Ranking": "austeer.adapters.localization",
    "fit_strength": "austeer.adapters.fit",
    "load_model": "austeer.adapters.loading",
    "load_tokenizer": "austeer.adapters.loading",
    "localize": "austeer.adapters.localization",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
