"""Where a graft is published: a file that shares its base's weights, or a directory.

A directory says what it was made of; a file stands in a folder that is not ours.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from austeer.adapters._errors import AusteerError, GraphError, OutputError
from austeer.adapters._files import (
    publish_directory,
    publish_file,
    refuse_foreign_link,
)
from austeer.adapters.adapter import SteeringAdapter
from austeer.exporter.provenance import Seal, adapter_facts, versions
from austeer.exporter.routes import Route

if TYPE_CHECKING:
    import onnx_ir as ir

    from austeer.exporter.graft import GraftRequest

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "*token*.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
"""Configs and tokenizers, which runtimes read beside a model."""

_SMALL = 1 << 20
"""More bytes than new nodes, cards and sums take."""


@contextmanager
def graft_as_file(out: Path, base: Path, model: ir.Model) -> Iterator[Path]:
    """A free name beside the output, renamed on a clean exit.

    Args:
        out: the new `.onnx` file.
        base: the file that the model was read from.
        model: the grafted model.

    Raises:
        OutputError: `out` is taken, or is not beside the weight files that it needs, or
            they are links out of their folder.
    """
    from austeer.graphs.model_io import external_tensors

    folder = base.parent.resolve()
    locations = sorted({str(tensor.location) for tensor in external_tensors(model)})
    if locations and out.parent.resolve() != folder:
        raise OutputError(
            f"{out}: the base keeps its weights in files of their own; write beside it, such "
            f"as {base.with_name(out.name)}, or into a new directory with --copy-data"
        )
    for location in locations:
        # What is a link itself is followed, as the base is; a new file would be none.
        if not (folder / location).resolve().is_relative_to(folder):
            raise OutputError(
                f"{out}: {location} beside it is a link out of the folder, as in the Hub's "
                "cache, which onnxruntime refuses to follow from a new file; write into a new "
                "directory with --copy-data"
            )
    with publish_file(out, replace=False) as work, _speaking_of(out, work):
        # The writer wants a name that is free; the temporary is what keeps it ours.
        fresh = work.with_name(f"{work.name}.new")
        try:
            yield fresh
            fresh.replace(work)
        finally:
            fresh.unlink(missing_ok=True)


@contextmanager
def graft_as_directory(
    out: Path, base: Path, model: ir.Model, *, copy_data: bool
) -> Iterator[Path]:
    """The model file of a directory that is published on a clean exit, companions beside it.

    Args:
        out: the new directory.
        base: the file that the model was read from.
        model: the grafted model; its external data moves with it.
        copy_data: whether weight files may be copied.

    Raises:
        OutputError: `out` is taken, or weight files would have to be copied.
        GraphError: what would be copied is a link out of the base's directory.
    """
    import onnx_ir as ir

    from austeer.graphs.model_io import external_tensors

    locations = sorted({str(tensor.location) for tensor in external_tensors(model)})
    if locations and not copy_data:
        raise OutputError(
            f"{out}: the base keeps its weights in {locations[0]}; write beside it, "
            f"such as {base.with_name('steered.onnx')}, where they are shared, or take "
            "--copy-data"
        )
    companions = [
        path
        for path in sorted(base.parent.iterdir())
        if any(path.match(name) for name in _COMPANIONS) and path.is_file()
    ]
    for path in (*companions, *(base.parent / location for location in locations)):
        refuse_foreign_link(path, base.parent, GraphError)
    with publish_directory(out) as work, _speaking_of(out, work):
        for location in locations:
            (work / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.parent / location, work / location)
        ir.external_data.set_base_dir(model.graph, work)
        for path in companions:
            shutil.copyfile(path, work / path.name)
        yield work / base.name


def graft_size(
    request: GraftRequest, base: Path, model: ir.Model, adapters: Sequence[SteeringAdapter]
) -> int:
    """The most bytes that the graft writes: graphs, adapters, and files that are copied."""
    from austeer.graphs.custom_op import library_file
    from austeer.graphs.model_io import external_tensors

    copied = {base.parent / str(tensor.location) for tensor in external_tensors(model)}
    if not request.copy_data:
        copied = set()
    if request.library and (library := library_file()) is not None:
        copied.add(library)
    # The proof of a replaced graft writes the unsteered graph as well, for a while.
    graphs = 2 if request.replace and request.verify else 1
    steering = sum(array.nbytes for a in adapters for array in a.tensors().values())
    return (
        graphs * base.stat().st_size
        + sum(path.stat().st_size for path in copied)
        + 2 * steering
        + _SMALL
    )


def seal_graft(
    request: GraftRequest,
    base: Path,
    model: ir.Model,
    folder: Path,
    adapters: Sequence[SteeringAdapter],
) -> None:
    """Write `austeer.json` and sums; a file of a graft has no folder of its own for them."""
    from austeer.graphs.model_io import external_tensors

    seal = Seal(command=request.command, model=str(request.base), sums=request.sums)
    given = dataclasses.asdict(request)
    decides = ("as_adapter", "force", "inline", "library", "replace", "scale", "scale_as")
    data = {base.parent / str(tensor.location) for tensor in external_tensors(model)}
    files = [base, *(path for path in sorted(data) if path.is_file())]
    facts = {
        "route": "graft",
        "options": {name: given[name] for name in (*decides, "together")},
        "adapters": [adapter_facts(adapter) for adapter in adapters],
        "base": seal.base_facts(base.parent, files),
        "versions": versions(Route.ONNX, live=False),
    }
    seal.close(folder, facts)


@contextmanager
def _speaking_of(out: Path, work: Path) -> Iterator[None]:
    """Name the output in errors, not the temporary that it is written to."""
    try:
        yield
    except AusteerError as error:
        if str(work) not in str(error):
            raise
        raise type(error)(str(error).replace(str(work), str(out))) from error
