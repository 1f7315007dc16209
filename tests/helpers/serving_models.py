"""The demo model as ONNX, steered in every way, and the scripts that serve it."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from requirements import unavailable

from austeer.adapters import Predictor, Site, SteeredSite, SteeringAdapter, Strength

REPO = Path(__file__).resolve().parents[2]
SERVING = REPO / "examples" / "serving"
DEMO_MODEL = REPO / "examples" / "demo_model"
PROMPT = "Tom found a red kite near the river. He felt"
TOKENS = 24
SECONDS = 300
ABSENT = ("austeer", "torch", "transformers")
_SURE = 2e-3
"""A near tie would make equal tokens a matter of luck: runtimes differ by some 1e-5."""


class DemoModels:
    """Builds each thing once in a folder, with the project's own commands.

    Adapters: `calm` and `loud` have constant gains, `keen` ones that read the input.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    @functools.cached_property
    def model(self) -> Any:
        from austeer.adapters import load_model

        return load_model(str(DEMO_MODEL))

    @functools.cached_property
    def tokenizer(self) -> Any:
        from austeer.adapters import load_tokenizer

        return load_tokenizer(str(DEMO_MODEL))

    @property
    def prompt(self) -> list[int]:
        return [int(i) for i in self.tokenizer(PROMPT)["input_ids"]]

    def text(self, ids: Sequence[int]) -> str:
        """Prompt and continuation as transformers decodes them."""
        return str(self.tokenizer.decode([*self.prompt, *ids], skip_special_tokens=True))

    def adapter(self, name: str) -> Path:
        path = self.root / name
        if not path.exists():
            self._make_adapter(name).save_pretrained(path)
        return path

    def exported(self) -> Path:
        """A folder of `austeer-export onnx`, steered by `calm`."""
        path = self.root / "exported"
        if not path.exists():
            command("onnx", DEMO_MODEL, self.adapter("calm"), "-o", path)
        return path

    def unsteered(self, path: Path) -> None:
        """Write the demo model without steering, with what lies beside it, to a new folder."""
        from austeer.graphs import load_model, remove_graft, save_model

        shutil.copytree(self.exported(), path, ignore=shutil.ignore_patterns("*.onnx"))
        model = load_model(self.exported() / "model.onnx")
        assert remove_graft(model)
        save_model(model, path / "model.onnx")

    def built(self, precision: str) -> Path:
        """A folder of the onnxruntime-genai model builder; skips or fails without it."""
        path = self.root / f"built-{precision}"
        if path.exists():
            return path
        packages = package_folder("onnxruntime_genai")
        paths = [packages, os.environ.get("PYTHONPATH", "")]
        words = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
        words += ["-i", DEMO_MODEL, "-o", path, "-p", precision, "-c", self.root / "cache"]
        run(words, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        return path

    def graft(self, *arguments: str, base: Path | None = None) -> Path:
        """A folder of `austeer-export graft`: adapters by name, and options."""
        base = base or self.exported()
        path = self.root / "-".join([base.name, *(part.strip("-") for part in arguments)])
        if path.exists():
            return path
        adapters = [
            self.adapter(name) for name in arguments if name in ("calm", "loud", "keen")
        ]
        options = [part for part in arguments if part not in ("calm", "loud", "keen")]
        command("graft", base, *adapters, *options, "--replace", "--copy-data", "-o", path)
        return path

    def reference(self, *adapters: str, scale: float = 1.0) -> list[int]:
        """Greedy tokens of the live model with adapters attached, without any KV cache."""
        loaded = [SteeringAdapter.from_pretrained(self.adapter(name)) for name in adapters]
        ids = torch.tensor([self.prompt])
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for adapter in loaded:
                stack.enter_context(adapter.attached(self.model, scale))
            for _ in range(TOKENS):
                logits = self.model(ids).logits[0, -1]
                best = logits.topk(2)
                assert float(best.values[0] - best.values[1]) > _SURE
                ids = torch.cat([ids, best.indices[None, :1]], dim=1)
                if int(ids[0, -1]) == self.tokenizer.eos_token_id:
                    break
        return [int(i) for i in ids[0, len(self.prompt) :]]

    def runner(
        self, folder: Path, scale: float | None = None, active: Sequence[Path] = ()
    ) -> list[int]:
        """Greedy tokens of a folder on the project's own runner."""
        from austeer.graphs import OnnxCausalLM

        runner = OnnxCausalLM(folder / "model.onnx", threads=1)
        runner.scale, runner.active = scale, active
        stop = self.tokenizer.eos_token_id
        ids = runner.generate(np.array([self.prompt]), TOKENS, stop)
        return [int(i) for i in ids[0, len(self.prompt) :]]

    def _make_adapter(self, name: str) -> SteeringAdapter:
        if name == "keen":
            return self._reading_adapter()
        component, factor = {"calm": ("attention", 2.0), "loud": ("layer", -0.5)}[name]
        gains = [factor * gain for gain in (9.0, -12.0, -15.0, 12.0)]
        return SteeringAdapter.from_units(
            self.model, component, layers=[0, 1, 1, 3], units=[3, 5, 7, 60], gamma=gains
        )

    def _reading_adapter(self) -> SteeringAdapter:
        rng = np.random.default_rng(0)
        sites = []
        for layer in (0, 2, 3):
            weights = [0.3 * rng.normal(size=shape) for shape in ((12, 2), (2,), (2, 12))]
            predictor = Predictor(*(weight.astype(np.float32) for weight in weights))
            gamma = (5.0 * rng.normal(size=12)).astype(np.float32)
            units = np.sort(rng.choice(128, 12, replace=False))
            site = Site.parse(f"layers.{layer}.attention")
            sites.append(SteeredSite(site, units, gamma, predictor))
        return SteeringAdapter.from_sites(self.model, sites, Strength.ADAPTIVE)


def command(*arguments: object) -> None:
    """Run `austeer-export`."""
    from austeer.exporter.cli import cli

    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output


def run(words: Sequence[object], environment: Mapping[str, str] | None = None) -> str:
    """What a program that must succeed prints."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Script:
    """A script of examples/serving, run as a user would: without this project on its path.

    Args:
        name: its file.
        blocker: a folder for what keeps the project and torch from it.
        packages: folders of packages that it needs besides those of the interpreter.
        python: the interpreter.
        absent: modules that it must do without.
    """

    def __init__(
        self,
        name: str,
        blocker: Path,
        packages: Sequence[str] = (),
        python: str = sys.executable,
        absent: Sequence[str] = ABSENT,
    ) -> None:
        blocker.mkdir(exist_ok=True)
        hook = f"import sys\nsys.modules.update(dict.fromkeys({tuple(absent)!r}))\n"
        (blocker / "sitecustomize.py").write_text(hook)
        self._command = [python, str(SERVING / name)]
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
        } | {"PYTHONPATH": os.pathsep.join([str(blocker), *packages]), "OMP_NUM_THREADS": "1"}

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run it."""
        return self._run([*self._command, *map(str, arguments)])

    def can_import(self, module: str) -> bool:
        """Whether the script could import a module."""
        return self._run([self._command[0], "-c", f"import {module}"]).returncode == 0

    def code(self, text: str) -> str:
        """What code beside the script prints."""
        done = self._run(
            [
                self._command[0],
                "-c",
                f"import sys\nsys.path.insert(0, {str(SERVING)!r})\n{text}",
            ]
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _run(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS,
            check=False,
            env=self._environment,
        )

    def answers(self, folder: Path, *arguments: object) -> list[Any]:
        """The answers to `PROMPT`, in order, each checked to be about it."""
        done = self(folder, PROMPT, "--json", "--tokens", TOKENS, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return [json.loads(line) for line in done.stdout.splitlines()]

    def tokens(self, folder: Path, *arguments: object) -> list[int]:
        """The tokens of the one answer to `PROMPT`."""
        (answer,) = self.answers(folder, *arguments)
        return list(answer["ids"])


def check_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One line on stderr, nothing on stdout, exit code 2."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert [part for part in parts if part not in done.stderr] == [], done.stderr


def package_folder(name: str) -> str:
    """The folder that a package lies in; skips or fails where it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        unavailable(name)
    return str(Path(found.submodule_search_locations[0]).parent)
