"""Supported decoder architectures, as data: where each component lives in each model type.

To add one, append a row to `ARCHITECTURES`, or give it to `register_architecture`: module
paths are those of the transformers class, `{i}` stands for the layer number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

from austeer.adapters._errors import ModelError
from austeer.adapters.architecture import Architecture, Hookpoint
from austeer.adapters.mixtures import Experts, Mixture

__all__ = [
    "ARCHITECTURES",
    "TRANSFORMERS_4",
    "Architecture",
    "Hookpoint",
    "architecture_of",
    "register_architecture",
    "skips_projections",
    "text_config",
]

_GPT = partial(
    Architecture,
    prefix="transformer",
    layer="transformer.h.{i}",
    embedding="transformer.wte",
    norm="transformer.ln_f",
)

TRANSFORMERS_4 = version("transformers").startswith("4.")
# What transformers 5 calls `mlp`.
_MIXTRAL_BLOCK = "block_sparse_moe" if TRANSFORMERS_4 else "mlp"

_FINE_EXPERTS = (
    Experts("mlp.gate.weight", "mlp.experts.{e}.down_proj.weight"),
    Experts("mlp.gate.weight", "mlp.experts.down_proj"),
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
    Architecture(
        "gemma3",
        prefix="model.language_model",
        layer="model.language_model.layers.{i}",
        embedding="model.language_model.embed_tokens",
        norm="model.language_model.norm",
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        masks="by_layer_type",
        layer_keys=("text_config.num_hidden_layers",),
        stored_prefixes=("language_model.model",),
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
    Architecture(
        "mixtral",
        mlp=f"{_MIXTRAL_BLOCK}.down_proj",
        mixture=Mixture(
            (
                Experts(
                    "block_sparse_moe.gate.weight", "block_sparse_moe.experts.{e}.w2.weight"
                ),
                Experts("mlp.gate.weight", "mlp.experts.down_proj"),
            )
        ),
    ),
    Architecture("qwen3_moe", mixture=Mixture(_FINE_EXPERTS)),
    Architecture(
        "deepseek_v3",
        mixture=Mixture(_FINE_EXPERTS, "mlp.shared_experts.down_proj"),
        float32=("e_score_correction_bias",),
    ),
    Architecture(
        "qwen2_moe",
        masks="by_layer_type",
        mixture=Mixture(_FINE_EXPERTS, "mlp.shared_expert.down_proj"),
    ),
    Architecture(
        "gpt_oss",
        masks="by_layer_type",
        mixture=Mixture(
            (
                Experts(
                    "mlp.router.weight", "mlp.experts.down_proj", "mlp.experts.down_proj_bias"
                ),
            ),
            transposed=True,
        ),
        float32_in_float16=("norm",),
    ),
    Architecture(
        "llama4_text",
        mlp="feed_forward.down_proj",
        counts_places=True,
        mixture=Mixture(
            (Experts("feed_forward.router.weight", "feed_forward.experts.down_proj"),),
            "feed_forward.shared_expert.down_proj",
            transposed=True,
        ),
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


def text_config(model: Any) -> Any:
    """The config of a model's text decoder: a vision-language model's is part of its own."""
    return model.config.get_text_config(decoder=True)


def skips_projections(setting: Callable[[str, Any], Any]) -> bool:
    """Whether a model multiplies by its projections without calling them: no hook would run.

    Args:
        setting: gives a key of the model's config, or the default that it is called with.
    """
    # BLOOM's way to the same sums as its training, in slices.
    return bool(setting("slow_but_exact", False)) and setting("pretraining_tp", 1) not in (0, 1)
