"""Proves a steered checkpoint with code: loaded as users will, compared with the live model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from austeer.adapters._errors import ModelError, VerificationError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import text_config
from austeer.adapters.fingerprint import module_reader
from austeer.exporter.proofs.code_check import private_code_cache
from austeer.exporter.proofs.parity import ParityReport, compare_logits, float32_bound
from austeer.exporter.proofs.reference import (
    context_length,
    encode_prompts,
    float32_truth,
    greedy_continuation,
    model_logits,
    reload_product,
    steered_agreement,
    steered_logits,
)

_GREEDY_TOKENS, _GREEDY_PROMPTS = 16, 4


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
    adapter.check_base(module_reader(model), text_config(model).num_hidden_layers, force)
    encoded = encode_prompts(tokenizer, prompts, context_length(model) - _GREEDY_TOKENS)
    _check_tokenizer(folder, tokenizer, prompts, trust_remote_code)
    with private_code_cache():
        product = reload_product("code", folder, model, True)
        truth = float32_truth(model)
        steered = steered_logits(truth, adapter, scale)
        found = compare_logits(encoded, model_logits(product), steered, model_logits(truth))
        starts = encoded[:_GREEDY_PROMPTS]
        decoded = [greedy_continuation(product, ids, _GREEDY_TOKENS) for ids in starts]
    tolerance = float32_bound(found.peak)
    greedy = steered_agreement(truth, adapter, scale, starts, decoded, 2 * tolerance)
    return found.report("code", folder.name, len(encoded), tolerance=tolerance, greedy=greedy)


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
