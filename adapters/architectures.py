"""Supported decoder architectures, as data: where each component lives in each model type.

To add one, append a row to `ARCHITECTURES`, or give it to `register_architecture`: module
paths are those of the transformers class, `{i}` stands for the layer number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

from austeer.adapters._errors import ModelError
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
        mlp: path of the MLP's last projection, below the layer.
        embedding: path of the token embedding.
        norm: path of the final norm.
        unembedding: path of the LM head.
        transposed: projections are stored `[in, out]` (`Conv1D`) instead of `[out, in]`.
        layer_keys: config keys that hold the number of layers, first match wins.
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
    tail: tuple[str, ...] = ()
    attention_norm: str | None = None
    mlp_norm: str | None = None
    own_blocks: bool = True
    counts_places: bool = False
    masks: Masks = "one"

    def __post_init__(self) -> None:
        for name, wanted in _malformed(self):
            value = getattr(self, name)
            raise ModelError(
                f"Architecture({self.model_type!r}): {name}={value!r}: expected {wanted}"
            )

    @property
    def decoder(self) -> str:
        """Path of the module that runs the layers."""
        return self.layer.partition(".{i}")[0].rpartition(".")[0]

    def hookpoint(self, site: Site) -> Hookpoint:
        """The place where `site` is steered in a live model."""
        if site.component is Component.LAYER:
            return Hookpoint(self.layer.format(i=site.layer), "output")
        side: Side = "output" if site.component is Component.FFN else "input"
        return Hookpoint(self.projection(site), side)

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
            value = config.get(key)
            if type(value) is int and value > 0:
                return value
        raise ModelError(
            f"config.json: expected a positive integer under {' or '.join(self.layer_keys)}, "
            "found none"
        )

    def disk_names(self, name: str) -> tuple[str, ...]:
        """Names under which a checkpoint may hold the module tensor `name`."""
        bare = name.removeprefix(f"{self.prefix}.")
        return (name,) if bare == name else (name, bare)


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
    for name, least in (("layer_keys", 1), ("tail", 0)):
        values = getattr(row, name)
        right = isinstance(values, tuple) and all(map(_is_path, values))
        if not right or len(values) < least:
            yield name, "a tuple of names"


def _is_path(path: object) -> bool:
    return isinstance(path, str) and _PATH.fullmatch(path) is not None


_GPT = partial(
    Architecture,
    prefix="transformer",
    layer="transformer.h.{i}",
    embedding="transformer.wte",
    norm="transformer.ln_f",
)

_ROWS = (
    *map(Architecture, ("llama", "mistral", "phi3", "cohere", "granite", "stablelm")),
    *(Architecture(name, masks="by_layer_type") for name in ("qwen2", "qwen3", "smollm3")),
    *(
        Architecture(
            name,
            attention_norm="post_attention_layernorm",
            mlp_norm="post_feedforward_layernorm",
            masks="one" if name == "olmo2" else "by_layer_type",
        )
        for name in ("gemma2", "gemma3_text", "olmo2")
    ),
    Architecture("starcoder2", mlp="mlp.c_proj"),
    Architecture(
        "phi", attention="self_attn.dense", mlp="mlp.fc2", norm="model.final_layernorm"
    ),
    Architecture(
        "opt",
        layer="model.decoder.layers.{i}",
        attention="self_attn.out_proj",
        mlp="fc2",
        embedding="model.decoder.embed_tokens",
        norm="model.decoder.final_layer_norm",
        tail=("model.decoder.project_out",),
        own_blocks=False,
    ),
    _GPT(
        "gpt2",
        attention="attn.c_proj",
        mlp="mlp.c_proj",
        transposed=True,
    ),
    _GPT(
        "gptj",
        attention="attn.out_proj",
        mlp="mlp.fc_out",
        layer_keys=("n_layer", "num_hidden_layers"),
    ),
    _GPT(
        "gpt_neo",
        attention="attn.attention.out_proj",
        mlp="mlp.c_proj",
        layer_keys=("num_layers", "num_hidden_layers"),
        counts_places=True,
    ),
    Architecture(
        "gpt_neox",
        prefix="gpt_neox",
        layer="gpt_neox.layers.{i}",
        attention="attention.dense",
        mlp="mlp.dense_4h_to_h",
        embedding="gpt_neox.embed_in",
        norm="gpt_neox.final_layer_norm",
    ),
    _GPT(
        "falcon",
        attention="self_attention.dense",
        mlp="mlp.dense_4h_to_h",
        embedding="transformer.word_embeddings",
    ),
    _GPT(
        "bloom",
        attention="self_attention.dense",
        mlp="mlp.dense_4h_to_h",
        embedding="transformer.word_embeddings",
        layer_keys=("n_layer", "num_hidden_layers"),
        own_blocks=False,
        counts_places=True,
        masks="tokens",
    ),
    Architecture(
        "mpt",
        prefix="transformer",
        layer="transformer.blocks.{i}",
        attention="attn.out_proj",
        mlp="ffn.down_proj",
        embedding="transformer.wte",
        norm="transformer.norm_f",
        layer_keys=("n_layers", "num_hidden_layers"),
        own_blocks=False,
        counts_places=True,
    ),
)

_TABLE = {row.model_type: row for row in _ROWS}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(_TABLE)
"""Every known row by `model_type`, registered ones included."""


def register_architecture(row: Architecture, *, replace: bool = False) -> None:
    """Make a model type known to this process, in every function of the package.

    Args:
        row: where its components are.
        replace: accept another row in place of one that is known.

    Raises:
        ModelError: the model type is known, with another row (unless `replace`).
    """
    known = _TABLE.get(row.model_type, row)
    if known != row and not replace:
        raise ModelError(
            f"Architecture({row.model_type!r}): known already, with other paths; "
            "pass replace=True to use this one instead"
        )
    _TABLE[row.model_type] = row


def architecture_of(model_type: object) -> Architecture:
    """The row of `model_type`.

    Raises:
        ModelError: the model type is not supported; names it and says what to add.
    """
    # A stranger's config.json may hold anything there.
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    known = ", ".join(sorted(ARCHITECTURES))
    raise ModelError(
        f"model_type {model_type!r}: not supported (known: {known}); "
        "give its module paths to austeer.adapters.register_architecture, or add a row to "
        "adapters/architectures.py"
    )


def skips_projections(setting: Callable[[str, Any], Any]) -> bool:
    """Whether a model multiplies by its projections without calling them: no hook would run.

    Args:
        setting: gives a key of the model's config, or the default that it is called with.
    """
    # BLOOM's way to the same sums as its training, in slices.
    return bool(setting("slow_but_exact", False)) and setting("pretraining_tp", 1) not in (0, 1)
