"""Check that an ONNX graph is the base model of an adapter, as far as its files can say."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from austeer.adapters._errors import AdapterError, GraphError, ModelError
from austeer.adapters._files import read_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import ARCHITECTURES
from austeer.adapters.fingerprint import fingerprint
from austeer.adapters.sites import Refusal, Site
from austeer.adapters.steered_site import touched_tensors
from austeer.graphs.locating.locate import SiteLocator
from austeer.graphs.locating.projections import stored_weight
from austeer.graphs.model_io import tensor_values


class BaseWeights(StrEnum):
    """What the weights of a graph say about an adapter's base; the worst is the least."""

    DIFFERENT = "different"
    NOT_COMPARABLE = "not comparable"
    EQUAL = "equal"


_EXACT = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
_GENAI_TYPE = ("model", "type")


def check_base(
    model: ir.Model, folder: Path, adapter: SteeringAdapter, *, force: bool = False
) -> BaseWeights:
    """Refuse a graph of another model than the adapter's base.

    A graph in float32 or bfloat16 holds what the fingerprint is made of, so that decides. One
    in float16, or quantized, holds them rounded: only its architecture can be compared.

    Args:
        model: the ungrafted graph.
        folder: where it is; a `config.json` or `genai_config.json` names the architecture.
        adapter: what shall be grafted.
        force: accept other weights (never another architecture).

    Returns:
        Whether the weights are the base's; DIFFERENT only with `force`.

    Raises:
        AdapterError: another architecture, or other weights (unless `force`).
    """
    _check_model_type(folder, adapter)
    read = _GraphReader(model.graph, adapter)
    sites = [steered.site for steered in adapter.sites]
    try:
        found = fingerprint(adapter.architecture, sites, read)
    except ModelError:
        return BaseWeights.NOT_COMPARABLE
    wanted = adapter.config.base_model_fingerprint
    if found == wanted:
        return BaseWeights.EQUAL
    touched = touched_tensors(adapter.sites, adapter.architecture, read)
    weights = (read(name) for name, _, _ in touched)
    exact = all(weight is not None and weight.dtype in _EXACT for weight in weights)
    if exact and not force:
        raise AdapterError(
            "adapter for another base model: made for "
            f"{adapter.config.base_model_name_or_path!r} with fingerprint {wanted}, the "
            f"graph's weights have {found}; use the right base or --force"
        )
    return BaseWeights.DIFFERENT if exact else BaseWeights.NOT_COMPARABLE


def _check_model_type(folder: Path, adapter: SteeringAdapter) -> None:
    for name, keys in (("config.json", ("model_type",)), ("genai_config.json", _GENAI_TYPE)):
        path = folder / name
        if not path.is_file():
            continue
        found: Any = read_json(path, GraphError, "export the model again")
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        # The builder has types of its own beside those of transformers.
        known = name == "config.json" or str(found) in ARCHITECTURES
        if found is not None and known and found != adapter.config.model_type:
            raise AdapterError(
                f"{path}: adapter for a {adapter.config.model_type} model, this one is "
                f"{found}; use the right base"
            )


class _GraphReader:
    """As `ReadTensor`, of the projections of an adapter's sites in a graph."""

    def __init__(self, graph: ir.Graph, adapter: SteeringAdapter) -> None:
        self._architecture = adapter.architecture
        self._locator = SiteLocator(graph, adapter.architecture)
        self._sites: dict[str, Site] = {
            adapter.architecture.projection(s.site): s.site for s in adapter.sites
        }

    def __call__(
        self, name: str, part: int | None = None, /
    ) -> np.ndarray[Any, np.dtype[Any]] | None:
        module, _, kind = name.rpartition(".")
        site = self._sites.get(module)
        # The experts of a mixture have no names in a graph.
        if site is None or part is not None:
            return None
        if kind == "bias":
            bias = self._locator.bias(site)
            return None if bias is None else tensor_values(bias)
        projection = self._locator.projection(site)
        weight = None if isinstance(projection, Refusal) else stored_weight(projection.node)
        return weight if weight is None or self._architecture.transposed else weight.T

    def shape(self, name: str, /) -> tuple[int, ...] | None:
        tensor = self(name)
        return None if tensor is None else tensor.shape
