"""What a job depends on, as frozen values that are checked before any model is opened."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.adapters._errors import FitError, RouteError
from austeer.adapters._files import check_output_free
from austeer.adapters.config import Strength
from austeer.adapters.sites import Component
from austeer.adapters.tensors import STORED_DTYPES
from austeer.exporter.routes import (
    Route,
    candidate_components,
    check_mixture,
    check_routes,
    resolve_strength,
)

_MOST_MINUTES = 365 * 24 * 60


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseOptions:
    """How to load a base model.

    Attributes:
        model: directory or Hub id.
        device: torch device.
        device_map: "auto" spreads the model over all devices through accelerate.
        dtype: name of a torch dtype, None for the checkpoint's own.
        revision: Hub revision.
        trust_remote_code: run code that comes with the model.
    """

    model: str
    device: str = "cpu"
    device_map: str | None = None
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAs:
    """How the weight files of a checkpoint are written.

    Attributes:
        link: hard link those that stay as they are; they are then the base's, too.
        dtype: of all float tensors but those that such a model keeps in float32: `float32`,
            `bfloat16` or `float16`; None: the base's.
        max_shard_size: largest file in bytes, but for one of a single tensor; None: the
            base's files.

    Raises:
        RouteError: another dtype, a size below 1, or links to files that are written anew.
    """

    link: bool = False
    dtype: str | None = None
    max_shard_size: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *STORED_DTYPES):
            raise RouteError(
                f"dtype: expected one of {', '.join(STORED_DTYPES)}, got {self.dtype!r}"
            )
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise RouteError(f"max_shard_size: expected 1 or more, got {self.max_shard_size}")
        if self.link and self.anew:
            raise RouteError(
                "link: a new dtype or shard size writes every file anew; choose one of them"
            )

    @property
    def anew(self) -> bool:
        """Whether every weight file is written anew."""
        return self.dtype is not None or self.max_shard_size is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """How a product is written and proved.

    Attributes:
        scale: factor on every γ.
        force: accept a base with other weights than the adapter was made for.
        own_base: whether the base is the adapter's, None where nobody has looked yet.
        verify: compare the product with the attached model.
        trust_remote_code: let transformers run code that the checkpoint brings.
        scale_as: what the factor is in an ONNX graph: `constant`, or a graph input that is
            `required` or `optional`.
        stored: weight files of a folded checkpoint, or of one with code.
        sums: write `SHA256SUMS`.

    Raises:
        RouteError: a scale that is no number, or another `scale_as`.
    """

    scale: float = 1.0
    force: bool = False
    own_base: bool | None = None
    verify: bool = True
    trust_remote_code: bool = False
    scale_as: str = "constant"
    stored: StoredAs = StoredAs()
    sums: bool = True

    def __post_init__(self) -> None:
        check_strength(self.scale, self.scale_as)


def check_timeout(minutes: float) -> None:
    """Refuse a time that is none.

    Raises:
        FitError: not above 0, or more than a year.
    """
    if not 0 < minutes <= _MOST_MINUTES:
        raise FitError(
            f"process timeout: expected minutes above 0 and at most {_MOST_MINUTES} (a year), "
            f"got {minutes:g}"
        )


def check_strength(scale: float, scale_as: str) -> None:
    """Refuse a strength factor that is no number, or an unknown place for it in a graph.

    Raises:
        RouteError: as said, or a factor where the caller gives one.
    """
    if not math.isfinite(scale):
        raise RouteError(f"scale: expected a finite number, got {scale}")
    if scale_as not in ("constant", "required", "optional"):
        raise RouteError(f"scale_as: expected constant, required or optional, got {scale_as!r}")
    if scale_as == "required" and scale != 1.0:
        raise RouteError(
            f"scale: with a strength input the caller gives it, and {scale:g} would be lost; "
            "leave --scale out, or make it the default with --optional-strength-input"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductRequest:
    """One product of an adapter that exists already.

    Attributes:
        base: the base model.
        adapter: adapter directory or Hub id.
        route: kind of product.
        out: new directory for it.
        handling: how it is written and proved.
        pairs: file whose prompts verify the product besides the neutral ones.
        command: the command line, for `austeer.json`.

    Raises:
        RouteError: weight files in another form on a route that has none.
    """

    base: BaseOptions
    adapter: str
    route: Route
    out: Path
    handling: Handling = Handling()
    pairs: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        stored, route = self.handling.stored, self.route
        if route is not Route.SAFETENSORS and (
            stored.anew or (stored.link and route is not Route.CODE)
        ):
            raise RouteError(
                f"route {route}: dtype and max_shard_size are for folded checkpoints, link for "
                "those and for checkpoints with code; leave them out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Everything that a run depends on.

    Attributes:
        base: the model to steer.
        pairs: contrastive pairs to localize and fit with: file or Hub dataset.
        out: new directory for everything that comes out.
        routes: products to make; none for an adapter alone.
        test_pairs: pairs for the reported figures; a split of `pairs` without it.
        components: places to choose from; empty for all that the routes can take.
        strength: `auto`, `paper`, `oriented`, `fitted` or `adaptive`.
        kl_budget: ceiling of mean KL(base ‖ steered) in nats per token.
        max_units: ceiling of steered units.
        fluency_limit: ceiling of the perplexity ratio of steered continuations.
        rank: rank of the γ predictor.
        keep_sign: never turn the sign of an activation.
        neutral_text: text file for the side effect; sampled from the base without it.
        ranking: localization of an earlier run to take up.
        batch_size: most pairs or texts per forward pass, None for what suits each stage.
        process_timeout: minutes to wait for another process of a distributed localization.
        seed: of splits, samples and training.
        command: the command line, for the report.
        sums: write `SHA256SUMS`.
        restart: discard the localization's state of a stopped run.

    Raises:
        FitError: a number out of range.
    """

    base: BaseOptions
    pairs: str
    out: Path
    routes: tuple[Route, ...] = ()
    test_pairs: str | None = None
    components: tuple[Component, ...] = ()
    strength: str = "auto"
    kl_budget: float = 0.1
    max_units: int = 64
    fluency_limit: float = 1.3
    rank: int = 1
    keep_sign: bool = False
    neutral_text: Path | None = None
    ranking: Path | None = None
    batch_size: int | None = None
    process_timeout: float = 30.0
    seed: int = 0
    command: str = ""
    sums: bool = True
    restart: bool = False

    def __post_init__(self) -> None:
        for name in ("max_units", "rank", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FitError(f"{name}: expected at least 1, got {value}")
        check_timeout(self.process_timeout)
        if self.rank > 1 and self.resolved_strength is not Strength.ADAPTIVE:
            raise FitError(
                f"rank: strength {self.resolved_strength} has no γ predictor; leave it out, "
                "or choose adaptive"
            )
        if not (self.kl_budget > 0.0 and math.isfinite(self.kl_budget)):
            raise FitError(f"kl_budget: expected a number above 0, got {self.kl_budget}")
        if not self.fluency_limit > 1.0:
            raise FitError(
                f"fluency_limit: expected a ratio above 1, got {self.fluency_limit}; "
                "inf lifts the limit"
            )

    @property
    def resolved_strength(self) -> Strength:
        """The strength, `auto` decided by the routes."""
        return resolve_strength(self.strength, self.routes)

    @property
    def candidates(self) -> tuple[Component, ...]:
        """The components to choose from."""
        return candidate_components(self.components, self.routes)

    def as_dict(self) -> dict[str, Any]:
        """Every option that decides what comes out, for the report; `auto` decided."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        for name in ("base", "command", "out", "restart", "sums"):
            del values[name]
        decided: dict[str, Any] = {
            "strength": self.resolved_strength,
            "components": self.candidates,
        }
        if math.isinf(self.fluency_limit):
            decided["fluency_limit"] = None  # JSON has no infinity
        return values | decided | dataclasses.asdict(self.base)

    def check(self) -> None:
        """Refuse what cannot work, before anything expensive.

        Raises:
            OutputError: `out` is taken.
            RouteError: strength or components cannot take a route.
        """
        check_output_free(self.out)
        check_routes(self.routes, self.resolved_strength, self.components)
        check_mixture(self.routes, self.components)
