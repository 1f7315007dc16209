"""Digest of the tensors an adapter touches: says which base model an adapter belongs to.

Values are rounded to bfloat16 before hashing, so that one model has one fingerprint whether
it is read from disk or was loaded in float32 or bfloat16. A model that was loaded in float16
from another dtype was rounded otherwise: it is another model, with another fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from austeer.adapters._errors import ModelError, SiteError
from austeer.adapters.architectures import Architecture, architecture_of, text_config
from austeer.adapters.mixtures import Carrier, projections_of
from austeer.adapters.sites import Component, Refusal, Site
from austeer.adapters.tensors import read_rows
from austeer.adapters.weights import Checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_STAMPED = 256  # values of each tensor that a stamp looks at

Values = np.ndarray[Any, np.dtype[Any]]


class ReadTensor(Protocol):
    """Reads a model's tensors by their names in the transformers class."""

    def __call__(self, name: str, part: int | None = None, /) -> Values | None:
        """The tensor, or number `part` of its first axis; None where there is none."""

    def shape(self, name: str, /) -> tuple[int, ...] | None:
        """Its shape, None where there is none."""


def fingerprint(architecture: Architecture, sites: Iterable[Site], read: ReadTensor) -> str:
    """`sha256:` digest over the projection weights and biases behind `sites`.

    Args:
        architecture: row of the base model.
        sites: the steered sites.
        read: gives the model's tensors.

    Raises:
        ModelError: a projection weight is missing.
        SiteError: a layer has no such site.
    """
    digest = hashlib.sha256()
    behind = _behind(architecture, sites, read)
    for module, carriers in groupby(behind, lambda carrier: carrier.name.rpartition(".")[0]):
        with _at_hand(read, module):
            for carrier in carriers:
                _add(digest, architecture, carrier, read)
    return f"sha256:{digest.hexdigest()}"


def _add(
    digest: hashlib._Hash, architecture: Architecture, carrier: Carrier, read: ReadTensor
) -> None:
    shape = read.shape(carrier.name)
    if shape is None:
        raise ModelError(
            f"{carrier.name}: not in the model; is it a {architecture.model_type} model "
            "with that many layers?"
        )
    shape = shape if carrier.part is None else shape[1:]
    digest.update(f"{carrier.module}.{carrier.kind}{shape}".encode())
    for values in _blocks(read, carrier.name, carrier.part):
        rounded = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16, copy=False))
        digest.update(rounded.view(np.uint16).data)


def _behind(
    architecture: Architecture, sites: Iterable[Site], read: ReadTensor
) -> list[Carrier]:
    """Each projection behind `sites` once, by name, its weight before its bias."""
    found: dict[tuple[str, bool], Carrier] = {}
    for site in sites:
        carriers = projections_of(architecture, site, read.shape)
        if isinstance(carriers, Refusal):
            raise SiteError(str(carriers))
        found |= {(carrier.module, carrier.kind == "bias"): carrier for carrier in carriers}
    return [found[key] for key in sorted(found)]


def ends_fingerprint(model: PreTrainedModel, components: Iterable[Component]) -> str:
    """Digest over the first and last layer: tells base models apart at little cost."""
    last = text_config(model).num_hidden_layers - 1
    sites = {Site(layer, component) for layer in (0, last) for component in components}
    return fingerprint(architecture_of(model.config.model_type), sites, module_reader(model))


def checkpoint_reader(architecture: Architecture, checkpoint: Checkpoint) -> ReadTensor:
    """Read module tensors from a checkpoint on disk, with or without the model prefix."""
    return _CheckpointReader(architecture, checkpoint)


def module_reader(model: torch.nn.Module) -> ReadTensor:
    """Read module tensors from a live torch model, as float32."""
    return _ModuleReader(model)


def weights_stamp(
    architecture: Architecture, sites: Iterable[Site], model: torch.nn.Module
) -> tuple[tuple[int, int, float], ...] | None:
    """Changes when weights or biases behind `sites` are replaced or written to; costs little.

    A write through `.data` leaves no trace in torch; a few values of each tensor stand for the
    rest. None where nothing can be said: a weight is missing, not in memory, or was made in
    inference mode.
    """
    behind = _behind(architecture, sites, module_reader(model))
    found = []
    for name in dict.fromkeys(carrier.name for carrier in behind):
        tensor = _parameter(model, name)
        if tensor is None or tensor.is_meta or tensor.is_inference():
            return None
        found.append((id(tensor), tensor._version, float(_some(tensor).double().sum())))
    return tuple(found)


def sampled_digest(model: torch.nn.Module) -> str:
    """`sha256:` digest of a few values of every parameter; one of another model differs.

    It costs little, where a fingerprint reads whole tensors, and need not see a change of
    single values. Parameters that are not in memory count by name and shape.
    """
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(_some(tensor).float().cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _some(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten()[:: max(1, tensor.numel() // _STAMPED)]


def _blocks(read: ReadTensor, name: str, part: int | None) -> Iterator[Values]:
    """A tensor that is there; from a file in blocks, for it may be large."""
    if isinstance(read, _CheckpointReader):
        yield from read.blocks(name, part)
    elif (tensor := read(name, part)) is not None:
        yield tensor


def _at_hand(read: ReadTensor, module: str) -> AbstractContextManager[None]:
    return read.at_hand(module) if isinstance(read, _ModuleReader) else nullcontext()


class _CheckpointReader:
    def __init__(self, architecture: Architecture, checkpoint: Checkpoint) -> None:
        self._architecture, self._checkpoint = architecture, checkpoint

    def __call__(self, name: str, part: int | None = None, /) -> Values | None:
        entry = self._checkpoint.find(self._architecture.disk_names(name))
        return None if entry is None else entry.read(part)

    def shape(self, name: str, /) -> tuple[int, ...] | None:
        entry = self._checkpoint.find(self._architecture.disk_names(name))
        return None if entry is None else entry.shape

    def blocks(self, name: str, part: int | None) -> Iterator[Values]:
        entry = self._checkpoint.find(self._architecture.disk_names(name))
        if entry is None:
            return
        entry = entry if part is None else entry.part(part)
        with entry.file.open("rb", buffering=0) as stream:
            for _, rows in read_rows(entry, stream):
                yield rows


class _ModuleReader:
    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __call__(self, name: str, part: int | None = None, /) -> Values | None:
        with self.at_hand(name.rpartition(".")[0]):
            tensor = _parameter(self._model, name)
            return None if tensor is None else _values(tensor, part)

    @contextmanager
    def at_hand(self, module: str) -> Iterator[None]:
        """Have a module's own values in memory; of offloaded experts, all of them at once."""
        try:
            owner = self._model.get_submodule(module)
        except AttributeError:
            owner = None
        if owner is None or not any(own.is_meta for own in owner.parameters(recurse=False)):
            yield
            return
        # Offloaded: accelerate brings the values back for as long as the context lasts.
        from accelerate.utils import align_module_device

        with align_module_device(owner):
            yield

    def shape(self, name: str, /) -> tuple[int, ...] | None:
        tensor = _parameter(self._model, name)
        return None if tensor is None else tuple(tensor.shape)


def _values(tensor: torch.Tensor, part: int | None) -> Values:
    wanted = tensor if part is None else tensor[part]
    values: Values = wanted.detach().float().cpu().numpy()
    return values


def _parameter(model: torch.nn.Module, name: str) -> torch.nn.Parameter | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None
