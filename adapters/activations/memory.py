"""How many tokens fit into memory at once, and what running out of it looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from austeer.adapters._errors import FitError
from austeer.adapters.architectures import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Beyond some thousands a CPU gets slower: malloc asks the system for each buffer anew.
CPU_TOKENS = 1536
MOST_TOKENS = 65536
LEAST_TOKENS = 512
_INNER_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
# Torch's CPU allocators raise a bare RuntimeError.
_PHRASES = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def token_budget_for(model: PreTrainedModel) -> int:
    """Tokens of a batch that suit the free memory of the devices `model` is on.

    On a CPU it is a constant that fits into caches; on GPUs the one with the least free memory
    decides. An estimate: who uses it halves it when memory runs out.
    """
    devices = {parameter.device for parameter in model.parameters()}
    free = [_free_bytes(device) for device in devices if device.type == "cuda"]
    if not free:
        return CPU_TOKENS
    fitting_tokens = int(0.8 * min(free)) // _bytes_per_token(model)
    return max(LEAST_TOKENS, min(MOST_TOKENS, fitting_tokens))


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the CPU, ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _PHRASES)


def release_memory() -> None:
    """Give cached blocks back, so that smaller ones can be cut from them."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def too_large(where: str) -> FitError:
    """The error for a pair at `where` for which halving is no help."""
    return FitError(
        f"{where}: this pair alone does not fit in memory; shorten it, or use a smaller dtype "
        "or another device"
    )


def _free_bytes(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    # Cached blocks are torch's to use again.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Upper estimate: one layer's intermediate values, and the kept last tokens of all layers.

    A pair keeps two rows of every site; pairs of 16 tokens or more are assumed.
    """
    config = text_config(model)
    hidden = config.hidden_size
    named = (getattr(config, name, None) for name in _INNER_KEYS)
    inner = next((size for size in named if size), 4 * hidden)
    live = 12 * hidden + 4 * inner
    kept = config.num_hidden_layers * (3 * hidden + inner) // 8
    return int((live + kept) * max(2, model.dtype.itemsize))
