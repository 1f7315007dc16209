"""Compile an adapter into edits of a GGUF file, or into reasons against it. Opens nothing.

An output gain multiplies a row: of a plain matrix, or of the scales of its blocks. An input
gain multiplies a column, which only a plain matrix can express: blocks run along the rows.
"""

from __future__ import annotations

from austeer.adapters._errors import AdapterError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.fingerprint import fingerprint
from austeer.adapters.sites import Component, Refusal
from austeer.adapters.steered_site import SteeredSite, check_layer
from austeer.exporter.plan import FoldPlan, TensorEdit, gain_of, plan_fold
from austeer.exporter.quantized.formats import REMEDY
from austeer.exporter.quantized.gguf_file import (
    ARCHITECTURES,
    BLOCKS,
    FLOATS,
    Array,
    GgufFile,
    GgufTensor,
    tensor_name,
)
from austeer.exporter.quantized.plan import INPUT_SIDE, notes_on

_EXACT = ("F32", "BF16")  # hold a checkpoint's values as they are; float16 may not


def check_gguf_base(file: GgufFile, adapter: SteeringAdapter, force: bool = False) -> None:
    """Refuse a GGUF file of another model than the adapter's.

    Where all steered projections are stored exactly, their weights are compared as well.

    Raises:
        AdapterError: another architecture, or other weights (unless `force`).
        SiteError: a layer that the file does not have.
    """
    model_type = adapter.config.model_type
    wanted = ARCHITECTURES.get(model_type)
    if wanted is None:
        raise AdapterError(
            f"{file.path}: adapter for a {model_type} model, which has no place in GGUF files "
            f"here (known: {', '.join(sorted(ARCHITECTURES))})"
        )
    if file.architecture != wanted:
        raise AdapterError(
            f"{file.path}: adapter for a {model_type} model, expected architecture {wanted}, "
            f"this file has {file.architecture!r}; use the right base"
        )
    for steered in adapter.sites:
        check_layer(steered.site, file.layers)
    if not force and not _uncompared(file, adapter):
        read = _ModuleReader(file, adapter)
        found = fingerprint(adapter.architecture, [s.site for s in adapter.sites], read)
        if found != adapter.config.base_model_fingerprint:
            raise AdapterError(
                f"{file.path}: adapter for another base model: made for fingerprint "
                f"{adapter.config.base_model_fingerprint}, this file has {found}; use the "
                "right base or --force"
            )


def gguf_notes(file: GgufFile, adapter: SteeringAdapter, scale: float) -> tuple[str, ...]:
    """What the reader of a fold into this file should know."""
    weights = [(s, file.tensors.get(tensor_name(s.site))) for s in adapter.sites]
    scaled = [s for s, weight in weights if weight is not None and weight.kind in BLOCKS]
    return notes_on(_uncompared(file, adapter), scaled, scale)


def plan_gguf(
    file: GgufFile, adapter: SteeringAdapter, scale: float = 1.0
) -> FoldPlan | tuple[Refusal, ...]:
    """Compile `adapter` for the fold into a GGUF file.

    Returns:
        The plan, edits by the file's tensor names and axes `[out, in]`, or every reason
        against it.

    Raises:
        SiteError: a unit that the base does not have.
    """
    folds = adapter.config.strength.foldable
    if not folds or any(not steered.site.component.foldable for steered in adapter.sites):
        return plan_fold(adapter, {})  # the reasons are those of any base
    results = [_site_edits(file, steered, scale) for steered in adapter.sites]
    refusals = tuple(result for result in results if isinstance(result, Refusal))
    if refusals:
        return refusals
    edits = tuple(edit for made in results if not isinstance(made, Refusal) for edit in made)
    names = {edit.name for edit in edits}
    return FoldPlan(edits, frozenset(n for n in names if file.tensors[n].kind in BLOCKS))


def _site_edits(
    file: GgufFile, steered: SteeredSite, scale: float
) -> list[TensorEdit] | Refusal:
    site = steered.site
    weight = file.tensors.get(tensor_name(site))
    if weight is None:
        return Refusal(site, f"{tensor_name(site)} is not in the file; is it the right base?")
    axis = 0 if site.component is Component.FFN else 1
    reason = objection(weight, axis)
    if reason is not None:
        return Refusal(site, reason)
    steered.check_width(weight.shape[axis])
    gain = gain_of(steered, scale)
    edits = [TensorEdit(weight.name, axis, steered.index, gain, (site,))]
    bias = file.tensors.get(tensor_name(site, "bias"))
    if bias is not None and site.component is Component.FFN:
        if bias.kind not in FLOATS or bias.shape != weight.shape[:1]:
            return Refusal(site, f"{bias.name} is {bias.kind} of shape {bias.shape}; {REMEDY}")
        edits.append(TensorEdit(bias.name, 0, steered.index, gain, (site,)))
    return edits


def objection(weight: GgufTensor, axis: int) -> str | None:
    """Why a weight cannot take gains along `axis` of `[out, in]`; None where it can."""
    if len(weight.shape) != 2:
        return f"it has shape {weight.shape}, expected two axes"
    if 0 in weight.shape:
        return f"it has shape {weight.shape}, which holds no weights; fetch the file again"
    if weight.kind in FLOATS:
        return None
    if axis == 1:
        return f"stored as {weight.kind}: {INPUT_SIDE}"
    if weight.kind not in BLOCKS:
        return f"stored as {weight.kind}: its scales cannot express a gain; {REMEDY}"
    return None


def _uncompared(file: GgufFile, adapter: SteeringAdapter) -> list[SteeredSite]:
    """The sites whose weights are not those of the checkpoint any more."""
    return [
        steered
        for steered in adapter.sites
        if (weight := file.tensors.get(tensor_name(steered.site))) is not None
        and weight.kind not in _EXACT
    ]


class _ModuleReader:
    """Tensors by the module names, and in the layout, of the adapter's architecture."""

    def __init__(self, file: GgufFile, adapter: SteeringAdapter) -> None:
        self._file, self._transposed = file, adapter.architecture.transposed
        self._names = {
            f"{adapter.architecture.projection(steered.site)}.{kind}": tensor_name(
                steered.site, kind
            )
            for steered in adapter.sites
            for kind in ("weight", "bias")
        }

    def __call__(self, name: str, part: int | None = None, /) -> Array | None:
        tensor = self._tensor(name)
        if tensor is None:
            return None
        (values,) = tensor.fields(tensor.read(self._file.path))
        values = values.T if self._transposed else values
        return values if part is None else values[part]

    def shape(self, name: str, /) -> tuple[int, ...] | None:
        tensor = self._tensor(name)
        if tensor is None:
            return None
        return tensor.shape[::-1] if self._transposed else tensor.shape

    def _tensor(self, name: str) -> GgufTensor | None:
        return self._file.tensors.get(self._names.get(name, ""))
