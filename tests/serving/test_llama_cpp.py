"""llama.cpp: what it makes of a folded model, and of the base with our LoRA.

Opt-in: `make test-llama` builds it, and LLAMA_CPP names the folder of its converters.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from austeer.adapters import SteeringAdapter
from austeer.exporter import Route, convert_peft, merge_checkpoint

pytestmark = [pytest.mark.runtimes, pytest.mark.slow]

NEW = 24
PROMPTS = ("Once upon a time", "Tom felt", "The little dog was very")
Convert = Callable[..., Path]


@pytest.fixture(scope="module")
def llama() -> Any:
    """The Python binding."""
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP is not set; run: make test-llama")
    import llama_cpp

    return llama_cpp


@pytest.fixture
def convert(llama: Any, tmp_path: Path) -> Convert:
    """Runs one of llama.cpp's converters on a folder; gives the .gguf."""
    root = Path(os.environ["LLAMA_CPP"]).resolve()

    path = [str(root / "gguf-py"), os.environ.get("PYTHONPATH", "")]

    def run(kind: str, folder: Path, *arguments: object) -> Path:
        out = tmp_path / f"{folder.name}.gguf"
        script = root / f"convert_{kind}_to_gguf.py"
        command = [sys.executable, script, folder, *arguments, "--outtype", "f32"]
        done = subprocess.run(
            [*map(str, command), "--outfile", str(out)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return out

    return run


@pytest.fixture
def model(shared: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260K").eval()


@pytest.fixture
def prompts(shared: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.fixture(params=["attention", "ffn", "neuron"])
def adapter(request: pytest.FixtureRequest, model: Any) -> SteeringAdapter:
    layers = [layer for layer in range(5) for _ in range(4)]
    units = [3, 17, 31, 55] * 5
    gamma = [2.8, -2.4, 1.8, -1.4] * 5
    return SteeringAdapter.from_units(model, request.param, layers, units, gamma)


def greedy(llama: Any, prompt: Sequence[int], **files: object) -> list[int]:
    """The next tokens of llama.cpp, in float32 without flash attention."""
    paths = {name: str(path) for name, path in files.items()}
    engine = llama.Llama(**paths, n_ctx=256, n_threads=1, verbose=False, seed=0)
    tokens = engine.generate(list(prompt), top_k=1, temp=0.0, repeat_penalty=1.0)
    return [next(tokens) for _ in range(NEW)]


def expected(model: Any, prompt: Sequence[int]) -> list[int]:
    """The next tokens of transformers, going on after an end of text as `greedy` does."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_folded_and_lora_say_what_the_attached_model_says(
    llama: Any,
    convert: Convert,
    shared: Path,
    model: Any,
    prompts: list[list[int]],
    adapter: SteeringAdapter,
    tmp_path: Path,
) -> None:
    source = shared / "models" / "stories260K"
    base = convert("hf", source)
    merge_checkpoint(source, adapter, tmp_path / "folded")
    folded = convert("hf", tmp_path / "folded")
    convert_peft(source, adapter, tmp_path / "lora", route=Route.LORA)
    lora = convert("lora", tmp_path / "lora", "--base", source)
    plain = [expected(model, prompt) for prompt in prompts]
    with adapter.attached(model):
        steered = [expected(model, prompt) for prompt in prompts]
    assert all(a != b for a, b in zip(plain, steered, strict=True))
    for prompt, without, with_ in zip(prompts, plain, steered, strict=True):
        assert greedy(llama, prompt, model_path=base) == without
        assert greedy(llama, prompt, model_path=folded) == with_
        assert greedy(llama, prompt, model_path=base, lora_path=lora) == with_
