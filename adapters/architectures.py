"""Supported decoder architectures, as data: where each component lives in each model type.

To add one, append a row to `ARCHITECTURES`: module paths are those of the transformers
class, `{i}` stands for the layer number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from austeer.adapters._errors import ModelError
from austeer.adapters.sites import Component, Site

Side = Literal["input", "output"]


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
        transposed: projections are stored `[in, out]` (`Conv1D`) instead of `[out, in]`.
        layer_keys: config keys that hold the number of layers, first match wins.
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
            if isinstance(value, int) and value > 0:
                return value
        raise ModelError(
            f"config.json: expected a positive integer under {' or '.join(self.layer_keys)}, "
            "found none"
        )

    def disk_names(self, name: str) -> tuple[str, ...]:
        """Names under which a checkpoint may hold the module tensor `name`."""
        bare = name.removeprefix(f"{self.prefix}.")
        return (name,) if bare == name else (name, bare)


ARCHITECTURES: Mapping[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama"),
        Architecture("mistral"),
        Architecture("qwen2"),
        Architecture("qwen3"),
        Architecture("gemma2"),
        Architecture("phi3"),
        Architecture(
            "gpt2",
            prefix="transformer",
            layer="transformer.h.{i}",
            attention="attn.c_proj",
            mlp="mlp.c_proj",
            embedding="transformer.wte",
            norm="transformer.ln_f",
            transposed=True,
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
    )
}


def architecture_of(model_type: str | None) -> Architecture:
    """The row of `model_type`.

    Raises:
        ModelError: the model type is not supported; names it and says what to add.
    """
    if model_type is not None and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    known = ", ".join(sorted(ARCHITECTURES))
    raise ModelError(
        f"model_type {model_type!r}: not supported (known: {known}); "
        "add an Architecture row with its module paths to adapters/architectures.py"
    )
