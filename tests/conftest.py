"""Fixtures: tiny random models of every architecture, a tiny tokenizer, the shared folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPO = Path(__file__).resolve().parent.parent
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")
WORDS = (
    *("the", "a", "one", "day", "Tom", "Mia", "felt", "was", "went", "to", "park", "home"),
    *("happy", "sad", "very", "and", "then", "so", "it", "sun", "rain"),
)


@pytest.fixture(scope="session", autouse=True)
def single_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real model and data; skips visibly where it is absent."""
    folder = Path(os.environ.get("AUSTEER_SHARED", REPO / ".." / "shared")).resolve()
    if not (folder / "models" / "stories260K" / "model.safetensors").is_file():
        pytest.skip(
            f"AUSTEER_SHARED: {folder} has no models/stories260K; set the variable to run this"
        )
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A word-level tokenizer (40 ids) with bos, eos, pad and unk; adds bos in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    pieces = special + ["▁" + word for word in WORDS] + ["▁.", "▁!"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Config of a 2-layer model a few thousand parameters large."""
    from transformers import AutoConfig

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if model_type == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    else:
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 128,
        }
    if model_type not in ("gpt2", "gpt_neox"):
        sizes["num_key_value_heads"] = 2
    if model_type in ("gemma2", "qwen3"):
        # Wider than hidden_size / heads, so that the attention width is not the hidden width.
        sizes["head_dim"] = 12
    if model_type == "gemma2":
        sizes["query_pre_attn_scalar"] = 12
    return AutoConfig.for_model(model_type, vocab_size=40, **{**sizes, **special, **changes})


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Factory of tiny random causal LMs: `tiny_model("llama", seed=0, **config_changes)`."""
    import torch
    from transformers import AutoModelForCausalLM

    def build(model_type: str, seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                # Default initialization leaves logits nearly flat and biases zero.
                parameter.add_(0.15 * torch.randn_like(parameter))
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture
def saved_model(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> Callable[..., Path]:
    """Factory of model directories on disk, tokenizer included."""

    def save(model_type: str = "llama", **changes: Any) -> Path:
        folder = tmp_path / f"base-{model_type}"
        shard = changes.pop("max_shard_size", "1GB")
        tiny_model(model_type, **changes).save_pretrained(folder, max_shard_size=shard)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def exported_base(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> Callable[..., tuple[Any, Path]]:
    """Tiny model and its exported base graph; each is exported once for all tests."""
    from austeer.exporter.onnx_export import export_base

    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent  # shared by the processes of one parallel run
    models: dict[str, Any] = {}

    def base(model_type: str, **changes: Any) -> tuple[Any, Path]:
        key = hashlib.sha256(repr((model_type, changes)).encode()).hexdigest()[:16]
        if key not in models:
            models[key] = tiny_model(model_type, **changes)
        path = folder / f"base-{key}.onnx"
        if not path.exists():
            export_base(models[key], own := tmp_path_factory.mktemp("base") / "base.onnx")
            own.replace(path)
        return models[key], path

    return base
