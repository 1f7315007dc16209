"""examples/serving/optimum_ort.py on a folder of optimum's own export.

Runs where optimum is: in the environment of `make test-optimum`, or from another one with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving_models import DEMO_MODEL, PROMPT, REPO, DemoModels, Script, check_refused, run

pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.runtimes, pytest.mark.slow]

NAMES = ("calm", "loud", "keen")


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter with optimum; its environment is one of its own, so this only skips."""
    other = os.environ.get("AUSTEER_OPTIMUM_PYTHON", REPO / ".venv-optimum/bin/python")
    for candidate in (sys.executable, str(other)):
        words = [candidate, "-c", "import importlib.util as u; u.find_spec('optimum').name"]
        if Path(candidate).is_file():
            done = subprocess.run(words, capture_output=True, timeout=60, check=False)
            if done.returncode == 0:
                return candidate
    pytest.skip(
        "optimum is not installed; run: make test-optimum (make test-serving leaves it)"
    )


@pytest.fixture(scope="module")
def script(python: str, tmp_path_factory: pytest.TempPathFactory) -> Script:
    blocker = tmp_path_factory.mktemp("blocker")
    return Script("optimum_ort.py", blocker, python=python, absent=["austeer"])


@pytest.fixture(scope="module")
def base(python: str, models: DemoModels) -> Path:
    """What `optimum-cli export onnx` makes of the demo model."""
    path = models.root / "optimum"
    if not path.exists():
        words = [python, "-m", "optimum.commands.optimum_cli", "export", "onnx"]
        words += ["--model", DEMO_MODEL, "--task", "text-generation-with-past", path]
        run(words, {**os.environ, "PYTHONPATH": ""})
    return path


@pytest.mark.parametrize("name", NAMES)
def test_steered_text_is_that_of_the_attached_model(
    name: str, models: DemoModels, script: Script, base: Path
) -> None:
    (answer,) = script.answers(models.graft(name, base=base))
    assert answer["prompt_ids"] == models.prompt
    assert answer["ids"] == models.reference(name) != models.reference()
    assert answer["text"] == models.text(answer["ids"])
    assert script.tokens(base) == models.reference()


def test_export_of_the_project(models: DemoModels, script: Script) -> None:
    assert script.tokens(models.graft("calm")) == models.reference("calm")


def test_kernels_change_nothing(models: DemoModels, script: Script, base: Path) -> None:
    from austeer.graphs.custom_op import library_file

    library = library_file()
    if library is None:
        pytest.skip("no operator library was built with this installation")
    folder = models.graft("calm", "--library", base=base)
    assert (folder / library.name).is_file()
    assert script.tokens(folder) == models.reference("calm")


def test_strength_belongs_to_the_request(
    models: DemoModels, script: Script, base: Path
) -> None:
    folder = models.graft("calm", "--optional-strength-input", base=base)
    found = {scale: script.tokens(folder, "--scale", scale) for scale in (0, 0.5, 1)}
    assert found == {scale: models.reference("calm", scale=float(scale)) for scale in found}
    assert found[1] == script.tokens(folder)
    assert len({tuple(ids) for ids in found.values()}) == 3


def test_adapters_are_switched_on_one_model(
    models: DemoModels, script: Script, base: Path
) -> None:
    folder = models.graft(*NAMES, "--as-adapter", base=base)
    order = ("none", "calm", "loud", "none", "keen", "calm")
    chosen = [name if name == "none" else folder / f"{name}.onnx_adapter" for name in order]
    answers = script.answers(folder, *(part for c in chosen for part in ("--adapter", c)))
    alone = {name: script.tokens(models.graft(name, base=base)) for name in NAMES}
    alone["none"] = models.reference()
    assert len({tuple(ids) for ids in alone.values()}) == 4
    assert [answer["ids"] for answer in answers] == [alone[name] for name in order]


def test_what_cannot_be_is_said_in_one_line(
    models: DemoModels, script: Script, base: Path
) -> None:
    required = models.graft("calm", "--strength-input", base=base)
    check_refused(script(required, PROMPT), "a required input", "--optional-strength-input")
    check_refused(script(base, PROMPT, "--scale", 1), "has no steering_scale input")
    switchable = models.graft(*NAMES, "--as-adapter", base=base)
    calm = ("--adapter", switchable / "calm.onnx_adapter")
    check_refused(script(switchable, PROMPT, *calm, "--scale", 2), "a strength of its own")
    check_refused(script(base, PROMPT, *calm), "failed to run", "austeer.layers")
    check_refused(script(base / "none", PROMPT), "no such folder")
