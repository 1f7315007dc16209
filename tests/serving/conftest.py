"""Fixtures: steered models in folders, what they must answer, the programs that serve them."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from requirements import unavailable
from serving_models import DemoModels

from austeer.adapters import Predictor, Site, SteeredSite, SteeringAdapter, Strength

REPO = Path(__file__).resolve().parents[2]
SERVING = REPO / "examples" / "serving"
DEMO_MODEL = REPO / "examples" / "demo_model"
SECONDS = 120


def steerable_model(folder: Path, model: Any, tokenizer: Any, adapter: SteeringAdapter) -> Path:
    """Write a steered model whose strength is the graph input `steering_scale`."""
    from austeer.exporter.onnx_export import write_onnx

    return write_onnx(model, tokenizer, adapter, folder, scale_as="required")


@dataclass(frozen=True)
class Served:
    """A model folder to serve, and the same model with its strength written into the graph."""

    folder: Path
    base: Path
    adapter: SteeringAdapter
    tokenizer: Any
    eos: int

    def tokens(self, ids: Sequence[int], new: int, scale: float) -> list[int]:
        """How the Python runner goes on at a fixed strength; 0 is the unsteered base."""
        from austeer.graphs import OnnxCausalLM

        prompt = np.array([ids])
        runner = OnnxCausalLM(self._fixed(scale) if scale else self.base, threads=1)
        return [int(i) for i in runner.generate(prompt, new, self.eos)[0, len(ids) :]]

    def text(self, prompt: str, new: int, scale: float) -> str:
        """Prompt and continuation as Python decodes them."""
        ids = [int(i) for i in self.tokenizer(prompt)["input_ids"]]
        return self.decode(ids + self.tokens(ids, new, scale))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def fixed_folder(self, folder: Path, scale: float = 1.0) -> Path:
        """A folder with the model at a fixed strength, without the input."""
        shutil.copytree(self.folder, folder)
        (folder / "model.onnx").unlink()
        shutil.copy(self._fixed(scale), folder / "model.onnx")
        return folder

    def split_folder(self, folder: Path) -> Path:
        """A folder with the same model, its weights in a file beside it."""
        import onnx

        shutil.copytree(self.folder, folder)
        (folder / "model.onnx").unlink()
        onnx.save(
            onnx.load(self.folder / "model.onnx"),
            folder / "model.onnx",
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=100,
        )
        return folder

    def _fixed(self, scale: float) -> Path:
        from austeer.graphs import graft_file

        path = self.base.with_name(f"{self.base.stem}-{scale:g}.onnx")
        if not path.exists():
            graft_file(self.base, self.adapter, path, scale=scale)
        return path


def make_adapter(model: Any, rank: int, k: int) -> SteeringAdapter:
    """Random gains, large enough to change what the model says."""
    rng = np.random.default_rng(3)
    width = model.config.hidden_size
    sites = []
    for layer in range(model.config.num_hidden_layers):
        units = np.sort(rng.choice(width, k, replace=False))
        gamma = (1.5 * rng.normal(size=k)).astype(np.float32)
        parts = [rng.normal(size=s).astype(np.float32) for s in ((k, rank), rank, (rank, k))]
        predictor = Predictor(*parts) if rank else None
        sites.append(
            SteeredSite(Site.parse(f"layers.{layer}.attention"), units, gamma, predictor)
        )
    strength = Strength.ADAPTIVE if rank else Strength.FITTED
    return SteeringAdapter.from_sites(model, sites, strength)


def _served(folder: Path, model: Any, tokenizer: Any, adapter: SteeringAdapter) -> Served:
    from austeer.exporter.onnx_export import export_base

    steerable_model(folder / "model", model, tokenizer, adapter)
    export_base(model, folder / "base.onnx")
    eos = model.config.eos_token_id
    return Served(folder / "model", folder / "base.onnx", adapter, tokenizer, eos)


def letters_tokenizer() -> Any:
    """A tokenizer of letters for the tiny models' 40 ids, of a type that JavaScript has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<s>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyzTM.!", "th", "the"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e")]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = dict(
        zip(("pad_token", "bos_token", "eos_token", "unk_token"), pieces, strict=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def need_runtime() -> None:
    """The Python runner is what the other runtimes are compared with."""
    if importlib.util.find_spec("onnxruntime") is None:
        unavailable("onnxruntime", "run: pip install -e '.[cpu]'")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Callable[[int], Served]:
    """A tiny random llama: `tiny(0)` has constant gains, `tiny(1)` ones that read the input."""

    @functools.cache
    def build(rank: int) -> Served:
        need_runtime()
        folder = tmp_path_factory.mktemp("tiny")
        model = tiny_model("llama")
        return _served(folder, model, letters_tokenizer(), make_adapter(model, rank, 8))

    return build


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The demo model, whose tokenizer is byte-level, with random gains."""
    from austeer.adapters import load_model, load_tokenizer

    need_runtime()
    model, tokenizer = load_model(str(DEMO_MODEL)), load_tokenizer(str(DEMO_MODEL))
    folder = tmp_path_factory.mktemp("demo")
    return _served(folder, model, tokenizer, make_adapter(model, 0, 32))


@pytest.fixture(scope="session")
def node() -> str:
    """Path of Node.js."""
    return shutil.which("node") or unavailable("node", "install Node.js 20 or later")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of Chromium; Playwright's own download is not needed."""
    return shutil.which("chromium") or unavailable("chromium", "run: apt-get install chromium")


def installed(folder: str) -> Path:
    """An example's folder, with the packages in it that its lock file names."""
    found = SERVING / folder
    for name in json.loads((found / "package.json").read_text())["dependencies"]:
        if not (found / "node_modules" / name / "package.json").is_file():
            unavailable(f"{name} in {found.relative_to(REPO)}", "run: make test-serving")
    return found


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def generate(node: str) -> Run:
    """Run `node generate.mjs …`."""
    script = installed("node") / "generate.mjs"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [node, str(script), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=SECONDS, check=False
        )

    return run


@pytest.fixture(scope="session")
def serve(node: str) -> Callable[[Path], Any]:
    """Serve a model folder with the page: `with serve(folder) as url`."""
    script = installed("web") / "serve.mjs"

    @contextmanager
    def run(folder: Path) -> Iterator[str]:
        command = [node, str(script), str(folder), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
            try:
                assert process.stdout is not None
                url = process.stdout.readline().strip()
                assert url.startswith("http://127.0.0.1:")
                yield url
            finally:
                process.terminate()

    return run


@pytest.fixture(scope="session")
def use_page(node: str, chromium: str, serve: Callable[[Path], Any]) -> Callable[..., Any]:
    """Use the page in a headless Chromium: `use_page(folder, prompt, tokens, scales)`."""
    script = installed("web") / "check.mjs"
    if not (script.parent / "node_modules" / "playwright-core").is_dir():
        unavailable("playwright-core in examples/serving/web", "run: make test-serving")

    def use(folder: Path, prompt: str, tokens: int, scales: Sequence[float] = ()) -> Any:
        with serve(folder) as url:
            command = [node, str(script), url, "--chromium", chromium, "--prompt", prompt]
            command += ["--tokens", str(tokens), "--scales", ",".join(map(str, scales))]
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", timeout=SECONDS, check=False
            )
        assert done.returncode == 0, done.stderr
        return {**json.loads(done.stdout), "url": url}

    return use


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> DemoModels:
    return DemoModels(tmp_path_factory.getbasetemp() / "demo-models")
