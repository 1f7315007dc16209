"""What a steered checkpoint with code looks like on disk: its config, its tensors, its code.

Stated once for who writes it and who reads it; opens no model and needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from austeer.adapters._errors import ModelError
from austeer.adapters._files import read_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import ARCHITECTURES
from austeer.adapters.model_directory import check_num_layers
from austeer.adapters.weights import Checkpoint

STEERED_TYPE = "austeer_steered"
STEERED_VERSION = 1
CODE_NAME = "modeling_austeer.py"
STEERING_NAME = "steering.safetensors"
AUTO_MAP = {
    "AutoConfig": "modeling_austeer.SteeredConfig",
    "AutoModelForCausalLM": "modeling_austeer.SteeredForCausalLM",
}


def code_file() -> Path:
    """The modelling file that goes beside the weights; found without importing it."""
    spec = find_spec("austeer.adapters.modeling_austeer")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def steered_config(
    base: Mapping[str, Any], adapter: SteeringAdapter, scale: float
) -> dict[str, Any]:
    """The content of config.json: the base's, under a model type that transformers lacks.

    Args:
        base: parsed config.json of the base.
        adapter: what to steer.
        scale: factor on every γ.
    """
    base_type = adapter.config.model_type
    return {
        **base,
        "model_type": STEERED_TYPE,
        "architectures": ["SteeredForCausalLM"],
        "auto_map": dict(AUTO_MAP),
        "steering": {
            "format_version": STEERED_VERSION,
            "base_model_type": base_type,
            "sites": _sites(adapter),
        },
        "steering_scale": float(scale),
        # A native class that is called by its name looks for a nested config of its own type.
        # It would go on without the steering, so it finds one that no class accepts.
        "without_code": {
            "model_type": base_type,
            "hidden_size": "steered model: load it with AutoModelForCausalLM and "
            "trust_remote_code=True, or with austeer.adapters.load_steered",
        },
    }


def steering_tensors(
    adapter: SteeringAdapter, bare: bool
) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """The adapter's tensors by their names in the checkpoint.

    Args:
        adapter: what to steer.
        bare: the checkpoint's names lack the prefix of the decoder.
    """
    # In the outermost module, also of a vision-language model.
    outer = adapter.architecture.prefix.partition(".")[0]
    prefix = "austeer" if bare else f"{outer}.austeer"
    return {f"{prefix}.{name}": tensor for name, tensor in adapter.tensors().items()}


def is_steered(folder: Path) -> bool:
    """Whether a directory holds a steered checkpoint with code, or says so."""
    if (folder / CODE_NAME).is_file():
        return True
    try:
        config = read_json(folder / "config.json", ModelError, "")
    except ModelError:
        return False
    return config.get("model_type") == STEERED_TYPE


def check_steered(folder: Path) -> None:
    """Refuse what is no steered checkpoint, or one of a format that this release cannot read.

    Raises:
        ModelError: says which; or its config claims more than its weights can hold.
    """
    path = folder / "config.json"
    config = read_json(path, ModelError, f"is {folder} a whole model directory?")
    if config.get("model_type") != STEERED_TYPE:
        raise ModelError(
            f"{path}: model_type {config.get('model_type')!r}, expected {STEERED_TYPE!r}; "
            "a plain checkpoint loads with load_model"
        )
    steering = config.get("steering")
    version = steering.get("format_version") if isinstance(steering, dict) else None
    if version != STEERED_VERSION or isinstance(version, bool):
        raise ModelError(
            f"{path}: steering format_version {version!r}, this release reads "
            f"{STEERED_VERSION}; update austeer or export the model again"
        )
    _check_sizes(path, config, Checkpoint(folder))


def _check_sizes(path: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse sizes that would fill memory before anything is compared with the weights."""
    steering = config["steering"]
    row = ARCHITECTURES.get(str(steering.get("base_model_type")))
    if row is not None:
        check_num_layers(path, row, config, checkpoint)
    sites = steering.get("sites")
    numbers = sum(math.prod(entry.shape) for entry in checkpoint.values())
    for key, facts in sites.items() if isinstance(sites, dict) else ():
        if not isinstance(facts, dict):
            raise ModelError(f"{path}: steering of {key}: expected an object")
        units, rank = facts.get("units"), facts.get("rank")
        if type(units) is not int or type(rank) is not int or units * max(rank, 1) > numbers:
            raise ModelError(
                f"{path}: steering of {key}: {units!r} units of rank {rank!r}, the weights "
                f"hold {numbers} numbers; export the model again"
            )


def _sites(adapter: SteeringAdapter) -> dict[str, dict[str, Any]]:
    """Where each site is and how large its tensors are."""
    found = {}
    for steered in adapter.sites:
        hookpoint = adapter.architecture.hookpoint(steered.site)
        found[steered.site.key] = {
            "module": hookpoint.module,
            "side": hookpoint.side,
            "units": len(steered.index),
            "rank": steered.predictor.rank if steered.predictor else 0,
        }
    return found
