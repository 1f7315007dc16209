"""examples/serving/onnxruntime_plain.py against the attached model and the Python runner."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_models import ABSENT, PROMPT, DemoModels, Script, check_refused

pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.runtimes, pytest.mark.slow]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script("onnxruntime_plain.py", tmp_path_factory.mktemp("blocker"))


@pytest.fixture
def copied(models: DemoModels, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a folder, to damage."""

    def copy(*arguments: str) -> Path:
        return shutil.copytree(models.graft(*arguments), tmp_path / "model")

    return copy


def test_it_has_neither_the_project_nor_torch(script: Script) -> None:
    assert script.can_import("onnxruntime")
    assert [name for name in ABSENT if script.can_import(name)] == []


@pytest.mark.parametrize("name", ["calm", "loud", "keen"])
def test_steered_text_is_that_of_the_attached_model(
    name: str, models: DemoModels, script: Script
) -> None:
    folder = models.graft(name)
    (answer,) = script.answers(folder)
    assert answer["prompt_ids"] == models.prompt
    assert answer["ids"] == models.reference(name) == models.runner(folder)
    assert answer["text"] == models.text(answer["ids"])
    assert answer["ids"] != models.reference()


@pytest.mark.parametrize("mode", ["--strength-input", "--optional-strength-input"])
def test_strength_belongs_to_the_request(mode: str, models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", mode)
    found = {scale: script.tokens(folder, "--scale", scale) for scale in (0, 0.5, 1)}
    assert found[0] == models.reference()
    assert found[0.5] == models.reference("calm", scale=0.5)
    assert found[1] == models.reference("calm") == script.tokens(folder)
    assert len({tuple(ids) for ids in found.values()}) == 3
    weaker = script.tokens(folder, "--scale=-0.25")
    assert weaker == models.reference("calm", scale=-0.25)


def test_adapters_are_switched_on_one_session(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "loud", "keen", "--as-adapter")
    order = ("none", "calm", "loud", "none", "keen", "loud", "calm", "none")
    chosen = [name if name == "none" else folder / f"{name}.onnx_adapter" for name in order]
    answers = script.answers(folder, *(part for c in chosen for part in ("--adapter", c)))
    assert tuple(answer["adapter"] for answer in answers) == order
    alone = {name: script.tokens(models.graft(name)) for name in ("calm", "loud", "keen")}
    alone["none"] = models.reference()
    assert len({tuple(ids) for ids in alone.values()}) == 4
    assert [answer["ids"] for answer in answers] == [alone[name] for name in order]


def test_requests_in_threads_keep_their_adapters(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "loud", "keen", "--as-adapter")
    printed = script.code(
        f"""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from model_folder import Text
from onnxruntime_plain import Model, complete
folder = Path({str(folder)!r})
text, model = Text.of(folder), Model(folder)
prompt = text.encode({PROMPT!r})
names = ["calm", None, "loud", "keen"] * 4
def work(name):
    files = [folder / f"{{name}}.onnx_adapter"] if name else []
    return complete(model, text, prompt, 24, adapters=files)
with ThreadPoolExecutor(8) as pool:
    print(json.dumps(list(pool.map(work, names))))
"""
    )
    wanted = [models.reference(*names) for names in (["calm"], [], ["loud"], ["keen"])]
    assert json.loads(printed) == wanted * 4


def test_adapters_act_together(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "loud", "--as-adapter", "--together")
    files = [folder / f"{name}.onnx_adapter" for name in ("calm", "loud")]
    arguments = ("--adapter", files[0], "--adapter", files[1])
    both = script.tokens(folder, *arguments, "--together")
    assert both == models.reference("calm", "loud") == models.runner(folder, active=files)
    apart = [answer["ids"] for answer in script.answers(folder, *arguments)]
    assert apart == [models.reference("calm"), models.reference("loud")]
    assert both not in apart


def test_adapter_at_a_chosen_strength(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "loud", "--as-adapter", "--strength-input")
    arguments = ("--adapter", folder / "calm.onnx_adapter", "--scale")
    assert script.tokens(folder, *arguments, 0.5) == models.reference("calm", scale=0.5)
    assert script.tokens(folder, *arguments, 0) == models.reference()


def test_kernels_change_nothing(models: DemoModels, script: Script) -> None:
    from austeer.graphs.custom_op import library_file

    library = library_file()
    if library is None:
        pytest.skip("no operator library was built with this installation")
    for name in ("calm", "keen"):
        folder = models.graft(name, "--library")
        assert script.tokens(folder, "--library", folder / library.name) == models.reference(
            name
        )


def test_weights_in_a_file_of_their_own(
    models: DemoModels, script: Script, copied: Callable[..., Path]
) -> None:
    import onnx

    folder = copied("calm")
    model = onnx.load(folder / "model.onnx")
    (folder / "model.onnx").unlink()
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data"
    )
    assert script.tokens(folder) == models.reference("calm")


