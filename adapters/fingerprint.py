"""Digest of the tensors an adapter touches: says which base model an adapter belongs to.

Values are rounded to bfloat16 before hashing, so that one model has one fingerprint whether
it is read from disk or was loaded in float32 or bfloat16. A model that was loaded in float16
from another dtype was rounded otherwise: it is another model, with another fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from austeer.adapters._errors import ModelError
from austeer.adapters.architectures import Architecture, architecture_of
from austeer.adapters.sites import Component, Site
from austeer.adapters.tensors import Checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_STAMPED = 256  # values of each tensor that a stamp looks at

ReadTensor = Callable[[str], np.ndarray[Any, np.dtype[Any]] | None]


def fingerprint(architecture: Architecture, sites: Iterable[Site], read: ReadTensor) -> str:
    """`sha256:` digest over the projection weights and biases behind `sites`.

    Args:
        architecture: row of the base model.
        sites: the steered sites.
        read: gives a tensor by module name, None where the model has none.

    Raises:
        ModelError: a projection weight is missing.
    """
    digest = hashlib.sha256()
    for module in sorted({architecture.projection(site) for site in sites}):
        weight = read(f"{module}.weight")
        if weight is None:
            raise ModelError(
                f"{module}.weight: not in the model; is it a {architecture.model_type} model "
                "with that many layers?"
            )
        _update(digest, f"{module}.weight", weight)
        bias = read(f"{module}.bias")
        if bias is not None:
            _update(digest, f"{module}.bias", bias)
    return f"sha256:{digest.hexdigest()}"


def ends_fingerprint(model: PreTrainedModel, components: Iterable[Component]) -> str:
    """Digest over the first and last layer: tells base models apart at little cost."""
    last = model.config.num_hidden_layers - 1
    sites = {Site(layer, component) for layer in (0, last) for component in components}
    return fingerprint(architecture_of(model.config.model_type), sites, module_reader(model))


def checkpoint_reader(architecture: Architecture, checkpoint: Checkpoint) -> ReadTensor:
    """Read module tensors from a checkpoint on disk, with or without the model prefix."""

    def read(name: str) -> np.ndarray[Any, np.dtype[Any]] | None:
        entry = checkpoint.find(architecture.disk_names(name))
        return None if entry is None else entry.read()

    return read


def weights_stamp(
    architecture: Architecture, sites: Iterable[Site], model: torch.nn.Module
) -> tuple[tuple[int, int, float], ...] | None:
    """Changes when weights or biases behind `sites` are replaced or written to; costs little.

    A write through `.data` leaves no trace in torch; a few values of each tensor stand for the
    rest. None where nothing can be said: a weight is missing, not in memory, or was made in
    inference mode.
    """
    found = []
    for module in sorted({architecture.projection(site) for site in sites}):
        parameters = model.get_submodule(module)._parameters
        tensors = [parameters.get(name) for name in ("weight", "bias")]
        if tensors[0] is None:
            return None
        for tensor in tensors:
            if tensor is None:
                continue
            if tensor.is_meta or tensor.is_inference():
                return None
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // _STAMPED)]
            found.append((id(tensor), tensor._version, float(some.double().sum())))
    return tuple(found)


def module_reader(model: torch.nn.Module) -> ReadTensor:
    """Read module tensors from a live torch model."""

    def read(name: str) -> np.ndarray[Any, np.dtype[Any]] | None:
        try:
            tensor = model.get_parameter(name)
        except AttributeError:
            return None
        if not tensor.is_meta:
            return tensor.detach().float().cpu().numpy()
        # Offloaded: accelerate brings the values back for as long as the context lasts.
        from accelerate.utils import align_module_device

        module, _, own = name.rpartition(".")
        with align_module_device(owner := model.get_submodule(module)):
            return owner.get_parameter(own).detach().float().cpu().numpy()

    return read


def _update(digest: hashlib._Hash, name: str, tensor: np.ndarray[Any, np.dtype[Any]]) -> None:
    digest.update(f"{name}{tuple(tensor.shape)}".encode())
    rounded = np.ascontiguousarray(tensor.astype(ml_dtypes.bfloat16, copy=False))
    digest.update(rounded.view(np.uint16).data)
