"""Routes out of an adapter, and what can be said about them before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from austeer.adapters._errors import RouteError
from austeer.adapters.config import Strength
from austeer.adapters.sites import Component
from austeer.adapters.steered_format import is_steered
from austeer.adapters.tensors import INDEX, SINGLE


class Route(StrEnum):
    """A kind of product."""

    SAFETENSORS = "safetensors"
    """A plain checkpoint with the gains folded into its weights."""
    ONNX = "onnx"
    """An ONNX model with an op at each steered site."""
    CODE = "code"
    """The base's weights, the adapter's tensors and a modelling file that steers."""

    @property
    def folds(self) -> bool:
        """Whether the product has no place for an op, so that weights must absorb the gains."""
        return self is Route.SAFETENSORS


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
    folds = any(route.folds for route in routes)
    return tuple(component for component in Component if component.foldable or not folds)


def check_routes(
    routes: Sequence[Route], strength: Strength, components: Sequence[Component]
) -> None:
    """Refuse what cannot come out in the end.

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
        _check_installed(route)


def route_of(product: Path) -> Route:
    """Recognize a product directory by its files.

    Raises:
        RouteError: no directory, or neither an ONNX model nor a checkpoint in it, or both.
    """
    if not product.is_dir():
        found = "a file" if product.exists() else "nothing there"
        raise RouteError(f"{product}: expected a product directory, found {found}")
    graph = any(product.glob("*.onnx"))
    # A ranking and an adapter are safetensors files, too, but no checkpoint.
    weights = any((product / name).exists() for name in (SINGLE, INDEX))
    if graph == weights:
        raise RouteError(
            f"{product}: expected a directory with *.onnx or {SINGLE}, found "
            f"{'both' if graph else 'neither'}; name the product directory itself, "
            "such as OUT/safetensors or OUT/onnx"
        )
    if graph:
        return Route.ONNX
    return Route.CODE if is_steered(product) else Route.SAFETENSORS


def _check_installed(route: Route) -> None:
    if route is not Route.ONNX:
        return
    for package in ("onnxruntime", "onnxscript"):
        if find_spec(package) is None:
            raise RouteError(
                f"route {route}: package {package} is not installed; "
                "pip install 'austeer[cpu]' (or [gpu])"
            )