def test_text_is_printed_with_its_adapter(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "loud", "keen", "--as-adapter")
    done = script(folder, PROMPT, "--tokens", 3)
    assert done.stdout == models.text(models.reference()[:3]) + "\n"
    names = ("--adapter", "none", "--adapter", folder / "calm.onnx_adapter")
    lines = script(folder, PROMPT, "--tokens", 3, *names).stdout.splitlines()
    calm = models.text(models.reference("calm")[:3])
    assert lines == [f"[none] {models.text(models.reference()[:3])}", f"[calm] {calm}"]


def test_text_ends_at_a_stop_token(
    models: DemoModels, script: Script, copied: Callable[..., Path]
) -> None:
    folder, ids = copied("calm"), models.reference("calm")
    stop = next(i for i in range(2, len(ids)) if ids[i] not in ids[:i])
    settings = json.dumps({"eos_token_id": [0, ids[stop]]})
    (folder / "generation_config.json").write_text(settings)
    assert script.tokens(folder) == ids[: stop + 1]


def test_text_stays_within_the_context(
    models: DemoModels, script: Script, copied: Callable[..., Path]
) -> None:
    folder = copied("calm")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = len(models.prompt) + 3
    (folder / "config.json").write_text(json.dumps(config))
    assert script.tokens(folder) == models.reference("calm")[:3]
    ids = ",".join(map(str, range(4, 4 + config["max_position_embeddings"])))
    check_refused(script(folder, "--ids", ids), "the model's context")


def _no_model(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def _half(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _half_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def _half_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_model, "model.onnx: no such file"),
        (_half, "cannot load this model"),
        (_no_tokenizer, "tokenizer.json is missing"),
        (_half_tokenizer, "cannot use this tokenizer"),
        (_half_config, "config.json: cannot read this file"),
    ],
)
def test_broken_folder(
    damage: Any, message: str, script: Script, copied: Callable[..., Path]
) -> None:
    folder = copied("calm")
    damage(folder)
    check_refused(script(folder, PROMPT), message)


def test_what_cannot_be_is_said_in_one_line(models: DemoModels, script: Script) -> None:
    fixed = models.graft("calm")
    switchable = models.graft("calm", "loud", "keen", "--as-adapter")
    calm = switchable / "calm.onnx_adapter"
    check_refused(script(fixed / "none", PROMPT), "no such folder")
    check_refused(script(fixed, PROMPT, "--scale", 1), "has no steering_scale input")
    check_refused(script(fixed, PROMPT, "--adapter", calm), "austeer.layers", "input")
    check_refused(script(fixed, PROMPT, "--adapter", "x"), "x: no such adapter file")
    check_refused(
        script(fixed, PROMPT, "--adapter", fixed / "config.json"), "not an adapter file"
    )
    check_refused(
        script(switchable, PROMPT, "--adapter", calm, "--scale", 2), "a strength of its own"
    )
    check_refused(script(fixed), "either a prompt or --ids")
    check_refused(script(fixed, PROMPT, "--ids", "1,2"), "either a prompt or --ids")
    check_refused(script(fixed, "--ids", "1,99999"), "out of data bounds")
    check_refused(script(fixed, PROMPT, "--library", fixed / "x.so"), "cannot load", "x.so")
    for option, value in (("--scale", "nan"), ("--tokens", "-1"), ("--ids", "1,,2")):
        done = script(fixed, PROMPT, f"{option}={value}")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"argument {option}: invalid" in done.stderr


def test_no_gpu_is_said_in_one_line(models: DemoModels, script: Script) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has a CUDAExecutionProvider")
    check_refused(script(models.graft("calm"), PROMPT, "--gpu"), "no CUDAExecutionProvider")


def test_another_kind_of_model(script: Script, copied: Callable[..., Path]) -> None:
    import onnx
    from onnx.helper import (
        make_graph,
        make_model,
        make_node,
        make_opsetid,
        make_tensor_value_info,
    )

    folder = copied("calm")
    x, y = (make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in ("pixels", "mask"))
    graph = make_graph([make_node("Neg", ["pixels"], ["mask"])], "other", [x], [y])
    model = make_model(graph, ir_version=10, opset_imports=[make_opsetid("", 18)])
    onnx.save(model, folder / "model.onnx")
    check_refused(
        script(folder, PROMPT), "missing: attention_mask, input_ids", "unknown: pixels"
    )


def test_another_kind_of_cache(script: Script) -> None:
    printed = script.code(
        """
from pathlib import Path
from causal_lm import Signature
from model_folder import BadInput
inputs = {"input_ids": ["B", "T"], "attention_mask": ["B", "S"]}
past = {"past_key_values.0.key": ["BH", 8, "P"]}
try:
    Signature.of(Path("model.onnx"), inputs | past, [], ["logits", "present.0.key"])
except BadInput as error:
    print(error)
"""
    )
    assert "past_key_values.0.key has shape ['BH', 8, 'P'], expected four" in printed
