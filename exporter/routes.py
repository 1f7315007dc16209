"""Routes out of an adapter, and what can be said about them before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from austeer.adapters._errors import RouteError
from austeer.adapters._files import read_json
from austeer.adapters.config import CONFIG_NAME, Strength
from austeer.adapters.sites import Component
from austeer.adapters.steered_format import is_steered
from austeer.adapters.weights import INDEX, SINGLE

if TYPE_CHECKING:
    from austeer.adapters.adapter import SteeringAdapter


class Route(StrEnum):
    """A kind of product."""

    SAFETENSORS = "safetensors"
    """A plain checkpoint with the gains folded into its weights."""
    ONNX = "onnx"
    """An ONNX model with an op at each steered site."""
    LORA = "lora"
    """A PEFT LoRA, exact: a rank for each unit."""
    IA3 = "ia3"
    """A PEFT IA3: a vector of gains for each steered module."""
    CODE = "code"
    """The base's weights, the adapter's tensors and a modelling file that steers."""

    @property
    def folds(self) -> bool:
        """Whether the product has no place for an op, so that weights must absorb the gains."""
        return self not in (Route.ONNX, Route.CODE)

    @property
    def is_peft(self) -> bool:
        """Whether the product is a PEFT adapter."""
        return self in (Route.LORA, Route.IA3)

    @property
    def components(self) -> frozenset[Component]:
        """The components that this route takes in every architecture and in any mixture."""
        if self.is_peft:
            # ffn may have a bias, which a LoRA cannot scale, or meet neuron, which an IA3
            # cannot scale as well.
            return frozenset((Component.ATTENTION, Component.NEURON))
        return frozenset(c for c in Component if c.foldable or not self.folds)


# Packages that a route needs beyond the required ones, and the extra that brings them.
_PACKAGES = {
    Route.ONNX: (("onnxruntime", "onnxscript"), "pip install 'austeer[cpu]' (or [gpu])"),
    Route.LORA: (("peft",), "pip install 'austeer[peft]'"),
    Route.IA3: (("peft",), "pip install 'austeer[peft]'"),
}


def resolve_strength(strength: str, routes: Sequence[Route]) -> Strength:
    """`auto` is `fitted` where a product must fold, else `adaptive`."""
    if strength != "auto":
        return Strength(strength)
    return Strength.FITTED if any(route.folds for route in routes) else Strength.ADAPTIVE


def candidate_components(
    components: Sequence[Component], routes: Sequence[Route]
) -> tuple[Component, ...]:
    """The components to choose from: those asked for, or all that every route can take."""
    if components:
        return tuple(dict.fromkeys(components))
    taken = [route.components for route in routes]
    return tuple(c for c in Component if all(c in components for components in taken))


def check_mixture(routes: Sequence[Route], components: Sequence[Component]) -> None:
    """Refuse components to choose from that may come out together and then cannot be written.

    Raises:
        RouteError: neuron and ffn on route ia3.
    """
    if Route.IA3 in routes and {Component.NEURON, Component.FFN} <= set(components):
        raise RouteError(
            "route ia3: components neuron and ffn: an IA3 scales the input or the output of a "
            "projection, not both; leave one out, or take route lora or safetensors"
        )


def check_routes(
    routes: Sequence[Route],
    strength: Strength,
    components: Sequence[Component],
    *,
    verify: bool = True,
) -> None:
    """Refuse what cannot come out in the end.

    Args:
        routes: kinds of products.
        strength: how the gains are set.
        components: places that are steered.
        verify: the products will be compared with the attached model.

    Raises:
        RouteError: gains that depend on the input, or a component that no weight can absorb,
            on a route that folds; a route whose packages are not installed.
    """
    for route in routes:
        if route.folds and not strength.foldable:
            raise RouteError(
                f"route {route}: strength {strength} depends on the input, no weight can "
                "absorb it; take strength fitted, or routes onnx and code alone "
                "(merge --code)"
            )
        for component in components:
            if route.folds and not component.foldable:
                raise RouteError(
                    f"route {route}: component {component} lies behind the residual add, no "
                    "weight can absorb a gain there; leave it out, or take routes onnx and "
                    "code alone (merge --code)"
                )
        # To write a PEFT adapter needs no peft, to prove it does.
        if verify or not route.is_peft:
            check_installed(route)


def check_gains(
    adapters: Iterable[SteeringAdapter], scale: float, scale_as: str = "constant"
) -> None:
    """Refuse a strength at which nothing is steered, or a gain that float32 does not hold.

    Args:
        adapters: what is steered.
        scale: factor on every γ.
        scale_as: what the factor is in an ONNX graph; an input may be 0 by default.

    Raises:
        RouteError: as said.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        gains = [s.gamma * np.float32(scale) for one in adapters for s in one.sites]
    if not all(np.isfinite(gain).all() for gain in gains):
        raise RouteError(f"scale {scale:g}: a gain is more than float32 holds; lower it")
    if scale_as == "constant" and not any(gain.any() for gain in gains):
        raise RouteError(f"nothing is steered at scale {scale:g}: every gain is 1")


def route_of(product: Path) -> Route:
    """Recognize a product directory by its files.

    Raises:
        RouteError: no directory, or in it neither an ONNX model nor a checkpoint nor a PEFT
            adapter, or several of them.
    """
    if not product.is_dir():
        found = "a file" if product.exists() else "nothing there"
        raise RouteError(f"{product}: expected a product directory, found {found}")
    kinds = [_peft_route(product / CONFIG_NAME)]
    if any(product.glob("*.onnx")):
        kinds.append(Route.ONNX)
    # A ranking and an adapter are safetensors files, too, but no checkpoint.
    if any((product / name).exists() for name in (SINGLE, INDEX)):
        kinds.append(Route.CODE if is_steered(product) else Route.SAFETENSORS)
    routes = [route for route in kinds if route is not None]
    if len(routes) != 1:
        raise RouteError(
            f"{product}: expected a directory with *.onnx or {SINGLE}, or a PEFT adapter, "
            f"found {' and '.join(routes) or 'none of them'}; name the product directory "
            "itself, such as OUT/safetensors or OUT/onnx"
        )
    return routes[0]


def check_installed(route: Route) -> None:
    """Refuse a route whose packages are missing.

    Raises:
        RouteError: names the package and how to install it.
    """
    packages, remedy = _PACKAGES.get(route, ((), ""))
    for package in packages:
        if find_spec(package) is None:
            raise RouteError(f"route {route}: package {package} is not installed; {remedy}")


def _peft_route(config: Path) -> Route | None:
    """The route that a PEFT config names, None where it is absent, ours or unreadable."""
    try:
        peft_type = read_json(config, RouteError, "").get("peft_type")
    except RouteError:
        return None
    return {"LORA": Route.LORA, "IA3": Route.IA3}.get(str(peft_type))
