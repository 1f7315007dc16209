"""Copies a checkpoint and changes tensors on the way; no torch, no model.

Files go side by side: memory is that of some rows of one tensor for each core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from austeer.adapters._errors import ModelError
from austeer.adapters._files import read_json, refuse_foreign_link
from austeer.adapters._json import is_writable
from austeer.adapters.tensors import TensorEntry, read_metadata
from austeer.adapters.weights import INDEX, SINGLE, Checkpoint
from austeer.exporter._threads import run_in_threads
from austeer.exporter.copying import Change, copy_file, link_file

_SUFFIXES = {".bpe", ".jinja", ".json", ".model", ".py", ".spm", ".tiktoken", ".txt", ".vocab"}
_LEGAL = ("license", "licence", "notice", "copying", "use_policy", "acceptable_use")
_TEMPLATES = "additional_chat_templates"  # the one subfolder that tokenizers read
# Of an adapter, and of a product that becomes a base: they would speak of other files.
_NOT_OURS = {"adapter_config.json", "adapter_model.safetensors", "austeer.json"}


@dataclass(frozen=True, slots=True)
class Copied:
    """What `copy_checkpoint` wrote.

    Attributes:
        names: the files, relative, sorted.
        changed: values that now have other bits.
    """

    names: tuple[str, ...]
    changed: int


def copy_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    changes: Mapping[str, Change] | None = None,
    check: Callable[[], None] | None = None,
    *,
    link: bool = False,
) -> Copied:
    """Copy weights, config, tokenizer, templates, custom code and licence into `folder`.

    Other weight formats, pickles, the model card, dot files and subfolders stay behind;
    symlinks are followed, those of companions within the model's directory and a Hub cache.

    Args:
        checkpoint: the base.
        folder: an existing directory.
        changes: what to do to tensors, by stored name.
        check: runs beside the copying; what it raises ends that.
        link: hard link weight files without changes, where the filesystem can.

    Raises:
        ModelError: a file of the base cannot be read, or is a link out of it.
        OSError: the copy cannot be written.
    """
    edits: dict[Path, list[tuple[TensorEntry, Change]]] = {}
    for name, change in (changes or {}).items():
        edits.setdefault(checkpoint[name].file, []).append((checkpoint[name], change))
    tasks: list[Callable[[Event], int]] = []
    for source in checkpoint.files:
        target = folder / source.name
        if link and source not in edits:
            tasks.append(partial(link_file, source, target))
        else:
            tasks.append(partial(copy_file, source, target, changes=edits.get(source, ())))
    if check is not None:
        tasks.insert(0, lambda _: check() or 0)
    # First what is quick, and refused where a link leads out of the base.
    names = copy_companions(checkpoint, folder)
    total = sum(run_in_threads(tasks))
    return Copied(tuple(sorted([*names, *(f.name for f in checkpoint.files)])), total)


def copy_companions(checkpoint: Checkpoint, folder: Path, *, index: bool = True) -> list[str]:
    """Copy what `copy_checkpoint` copies besides weights; the index of these on request.

    Raises:
        ModelError: a file of the base cannot be read.
        OSError: the copy cannot be written.
    """
    names = []
    check_companions(checkpoint)
    for source in _wanted_files(checkpoint):
        if source.name == INDEX and not index:
            continue
        name = source.relative_to(checkpoint.root)
        (folder / name).parent.mkdir(exist_ok=True)
        copy_file(source, folder / name)
        names.append(str(name))
    return names


def source_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of a base that `copy_checkpoint` copies, or would but for a link, sorted."""
    companions = (path for path in _wanted_files(checkpoint) if path.is_file())
    return sorted([*checkpoint.files, *companions])


def check_companions(checkpoint: Checkpoint) -> None:
    """Refuse a base of which `copy_checkpoint` would not copy everything.

    Raises:
        ModelError: a link to nothing, or out of the model's directory.
    """
    for path in _wanted_files(checkpoint):
        _existing(path, checkpoint.root)


def refuse_unwritable(config: Mapping[str, Any], root: Path) -> None:
    """Refuse a config that is to be written anew, and holds what JSON cannot say.

    Raises:
        ModelError: as said.
    """
    if not is_writable(config):
        raise ModelError(
            f"{root}/config.json: holds NaN, infinity or half of a surrogate pair, which JSON "
            "has no way to write; fetch the model again"
        )


def index_metadata(folder: Path) -> dict[str, Any]:
    """What the index of a sharded checkpoint says besides its map; empty without one."""
    path = folder / INDEX
    found = read_json(path, ModelError, "").get("metadata") if path.is_file() else None
    return found if isinstance(found, dict) and is_writable(found) else {}


def shared_names(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Partners of tensors that several names stand for.

    Writers that drop duplicates (safetensors' `save_model`, accelerate) note
    `dropped name: kept name` in the file's metadata.

    Returns:
        Every name of a shared tensor, dropped or kept, with all its other names.
    """
    groups: dict[str, set[str]] = {}
    for file in checkpoint.files:
        for dropped, kept in read_metadata(file).items():
            if kept in checkpoint:
                groups.setdefault(kept, {kept}).add(dropped)
    return {name: tuple(sorted(names - {name})) for names in groups.values() for name in names}


def _wanted_files(checkpoint: Checkpoint) -> Iterator[Path]:
    root = checkpoint.root
    sharded = checkpoint.files != [root / SINGLE]
    yield from (path for path in sorted(root.iterdir()) if _wanted(path, sharded))
    if (root / _TEMPLATES).is_dir():
        yield from sorted((root / _TEMPLATES).glob("*.jinja"))


def _wanted(path: Path, sharded: bool) -> bool:
    name = path.name.lower()
    if path.is_dir() or name.startswith(".") or name in _NOT_OURS:
        return False
    if name.endswith(".index.json"):
        return sharded and path.name == INDEX
    legal = name.startswith(_LEGAL) and path.suffix.lower() in ("", ".md", ".txt")
    return legal or path.suffix.lower() in _SUFFIXES


def _existing(path: Path, root: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"{path}: expected a file or a link to one; download the whole model")
    refuse_foreign_link(path, root, ModelError)
    return path
