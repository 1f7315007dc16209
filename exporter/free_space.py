"""Refuses, before anything is written, an output that its filesystem cannot hold."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from austeer.adapters._errors import AusteerError, OutputError
from austeer.adapters._files import final_path
from austeer.adapters._leftovers import remove_leftovers
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import Architecture, architecture_of
from austeer.adapters.fingerprint import checkpoint_reader
from austeer.adapters.sites import Component, Site
from austeer.adapters.steered_site import touched_tensors
from austeer.adapters.tensors import DTYPES, TensorEntry
from austeer.adapters.weights import Checkpoint
from austeer.exporter.checkpoint import source_files
from austeer.exporter.merge import read_model_config
from austeer.exporter.rewrite import new_dtype
from austeer.exporter.routes import Route
from austeer.exporter.settings import StoredAs

# Cards, configs, sums, a report, tokenizers that are saved anew: more than all of them take.
_SMALL = 1 << 20
_NODES = 1 << 14  # of an exported graph, for each tensor of the checkpoint
_CLONE = 0x40049409  # FICLONE of linux/fs.h
_FLOAT32 = 4


def check_space(out: Path, needed: int, sources: Iterable[Path] = ()) -> None:
    """Refuse an output larger than what is free where it goes; first free what is ours.

    Args:
        out: where the output will be.
        needed: the most bytes that will be written.
        sources: files that are copied; where the filesystem shares the blocks of copies, they
            take nothing and all is well.

    Raises:
        OutputError: too little is free; the message has both numbers.
    """
    out = final_path(out)
    remove_leftovers(out)
    place = next(parent for parent in out.parents if parent.is_dir())
    try:
        found = os.statvfs(place)
    except OSError:
        return  # the writing will say what is wrong there
    free = found.f_bavail * found.f_frsize
    # A filesystem that says nothing of its size has none to check.
    if needed <= free or not found.f_blocks or _shares_blocks(sources, place):
        return
    raise OutputError(
        f"{out}: needs up to {_size(needed)}, its filesystem has {_size(free)} free; free "
        "some or choose another disk; nothing was written"
    )


def product_size(
    route: Route,
    base: Path,
    adapter: SteeringAdapter,
    dtype: str | None = None,
    stored: StoredAs | None = None,
) -> int:
    """The most bytes that a product takes.

    Args:
        route: its kind.
        base: directory of the base model.
        adapter: what steers it.
        dtype: name of the torch dtype that the model is loaded in, None for its own.
        stored: how weight files are written.

    Raises:
        ModelError: the base is malformed.
    """
    own = sum(tensor.nbytes for tensor in adapter.tensors().values())
    checkpoint = Checkpoint(base)
    if not route.is_peft:
        size = own + _model_size(route, checkpoint, dtype)
        return size + (_difference(route, checkpoint, adapter, stored) if stored else 0)
    ranks: Counter[str] = Counter()
    for steered in adapter.sites:
        ranks[adapter.architecture.projection(steered.site)] += len(steered.index)
    layers = {steered.site.layer for steered in adapter.sites}
    # Every kind of projection that is steered in one layer gets zeros in the others.
    modules = len(layers) * len(adapter.config.components)
    values = modules * max(ranks.values()) * _widths(adapter.architecture, checkpoint)
    return _SMALL + _FLOAT32 * values


def run_size(
    routes: Iterable[Route], base: Path, max_units: int, dtype: str | None = None
) -> int:
    """The most bytes that a run writes whose adapter is still to be found.

    Args:
        routes: kinds of its products.
        base: directory of the base model.
        max_units: the most units that will be steered.
        dtype: as in `product_size`.

    Raises:
        ModelError: the base is malformed.
    """
    config, checkpoint = read_model_config(base), Checkpoint(base)
    architecture = architecture_of(config.get("model_type"))
    layers = architecture.num_layers(config)
    widths = _widths(architecture, checkpoint)
    # A ranking has six numbers of eight bytes for each unit of four components.
    total = _SMALL + 4 * 6 * 8 * layers * widths
    # The rank is that of the layer with most units, and every steered layer has it; a
    # projection has no more units than inputs and outputs.
    spread = max(
        n * min(max_units + 1 - n, widths) for n in range(1, min(layers, max_units) + 1)
    )
    for route in routes:
        if route.is_peft:
            total += _SMALL + _FLOAT32 * 2 * spread * widths
        else:
            total += _model_size(route, checkpoint, dtype)
    return total


def _model_size(route: Route, checkpoint: Checkpoint, dtype: str | None) -> int:
    copied = sum(path.stat().st_size for path in source_files(checkpoint))
    if route is not Route.ONNX:
        return _SMALL + copied
    sizes = [_exported_bytes(entry, dtype) for entry in checkpoint.values()]
    weights = sum(path.stat().st_size for path in checkpoint.files)
    # An output layer that shares its weight with the embedding may be written once more.
    return _SMALL + _NODES * len(sizes) + sum(sizes) + max(sizes, default=0) + copied - weights


def _difference(
    route: Route, checkpoint: Checkpoint, adapter: SteeringAdapter, stored: StoredAs
) -> int:
    """Bytes that weight files take more than the base's."""
    if stored.dtype is not None:
        return sum(
            DTYPES[dtype].itemsize * math.prod(entry.shape) - entry.size
            for entry in checkpoint.values()
            if (dtype := new_dtype(entry, stored.dtype, adapter.architecture)) != entry.dtype
        )
    if not stored.link:
        return 0
    touched = set()
    if route is Route.SAFETENSORS:
        architecture = adapter.architecture
        read = checkpoint_reader(architecture, checkpoint)
        for name, *_ in touched_tensors(adapter.sites, architecture, read):
            entry = checkpoint.find(architecture.disk_names(name))
            if entry is None:  # a quantized projection: its plan alone knows what changes
                return 0
            touched.add(entry.file)
    return -sum(file.stat().st_size for file in checkpoint.files if file not in touched)


def _exported_bytes(entry: TensorEntry, dtype: str | None) -> int:
    """Bytes of a tensor in an ONNX graph; bfloat16 is written in float32."""
    half = dtype == "float16" if dtype else entry.dtype == "F16"
    return math.prod(entry.shape) * (2 if half else _FLOAT32)


def _widths(architecture: Architecture, checkpoint: Checkpoint) -> int:
    """Inputs and outputs of the widest projection that can be steered, together."""
    found = [0]
    for component in (Component.ATTENTION, Component.NEURON):
        try:
            weight = f"{architecture.projection(Site(0, component))}.weight"
        except AusteerError:
            continue  # an architecture without such a place
        entry = checkpoint.find(architecture.disk_names(weight))
        found.append(sum(entry.shape[-2:]) if entry else 0)
    return max(found)


def _shares_blocks(sources: Iterable[Path], place: Path) -> bool:
    """Whether copies of `sources` in `place` take no room: tries one, in a nameless file."""
    import fcntl

    source = min(sources, key=lambda path: path.stat().st_size, default=None)
    if source is None or not hasattr(os, "O_TMPFILE"):
        return False
    try:
        target = os.open(place, os.O_TMPFILE | os.O_WRONLY)
    except OSError:
        return False
    try:
        with source.open("rb") as stream:
            fcntl.ioctl(target, _CLONE, stream.fileno())
    except OSError:
        return False
    finally:
        os.close(target)
    return True


def _size(count: int) -> str:
    if count < 10**7:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 10**10 else f"{count / 1e9:.1f} GB"
