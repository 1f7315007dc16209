"""`Ranking`: how every unit of a model tells positive from negative; ranked, saved, loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from austeer.adapters._errors import FitError, ModelError, SiteError
from austeer.adapters._files import publish_file
from austeer.adapters.config import library_versions
from austeer.adapters.fingerprint import ends_fingerprint
from austeer.adapters.sites import Component, UnitTable
from austeer.adapters.tensors import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "austeer-ranking"
FORMAT_VERSION = 1
TIE_BREAKS = ("effect", "reference")
_INTEGERS = ("positive", "negative", "near_ties")
_SUMS = ("delta", "total", "squares")


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


class Ranking:
    """Discriminative scores of all units of the localized components.

    Args:
        info: what it was made from.
        counts: sums of each component.
    """

    def __init__(self, info: RankingInfo, counts: Mapping[Component, Counts]) -> None:
        self.info = info
        self._counts = dict(counts)

    @property
    def components(self) -> tuple[Component, ...]:
        """The localized components."""
        return tuple(self._counts)

    @property
    def count(self) -> int:
        """Number of pairs, N."""
        return self.info.count

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.info.num_layers

    def counts(self, component: str | Component) -> Counts:
        """All sums of one component.

        Raises:
            SiteError: the component was not localized.
        """
        if component not in self._counts:
            known = ", ".join(self._counts)
            raise SiteError(
                f"component {str(component)!r}: not in this ranking, which has {known}"
            )
        return self._counts[Component(component)]

    def positive(self, component: str | Component) -> Int[np.ndarray, "L D"]:
        """Pairs whose positive side has the larger value, per unit."""
        return self.counts(component).positive

    def negative(self, component: str | Component) -> Int[np.ndarray, "L D"]:
        """Pairs whose negative side has the larger value, per unit."""
        return self.counts(component).negative

    def near_ties(self, component: str | Component) -> int:
        """Comparisons, over all units and pairs, that rounding could decide; see `Counts`."""
        return int(self.counts(component).near_ties.sum())

    def beta(self, component: str | Component) -> Float[np.ndarray, "L D"]:
        """β = +p/N where p ≥ n, else −n/N."""
        counts = self.counts(component)
        p, n = counts.positive, counts.negative
        return np.where(p >= n, p, -n) / np.float64(self.count)

    def mean(self, component: str | Component) -> Float[np.ndarray, "L D"]:
        """Mean activation over both sides of all pairs."""
        return self.counts(component).total / (2 * self.count)

    def std(self, component: str | Component) -> Float[np.ndarray, "L D"]:
        """Standard deviation (population) of the activation over both sides of all pairs."""
        mean_square = self.counts(component).squares / (2 * self.count)
        variance = np.maximum(mean_square - self.mean(component) ** 2, 0.0)
        return np.asarray(np.sqrt(variance))

    def effect(self, component: str | Component) -> Float[np.ndarray, "L D"]:
        """Standardized effect size |mean Δ| / std(x), 0 for a constant unit."""
        shift = np.abs(self.counts(component).delta) / self.count
        std = self.std(component)
        return np.asarray(np.divide(shift, std, out=np.zeros_like(shift), where=std > 0))

    def top(self, component: str | Component, k: int, tie_break: str = "effect") -> UnitTable:
        """The k units with the largest |β| over all layers, best first.

        Args:
            component: a localized component.
            k: number of units.
            tie_break: order of equal |β|: `effect` (largest standardized effect first, then
                layer and unit) or `reference` (layer and unit).

        Raises:
            SiteError: fewer than k units exist, or unknown component or tie-break.
        """
        if tie_break not in TIE_BREAKS:
            raise SiteError(f"tie-break {tie_break!r}: expected {' or '.join(TIE_BREAKS)}")
        beta = self.beta(component).ravel()
        if not 1 <= k <= beta.size:
            raise SiteError(f"{component}: {k} units asked for, 1 to {beta.size} exist")
        strongest = -np.abs(beta)
        keys = (
            (-self.effect(component).ravel(), strongest)
            if tie_break == "effect"
            else (strongest,)
        )
        best = np.lexsort(keys)[:k]
        layer, unit = np.divmod(best, self.beta(component).shape[1])
        return UnitTable(Component(component), layer, unit, beta[best])

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model that this ranking was not made from.

        Raises:
            FitError: another model type, number of layers or weights.
        """
        found = (model.config.model_type, model.config.num_hidden_layers)
        made_for = (self.info.model_type, self.num_layers)
        if found != made_for:
            raise FitError(
                f"ranking for a {made_for[0]} model with {made_for[1]} layers, this one is "
                f"{found[0]} with {found[1]}; localize again"
            )
        digest = ends_fingerprint(model, self.components)
        if digest != self.info.base_fingerprint:
            raise FitError(
                f"ranking for another base model: made for fingerprint "
                f"{self.info.base_fingerprint}, this model has {digest}; localize again"
            )

    def save(self, path: str | Path) -> Path:
        """Write one .safetensors file, atomically; an existing file is replaced.

        Raises:
            OutputError: it cannot be written.
        """
        from safetensors.numpy import save_file

        tensors = {
            f"{component.value}.{name}": np.ascontiguousarray(array)
            for component, counts in self._counts.items()
            for name, array in asdict(counts).items()
        }
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "info": json.dumps(asdict(self.info), sort_keys=True),
        }
        with publish_file(Path(path)) as work:
            save_file(tensors, work, metadata=metadata)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Ranking:
        """Read a saved ranking.

        Raises:
            FitError: missing, corrupt, not a ranking, of another version, or inconsistent.
        """
        info, tensors = _read(Path(path))
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
        return cls(info, counts)


def _read(path: Path) -> tuple[RankingInfo, dict[str, np.ndarray[Any, np.dtype[Any]] | None]]:
    """Metadata and tensors of a ranking file; the values are still unchecked."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FitError(f"{path}: expected a ranking file, found none; run localize first")
    try:
        tensors = {name: entry.read() for name, entry in read_header(path).items()}
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (ModelError, SafetensorError) as error:
        raise FitError(f"{path}: not a readable ranking ({error})") from error
    if metadata.get("format") != FORMAT:
        raise FitError(f"{path}: not a ranking (format {metadata.get('format')!r})")
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        raise FitError(
            f"{path}: format_version {version!r}, this release reads {FORMAT_VERSION}; "
            "localize again"
        )
    return _info(path, metadata.get("info", "")), dict(tensors)


def _info(path: Path, text: str) -> RankingInfo:
    try:
        values = json.loads(text)
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
            or not np.isfinite(part).all()
        ):
            raise FitError(f"{where}.{name}: expected finite {wanted} [layers, width]")
        found[name] = part
    shapes = {part.shape for part in found.values()}
    if len(shapes) > 1 or found["positive"].shape[0] != info.num_layers:
        raise FitError(f"{where}: expected equal shapes with {info.num_layers} layers")
    signs = found["positive"] + found["negative"]
    lowest = min(int(found[name].min(initial=0)) for name in _INTEGERS)
    highest = max(int(signs.max(initial=0)), int(found["near_ties"].max(initial=0)))
    if lowest < 0 or highest > info.count:
        raise FitError(f"{where}: counters outside 0 to {info.count}, the number of pairs")
    return Counts(**found)
