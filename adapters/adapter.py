"""`SteeringAdapter`: steered units, their gains and predictors; saved, loaded, attached."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from austeer.adapters._errors import AdapterError, SiteError
from austeer.adapters._files import publish_directory
from austeer.adapters.architectures import Architecture, architecture_of, text_config
from austeer.adapters.config import AdapterConfig, Strength
from austeer.adapters.fingerprint import (
    ReadTensor,
    fingerprint,
    module_reader,
    weights_stamp,
)
from austeer.adapters.model_directory import adapter_directory
from austeer.adapters.sites import Component, Site
from austeer.adapters.steered_site import SteeredSite, check_sites, read_sites, site_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_NAME = "adapter_model.safetensors"


class SteeringAdapter:
    """A set of steered sites together with the description of their base model.

    Args:
        config: description; `components`, `k` and `rank` must agree with the sites.
        sites: steered sites, each once.

    Raises:
        AdapterError: config and sites disagree.
    """

    def __init__(self, config: AdapterConfig, sites: Sequence[SteeredSite]) -> None:
        self.config = config
        self.sites = tuple(
            sorted(sites, key=lambda steered: (steered.site.layer, steered.site.component))
        )
        _check_consistent(config, self.sites)
        # Hashing the touched weights takes seconds on a large model: once is enough.
        self._checked: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "sites": self.sites}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @classmethod
    def from_units(
        cls,
        model: PreTrainedModel,
        component: str | Component,
        layers: Sequence[int],
        units: Sequence[int],
        gamma: Sequence[float],
    ) -> SteeringAdapter:
        """Build an adapter by hand: γ[j] for unit units[j] of layer layers[j].

        Raises:
            SiteError: lengths differ, unknown layers or units, duplicates, non-finite γ.
            ModelError: no model, or its architecture is not supported.
        """
        from austeer.adapters.live_model import check_module

        check_module(model, "from_units")
        shapes = [np.shape(part) for part in (layers, units, gamma)]
        if any(len(shape) != 1 for shape in shapes):
            raise SiteError(
                "from_units: expected lists of layers, units and gammas, one entry a unit, "
                f"got arrays of shape {', '.join(map(str, shapes))}"
            )
        if not len(layers) == len(units) == len(gamma):
            raise SiteError(
                "from_units: expected equally many layers, units and gammas, "
                f"got {len(layers)}, {len(units)}, {len(gamma)}"
            )
        kind = _component(component)
        layer, unit = np.asarray(layers), np.asarray(units)
        if len(layer) and layer.dtype.kind not in "iu":
            raise SiteError(f"from_units: expected whole layer numbers, got {layer.dtype}")
        values = np.asarray(gamma, np.float32)
        sites = []
        for number in np.unique(layer):
            rows = np.flatnonzero(layer == number)
            rows = rows[np.argsort(unit[rows], kind="stable")]
            sites.append(SteeredSite(Site(int(number), kind), unit[rows], values[rows]))
        return cls.from_sites(model, sites, Strength.FITTED)

    @classmethod
    def from_sites(
        cls,
        model: PreTrainedModel,
        sites: Sequence[SteeredSite],
        strength: Strength,
        alpha: float | None = None,
        fit: dict[str, Any] | None = None,
    ) -> SteeringAdapter:
        """Describe `sites` of `model` as an adapter.

        Raises:
            SiteError: a site or unit that the model does not have.
            ModelError: the model's architecture is not supported.
        """
        if not sites:
            raise SiteError("adapter: expected at least one steered unit, got none")
        architecture = architecture_of(model.config.model_type)
        read = module_reader(model)
        check_sites(sites, architecture, text_config(model).num_hidden_layers, read)
        config = AdapterConfig(
            base_model_name_or_path=str(getattr(model, "name_or_path", "") or ""),
            base_model_fingerprint=fingerprint(architecture, [s.site for s in sites], read),
            model_type=architecture.model_type,
            components=tuple(sorted({s.site.component for s in sites})),
            strength=strength,
            alpha=alpha,
            k=sum(len(s.index) for s in sites),
            rank=max(s.predictor.rank if s.predictor else 0 for s in sites),
            fit=fit or {},
        )
        return cls(config, sites)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, revision: str | None = None
    ) -> SteeringAdapter:
        """Load an adapter from a directory or the Hub.

        Raises:
            AdapterError: not an adapter, malformed, unknown version or key.
        """
        folder = adapter_directory(str(name_or_path), revision)
        config, sites = AdapterConfig.load(folder), read_sites(folder / WEIGHTS_NAME)
        try:
            return cls(config, sites)
        except AdapterError as error:
            raise AdapterError(f"{folder}: {error}; export the adapter again") from error

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config, weights and model card to a new directory, atomically.

        Raises:
            OutputError: the directory exists and is not empty, or cannot be written.
        """
        with publish_directory(Path(folder)) as work:
            self.write_files(work)
        return Path(folder)

    def write_files(self, folder: Path) -> None:
        """Write the adapter's files into an existing directory."""
        from safetensors.numpy import save_file

        from austeer.adapters.card import adapter_card

        self.config.save(folder)
        save_file(self.tensors(), folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / "README.md").write_text(adapter_card(self.config), encoding="utf-8")

    def push_to_hub(self, repo: str, private: bool | None = None) -> str:
        """Upload the adapter to the Hub (needs a login); returns the commit's address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            self.write_files(Path(work))
            return str(api.upload_folder(repo_id=repo, folder_path=work))

    def tensors(self) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        """Tensors of `adapter_model.safetensors` by name."""
        return site_tensors(self.sites)

    @property
    def architecture(self) -> Architecture:
        """The architecture row of the base model."""
        return architecture_of(self.config.model_type)

    def check_base(self, read: ReadTensor, num_layers: int, force: bool = False) -> None:
        """Refuse a base model that has other weights, too few layers or too few units.

        Args:
            read: gives the base model's tensors by module name.
            num_layers: layers of the base model.
            force: accept other weights (never missing layers or units).

        Raises:
            AdapterError: fingerprints differ; the message shows both.
            SiteError: a site or unit that the base does not have.
        """
        check_sites(self.sites, self.architecture, num_layers, read)
        if force:
            return
        found = self._fingerprint_of(read)
        if found != self.config.base_model_fingerprint:
            raise AdapterError(
                "adapter for another base model: made for "
                f"{self.config.base_model_name_or_path!r} with fingerprint "
                f"{self.config.base_model_fingerprint}, this model has {found}; "
                "use the right base, or force it (force=True, --force)"
            )

    def is_made_for(self, read: ReadTensor) -> bool:
        """Whether the model whose tensors `read` gives is this adapter's base."""
        return self._fingerprint_of(read) == self.config.base_model_fingerprint

    def _fingerprint_of(self, read: ReadTensor) -> str:
        return fingerprint(self.architecture, [s.site for s in self.sites], read)

    @contextmanager
    def attached(
        self, model: PreTrainedModel, scale: float = 1.0, *, force: bool = False
    ) -> Iterator[None]:
        """Steer a live model inside the context, at `scale` times the fitted strength.

        The hooks are removed on exit, also after an exception. What torch.compile made of any
        model is compiled anew at the next call. Gains of several adapters multiply.

        Raises:
            AdapterError: the model is not the adapter's base (unless `force`), this adapter is
                attached to it already, or `scale` is not finite.
            ModelError: no model of transformers.
            SiteError: a site or unit that the model does not have.
        """
        from austeer.adapters.attach import steering_hooks
        from austeer.adapters.live_model import attachment, check_module

        check_module(model, "attached")
        if model.config.model_type != self.config.model_type:
            raise AdapterError(
                f"adapter for a {self.config.model_type} model, this one is "
                f"{model.config.model_type}; use the right base"
            )
        if hasattr(model, "steering_scale"):
            raise AdapterError("this model is steered in code already; load its base")
        stamp = weights_stamp(self.architecture, [s.site for s in self.sites], model)
        if stamp is None or self._checked.get(model) != stamp:
            layers = text_config(model).num_hidden_layers
            try:
                self.check_base(module_reader(model), layers, force)
            except AdapterError as error:
                if str(model.dtype) != "torch.float16":
                    raise
                raise AdapterError(
                    f"{error}. It is in float16, which may have changed its weights: load it "
                    "in float32 or bfloat16"
                ) from error
            if not force:
                self._checked[model] = stamp
        with (
            attachment(model, self, scale),
            steering_hooks(model, self.architecture, self.sites, scale),
        ):
            yield

    def scaled(self, factor: float) -> SteeringAdapter:
        """The same adapter with every γ multiplied by `factor`, without the fit's figures."""
        sites = [
            dataclasses.replace(s, gamma=(s.gamma * np.float32(factor))) for s in self.sites
        ]
        if factor == 1.0:
            return SteeringAdapter(self.config, sites)
        return SteeringAdapter(self.config.scaled(float(factor)), sites)


def _check_consistent(config: AdapterConfig, sites: Sequence[SteeredSite]) -> None:
    kinds = tuple(sorted({s.site.component for s in sites}))
    if kinds != tuple(sorted(config.components)):
        raise AdapterError(
            f"config says components {', '.join(config.components)}, the tensors hold "
            f"{', '.join(kinds)}"
        )
    if len({s.site for s in sites}) != len(sites):
        raise AdapterError("a site is given twice; merge its units into one")
    k = sum(len(s.index) for s in sites)
    if k != config.k:
        raise AdapterError(f"config says k = {config.k}, the tensors hold {k} units")
    for steered in sites:
        rank = steered.predictor.rank if steered.predictor else 0
        if rank != config.rank:
            raise AdapterError(
                f"{steered.site}: config says predictor rank {config.rank}, "
                f"the tensors hold rank {rank}"
            )


def _component(name: str | Component) -> Component:
    try:
        return Component(name)
    except ValueError:
        names = ", ".join(component.value for component in Component)
        raise SiteError(f"component {name!r}: expected one of {names}") from None
