"""One architecture as data: where the components of its decoder layers are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from austeer.adapters._errors import ModelError
from austeer.adapters.mixtures import Mixture
from austeer.adapters.sites import Component, Site

Side = Literal["input", "output"]
Masks = Literal["one", "by_layer_type", "tokens"]


@dataclass(frozen=True, slots=True)
class Hookpoint:
    """The module and the side of it at which a site's activation is read and rescaled."""

    module: str
    side: Side


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where the four components of one `model_type` are.

    Attributes:
        model_type: `model_type` of the config.
        prefix: first part of every decoder path; checkpoints of the bare base model lack it.
        layer: path of decoder layer `{i}`.
        attention: path of the attention output projection, below the layer.
        mlp: path of the MLP's last projection, below the layer; the module above it is the
            whole block, a mixture of experts in those layers that have one.
        embedding: path of the token embedding.
        norm: path of the final norm.
        unembedding: path of the LM head.
        transposed: projections are stored `[in, out]` (`Conv1D`) instead of `[out, in]`.
        layer_keys: config keys that hold the number of layers, first match wins; a dot leads
            into a part of the config.
        stored_prefixes: other names that checkpoints give the prefix.
        tail: paths of what else lies between the final norm and the LM head.
        attention_norm: path below the layer of a norm between the attention's output and the
            residual stream.
        mlp_norm: the same of the MLP.
        own_blocks: attention and MLP are modules whose outputs are those of their last
            projections; not so where one adds the residual itself, or is no module.
        counts_places: distances between tokens come from their places in a row (ALiBi,
            windows cut out of a stored mask), not from `position_ids`.
        masks: attention masks that the model takes where its caller prepares them: one, one
            for each of `layer_types`, or none but which tokens are real (ALiBi needs that).
        mixture: how the layers that are mixtures of experts store them, None where all are
            dense. `ffn` is then the output of the whole block, in every layer.
        float32: parts of names of tensors that transformers keeps in float32 where the model
            is in half precision (`_keep_in_fp32_modules_strict`).
        float32_in_float16: the same where it is in float16 (`_keep_in_fp32_modules`).

    Raises:
        ModelError: a field is malformed; names it and what it should be.
    """

    model_type: str
    prefix: str = "model"
    layer: str = "model.layers.{i}"
    attention: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    unembedding: str = "lm_head"
    transposed: bool = False
    layer_keys: tuple[str, ...] = ("num_hidden_layers", "n_layer")
    stored_prefixes: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()
    attention_norm: str | None = None
    mlp_norm: str | None = None
    own_blocks: bool = True
    counts_places: bool = False
    masks: Masks = "one"
    mixture: Mixture | None = None
    float32: tuple[str, ...] = ()
    float32_in_float16: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, wanted in _malformed(self):
            value = getattr(self, name)
            raise ModelError(
                f"Architecture({self.model_type!r}): {name}={value!r}: expected {wanted}"
            )

    @property
    def components(self) -> tuple[Component, ...]:
        """The components that every layer has."""
        lacking = () if self.mixture is None else (Component.NEURON,)
        return tuple(component for component in Component if component not in lacking)

    @property
    def decoder(self) -> str:
        """Path of the module that runs the layers."""
        return self.layer.partition(".{i}")[0].rpartition(".")[0]

    def hookpoint(self, site: Site) -> Hookpoint:
        """The place where `site` is steered in a live model."""
        if site.component is Component.LAYER:
            return Hookpoint(self.layer.format(i=site.layer), "output")
        if site.component is not Component.FFN:
            return Hookpoint(self.projection(site), "input")
        # A dense block's output is that of its last projection.
        module = self.projection(site) if self.mixture is None else self.block(site.layer)
        return Hookpoint(module, "output")

    def block(self, layer: int) -> str:
        """Path of the MLP, or of the mixture, of layer number `layer`."""
        return f"{self.layer.format(i=layer)}.{self.mlp}".rpartition(".")[0]

    def projection(self, site: Site) -> str:
        """Path of the projection whose weight bounds `site` (for `layer`: the MLP's last)."""
        below = self.attention if site.component is Component.ATTENTION else self.mlp
        return f"{self.layer.format(i=site.layer)}.{below}"

    def post_norm(self, component: Component) -> str | None:
        """Path below the layer of the norm that `component`'s block passes on its way out."""
        if component is Component.LAYER:
            return None
        return self.attention_norm if component is Component.ATTENTION else self.mlp_norm

    def width_axis(self, component: Component) -> int:
        """Axis of the stored projection weight whose length is the site's width."""
        reads_input = component in (Component.ATTENTION, Component.NEURON)
        return int(reads_input != self.transposed)

    def num_layers(self, config: Mapping[str, Any]) -> int:
        """Number of decoder layers in a parsed `config.json`.

        Raises:
            ModelError: no such key, or not a positive integer.
        """
        for key in self.layer_keys:
            value: Any = config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if type(value) is int and value > 0:
                return value
        raise ModelError(
            f"config.json: expected a positive integer under {' or '.join(self.layer_keys)}, "
            "found none"
        )

    def stays_wide(self, name: str, dtype: str) -> bool:
        """Whether tensor `name` is float32 in a model of torch dtype `dtype`.

        Stored in half precision it would have lost what the model computes with.
        """
        parts = self.float32 if dtype in ("float16", "bfloat16") else ()
        if dtype == "float16":
            parts += self.float32_in_float16
        return any(part in name for part in parts)

    def disk_names(self, name: str) -> tuple[str, ...]:
        """Names under which a checkpoint may hold the module tensor `name`."""
        bare = name.removeprefix(f"{self.prefix}.")
        if bare == name:
            return (name,)
        return (name, *(f"{prefix}.{bare}" for prefix in self.stored_prefixes), bare)


_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def _malformed(row: Architecture) -> Iterator[tuple[str, str]]:
    """Fields of a row that cannot be right, each with what it should be."""
    paths = ("prefix", "attention", "mlp", "embedding", "norm", "unembedding")
    for name in ("model_type", "layer", *paths):
        if not isinstance(getattr(row, name), str):
            yield name, "a string"
    if not _is_path(row.model_type.replace("-", "_")):
        yield "model_type", "the model_type of a config.json"
    once = row.layer.count(".{i}") == 1 and _is_path(row.layer.replace(".{i}", ".0"))
    if not (once and row.decoder):
        yield "layer", "a module path with {i} once, such as model.layers.{i}"
    for name in paths:
        if not _is_path(getattr(row, name)):
            yield name, "a module path such as self_attn.o_proj"
    for name in ("attention_norm", "mlp_norm"):
        if not (getattr(row, name) is None or _is_path(getattr(row, name))):
            yield name, "a module path or None"
    for name in ("layer", "embedding", "norm"):
        if not getattr(row, name).startswith(f"{row.prefix}."):
            yield name, f"a path below the prefix {row.prefix!r}"
    if row.masks not in get_args(Masks):
        yield "masks", f"one of {', '.join(get_args(Masks))}"
    mixture = row.mixture
    if not (mixture is None or (isinstance(mixture, Mixture) and mixture.well_formed)):
        yield "mixture", "a Mixture of paths such as mlp.experts.{e}.down_proj.weight"
    optional = ("tail", "stored_prefixes", "float32", "float32_in_float16")
    for name, least in (("layer_keys", 1), *((name, 0) for name in optional)):
        values = getattr(row, name)
        right = isinstance(values, tuple) and all(map(_is_path, values))
        if not right or len(values) < least:
            yield name, "a tuple of names"


def _is_path(path: object) -> bool:
    return isinstance(path, str) and _PATH.fullmatch(path) is not None
