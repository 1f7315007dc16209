"""examples/serving/openvino_inline.py: which graphs OpenVINO takes, and what it makes."""

from __future__ import annotations

import pytest
from serving_models import PROMPT, DemoModels, Script, check_refused, package_folder

pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.runtimes, pytest.mark.slow]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    packages = [package_folder("openvino")]
    return Script("openvino_inline.py", tmp_path_factory.mktemp("blocker"), packages)


@pytest.mark.parametrize("name", ["calm", "loud", "keen"])
def test_steered_text_is_that_of_the_attached_model(
    name: str, models: DemoModels, script: Script
) -> None:
    (answer,) = script.answers(models.graft(name, "--inline"))
    assert answer["prompt_ids"] == models.prompt
    assert answer["ids"] == models.reference(name) != models.reference()
    assert answer["text"] == models.text(answer["ids"])


@pytest.mark.parametrize("name", ["calm", "keen"])
def test_strength_belongs_to_the_request(name: str, models: DemoModels, script: Script) -> None:
    folder = models.graft(name, "--inline", "--strength-input")
    found = {scale: script.tokens(folder, "--scale", scale) for scale in (0, 0.5, 1)}
    assert found == {scale: models.reference(name, scale=float(scale)) for scale in found}
    assert found[1] == script.tokens(folder) != found[0] == models.reference()


def test_inputs_with_a_default_are_constants(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "--inline", "--optional-strength-input")
    assert script.tokens(folder) == models.reference("calm")
    check_refused(script(folder, PROMPT, "--scale", 0), "no steering_scale input")
    switchable = models.graft("calm", "loud", "--inline", "--as-adapter")
    assert script.tokens(switchable) == models.reference()


def test_functions_are_refused(models: DemoModels, script: Script) -> None:
    for name, operator in (("calm", "SteerAU"), ("keen", "SteerAUAdaptive")):
        check_refused(script(models.graft(name), PROMPT), f"ai.austeer.{operator}", "--inline")


def test_dynamically_quantized_weights(models: DemoModels, script: Script) -> None:
    from onnxruntime.quantization import quantize_dynamic

    base = models.root / "int8"
    if not base.exists():
        models.unsteered(base)
        quantize_dynamic(base / "model.onnx", base / "quantized.onnx")
        (base / "quantized.onnx").replace(base / "model.onnx")
    folder = models.graft("calm", "--inline", "--strength-input", base=base)
    found = [script.tokens(folder, "--scale", scale) for scale in (0, 1)]
    assert found == [models.runner(folder, 0.0), models.runner(folder, 1.0)]
    assert found[0] != found[1]


def test_models_of_the_genai_builder(models: DemoModels, script: Script) -> None:
    arguments = ("calm", "--inline", "--strength-input")
    folder = models.graft(*arguments, base=models.built("fp32"))
    found = [script.tokens(folder, "--scale", scale) for scale in (0, 1)]
    assert found == [models.reference(), models.reference("calm")]
    refused = script(models.graft(*arguments, base=models.built("int4")), PROMPT)
    check_refused(refused, "quantized operators", "GatherBlockQuantized")


def test_what_cannot_be_is_said_in_one_line(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "--inline", "--strength-input")
    check_refused(script(folder, PROMPT, "--device", "NONE"), "cannot compile", "NONE")
    check_refused(script(folder / "none", PROMPT), "no such folder")
    assert script(folder, PROMPT, "--adapter", "x").returncode == 2
