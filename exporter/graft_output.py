"""Where a graft is published: a file that shares its base's weights, or a directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from austeer.adapters._errors import AusteerError, GraphError, OutputError
from austeer.adapters._files import (
    check_output_free,
    publish_directory,
    publish_file,
    refuse_foreign_link,
)

if TYPE_CHECKING:
    import onnx_ir as ir

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


@contextmanager
def graft_as_file(out: Path, base: Path, model: ir.Model) -> Iterator[Path]:
    """A free name beside the output, renamed on a clean exit.

    Args:
        out: the new `.onnx` file.
        base: the file that the model was read from.
        model: the grafted model.

    Raises:
        OutputError: `out` is taken, or is not beside the weight files that it needs.
    """
    from austeer.graphs.model_io import external_tensors

    beside = out.parent.resolve() == base.parent.resolve()
    if not beside and any(True for _ in external_tensors(model)):
        raise OutputError(
            f"{out}: the base keeps its weights in files of their own; write beside it, such "
            f"as {base.with_name(out.name)}, or into a new directory with --copy-data"
        )
    with publish_file(out) as work, _speaking_of(out, work):
        work.unlink()
        yield work
        # Another run may have been quicker.
        check_output_free(out)


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


@contextmanager
def _speaking_of(out: Path, work: Path) -> Iterator[None]:
    """Name the output in errors, not the temporary that it is written to."""
    try:
        yield
    except AusteerError as error:
        if str(work) not in str(error):
            raise
        raise type(error)(str(error).replace(str(work), str(out))) from error
