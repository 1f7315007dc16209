"""Gradient checkpointing that hooks survive: decoder layers run again on the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from austeer.adapters.architectures import Architecture, text_config
from austeer.adapters.attach import find_module, replaced_forward
from austeer.adapters.sites import Component, Site

LARGE = 1_000_000_000  # parameters from which memory is dearer than a second forward pass


def is_large(model: PreTrainedModel) -> bool:
    """Whether a model is so large that training it should save memory first."""
    return bool(sum(parameter.numel() for parameter in model.parameters()) >= LARGE)


@contextmanager
def gradient_checkpointing(
    model: PreTrainedModel, architecture: Architecture, *, enabled: bool = True
) -> Iterator[None]:
    """Keep only the input of each decoder layer for the backward pass, inside the context.

    Costs a second forward pass. transformers' own checkpointing wants the model in training
    mode, which would also turn its dropout on.

    Args:
        model: a live model.
        architecture: its row.
        enabled: False does nothing.

    Raises:
        ModelError: the model lacks a decoder layer that its config promises.
    """
    count = text_config(model).num_hidden_layers if enabled else 0
    paths = [architecture.hookpoint(Site(n, Component.LAYER)).module for n in range(count)]
    with ExitStack() as stack:
        for layer in [find_module(model, path) for path in paths]:
            again = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
            stack.enter_context(replaced_forward(layer, again))
        yield
