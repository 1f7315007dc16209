"""A ranking on disk: counters and where they come from, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from austeer.adapters._errors import FitError, ModelError
from austeer.adapters._json import parse_json
from austeer.adapters.config import library_versions
from austeer.adapters.sites import Component
from austeer.adapters.tensors import Tensors, read_tensors, write_tensors

FORMAT = "austeer-ranking"
FORMAT_VERSION = 1
_INTEGERS = ("positive", "negative", "near_ties")
_SUMS = ("delta", "total", "squares")
_LARGEST = 1e100  # float32 squared and summed comes to far less, and its own square is finite


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """Sums over N pairs for every unit of one component, each array `[num_layers, width]`.

    Attributes:
        positive: pairs with Δ > 0, where Δ = x(positive) − x(negative) at the last tokens.
        negative: pairs with Δ < 0.
        near_ties: pairs with |Δ| ≤ 1e-5 · max(1, |x(positive)|, |x(negative)|), exact ties
            included: those whose sign rounding alone could change.
        delta: Σ Δ.
        total: Σ x over both sides, 2N values.
        squares: Σ x² over both sides.
    """

    positive: Int[np.ndarray, "L D"]
    negative: Int[np.ndarray, "L D"]
    near_ties: Int[np.ndarray, "L D"]
    delta: Float[np.ndarray, "L D"]
    total: Float[np.ndarray, "L D"]
    squares: Float[np.ndarray, "L D"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingInfo:
    """What a ranking was made from.

    Attributes:
        model_type: `model_type` of the model.
        num_layers: its decoder layers.
        dtype: dtype of its activations, in which signs were taken.
        base_fingerprint: digest of the first and last layers' weights behind the ranking; see
            `austeer.adapters.fingerprint`.
        pairs_digest: digest of the pairs.
        count: number of pairs, N.
        compat: `reference` if activations were rounded to float16 first, else None.
        versions: versions of the libraries that made it.
    """

    model_type: str
    num_layers: int
    dtype: str
    base_fingerprint: str
    pairs_digest: str
    count: int
    compat: str | None = None
    versions: dict[str, str] = field(default_factory=library_versions)


def write_ranking(path: Path, info: RankingInfo, counts: Mapping[Component, Counts]) -> None:
    """Write one .safetensors file, atomically; an existing file is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    tensors = {
        f"{component.value}.{name}": np.ascontiguousarray(array)
        for component, sums in counts.items()
        for name, array in asdict(sums).items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "info": json.dumps(asdict(info), sort_keys=True),
    }
    write_tensors(path, tensors, metadata)


def read_ranking(path: Path) -> tuple[RankingInfo, dict[Component, Counts]]:
    """Read a saved ranking.

    Raises:
        FitError: missing, corrupt, not a ranking, of another version, or inconsistent.
    """
    info, tensors = _read(path)
    counts = {}
    for component in Component:
        parts = {
            name: tensors.pop(f"{component.value}.{name}", None)
            for name in (*_INTEGERS, *_SUMS)
        }
        if any(part is not None for part in parts.values()):
            counts[component] = _checked(f"{path}: {component.value}", info, parts)
    if tensors or not counts:
        found = next(iter(tensors), "none")
        raise FitError(f"{path}: expected tensors named <component>.<sum>, found {found}")
    return info, counts


def _read(path: Path) -> tuple[RankingInfo, Tensors]:
    """Metadata and tensors of a ranking file; the values are still unchecked."""
    if not path.is_file():
        raise FitError(f"{path}: expected a ranking file, found none; run localize first")
    try:
        metadata, tensors = read_tensors(path)
    except ModelError as error:
        raise FitError(f"{path}: not a readable ranking ({error})") from error
    if metadata.get("format") != FORMAT:
        raise FitError(f"{path}: not a ranking (format {metadata.get('format')!r})")
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        raise FitError(
            f"{path}: format_version {version!r}, this release reads {FORMAT_VERSION}; "
            "localize again"
        )
    return _info(path, metadata.get("info", "")), tensors


def _info(path: Path, text: str) -> RankingInfo:
    try:
        values = parse_json(text)
        for name in ("model_type", "dtype", "base_fingerprint", "pairs_digest"):
            if not isinstance(values[name], str):
                raise FitError(f"{path}: {name}: expected text, found {values[name]!r}")
        for name in ("count", "num_layers"):
            value = values[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise FitError(f"{path}: {name}: expected a positive integer, found {value!r}")
        if values["compat"] not in (None, "reference"):
            found = values["compat"]
            raise FitError(f"{path}: compat: expected null or 'reference', found {found!r}")
        if not isinstance(values["versions"], dict):
            raise FitError(f"{path}: versions: expected an object")
        return RankingInfo(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise FitError(f"{path}: malformed description ({error})") from error


def _checked(
    where: str,
    info: RankingInfo,
    parts: Mapping[str, np.ndarray[Any, np.dtype[Any]] | None],
) -> Counts:
    found: dict[str, np.ndarray[Any, np.dtype[Any]]] = {}
    for name, part in parts.items():
        wanted = np.dtype(np.int64 if name in _INTEGERS else np.float64)
        if (
            part is None
            or part.dtype != wanted
            or part.ndim != 2
            or not part.size
            or not (np.abs(part) <= _LARGEST).all()
        ):
            raise FitError(
                f"{where}.{name}: expected {wanted} [layers, width], finite and below "
                f"{_LARGEST:g}"
            )
        found[name] = part
    shapes = {part.shape for part in found.values()}
    if len(shapes) > 1 or found["positive"].shape[0] != info.num_layers:
        raise FitError(f"{where}: expected equal shapes with {info.num_layers} layers")
    counters = [found[name] for name in _INTEGERS]
    # Each for itself first: the sum of two huge ones would wrap around.
    if any(part.min() < 0 or part.max() > info.count for part in counters) or (
        (counters[0] + counters[1]).max() > info.count
    ):
        raise FitError(f"{where}: counters outside 0 to {info.count}, the number of pairs")
    if found["squares"].min() < 0:
        raise FitError(f"{where}.squares: a sum of squares is negative")
    return Counts(**found)
