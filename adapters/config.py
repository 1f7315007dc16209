"""`adapter_config.json`: what an adapter is, where it came from, which base it belongs to."""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from austeer.adapters._errors import AdapterError
from austeer.adapters._files import read_json, write_json
from austeer.adapters._json import is_writable
from austeer.adapters.sites import Component

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
PEFT_TYPE = "AUSTEER"

# What `fit` holds of figures, and what a combined one holds besides.
_MEASURED = ("validation", "test")
_JOINED = ("adapters", "overlaps", "conflicts")

E = TypeVar("E", bound=StrEnum)


class Strength(StrEnum):
    """How the gains of the selected units were set."""

    PAPER = "paper"
    """γ_i = α β_i (AUSteer, arXiv 2602.04428)."""
    ORIENTED = "oriented"
    """γ_i = α β_i · sign(mean x_i)."""
    FITTED = "fitted"
    """γ by gradient under a KL budget."""
    ADAPTIVE = "adaptive"
    """γ_i(x) = γ_i · φ(x)_i, γ and the predictor φ by gradient under a KL budget."""

    @property
    def foldable(self) -> bool:
        """Whether the gains are constants that weights can absorb."""
        return self is not Strength.ADAPTIVE

    @property
    def trained(self) -> bool:
        """Whether the gains come from gradient descent."""
        return self in (Strength.FITTED, Strength.ADAPTIVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Validated content of `adapter_config.json`.

    Attributes:
        base_model_name_or_path: directory or Hub id of the base model.
        revision: its Hub revision, if one was asked for.
        base_model_fingerprint: see `austeer.adapters.fingerprint`.
        model_type: `model_type` of the base model's config.
        components: components with at least one steered unit.
        strength: how γ was set.
        alpha: factor of an untrained strength, else None.
        k: number of steered units over all sites.
        rank: rank of the γ predictor, 0 without one.
        fit: pairs digest, splits and metrics of the fit; empty for hand-made adapters.
        versions: versions of the libraries that made it.

    Raises:
        AdapterError: a value of the wrong type or range.
    """

    base_model_name_or_path: str
    base_model_fingerprint: str
    model_type: str
    components: tuple[Component, ...]
    strength: Strength
    k: int
    alpha: float | None = None
    rank: int = 0
    revision: str | None = None
    fit: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    format_version: int = FORMAT_VERSION
    peft_type: str = PEFT_TYPE

    def __post_init__(self) -> None:
        _expect(
            self.format_version == FORMAT_VERSION,
            "format_version",
            str(FORMAT_VERSION),
            self.format_version,
        )
        _expect(self.peft_type == PEFT_TYPE, "peft_type", PEFT_TYPE, self.peft_type)
        for name in ("base_model_name_or_path", "model_type", "revision"):
            found = getattr(self, name)
            absent = found is None and name == "revision"
            kind = "a string or null" if name == "revision" else "a string"
            _expect(absent or isinstance(found, str), name, kind, found)
            # It goes into model cards, and on the terminal.
            _expect(absent or _is_shown(found), name, "printable text", found)
        for name in ("fit", "versions"):
            found = getattr(self, name)
            _expect(isinstance(found, dict), name, "an object", found)
            _expect(is_writable(found), name, "what JSON can hold (no NaN)", found)
        _expect(
            self.alpha is None or is_finite(self.alpha),
            "alpha",
            "a finite number or null",
            self.alpha,
        )
        digest = self.base_model_fingerprint
        fits = isinstance(digest, str) and re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
        _expect(bool(fits), "base_model_fingerprint", "sha256:<64 hex digits>", digest)
        _expect(_is_count(self.k) and self.k > 0, "k", "a positive integer", self.k)
        _expect(_is_count(self.rank), "rank", "an integer ≥ 0", self.rank)
        _expect(
            (self.rank > 0) == (self.strength is Strength.ADAPTIVE),
            "rank",
            "positive exactly for strength adaptive",
            self.rank,
        )
        _expect(bool(self.components), "components", "at least one", self.components)
        names = [str(component) for component in self.components]
        _expect(len(set(names)) == len(names), "components", "each one once", names)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> AdapterConfig:
        """Check keys and types of parsed JSON.

        Raises:
            AdapterError: unknown or missing keys, unknown version, bad values.
        """
        kind = values.get("peft_type", PEFT_TYPE)
        if kind != PEFT_TYPE:
            raise AdapterError(
                f"{where}: peft_type: expected {PEFT_TYPE}, found {kind!r}; is it an adapter "
                "of another library?"
            )
        found = values.get("format_version")
        if found != FORMAT_VERSION or isinstance(found, bool):
            raise AdapterError(
                f"{where}: format_version {found!r}, this release reads {FORMAT_VERSION}; "
                "update austeer or export the adapter again"
            )
        items = dataclasses.fields(cls)
        unknown = sorted(set(values) - {item.name for item in items})
        if unknown:
            raise AdapterError(
                f"{where}: unknown key {unknown[0]!r}; was it written by a newer austeer?"
            )
        missing = [
            item.name
            for item in items
            if item.name not in values
            and item.default is item.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise AdapterError(f"{where}: key {missing[0]!r} is missing")
        try:
            named = values["components"]
            _expect(isinstance(named, list | tuple), "components", "a list", named)
            kinds = tuple(_member(Component, "components", item) for item in named)
            strength = _member(Strength, "strength", values["strength"])
            return cls(**{**values, "components": kinds, "strength": strength})
        except (TypeError, ValueError, AdapterError) as error:
            raise AdapterError(f"{where}: {error}") from error

    @classmethod
    def load(cls, folder: Path) -> AdapterConfig:
        """Read `adapter_config.json` of an adapter directory.

        Raises:
            AdapterError: missing, not JSON, or invalid.
        """
        path = folder / CONFIG_NAME
        values = read_json(path, AdapterError, f"is {folder} an adapter directory?")
        return cls.from_dict(values, str(path))

    def save(self, folder: Path) -> None:
        """Write `adapter_config.json` into `folder`."""
        write_json(folder / CONFIG_NAME, self.as_dict())

    def scaled(self, factor: float) -> AdapterConfig:
        """That of an adapter whose every γ is `factor` times as large.

        What was measured was measured at another strength, and is left out.
        """
        fit = {key: found for key, found in self.fit.items() if key not in _MEASURED}
        if isinstance(joined := fit.get("combined"), dict):
            fit["combined"] = {key: joined[key] for key in _JOINED if key in joined}
        before = fit.get("scaled_by", 1.0)
        fit["scaled_by"] = factor * (before if is_finite(before) else 1.0)
        alpha = None if self.alpha is None else self.alpha * factor
        return dataclasses.replace(self, alpha=alpha, fit=fit)

    def as_dict(self) -> dict[str, Any]:
        """Content of `adapter_config.json`."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["components"] = [component.value for component in self.components]
        values["strength"] = self.strength.value
        return values


_SHAPING = ("austeer", "torch", "transformers", "safetensors", "numpy")


def figures_of_test(fit: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the test split in an adapter's `fit`: numbers and intervals by name.

    Whatever else a stranger wrote there is left out.
    """
    found = fit.get("test")
    return {
        name: value
        for name, value in (found.items() if isinstance(found, dict) else ())
        if name.isidentifier() and (value is None or is_finite(value) or is_interval(value))
    }


def is_interval(value: object) -> TypeGuard[list[float]]:
    """Whether JSON gave two finite numbers."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_finite, value))


def library_versions(names: Sequence[str] = _SHAPING) -> dict[str, str]:
    """Installed versions of `names`, by default of what shapes an adapter's numbers."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _is_shown(text: str) -> bool:
    """Whether a text stays on its line: no control characters, line ends or surrogates.

    Less strict than `isprintable`: paths hold the spaces and joiners of every language.
    """
    return not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, text))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_finite(value: object) -> bool:
    """Whether JSON gave a finite number; a flag is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _member(kind: type[E], name: str, value: Any) -> E:
    """The member of `kind` with this value."""
    choices = [str(one.value) for one in kind]
    _expect(value in choices, name, f"one of {', '.join(choices)}", value)
    return kind(value)


def _expect(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise AdapterError(f"{name}: expected {expected}, found {found!r}")
