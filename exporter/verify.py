"""Proves a product before it is published: reloaded from disk, compared with the live model.

Everything is judged against a float32 truth: the base in float32 with hooks. A reduced
dtype earns an allowance on top of the float32 bound, measured and never guessed: for a fold
see `austeer.exporter.proofs.allowance`; an ONNX graph also rounds activations, as the live
model in that dtype does, so its allowance is twice the live model's own distance from the
truth; a float32 graph of a reduced-precision base has none. The other products are proved
in `austeer.exporter.proofs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from austeer.adapters._errors import AusteerError, GraphError, RouteError, VerificationError
from austeer.adapters._files import read_json
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import text_config
from austeer.adapters.fingerprint import module_reader
from austeer.adapters.tokens import check_vocabulary
from austeer.exporter.proofs.allowance import SAFETY, fold_rounding, rounding_allowance
from austeer.exporter.proofs.fold_check import verify_fold_structure
from austeer.exporter.proofs.parity import ParityReport, compare_logits, float32_bound
from austeer.exporter.proofs.reference import (
    Prompt,
    context_length,
    encode_prompts,
    float32_truth,
    model_logits,
    reload_product,
    steered_agreement,
    steered_logits,
)
from austeer.exporter.provenance import PROVENANCE_NAME, adapter_facts

__all__ = ["ParityReport", "verify_checkpoint", "verify_fold_structure", "verify_onnx"]


def verify_checkpoint(
    folder: Path,
    model: Any,
    tokenizer: Any,
    adapter: SteeringAdapter,
    prompts: Sequence[str],
    *,
    scale: float = 1.0,
    force: bool = False,
    trust_remote_code: bool = False,
) -> ParityReport:
    """Compare a steered checkpoint, reloaded with plain transformers, with the attached model.

    Args:
        folder: the product.
        model: the live base model, any dtype; left as it was.
        tokenizer: its tokenizer.
        adapter: what was folded.
        prompts: texts to compare on, at every position.
        scale: factor on every γ.
        force: accept a base with another fingerprint.
        trust_remote_code: let transformers run code from `folder`.

    Raises:
        VerificationError: the product does not load, or there is nothing to compare on.
        AdapterError: `model` is not the adapter's base (unless `force`).
        ModelError: the tokenizer gives ids that the model has no embedding of.
        RouteError: steered so strongly, the model itself overflows.
    """
    adapter.check_base(module_reader(model), text_config(model).num_hidden_layers, force)
    encoded = _encoded(model, tokenizer, prompts, context_length(model))
    product = reload_product("safetensors", folder, model, trust_remote_code)
    truth = float32_truth(model)
    steered = steered_logits(truth, adapter, scale)
    found = compare_logits(encoded, model_logits(product), steered, model_logits(truth))
    _check_finite(found.peak, scale)
    tolerance = float32_bound(found.peak)
    unit, spacing = fold_rounding(folder, model, adapter)
    if unit > torch.finfo(torch.float32).eps:
        tolerance += rounding_allowance(truth, adapter, scale, encoded, unit, spacing)
    return found.report("safetensors", folder.name, len(encoded), tolerance=tolerance)


def verify_onnx(
    folder: Path,
    model: Any,
    tokenizer: Any,
    adapter: SteeringAdapter,
    prompts: Sequence[str],
    *,
    scale: float = 1.0,
    force: bool = False,
    greedy_tokens: int = 16,
    greedy_prompts: int = 4,
) -> ParityReport:
    """Compare `folder/model.onnx` on onnxruntime with the attached model; decode, too.

    In a graft whose sites are empty, the adapter file that holds `adapter` is made active.

    Args:
        folder: the product.
        model: the live base model, any dtype.
        tokenizer: its tokenizer.
        adapter: what was grafted.
        prompts: texts to compare on, at every position.
        scale: factor on every γ.
        force: accept a base with another fingerprint.
        greedy_tokens: tokens to decode greedily with the KV cache.
        greedy_prompts: on how many of the prompts.

    Raises:
        GraphError: the graph does not load or run, or none of its adapter files is of
            `adapter`.
        VerificationError: there is nothing to compare on, or an adapter file was changed.
        AdapterError: `model` is not the adapter's base (unless `force`).
        ModelError: the tokenizer gives ids that the model has no embedding of.
        RouteError: the graph is quantized; or steered so strongly, the model overflows.
    """
    from austeer.graphs import OnnxCausalLM
    from austeer.graphs.runtime import model_file

    adapter.check_base(module_reader(model), text_config(model).num_hidden_layers, force)
    encoded = _encoded(model, tokenizer, prompts, context_length(model) - greedy_tokens)
    file = model_file(folder)
    runner = OnnxCausalLM(file)
    _refuse_quantized(file)
    carried = runner.switchable and _activate(runner, folder, adapter)
    if runner.adjustable and not carried:
        runner.scale = scale
    truth = float32_truth(model)
    steered = steered_logits(truth, adapter, scale)
    found = compare_logits(
        encoded, lambda ids: runner.logits(ids)[0], steered, model_logits(truth)
    )
    _check_finite(found.peak, scale)
    tolerance = float32_bound(found.peak)
    if runner.half and truth is not model:
        live = steered_logits(model, adapter, scale)
        noise = max(float(np.abs(live(ids) - steered(ids)).max()) for ids in encoded)
        tolerance += SAFETY * noise
    starts = encoded[:greedy_prompts]
    decoded = [runner.generate(ids, greedy_tokens) for ids in starts]
    greedy = steered_agreement(truth, adapter, scale, starts, decoded, 2 * tolerance)
    return found.report("onnx", folder.name, len(encoded), tolerance=tolerance, greedy=greedy)


def _encoded(model: Any, tokenizer: Any, prompts: Sequence[str], limit: int) -> list[Prompt]:
    encoded = encode_prompts(tokenizer, prompts, limit)
    for row in encoded:
        check_vocabulary(model, "verification", row[0].tolist())
    return encoded


def _refuse_quantized(file: Path) -> None:
    from austeer.graphs import load_model
    from austeer.graphs.locating.projections import is_quantized

    if is_quantized(load_model(file)):
        raise RouteError(
            f"{file}: its weights are quantized, so its logits are not those of the base "
            "model; graft proves such a graph when it makes it, and sha256sum -c SHA256SUMS "
            "checks it later"
        )


def _check_finite(peak: float, scale: float) -> None:
    if not np.isfinite(peak):
        raise RouteError(
            f"scale {scale:g}: steered live, the model's own logits overflow; lower the scale"
        )


def _activate(runner: Any, folder: Path, adapter: SteeringAdapter) -> bool:
    """Let the adapter file of `adapter` steer; whether it sets the strength, too."""
    from austeer.graphs.adapter_file import holds_adapter, read_adapter_file
    from austeer.graphs.opset import SCALE_INPUT

    files = sorted(folder.glob("*.onnx_adapter"))
    for file in files:
        tensors = read_adapter_file(file)
        if holds_adapter(tensors, adapter):
            runner.active = [file]
            return SCALE_INPUT in tensors
    names = ", ".join(file.name for file in files) or "no .onnx_adapter file"
    if adapter_facts(adapter) in _recorded_adapters(folder):
        raise VerificationError(
            f"{folder}: was grafted with this adapter, which {names} does not hold any more; "
            "graft again"
        )
    raise GraphError(
        f"{folder}: its sites are empty until an adapter file fills them, and this adapter is "
        f"in none ({names}); give one that it was grafted with"
    )


def _recorded_adapters(folder: Path) -> Sequence[Any]:
    try:
        found = read_json(folder / PROVENANCE_NAME, GraphError, "").get("adapters")
    except AusteerError:
        return ()
    return found if isinstance(found, list) else ()
