"""What is fetched from the Hub is what the exporter copies, and no more of its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from austeer.adapters.model_directory import model_directory
from austeer.adapters.weights import Checkpoint
from austeer.exporter.checkpoint import source_files

COPIED = (
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.bpe",
    "modeling_own.py",
    "sentencepiece.spm",
    "source.vocab",
    "tokenizer.model",
    "qwen.tiktoken",
    "vocab.txt",
    "LICENSE",
    "LICENSE-MODEL.md",
    "License.txt",
    "licence",
    "NOTICE",
    "COPYING",
    "USE_POLICY.md",
    "Acceptable_Use_Policy.md",
    "model.safetensors",
)
LEFT = (
    ".gitattributes",
    "README.md",
    "consolidated.00.pth",
    "consolidated.safetensors",
    "flax_model.msgpack",
    "model.onnx",
    "onnx/config.json",
    "onnx/model.safetensors",
    "onnx/LICENSE",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "pytorch_model.bin",
    "runs/deep/er.json",
    "src/own.py",
)


def fetched(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, *, code: bool) -> set[str]:
    """What a download of a repository of these files would hold."""
    asked: dict[str, Any] = {}

    def download(_name: str, **options: Any) -> str:
        asked.update(options)
        return "snapshot"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert model_directory("someone/model", code=code) == Path("snapshot")
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    return set(filter_repo_objects(names, **patterns))


def test_what_is_copied_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    for name in COPIED:
        (tmp_path / name).touch()
    save_file({}, tmp_path / "model.safetensors")
    files = source_files(Checkpoint(tmp_path))
    assert {str(file.relative_to(tmp_path)) for file in files} == set(COPIED)
    assert fetched((*COPIED, *LEFT), monkeypatch, code=True) == set(COPIED)


def test_code_is_fetched_where_it_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fetched((*COPIED, *LEFT), monkeypatch, code=False)
    assert found == set(COPIED) - {"modeling_own.py"}
