"""Proves a PEFT adapter: loaded with stock peft onto the base, compared with the live model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from austeer.adapters._errors import VerificationError
from austeer.adapters.adapter import SteeringAdapter
from austeer.adapters.architectures import text_config
from austeer.adapters.fingerprint import checkpoint_reader, module_reader
from austeer.adapters.loading import load_model
from austeer.adapters.steered_site import touched_tensors
from austeer.adapters.weights import Checkpoint
from austeer.exporter.proofs.parity import ParityReport, compare_logits, float32_bound
from austeer.exporter.proofs.reference import (
    context_length,
    encode_prompts,
    float32_truth,
    model_logits,
    steered_logits,
)


def verify_peft(
    folder: Path,
    model: Any,
    tokenizer: Any,
    adapter: SteeringAdapter,
    prompts: Sequence[str],
    *,
    base: Path | None = None,
    scale: float = 1.0,
    force: bool = False,
    trust_remote_code: bool = False,
) -> ParityReport:
    """Compare a PEFT adapter, loaded with stock peft onto the base, with the attached model.

    Args:
        folder: the product.
        model: the live base model, any dtype; left as it was.
        tokenizer: its tokenizer.
        adapter: what was converted.
        prompts: texts to compare on, at every position.
        base: directory of the base, whose files a LoRA was made from; where `model` is in
            a reduced dtype that is not theirs, they are loaded for the comparison.
        scale: factor on every γ.
        force: accept a base with another fingerprint.
        trust_remote_code: let transformers run code from `base`.

    Raises:
        VerificationError: the product does not load, or there is nothing to compare on.
        AdapterError: `model` is not the adapter's base (unless `force`).
    """
    adapter.check_base(module_reader(model), text_config(model).num_hidden_layers, force)
    encoded = encode_prompts(tokenizer, prompts, context_length(model))
    if base is None or _has_dtype_of(base, model, adapter):
        truth = float32_truth(model)
    else:
        truth = load_model(
            base,
            device=str(model.device),
            dtype="float32",
            trust_remote_code=trust_remote_code,
        )
    product = _with_peft(folder, truth)
    found = compare_logits(
        encoded,
        model_logits(product),
        steered_logits(truth, adapter, scale),
        model_logits(truth),
    )
    route = str(product.active_peft_config.peft_type.value).lower()
    tolerance = float32_bound(found.peak)
    return found.report(route, folder.name, len(encoded), tolerance=tolerance)


def _has_dtype_of(base: Path, model: Any, adapter: SteeringAdapter) -> bool:
    """Whether the live weights are those of the files, whatever float32 made of them."""
    if model.dtype in (torch.float32, torch.float64):
        return True
    checkpoint = Checkpoint(base)
    read = checkpoint_reader(adapter.architecture, checkpoint)
    name, _, _ = next(touched_tensors(adapter.sites, adapter.architecture, read))
    entry = checkpoint.find(adapter.architecture.disk_names(name))
    return entry is None or f"torch.{entry.numpy_dtype.name}" == str(model.dtype)


def _with_peft(folder: Path, model: Any) -> Any:
    """A copy of `model` with the product loaded into it; peft changes what it is given."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # A tensor that is not in the file would stay at its random initial value.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning) as error:
        raise VerificationError(
            f"PEFT product {folder.name}: peft cannot load it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); not published"
        ) from error
