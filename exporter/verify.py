"""Proves a product before it is published: reloaded from disk, compared with the live model.

Everything is judged against a float32 truth: the base in float32 with hooks. A reduced
dtype earns an allowance on top of the float32 bound, measured and never guessed: for a fold
see `austeer.exporter.allowance`; an ONNX graph also rounds activations, as the live model in
that dtype does, so its allowance is twice the live model's own distance from the truth; a
float32 graph of a reduced-precision base has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from austeer.adapters._errors import ModelError, VerificationError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.attach import steering_hooks
from austeer.adapters.fingerprint import module_reader
from austeer.exporter.allowance import SAFETY, fold_rounding, rounding_allowance
from austeer.exporter.code_check import private_code_cache, verify_code_structure
from austeer.exporter.fold_check import verify_fold_structure
from austeer.exporter.parity import ParityReport, compare_logits, float32_bound
from austeer.exporter.reference import (
    Prompt,
    context_length,
    encode_prompts,
    float32_truth,
    greedy_agreement,
    greedy_continuation,
    model_logits,
    steered_logits,
)

__all__ = [
    "ParityReport",
    "verify_checkpoint",
    "verify_code",
    "verify_code_structure",
    "verify_fold_structure",
    "verify_onnx",
]
_GREEDY_TOKENS, _GREEDY_PROMPTS = 16, 4


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
    """
    adapter.check_base(module_reader(model), model.config.num_hidden_layers, force)
    encoded = encode_prompts(tokenizer, prompts, context_length(model))
    product = _reload("safetensors", folder, model, trust_remote_code)
    truth = float32_truth(model)
    steered = steered_logits(truth, adapter, scale)
    found = compare_logits(encoded, model_logits(product), steered, model_logits(truth))
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
    greedy_tokens: int = _GREEDY_TOKENS,
    greedy_prompts: int = _GREEDY_PROMPTS,
) -> ParityReport:
    """Compare `folder/model.onnx` on onnxruntime with the attached model; decode, too.

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
        GraphError: the graph does not load or run.
        VerificationError: there is nothing to compare on.
        AdapterError: `model` is not the adapter's base (unless `force`).
    """
    from austeer.graphs import OnnxCausalLM
    from austeer.graphs.runtime import model_file

    adapter.check_base(module_reader(model), model.config.num_hidden_layers, force)
    encoded = encode_prompts(tokenizer, prompts, context_length(model) - greedy_tokens)
    runner = OnnxCausalLM(model_file(folder))
    if runner.adjustable:
        runner.scale = scale
    truth = float32_truth(model)
    steered = steered_logits(truth, adapter, scale)
    found = compare_logits(
        encoded, lambda ids: runner.logits(ids)[0], steered, model_logits(truth)
    )
    tolerance = float32_bound(found.peak)
    if runner.half and truth is not model:
        live = steered_logits(model, adapter, scale)
        noise = max(float(np.abs(live(ids) - steered(ids)).max()) for ids in encoded)
        tolerance += SAFETY * noise
    starts = encoded[:greedy_prompts]
    decoded = [runner.generate(ids, greedy_tokens) for ids in starts]
    with steering_hooks(truth, adapter.architecture, adapter.sites, scale):
        greedy = _mean_agreement(truth, starts, decoded, tolerance)
    return found.report("onnx", folder.name, len(encoded), tolerance=tolerance, greedy=greedy)


def verify_code(
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
    """Compare a steered checkpoint with code with the attached model; decode, too.

    Runs the modelling file in `folder`, as users will: `verify_code_structure` comes first.

    Args:
        folder: the product.
        model: the live base model, any dtype; left as it was.
        tokenizer: its tokenizer.
        adapter: what was exported.
        prompts: texts to compare on, at every position.
        scale: factor on every γ.
        force: accept a base with another fingerprint.
        trust_remote_code: let transformers run code of the tokenizer, too.

    Raises:
        VerificationError: the product does not load, has another tokenizer, or there is nothing
            to compare on.
        AdapterError: `model` is not the adapter's base (unless `force`).
    """
    adapter.check_base(module_reader(model), model.config.num_hidden_layers, force)
    encoded = encode_prompts(tokenizer, prompts, context_length(model) - _GREEDY_TOKENS)
    _check_tokenizer(folder, tokenizer, prompts, trust_remote_code)
    with private_code_cache():
        product = _reload("code", folder, model, True)
        truth = float32_truth(model)
        steered = steered_logits(truth, adapter, scale)
        found = compare_logits(encoded, model_logits(product), steered, model_logits(truth))
        starts = encoded[:_GREEDY_PROMPTS]
        decoded = [greedy_continuation(product, ids, _GREEDY_TOKENS) for ids in starts]
    tolerance = float32_bound(found.peak)
    with steering_hooks(truth, adapter.architecture, adapter.sites, scale):
        greedy = _mean_agreement(truth, starts, decoded, tolerance)
    return found.report("code", folder.name, len(encoded), tolerance=tolerance, greedy=greedy)


def _mean_agreement(
    truth: Any, starts: Sequence[Prompt], decoded: Sequence[Prompt], tolerance: float
) -> float:
    pairs = zip(starts, decoded, strict=True)
    return float(np.mean([greedy_agreement(truth, *pair, 2 * tolerance) for pair in pairs]))


def _check_tokenizer(
    folder: Path, tokenizer: Any, prompts: Sequence[str], trust_remote_code: bool
) -> None:
    """For a model type that it lacks, transformers may choose another tokenizer class."""
    from austeer.adapters.loading import load_tokenizer

    try:
        found = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise VerificationError(
            f"code product {folder.name}: {error}; not published"
        ) from error
    for text in prompts:
        if found(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise VerificationError(
                f"code product {folder.name}: its tokenizer differs from the base's; "
                "name the base's tokenizer_class in its tokenizer_config.json"
            )


def _reload(route: str, folder: Path, model: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        product = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=model.dtype, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise VerificationError(
            f"{route} product {folder.name}: transformers cannot load it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); not published"
        ) from error
    return product.eval().float().to(model.device)
