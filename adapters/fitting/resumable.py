"""A decoder that can run again from any place at which it can be steered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from austeer.adapters.architectures import architecture_of, text_config
from austeer.adapters.attach import (
    SiteSteer,
    final_modules,
    find_module,
    first_output,
    replaced_forward,
)
from austeer.adapters.fingerprint import module_reader
from austeer.adapters.mixtures import stored_experts
from austeer.adapters.sites import Component, Site
from austeer.adapters.steered_site import SteeredSite

PLACES = (Component.ATTENTION, Component.NEURON, Component.FFN, Component.LAYER)
"""Components of a layer in the order in which they are computed."""

_LAYER = PLACES.index(Component.LAYER)

T = TypeVar("T")


def depth_of(site: Site) -> int:
    """Place of `site` in the order of computation, from 0."""
    return site.layer * len(PLACES) + PLACES.index(site.component)


class ResumableDecoder:
    """Runs a model again from a place up to which nothing changed since the last run.

    Hooks keep the arguments with which the model calls each layer (masks, positions), so that
    no architecture's own forward has to be written down here.

    Args:
        model: a supported causal language model.
        starts: depths (see `depth_of`) from which it will be run again.

    Raises:
        ModelError: unsupported architecture.
    """

    def __init__(self, model: PreTrainedModel, starts: Set[int]) -> None:
        self._starts = [divmod(start, len(PLACES)) for start in starts]
        architecture = architecture_of(model.config.model_type)
        # Not always the base model: OPT's head calls what lies inside that.
        self._decoder = find_module(model, architecture.decoder)
        count = text_config(model).num_hidden_layers
        paths = [architecture.layer.format(i=i) for i in range(count)]
        self._layers = [find_module(model, path) for path in paths]
        # Without blocks, a layer is run again as a whole.
        within = paths if architecture.own_blocks else []
        shape = module_reader(model).shape
        self._attention = [_Block(model, f"{path}.{architecture.attention}") for path in within]
        self._mlp = [
            _Block(
                model,
                f"{path}.{architecture.mlp}",
                projected=not stored_experts(architecture, number, shape),
            )
            for number, path in enumerate(within)
        ]
        self._final = final_modules(model, architecture)
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._passes = 0

    @contextmanager
    def recording(self) -> Iterator[ResumableDecoder]:
        """Keep what later runs need inside the context; enter it before steering."""
        with ExitStack() as stack:
            counting = self._decoder.register_forward_pre_hook(self._count)
            stack.callback(counting.remove)
            for number, layer in enumerate(self._layers):
                # Before any steering hook, so that an output is kept as the layer gave it.
                keep = partial(self._keep, number)
                stack.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
            inside = {number for number, place in self._starts if place < _LAYER}
            for number in inside if self._attention else ():
                stack.enter_context(self._attention[number].recording())
                stack.enter_context(self._mlp[number].recording())
            yield self

    @contextmanager
    def resumed(self, start: int, steering: Sequence[SteeredSite]) -> Iterator[None]:
        """Let the model's decoder begin at depth `start` inside the context.

        Args:
            start: one of `starts`; up to there the last run was steered as this one is.
            steering: what the model is steered by, now attached to it.
        """

        def forward(*_: Any, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
            hidden = self._run(*divmod(start, len(PLACES)), steering)
            output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
            # The heads of mixtures of experts look for it.
            output.router_logits = None
            return output

        with replaced_forward(self._decoder, forward):
            yield

    def once(self, measure: Callable[[], T]) -> T:
        """Call `measure`.

        Raises:
            ValueError: it does not run the decoder exactly once.
        """
        self._passes = 0
        found = measure()
        if self._passes != 1:
            raise ValueError(f"measure: expected one run of the model, saw {self._passes}")
        return found

    def _run(self, layer: int, place: int, steering: Sequence[SteeredSite]) -> Tensor:
        if place == _LAYER:
            hidden = self._outputs[layer]
            for steered in steering:
                if steered.site == Site(layer, Component.LAYER):
                    hidden = SiteSteer(steered, 1.0)(hidden)
        else:
            hidden = self._resume_layer(layer, PLACES[place])
        for number in range(layer + 1, len(self._layers)):
            hidden = self._call(number, hidden)
        for module in self._final:
            hidden = module(hidden)
        return hidden

    def _resume_layer(self, number: int, component: Component) -> Tensor:
        later = component is not Component.ATTENTION
        with ExitStack() as stack:
            if self._attention:
                stack.enter_context(self._attention[number].resumed(unchanged=later))
            if self._mlp and later:
                stack.enter_context(self._mlp[number].resumed(unchanged=False))
            return self._call(number, self._inputs[number])

    def _call(self, number: int, hidden: Tensor) -> Tensor:
        arguments, named = self._calls[number]
        found: Tensor = first_output(self._layers[number](hidden, *arguments, **named))
        return found

    def _count(self, *_: Any) -> None:
        self._passes += 1

    def _keep(
        self,
        number: int,
        _: Any,
        given: tuple[Any, ...],
        named: dict[str, Any],
        output: Any,
    ) -> None:
        self._calls[number] = (given[1:], named)
        for layer, place in self._starts:
            if layer == number and place == _LAYER:
                self._outputs[number] = first_output(output)
            elif layer == number:
                self._inputs[number] = given[0]


class _Block:
    """An attention or MLP block. It ends with a projection, whose output is the block's.

    A mixture of experts is not `projected`: it is steered behind its output alone.
    """

    def __init__(self, model: nn.Module, projection: str, *, projected: bool = True) -> None:
        self._projection = find_module(model, projection) if projected else None
        self._module = find_module(model, projection.rpartition(".")[0])
        self._projected: Tensor | None = None
        self._output: Any = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the output, and the input of the projection as nothing has steered it yet."""
        hooks = [self._module.register_forward_hook(self._keep_output)]
        if self._projection is not None:
            keep = self._keep_projected
            hooks.append(self._projection.register_forward_pre_hook(keep, prepend=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def resumed(self, *, unchanged: bool) -> Iterator[None]:
        """Compute only the projection inside the context, or nothing if `unchanged`."""

        def forward(*_: Any, **__: Any) -> Any:
            if unchanged or self._projection is None:
                return self._output
            found = self._projection(self._projected)
            if isinstance(self._output, tuple):
                return (found, *self._output[1:])
            return found

        with replaced_forward(self._module, forward):
            yield

    def _keep_projected(self, _: Any, arguments: tuple[Any, ...]) -> None:
        self._projected = arguments[0]

    def _keep_output(self, _: Any, __: Any, output: Any) -> None:
        self._output = output
