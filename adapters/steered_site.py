"""`SteeredSite`: the steered units of one site, checked; and their tensors in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from austeer.adapters._errors import AdapterError, ModelError, SiteError
from austeer.adapters.architectures import Architecture
from austeer.adapters.fingerprint import ReadTensor
from austeer.adapters.mixtures import carriers
from austeer.adapters.predictor import Predictor
from austeer.adapters.sites import Refusal, Site
from austeer.adapters.tensors import read_header

_PREDICTOR_PARTS = ("V", "b", "U")
# Ten times what steering every unit of a 70 B model takes; a sparse file can claim anything.
_MAX_BYTES = 1 << 29


@dataclass(frozen=True, slots=True, eq=False)
class SteeredSite:
    """The steered units of one site.

    Attributes:
        site: where.
        index: unit numbers, unique; any integer dtype, held as int64.
        gamma: γ of each unit; gain = 1 + γ; held as float32, the dtype it is saved in.
        predictor: makes γ depend on the token, for strength `adaptive`.

    Raises:
        SiteError: duplicate, negative or fractional units, lengths that differ, non-finite γ.
    """

    site: Site
    index: Int[np.ndarray, " k"]
    gamma: Float[np.ndarray, " k"]
    predictor: Predictor | None = None

    def __post_init__(self) -> None:
        if self.index.dtype.kind not in "iu":
            raise SiteError(f"{self.site}: expected whole unit numbers, got {self.index.dtype}")
        # As saved, so that an adapter steers the same before it is saved and after.
        object.__setattr__(self, "index", self.index.astype(np.int64))
        object.__setattr__(self, "gamma", self.gamma.astype(np.float32))
        if self.index.ndim != 1 or self.index.shape != self.gamma.shape or not len(self.index):
            raise SiteError(
                f"{self.site}: expected as many gammas as units, at least one, "
                f"got {self.gamma.shape} and {self.index.shape}"
            )
        values, counts = np.unique(self.index, return_counts=True)
        if counts.max() > 1:
            raise SiteError(
                f"{self.site}: unit {values[counts.argmax()]} is given {counts.max()} times; "
                "name each unit once"
            )
        if values[0] < 0:
            raise SiteError(f"{self.site}: unit {values[0]} is negative; units count from 0")
        if not np.isfinite(self.gamma).all():
            raise SiteError(f"{self.site}: expected finite gammas, found NaN or infinity")
        if self.predictor is not None and len(self.predictor.V) != len(self.index):
            raise SiteError(
                f"{self.site}: predictor for {len(self.predictor.V)} units, "
                f"site has {len(self.index)}"
            )

    def check_width(self, width: int) -> None:
        """Refuse units that the model does not have.

        Raises:
            SiteError: a unit number ≥ `width`.
        """
        check_units(self.site, self.index, width)


def check_units(site: Site, index: Int[np.ndarray, " k"], width: int) -> None:
    """Refuse units that the model does not have.

    Raises:
        SiteError: a unit number ≥ `width`.
    """
    worst = int(index.max())
    if worst >= width:
        raise SiteError(
            f"{site}: unit {worst} outside width {width}; "
            "was the adapter made for another model?"
        )


def check_layer(site: Site, num_layers: int) -> None:
    """Refuse a layer that the model does not have.

    Raises:
        SiteError: a layer number ≥ `num_layers`.
    """
    if not 0 <= site.layer < num_layers:
        raise SiteError(
            f"{site}: layer {site.layer} outside the model's {num_layers} layers; "
            "was the adapter made for another model?"
        )


def check_sites(
    sites: Sequence[SteeredSite], architecture: Architecture, num_layers: int, read: ReadTensor
) -> None:
    """Refuse sites or units that a base model does not have.

    Raises:
        SiteError: layer or unit out of range.
    """
    for steered in sites:
        site = steered.site
        check_layer(site, num_layers)
        steered.check_width(site_width(site, architecture, read))


def touched_tensors(
    sites: Sequence[SteeredSite], architecture: Architecture, read: ReadTensor
) -> Iterator[tuple[str, int, Int[np.ndarray, " k"]]]:
    """Name, axis of units and steered units of each tensor that carries a gain of `sites`.

    Raises:
        SiteError: a site that the model does not have.
    """
    for steered in sites:
        found = carriers(architecture, steered.site, read.shape)
        if isinstance(found, Refusal):
            raise SiteError(str(found))
        for name, axis in dict.fromkeys((c.name, c.stored_axis) for c in found):
            yield name, axis, steered.index


def site_width(site: Site, architecture: Architecture, read: ReadTensor) -> int:
    """Number of units of `site` in a base model.

    Raises:
        SiteError: the model has no such site.
    """
    found = carriers(architecture, site, read.shape)
    if isinstance(found, Refusal):
        raise SiteError(str(found))
    shape = read.shape(found[0].name)
    if shape is None:
        raise SiteError(f"{site}: {found[0].name} is not in the model")
    if len(shape) <= found[0].stored_axis:
        raise SiteError(
            f"{site}: {found[0].name} has shape {shape}, too few axes for a projection; "
            "fetch the base model again"
        )
    return shape[found[0].stored_axis]


def site_tensors(sites: Sequence[SteeredSite]) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Tensors of `adapter_model.safetensors` by name: `layers.{i}.{component}.{part}`."""
    found: dict[str, np.ndarray[Any, np.dtype[Any]]] = {}
    for steered in sites:
        key = steered.site.key
        found[f"{key}.index"] = steered.index
        found[f"{key}.gamma"] = steered.gamma
        if steered.predictor is not None:
            for part in _PREDICTOR_PARTS:
                found[f"{key}.{part}"] = np.ascontiguousarray(
                    getattr(steered.predictor, part), np.float32
                )
    return found


