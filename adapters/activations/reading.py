"""Hooks that read the last-token activations of a batch, and stop the model behind them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from austeer.adapters._errors import ModelError
from austeer.adapters.activations.batches import PairBatch
from austeer.adapters.activations.packing import PackedBatch, packed_attention
from austeer.adapters.architectures import architecture_of
from austeer.adapters.attach import find_module, first_output, text_decoder
from austeer.adapters.sites import Component, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SiteValues = dict[Site, tuple[Float[Tensor, "P D"], Float[Tensor, "P D"]]]


def read_sites(
    model: PreTrainedModel, batch: PairBatch | PackedBatch, sites: Sequence[Site]
) -> SiteValues:
    """Run the decoder, without the LM head, until every site is read.

    Args:
        model: a supported causal language model.
        batch: pairs laid out for it.
        sites: where to read, at least one.

    Returns:
        (positive, negative) of each site, each `[P, width]` in the model's dtype.

    Raises:
        ModelError: a site's module or the packed attention was never asked.
    """
    depth = 1 + max(site.layer for site in sites)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        attention = None
        if isinstance(batch, PackedBatch):
            attention = stack.enter_context(packed_attention(model, batch, depth))
            stack.enter_context(_last_rows_alone(model, batch, depth - 1))
        reader = _Reader(batch, sites, () if attention is None else _narrow(model, depth - 1))
        stack.enter_context(reader.attached(model))
        with suppress(_AllReadError):
            text_decoder(model)(**batch.inputs(), use_cache=False)
    if attention is not None and attention.calls != depth:
        raise ModelError(
            f"packed attention: expected one call from each of {depth} layers, got "
            f"{attention.calls} in all; the model bypasses transformers' AttentionInterface"
        )
    for site in sites:
        if site not in reader.values:
            raise ModelError(f"{site}: its module never ran; is the Architecture row right?")
    return reader.values


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout and autocast off inside the context; they come back after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        # Activations are those of the dtype that the weights are in.
        with _without_autocast(model):
            yield
    finally:
        for module in training:
            module.training = True


def _without_autocast(model: nn.Module) -> AbstractContextManager[Any]:
    first = next(model.parameters(), None)
    device = "cpu" if first is None else first.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


class _AllReadError(Exception):
    """Stops a forward pass whose remaining layers nobody needs."""


class _Reader:
    """Keeps the last-token activations of each site.

    Args:
        batch: the batch that will run.
        sites: where to read.
        narrow: the sites of which only the last rows exist.
    """

    def __init__(
        self,
        batch: PairBatch | PackedBatch,
        sites: Sequence[Site],
        narrow: Container[Site] = (),
    ) -> None:
        self.values: SiteValues = {}
        self._batch = batch
        self._sites = sites
        self._narrow = narrow

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        with ExitStack() as stack:
            for site in self._sites:
                stack.callback(self._hook(model, site).remove)
            yield

    def _hook(self, model: PreTrainedModel, site: Site) -> torch.utils.hooks.RemovableHandle:
        hookpoint = architecture_of(model.config.model_type).hookpoint(site)
        module = find_module(model, hookpoint.module)
        if hookpoint.side == "input":
            return module.register_forward_pre_hook(lambda *call: self._keep(site, call[1]))
        return module.register_forward_hook(lambda *call: self._keep(site, call[2]))

    def _keep(self, site: Site, found: Any) -> None:
        x = first_output(found)
        if site in self._narrow:
            positive, negative = x[0].chunk(2)
        else:
            # Some models flatten rows and tokens into one axis before the MLP.
            x = x.reshape(*self._batch.input_ids.shape, -1)
            positive, negative = self._batch.positive.last(x), self._batch.negative.last(x)
        self.values[site] = positive, negative
        if len(self.values) == len(self._sites):
            raise _AllReadError


def _narrow(model: PreTrainedModel, layer: int) -> list[Site]:
    """The sites inside the modules that `_last_rows_alone` narrows."""
    row = architecture_of(model.config.model_type)
    inside = [Component.ATTENTION]
    if row.own_blocks:
        # Behind a mixture all rows are there again.
        inside += [Component.NEURON] if row.mixture else [Component.NEURON, Component.FFN]
    return [Site(layer, component) for component in inside]


@contextmanager
def _last_rows_alone(model: PreTrainedModel, batch: PackedBatch, layer: int) -> Iterator[None]:
    """Spare the output projection and the MLP of `layer` the tokens that nobody reads.

    Behind the attention of the last layer no token sees another; rows left out come back as
    zeros, so that shapes stay what the model expects. An MLP that is no module of its own
    computes them all.
    """
    architecture = architecture_of(model.config.model_type)
    rows = torch.cat([batch.positive.last_position, batch.negative.last_position])
    paths = [architecture.projection(Site(layer, Component.ATTENTION))]
    if architecture.own_blocks:
        paths.append(architecture.block(layer))

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0][:, rows.to(args[0].device)], *args[1:]

    def spread(_: nn.Module, __: Any, output: Any) -> Any:
        out = first_output(output)
        whole = out.new_zeros(1, batch.input_ids.shape[1], out.shape[-1])
        whole[:, rows.to(out.device)] = out
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    with ExitStack() as stack:
        for path in paths:
            module = find_module(model, path)
            stack.callback(module.register_forward_pre_hook(select).remove)
            stack.callback(module.register_forward_hook(spread).remove)
        yield
