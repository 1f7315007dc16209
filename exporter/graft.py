"""Graft adapters onto an ONNX model that exists already: one job, published whole or not."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.adapters._errors import GraphError, RouteError
from austeer.adapters._files import check_output_free, read_json, write_json
from austeer.adapters._progress import Progress, silent
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.card import model_card
from austeer.exporter.free_space import check_space
from austeer.exporter.graft_output import (
    graft_as_directory,
    graft_as_file,
    graft_size,
    seal_graft,
)
from austeer.exporter.routes import check_gains
from austeer.exporter.settings import check_strength

if TYPE_CHECKING:
    import onnx_ir as ir

    from austeer.graphs import GraftPlan
    from austeer.graphs.base_check import BaseWeights


_ONE_FILE = 2**31
"""More than a protobuf file can hold: no weights of a file that was read are ever split off."""

_SWITCHABLE = """

Its steered sites are empty until a run makes an adapter active:

| adapter | strength | units | at |
|---|---|---|---|"""

_USAGE = """`{name}` runs on stock onnxruntime without this package; the operator library of
austeer is an option that makes it faster, never a condition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraftRequest:
    """What to graft onto what, and how.

    Attributes:
        base: an `.onnx` file, or a folder with one in it.
        adapters: directories or Hub ids; several only with `as_adapter`.
        out: a new directory, or a new `.onnx` file; beside the base it shares its data.
        scale: factor on every γ.
        scale_as: `constant`, or a graph input: `required` or `optional`.
        as_adapter: write empty sites, and each adapter as an `.onnx_adapter` file.
        together: with `as_adapter`: let several adapters be active in one run.
        inline: write plain operators in place of model-local functions.
        replace: take an earlier graft out of the base first.
        copy_data: copy the base's external data into a new directory.
        library: put the operator library into the directory, for onnxruntime-genai.
        force: accept a base with other weights.
        verify: run the result and compare it with its formula and its base.
        sums: write `SHA256SUMS` into a directory.
        command: the command line, for `austeer.json` in a directory.

    Raises:
        RouteError: options that exclude one another.
    """

    base: Path
    adapters: tuple[str, ...]
    out: Path
    scale: float = 1.0
    scale_as: str = "constant"
    as_adapter: bool = False
    together: bool = False
    inline: bool = False
    replace: bool = False
    copy_data: bool = False
    library: bool = False
    force: bool = False
    verify: bool = True
    sums: bool = True
    command: str = ""

    def __post_init__(self) -> None:
        check_strength(self.scale, self.scale_as)
        if len(self.adapters) != 1 and not self.as_adapter:
            raise RouteError(
                f"graft: expected one adapter, got {len(self.adapters)}; take --as-adapter to "
                "switch between several, or combine them into one"
            )
        if self.together and not self.as_adapter:
            raise RouteError("--together: is about several adapters; add --as-adapter")
        if self.is_file and (self.as_adapter or self.library or self.copy_data):
            raise RouteError(
                f"{self.out}: --as-adapter, --library and --copy-data write several files; "
                "give a directory"
            )

    @property
    def is_file(self) -> bool:
        """Whether one `.onnx` file comes out, and not a directory."""
        return self.out.suffix == ".onnx"


@dataclass(frozen=True, slots=True, eq=False)
class _Graft:
    """A grafted graph in memory, and what proves it."""

    model: ir.Model
    plan: GraftPlan
    traces: Mapping[str, tuple[str, str]]
    replaced: bool
    """Whether the base file is steered itself."""


def graft_job(request: GraftRequest, progress: Progress = silent) -> dict[str, Any]:
    """Write, prove and publish a graft; its row of figures.

    Raises:
        AusteerError: base, adapter or output is unusable, a site cannot be found, or the
            result differs from its formula; nothing is published then.
    """
    from austeer.graphs.runtime import model_file

    started = time.monotonic()
    base = model_file(request.base)
    is_file = request.out.suffix == ".onnx"
    check_output_free(request.out, "a new file name" if is_file else "a new or empty directory")
    adapters = [SteeringAdapter.from_pretrained(name) for name in request.adapters]
    check_gains(adapters, request.scale, request.scale_as)
    progress("graft", 0, 1)
    graft, compared = _grafted(request, base, adapters)
    progress("graft", 1, 1)
    check_space(request.out, graft_size(request, base, graft.model, adapters))
    with _published(request, base, graft.model) as target:
        files = _write(request, target, graft, adapters, compared)
        progress("verify graft", 0, 1)
        proof = _prove(base, target, graft, files) if request.verify else {}
        progress("verify graft", 1, 1)
        if not request.is_file:
            seal_graft(request, base, graft.model, target.parent, adapters)
    return proof | {
        "route": "graft",
        "path": str(request.out),
        "nodes": len(graft.plan.nodes),
        "base_weights": compared.value,
        "adapter_files": [file.name for file in files],
        "verified": request.verify,
        "seconds": round(time.monotonic() - started, 2),
    }


