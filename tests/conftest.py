"""Fixtures: tiny random models and their tokenizer, the shared folder, forked processes."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPO = Path(__file__).resolve().parent.parent
MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox"),
    *("gemma3_text", "olmo2", "cohere", "granite", "starcoder2", "stablelm", "smollm3"),
    *("phi", "falcon", "opt", "bloom", "gptj", "gpt_neo", "mpt"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "gemma3"),
)
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


_DECODER = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}
_CHOICE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Mixtures of four experts; of three model types the first layer is dense.
_MIXTURE_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": _DECODER | {"num_local_experts": 4},
    "qwen2_moe": _DECODER
    | _CHOICE
    | {"num_experts": 4, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "qwen3_moe": _DECODER | _CHOICE | {"num_experts": 4, "head_dim": 12},
    "deepseek_v3": _DECODER
    | _CHOICE
    | {
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    },
    "gpt_oss": _DECODER
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 12,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4,
            "truncate": False,
        },
    },
    "llama4_text": _DECODER
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 56,
        "interleave_moe_layer_step": 2,
        "head_dim": 12,
    },
}
MIXTURES = tuple(_MIXTURE_SIZES)

# What a vision-language model has beside its text decoder; an image is four tokens.
_VISION = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    },
    "mm_tokens_per_image": 4,
    "boi_token_index": 36,
    "eoi_token_index": 37,
    "image_token_index": 38,
}

# Configs with names of their own, or whose models lack a size of the others.
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "gpt_neox": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
    },
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "max_position_embeddings": 128,
    },
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    **_MIXTURE_SIZES,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Config of a 2-layer model a few thousand parameters large."""
    from transformers import AutoConfig

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if model_type == "gemma3":
        text = tiny_config("gemma3_text", **changes).to_dict()
        return AutoConfig.for_model(model_type, text_config=text, **_VISION, **special)
    common = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}
    sizes = _OWN_SIZES.get(
        model_type,
        {**common, "num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 2},
    )
    if model_type in ("gemma2", "gemma3_text", "qwen3"):
        # Wider than hidden_size / heads, so that the attention width is not the hidden width.
        sizes = {**sizes, "head_dim": 12}
    if model_type in ("gemma2", "gemma3_text"):
        sizes = {**sizes, "query_pre_attn_scalar": 12}
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
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where transformers keeps the code of models it loads: not in anybody's home."""
    from transformers import dynamic_module_utils

    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", [*sys.path])
        yield folder


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


@dataclass(frozen=True)
class Child:
    """A forked process, which has torch imported already: that alone takes seconds.

    What its work returns, arrays by name, comes back with `result`, and what it raised.
    """

    pid: int
    path: Path

    def end(self, seconds: float = 120.0) -> int:
        """Wait for its end: its exit code, or minus the number of the signal."""
        deadline = time.monotonic() + seconds
        while (ended := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(ended[1])

    def result(self) -> dict[str, Any]:
        """What it returned, after its end."""
        import numpy as np

        with np.load(self.path.with_suffix(".npz")) as found:
            return dict(found)

    def error(self) -> str:
        """What it raised, after its end."""
        return self.path.with_suffix(".txt").read_text()


@pytest.fixture
def fork(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Child]:
    """Start `work()` in a forked process, with this environment besides."""

    def start(work: Callable[[], Any], environment: Mapping[str, str] | None = None) -> Child:
        path = tmp_path_factory.mktemp("child") / "of"
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python 3.12 warns where there are other threads; they wait for work that
            # a child never gives them.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            os.environ |= environment or {}
            _run_and_exit(work, path)
        return Child(pid, path)

    return start


def _run_and_exit(work: Callable[[], Any], path: Path) -> None:
    """Whatever happens here must not run the parent's test session on."""
    import numpy as np

    try:
        np.savez(path.with_suffix(".npz"), **(work() or {}))
        os._exit(0)
    except BaseException as error:
        path.with_suffix(".txt").write_text(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        os._exit(1)


@pytest.fixture
def launch(fork: Callable[..., Child]) -> Callable[..., list[Child]]:
    """Start `work(rank)` in forked processes that can find each other as those of torchrun."""

    def start(work: Callable[[int], Any], size: int = 2) -> list[Child]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            fork(
                lambda rank=rank: work(rank),
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(size)
        ]

    return start
