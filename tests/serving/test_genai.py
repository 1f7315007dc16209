"""examples/serving/genai_stream.py on models of the onnxruntime-genai builder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from serving_models import PROMPT, DemoModels, Script, check_refused, package_folder

pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.runtimes, pytest.mark.slow]


NAMES = ("calm", "loud", "keen")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    packages = [package_folder("onnxruntime_genai")]
    return Script("genai_stream.py", tmp_path_factory.mktemp("blocker"), packages)


@pytest.fixture(scope="module")
def library() -> str:
    from austeer.graphs.custom_op import library_file

    if (found := library_file()) is None:
        pytest.skip("no operator library was built with this installation")
    return found.name


@pytest.mark.parametrize("name", NAMES)
def test_steered_text_is_that_of_the_attached_model(
    name: str, models: DemoModels, script: Script
) -> None:
    (answer,) = script.answers(models.graft(name, base=models.built("fp32")))
    assert answer["prompt_ids"] == models.prompt
    assert answer["ids"] == models.reference(name) != models.reference()
    assert answer["text"] == models.text(answer["ids"])


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_strength_belongs_to_the_request(
    precision: str, models: DemoModels, script: Script, library: str
) -> None:
    base = models.built(precision)
    folder = models.graft("calm", "--strength-input", "--library", base=base)
    assert library in (folder / "genai_config.json").read_text()
    found = {scale: script.tokens(folder, "--scale", scale) for scale in (0, 0.5, 1)}
    assert found == {scale: models.runner(folder, float(scale)) for scale in found}
    assert found[0] == script.tokens(base) == models.runner(base)
    assert found[1] == script.tokens(folder) != found[0]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_adapters_are_switched_on_one_model(
    precision: str, models: DemoModels, script: Script, library: str
) -> None:
    base = models.built(precision)
    folder = models.graft(*NAMES, "--as-adapter", "--library", base=base)
    order = ("none", "calm", "loud", "none", "keen", "loud", "calm", "none")
    files = {name: folder / f"{name}.onnx_adapter" for name in NAMES}
    answers = script.answers(
        folder, *(part for name in order for part in ("--adapter", files.get(name, name)))
    )
    assert tuple(answer["adapter"] for answer in answers) == order
    if precision == "fp32":
        alone = {name: script.tokens(models.graft(name, base=base)) for name in NAMES}
    else:
        # Its operators round activations to 8 bits, so that a last bit, which differs from
        # graph to graph, moves logits by a tenth: compared on the same graph.
        alone = {name: models.runner(folder, active=[file]) for name, file in files.items()}
    alone["none"] = models.runner(base)
    assert len({tuple(ids) for ids in alone.values()}) == 4
    assert [answer["ids"] for answer in answers] == [alone[name] for name in order]


def test_adapter_at_a_chosen_strength(models: DemoModels, script: Script) -> None:
    base = models.built("fp32")
    folder = models.graft("calm", "loud", "--as-adapter", "--strength-input", base=base)
    arguments = ("--adapter", folder / "calm.onnx_adapter", "--scale")
    assert script.tokens(folder, *arguments, 0.5) == models.reference("calm", scale=0.5)
    assert script.tokens(folder, *arguments, 0) == models.reference()


def test_the_library_is_really_loaded(
    models: DemoModels, script: Script, library: str, tmp_path: Path
) -> None:
    folder = models.graft("calm", "--library", base=models.built("fp32"))
    assert script.tokens(folder) == models.reference("calm")
    shutil.copytree(folder, broken := tmp_path / "broken")
    (broken / library).write_text("no library")
    check_refused(script(broken, PROMPT), "cannot load this model", library)


def test_text_is_streamed(models: DemoModels, script: Script) -> None:
    base = models.built("fp32")
    folder = models.graft(*NAMES, "--as-adapter", base=base)
    done = script(base, PROMPT, "--tokens", 24)
    assert (done.stdout, done.stderr) == (models.text(models.reference()) + "\n", "")
    names = ("--adapter", "none", "--adapter", folder / "calm.onnx_adapter")
    lines = script(folder, PROMPT, "--tokens", 24, *names).stdout.splitlines()
    texts = [models.text(models.reference(*chosen)) for chosen in ([], ["calm"])]
    assert lines == [f"[none] {texts[0]}", f"[calm] {texts[1]}"]


def test_prompt_is_that_of_transformers(models: DemoModels, script: Script) -> None:
    base = models.built("fp32")
    for text in ("Tom  felt", "naïve café 🙂", "", "a</s>b"):
        done = script(base, "--json", "--tokens", 0, "--", text)
        assert json.loads(done.stdout)["prompt_ids"] == models.tokenizer(text)["input_ids"]


def test_what_cannot_be_is_said_in_one_line(models: DemoModels, script: Script) -> None:
    base = models.built("fp32")
    switchable = models.graft(*NAMES, "--as-adapter", base=base)
    optional = models.graft("calm", "--optional-strength-input", base=base)
    calm = switchable / "calm.onnx_adapter"
    check_refused(script(models.graft("calm"), PROMPT), "cannot load", "genai_config.json")
    for folder in (base, switchable, optional):
        check_refused(script(folder, PROMPT, "--scale", 0.5), "this model takes no")
    check_refused(script(base, PROMPT, "--adapter", calm), "Invalid input name")
    check_refused(script(base, PROMPT, "--adapter", base / "genai_config.json"), "lora")
