"""What an adapter steers, as rows to print: sites, units, gains, how consistent they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.steered_site import SteeredSite

if TYPE_CHECKING:
    from austeer.adapters.localization import Ranking


def site_rows(adapter: SteeringAdapter) -> list[dict[str, Any]]:
    """One row a steered site: units, ranges of γ and |β|, flipped signs, strongest units."""
    beta = adapter.config.fit.get("beta", {})
    return [_site_row(steered) | _beta(beta, steered) for steered in adapter.sites]


def beta_ranges(adapter: SteeringAdapter, ranking: Ranking) -> dict[str, list[float]]:
    """Smallest and largest |β| of the steered units of each site, by the site's key."""
    found = {}
    for steered in adapter.sites:
        site = steered.site
        beta = np.abs(ranking.beta(site.component)[site.layer, steered.index])
        found[site.key] = [float(beta.min()), float(beta.max())]
    return found


def describe_adapter(adapter: SteeringAdapter) -> dict[str, Any]:
    """Config, sites and figures of an adapter."""
    config = adapter.config
    return {
        "base_model": config.base_model_name_or_path,
        "revision": config.revision,
        "model_type": config.model_type,
        "fingerprint": config.base_model_fingerprint,
        "strength": config.strength.value,
        "alpha": config.alpha,
        "units": config.k,
        "rank": config.rank,
        "components": [component.value for component in config.components],
        "sites": site_rows(adapter),
        "fit": config.fit,
        "versions": config.versions,
    }


def fact_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The description's single facts, as rows of name and value."""
    names = (
        "base_model",
        "revision",
        "model_type",
        "fingerprint",
        "strength",
        "alpha",
        "units",
    )
    rows = [(name, str(values[name])) for name in names if values[name] is not None]
    if values["rank"]:
        rows.append(("predictor rank", str(values["rank"])))
    if values.get("base_matches"):
        rows.append(("base", "matches the fingerprint"))
    return rows


def _beta(ranges: Mapping[str, Any], steered: SteeredSite) -> dict[str, Any]:
    """Adapters made by hand have none."""
    low_high = ranges.get(steered.site.key)
    return {"beta_min": low_high[0], "beta_max": low_high[1]} if low_high else {}


def _site_row(steered: SteeredSite) -> dict[str, Any]:
    gamma = steered.gamma
    strongest = np.argsort(-np.abs(gamma), kind="stable")[:5]
    return {
        "site": steered.site.key,
        "units": len(steered.index),
        "gamma_min": float(gamma.min()),
        "gamma_max": float(gamma.max()),
        "flipped": int((gamma < -1.0).sum()),
        "strongest": [int(unit) for unit in steered.index[strongest]],
    }
