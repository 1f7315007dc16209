"""What an adapter steers, as rows to print: sites, units, gains, how consistent they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.adapters._errors import RouteError
from austeer.adapters._progress import Progress
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.config import is_finite, is_interval
from austeer.adapters.steered_site import SteeredSite
from austeer.exporter.markdown import Row, number

if TYPE_CHECKING:
    from austeer.adapters.localization.run import Ranking
    from austeer.exporter.settings import BaseOptions

UNIT_HEADER = ("", "site", "unit", "γ", "mean x", "mean change", "KL", "raises", "lowers")
_MOST_COLUMNS = 16


def site_rows(adapter: SteeringAdapter) -> list[dict[str, Any]]:
    """One row a steered site: units, ranges of γ and |β|, flipped signs, strongest units."""
    beta = adapter.config.fit.get("beta")
    ranges = beta if isinstance(beta, dict) else {}
    return [_site_row(steered) | _beta(ranges, steered) for steered in adapter.sites]


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


def describe_in_base(
    adapter: SteeringAdapter,
    name: str,
    base: BaseOptions,
    units: int,
    progress: Progress,
) -> dict[str, Any]:
    """Check the base model of an adapter, and analyze the adapter's strongest units in it.

    Args:
        adapter: the adapter.
        name: what messages call it.
        base: the base model.
        units: how many units; with 0 no model is loaded.
        progress: called with (stage, done, total).

    Returns:
        `base_matches`, and under `analysis` what `UnitAnalysis.as_dict` gives.

    Raises:
        AdapterError: not the adapter's base.
        ModelError: the model or its tokenizer cannot be loaded.
        SiteError: a unit or layer that the base does not have.
        RouteError: the base's weights are quantized.
    """
    from austeer.adapters.analysis.units import analyze_units
    from austeer.adapters.composition.combined import check_fingerprint
    from austeer.adapters.fingerprint import checkpoint_reader
    from austeer.adapters.model_directory import model_directory
    from austeer.exporter.merge import is_comparable, open_base
    from austeer.exporter.products import load_base
    from austeer.exporter.quantized.formats import quantization_of

    # Here nothing can be forced: the fingerprint is checked by itself, with its own message.
    folder = model_directory(base.model, base.revision)
    quantization = quantization_of(folder)
    checkpoint = open_base(folder, adapter, force=True, quantization=quantization)
    if not is_comparable(adapter, checkpoint, quantization):
        raise RouteError(
            f"{folder}: its weights are quantized, and cannot be compared with those of the "
            "adapter's base; name the unquantized model"
        )
    read = checkpoint_reader(adapter.architecture, checkpoint)
    check_fingerprint(adapter, read, name)
    if units == 0:
        return {"base_matches": True}
    progress("load the model", 0, 1)
    loaded = load_base(base)
    progress("load the model", 1, 1)
    found = analyze_units(
        adapter, loaded.model, loaded.tokenizer, units=units, read=read, progress=progress
    )
    return {"base_matches": True, "analysis": found.as_dict()}


def unit_rows(analysis: Mapping[str, Any]) -> list[Row]:
    """Rows under `UNIT_HEADER`: one a unit, numbered as in `kl_table`."""
    return [
        (
            str(place + 1),
            unit["site"],
            str(unit["unit"]),
            *(number(unit[key]) for key in ("gamma", "mean_activation", "mean_change", "kl")),
            _tokens(unit["promotes"]),
            _tokens(unit["suppresses"]),
        )
        for place, unit in enumerate(analysis["units"])
    ]


def kl_table(analysis: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Header and rows of the KL between units steered alone, as far as a page is wide."""
    matrix = [row[:_MOST_COLUMNS] for row in analysis["kl"][:_MOST_COLUMNS]]
    header = ("", *(str(column + 1) for column in range(len(matrix))))
    rows = [
        (
            str(place + 1),
            *(
                "·" if place == column else f"{value:.1e}".replace("e-0", "e-")
                for column, value in enumerate(row)
            ),
        )
        for place, row in enumerate(matrix)
    ]
    return header, rows


def _tokens(scores: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(repr(score["text"]) for score in scores)


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
    rows += [
        ("combines", f"{part['name']} × {number(part['weight'])}")
        for part in _combined(values["fit"])
    ]
    if values.get("base_matches"):
        rows.append(("base", "matches the fingerprint"))
    return rows


def _beta(ranges: Mapping[str, Any], steered: SteeredSite) -> dict[str, Any]:
    """Adapters made by hand have none."""
    low_high = ranges.get(steered.site.key)
    if not is_interval(low_high):
        return {}
    return {"beta_min": low_high[0], "beta_max": low_high[1]}


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


def _combined(fit: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What an adapter combines; whatever else a stranger wrote there is left out."""
    found = fit.get("combined")
    parts = found.get("adapters") if isinstance(found, Mapping) else None
    return [
        part
        for part in (parts if isinstance(parts, list) else [])
        if isinstance(part, Mapping)
        and isinstance(part.get("name"), str)
        and part["name"].isprintable()
        and is_finite(part.get("weight"))
    ]