def _published(
    request: GraftRequest, base: Path, model: ir.Model
) -> AbstractContextManager[Path]:
    if request.is_file:
        return graft_as_file(request.out, base, model)
    return graft_as_directory(request.out, base, model, copy_data=request.copy_data)


def _grafted(
    request: GraftRequest, base: Path, adapters: Sequence[SteeringAdapter]
) -> tuple[_Graft, BaseWeights]:
    from austeer.graphs import (
        ScaleAs,
        load_model,
        plan_graft,
        plan_switchable_graft,
        remove_graft,
    )
    from austeer.graphs.base_check import BaseWeights, check_base
    from austeer.graphs.graft import apply_plan, steered_values
    from austeer.graphs.inline import inline_functions

    model = load_model(base)
    removed = remove_graft(model) if request.replace else 0
    compared = [check_base(model, base.parent, a, force=request.force) for a in adapters]
    scale_as = ScaleAs(request.scale_as)
    if request.as_adapter:
        plan = plan_switchable_graft(
            adapters, request.scale, scale_as, together=request.together
        )
    else:
        plan = plan_graft(adapters[0], request.scale, scale_as)
    apply_plan(model, plan)
    traces = steered_values(model)
    if request.inline:
        inline_functions(model)
    return _Graft(model, plan, traces, removed > 0), min(compared, key=list(BaseWeights).index)


def _write(
    request: GraftRequest,
    target: Path,
    graft: _Graft,
    adapters: Sequence[SteeringAdapter],
    compared: BaseWeights,
) -> list[Path]:
    """Write the model and what belongs to it; the adapter files."""
    from austeer.graphs import save_model
    from austeer.graphs.adapter_file import write_adapter_file
    from austeer.graphs.base_check import BaseWeights

    if request.is_file:
        save_model(graft.model, target, limit=_ONE_FILE)
        return []
    save_model(graft.model, target)
    folder, files = target.parent, []
    for name, values in zip(request.adapters, graft.plan.switched, strict=False):
        stem = Path(name).name if Path(name).name.strip(".") else Path(name).resolve().name
        file = _free(folder / f"{stem or 'adapter'}.onnx_adapter")
        write_adapter_file(file, values)
        files.append(file)
    if request.library:
        _add_library(folder)
    usage = _USAGE.format(name=target.name)
    if files:
        usage += _SWITCHABLE + "".join(
            f"\n| `{file.name}` | `{a.config.strength}` | {a.config.k} | "
            f"{', '.join(a.config.components)} |"
            for file, a in zip(files, adapters, strict=True)
        )
    # Of several adapters none speaks for the others' figures.
    config = dataclasses.replace(adapters[0].config, fit={}) if files else adapters[0].config
    own = compared is not BaseWeights.DIFFERENT
    card = model_card(config, "finetune", "onnx", usage, scale=request.scale, own_base=own)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return files


def _free(path: Path) -> Path:
    number = 2
    free = path
    while free.exists():
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return free


def _add_library(folder: Path) -> None:
    """Put the operator library where onnxruntime-genai looks, and tell it."""
    from austeer.graphs import custom_op_library

    library = custom_op_library()
    shutil.copyfile(library, folder / library.name)
    path = folder / "genai_config.json"
    if not path.is_file():
        return
    config = read_json(path, GraphError, "build the model again")
    try:
        options = config["model"]["decoder"].setdefault("session_options", {})
        options["custom_ops_library"] = library.name
    except (KeyError, TypeError, AttributeError) as error:
        raise GraphError(
            f"{path}: expected model.decoder with session_options, found none; build it again"
        ) from error
    write_json(path, config)


def _prove(base: Path, target: Path, graft: _Graft, files: Sequence[Path]) -> dict[str, Any]:
    from austeer.graphs.probe import prove_graft

    active = list(zip(files, graft.plan.switched, strict=True))
    with _unsteered(base, target) if graft.replaced else nullcontext(base) as path:
        try:
            proof = prove_graft(target, path, graft.plan, graft.traces, active=active)
        except GraphError as error:
            raise GraphError(f"{error}; --no-verify publishes without running it") from error
    return dataclasses.asdict(proof)


@contextmanager
def _unsteered(base: Path, target: Path) -> Iterator[Path]:
    """A temporary file beside `target`: the base without the graft that it holds."""
    import onnx_ir as ir

    from austeer.graphs import load_model, remove_graft, save_model

    model = load_model(base)
    remove_graft(model)
    ir.external_data.set_base_dir(model.graph, target.parent)
    path = target.with_name(f".{target.name}.unsteered")
    try:
        save_model(model, path, limit=_ONE_FILE)
        yield path
    finally:
        path.unlink(missing_ok=True)
