"""Load models and tokenizers; every unusable directory becomes one clear `ModelError`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from austeer.adapters._errors import ModelError
from austeer.adapters._files import read_json
from austeer.adapters.architectures import architecture_of
from austeer.adapters.model_directory import check_num_layers, model_directory
from austeer.adapters.steered_format import STEERED_TYPE, check_steered
from austeer.adapters.tensors import STORED_DTYPES
from austeer.adapters.weights import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


def load_model(
    name_or_path: str | Path,
    *,
    device: str = "cpu",
    device_map: str | dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model from safetensors, in eval mode, without gradients.

    Args:
        name_or_path: model directory or Hub id.
        device: a torch device, such as `cpu` or `cuda:0`.
        device_map: `auto`, or a map of modules to devices, spreads a model larger than one
            device through accelerate; `device` must then be left at `cpu`.
        dtype: `float32`, `bfloat16`, `float16` or torch's own of that name, or None for the
            checkpoint's.
        revision: Hub revision (branch, tag or commit).
        trust_remote_code: run the Python code that comes with the model.

    Raises:
        ModelError: missing, malformed or unsupported model, unknown device or dtype.
    """
    from transformers import AutoModelForCausalLM

    target, stored = _target(device, device_map, dtype)
    folder = model_directory(name_or_path, revision, code=trust_remote_code)
    _check_folder(folder)
    with _transformers_calls(folder, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=stored,
            use_safetensors=True,
            # Allowed here only so that the tensor can be named in our own error below.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
        )
        _check_complete(folder, model, info)
        model = (model if device_map else model.to(target)).eval().requires_grad_(False)
    if model.device.type == "meta":
        raise ModelError("device map: offloads the token embedding; keep that on a device")
    # The Hub id, not the cache folder, is what an adapter should remember as its base.
    model.name_or_path = str(name_or_path)
    return model


def load_steered(
    name_or_path: str | Path,
    *,
    device: str = "cpu",
    device_map: str | dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a steered checkpoint with code, running our own code and none that lies beside it.

    Args:
        name_or_path: what `austeer-export merge --code` wrote: directory or Hub id.
        device: as for `load_model`.
        device_map: as for `load_model`.
        dtype: as for `load_model`; the adapter's numbers stay in float32.
        revision: Hub revision (branch, tag or commit).

    Returns:
        The steered model; its `steering_scale` sets the strength, 0 is the base.

    Raises:
        ModelError: not a steered checkpoint, one of another format, or malformed.
    """
    from austeer.adapters.modeling_austeer import SteeredConfig, SteeredForCausalLM

    target, stored = _target(device, device_map, dtype)
    folder = model_directory(name_or_path, revision)
    check_steered(folder)
    with _transformers_calls(folder, "steered model"):
        model, info = SteeredForCausalLM.from_pretrained(
            folder,
            config=SteeredConfig.from_pretrained(folder),
            dtype=stored,
            use_safetensors=True,
            output_loading_info=True,
            device_map=device_map,
        )
        _check_complete(folder, model, info)
        return (model if device_map else model.to(target)).eval().requires_grad_(False)


def load_tokenizer(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or Hub id.

    Raises:
        ModelError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    folder = model_directory(name_or_path, revision, code=trust_remote_code)
    # Without this check transformers builds an empty tokenizer for some model types.
    if not any((folder / name).is_file() for name in _VOCABULARIES) and not trust_remote_code:
        raise ModelError(
            f"{folder}: has no tokenizer (looked for {', '.join(_VOCABULARIES)}); "
            "copy the tokenizer's files beside the weights"
        )
    with _transformers_calls(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **_type_of_base(folder)
        )
        if not tokenizer("some text")["input_ids"]:
            raise ModelError(
                f"{folder}: its tokenizer turns text into no tokens; fetch it again"
            )
    return tokenizer


def _type_of_base(folder: Path) -> dict[str, Any]:
    """Of a steered checkpoint, a config of the base's type, which decides the class."""
    from transformers import AutoConfig

    path = folder / "config.json"
    config = read_json(path, ModelError, "fetch it again") if path.is_file() else {}
    if config.get("model_type") != STEERED_TYPE:
        return {}
    steering = config.get("steering")
    base = steering.get("base_model_type") if isinstance(steering, dict) else None
    return {"config": AutoConfig.for_model(str(base))}


def _check_folder(folder: Path) -> None:
    """Refuse what transformers would answer with a traceback, before it loads anything."""
    path = folder / "config.json"
    config = read_json(path, ModelError, f"is {folder} a whole model directory?")
    if config.get("model_type") == STEERED_TYPE:
        raise ModelError(
            f"{folder}: is a steered model already; name its base, or load it with load_steered"
        )
    try:
        architecture = architecture_of(config.get("model_type"))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    check_num_layers(path, architecture, config, Checkpoint(folder))


def _check_complete(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    for key in info["mismatched_keys"]:
        # transformers 4 gives names, 5 gives (name, found, expected).
        name = key if isinstance(key, str) else key[0]
        entry = Checkpoint(folder).find(
            architecture_of(model.config.model_type).disk_names(name)
        )
        found, wanted = entry and entry.shape, tuple(model.state_dict()[name].shape)
        raise ModelError(
            f"{folder}: {name} has shape {found}, config.json wants {wanted}; "
            "do config and weights belong together?"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{folder}: the weights lack {missing[0]}{more}; download the whole model"
        )


def _target(
    device: str, device_map: object, dtype: str | torch.dtype | None
) -> tuple[torch.device, str]:
    """The device, and the dtype as transformers takes it, once what was asked for can work."""
    if device_map is not None:
        _check_device_map(device)
    target = _device(device)
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in ("auto", *STORED_DTYPES):
        raise ModelError(f"dtype {name!r}: expected one of {', '.join(STORED_DTYPES)}")
    return target, name


def _check_device_map(device: str) -> None:
    if device != "cpu":
        raise ModelError(f"device {device!r} and a device map: give one of the two")
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError("a device map needs accelerate; run: pip install accelerate")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("meta holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        usable = "cpu" + (", cuda" if torch.cuda.is_available() else "")
        raise ModelError(
            f"device {name!r}: not usable here ({_first_line(error)}); usable: {usable}"
        ) from error
    return device


@contextmanager
def _transformers_calls(folder: Path, what: str) -> Iterator[None]:
    """Keep transformers quiet, and turn whatever it raises into one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModelError:
        raise
    except Exception as error:  # its checks raise nearly every built-in type
        raise ModelError(
            f"{folder}: transformers cannot load the {what}: {_first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