def read_sites(path: Path) -> list[SteeredSite]:
    """Sites of an `adapter_model.safetensors`.

    Raises:
        AdapterError: missing, corrupt, or not tensors of an adapter.
    """
    if not path.is_file():
        raise AdapterError(f"{path}: missing; is {path.parent} a complete adapter directory?")
    try:
        entries = read_header(path)
        size = sum(entry.size for entry in entries.values())
        if size > _MAX_BYTES:
            raise AdapterError(
                f"{path}: holds {size} bytes of numbers, more than any adapter "
                f"({_MAX_BYTES}); is it an adapter?"
            )
        tensors = {name: entry.read() for name, entry in entries.items()}
    except ModelError as error:
        raise AdapterError(str(error)) from error
    grouped: dict[str, dict[str, np.ndarray[Any, np.dtype[Any]]]] = {}
    for name, tensor in tensors.items():
        key, _, part = name.rpartition(".")
        grouped.setdefault(key or name, {})[part] = tensor
    try:
        return [_site(key, parts) for key, parts in grouped.items()]
    except (SiteError, AdapterError) as error:
        raise AdapterError(f"{path}: {error}") from error


def _site(key: str, parts: dict[str, np.ndarray[Any, np.dtype[Any]]]) -> SteeredSite:
    site = Site.parse(key)
    wanted = {"index": np.int64, "gamma": np.float32} | dict.fromkeys(
        set(parts) & set(_PREDICTOR_PARTS), np.float32
    )
    if set(parts) != set(wanted) or len(wanted) not in (2, 5):
        raise AdapterError(
            f"{key}: expected tensors index and gamma, or index, gamma, V, b and U, found "
            f"{', '.join(sorted(parts))}"
        )
    for part, dtype in wanted.items():
        if parts[part].dtype != dtype:
            raise AdapterError(
                f"{key}.{part}: expected {np.dtype(dtype)}, found {parts[part].dtype}"
            )
    predictor = Predictor(parts["V"], parts["b"], parts["U"]) if "V" in parts else None
    return SteeredSite(site, parts["index"], parts["gamma"], predictor)
