"""Where a model's or adapter's files are: a local directory, or a Hub snapshot. No torch.

And whether its config can belong to its weights, as far as their headers tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from austeer.adapters._errors import AdapterError, AusteerError, ModelError
from austeer.adapters.architectures import Architecture

_SUFFIXES = ("bpe", "json", "model", "safetensors", "spm", "tiktoken", "txt", "vocab")
_LEGAL = ("license", "licence", "notice", "copying", "use_policy", "acceptable_use")


def _any_case(name: str) -> str:
    return "".join(f"[{char}{char.upper()}]" if char.isalpha() else char for char in name)


# What the exporter copies. Names match on through a `/`, so that subfolders need patterns of
# their own to stay out: they repeat the weights in other formats, as consolidated files do.
_TOP = (*(f"*.{suffix}" for suffix in _SUFFIXES), *(f"{_any_case(name)}*" for name in _LEGAL))
_WANTED = (*_TOP, "*.jinja")
_UNWANTED = (*(f"*/{pattern}" for pattern in _TOP), "consolidated*")


def model_directory(
    name_or_path: str | Path, revision: str | None = None, *, code: bool = False
) -> Path:
    """The directory of a model: a local one as it is, or a Hub snapshot (downloaded once).

    Args:
        name_or_path: directory or Hub id.
        revision: of the Hub.
        code: fetch the Python code that comes with the model as well.

    Raises:
        ModelError: neither a directory nor a model on the Hub, or a revision of a directory.
    """
    name = str(name_or_path)
    if name and Path(name).is_dir():
        return _local(name, revision, ModelError)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local or not name or Path(name).exists():
        raise ModelError(
            f"{name or '(empty)'}: expected a model directory, found "
            f"{'a file' if Path(name).is_file() else 'nothing there'}; check the path"
        )
    return _snapshot(name, revision, code)


def adapter_directory(name: str, revision: str | None = None) -> Path:
    """The directory of an adapter, as `model_directory` gives that of a model.

    Raises:
        AdapterError: neither a directory nor on the Hub, or a revision of a directory.
    """
    if Path(name).is_dir():
        return _local(name, revision, AdapterError)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise AdapterError(
            f"{name}: expected an adapter directory or a Hub id (owner/name), found neither"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.md"]
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise AdapterError(
            f"{name}: no such directory, and the Hub did not give it ({type(error).__name__}); "
            "check the name and the network"
        ) from error


def _local(name: str, revision: str | None, error: type[AusteerError]) -> Path:
    if revision is not None:
        raise error(
            f"{name}: revision {revision!r} is one of the Hub, this is a local folder; "
            "leave the revision out"
        )
    return Path(name)


def check_num_layers(
    path: Path, architecture: Architecture, config: Mapping[str, Any], tensors: Sized
) -> None:
    """Refuse more layers than tensors: a model would be built of them, with no end in sight.

    Args:
        path: of the config, for the message.
        architecture: its row.
        config: parsed `config.json`.
        tensors: of the checkpoint.

    Raises:
        ModelError: too many layers, or no number of layers.
    """
    try:
        layers = architecture.num_layers(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    if layers > len(tensors):
        raise ModelError(
            f"{path}: {layers} layers, the weights have {len(tensors)} tensors; "
            "do config and weights belong together?"
        )


def _snapshot(name: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*_WANTED, *(["*.py"] if code else [])],
                ignore_patterns=[*_UNWANTED, "*/*.py"],
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{name}: no such directory, and the Hub gave no such model{at} "
            f"({type(error).__name__}); check the name and the network"
        ) from error
