"""examples/serving/onnxruntime_gpu_binding.py: its loops on the CPU, and what it refuses."""

from __future__ import annotations

import pytest
from serving_models import PROMPT, DemoModels, Script, check_refused

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.runtimes, pytest.mark.slow]

CPU = ("--device", "cpu")
FIXED = (*CPU, "--fixed")
CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script("onnxruntime_gpu_binding.py", tmp_path_factory.mktemp("blocker"))


@pytest.mark.parametrize("name", ["calm", "keen"])
def test_growing_cache(name: str, models: DemoModels, script: Script) -> None:
    folder = models.graft(name, "--strength-input")
    found = [script.tokens(folder, *CPU, "--scale", scale) for scale in (0, 0.5, 1)]
    scales = (0.5, 1.0)
    assert found == [models.reference(), *(models.reference(name, scale=s) for s in scales)]
    assert found[0] != found[2]


def test_growing_cache_switches_adapters(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "loud", "keen", "--as-adapter")
    check_switches(models, script, folder, CPU)


def test_fixed_cache(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "--strength-input", base=models.built("fp32"))
    found = [script.tokens(folder, *FIXED, "--scale", scale) for scale in (0, 0.5, 1)]
    assert found == [
        models.reference(),
        models.reference("calm", scale=0.5),
        models.reference("calm"),
    ]


def test_fixed_cache_on_quantized_weights(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "--strength-input", base=models.built("int4"))
    for scale in (0.0, 1.0):
        ids = script.tokens(folder, *FIXED, "--scale", scale)
        assert ids == models.runner(folder, scale)
        assert ids == script.tokens(folder, *CPU, "--scale", scale)


def test_fixed_cache_switches_adapters(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "loud", "keen", "--as-adapter", base=models.built("fp32"))
    check_switches(models, script, folder, FIXED)


def check_switches(models: DemoModels, script: Script, folder: object, where: tuple) -> None:
    order = ("none", "calm", "keen", "loud", "none", "calm")
    chosen = [name if name == "none" else f"{folder}/{name}.onnx_adapter" for name in order]
    answers = script.answers(folder, *where, *(p for c in chosen for p in ("--adapter", c)))
    alone = {name: models.reference(name) for name in ("calm", "loud", "keen")}
    alone["none"] = models.reference()
    assert len({tuple(ids) for ids in alone.values()}) == 4
    assert [answer["ids"] for answer in answers] == [alone[name] for name in order]


def test_few_tokens(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", base=models.built("fp32"))
    for count in (0, 1, 2):
        for where in (CPU, FIXED):
            ids = script.tokens(folder, *where, "--tokens", count)
            assert ids == models.reference("calm")[:count]


def test_kernels_change_nothing(models: DemoModels, script: Script) -> None:
    from austeer.graphs.custom_op import library_file

    library = library_file()
    if library is None:
        pytest.skip("no operator library was built with this installation")
    folder = models.graft("calm", "--library")
    found = script.tokens(folder, *CPU, "--library", folder / library.name)
    assert found == models.reference("calm")


def test_a_cache_that_grows_is_no_fixed_one(models: DemoModels, script: Script) -> None:
    check_refused(
        script(models.graft("calm"), PROMPT, *FIXED), "--fixed: the cache of", "grows"
    )


def test_what_cannot_be_is_said_in_one_line(models: DemoModels, script: Script) -> None:
    folder = models.graft("calm", "loud", "keen", "--as-adapter")
    calm = folder / "calm.onnx_adapter"
    message = "--cuda-graph: needs shapes that do not change"
    for where in ((), CPU, FIXED):
        check_refused(script(folder, PROMPT, "--cuda-graph", *where), message)
    arguments = ("--adapter", calm, "--scale", 2)
    check_refused(script(folder, PROMPT, *CPU, *arguments), "a strength of its own")
    plain = models.graft("calm")
    check_refused(script(plain, PROMPT, *CPU, "--adapter", calm), "Failed to find input")
    check_refused(script(plain, PROMPT, *CPU, "--scale", 2), "no steering_scale input")


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason=f"has {CUDA}")
def test_no_gpu_is_said_in_one_line(models: DemoModels, script: Script) -> None:
    for option in ((), ("--scale", 1)):
        done = script(models.graft("calm", "--strength-input"), PROMPT, *option)
        check_refused(done, f"no {CUDA}", "onnxruntime-gpu")


@pytest.mark.skipif(
    CUDA not in onnxruntime.get_available_providers(),
    reason=f"onnxruntime has no {CUDA}: needs a GPU and onnxruntime-gpu",
)
def test_on_a_gpu(models: DemoModels, script: Script) -> None:
    grown = models.graft("calm", "--strength-input")
    fixed = models.graft("calm", "--strength-input", base=models.built("fp32"))
    for scale in (0.0, 1.0):
        wanted = models.reference("calm", scale=scale)
        assert script.tokens(grown, "--scale", scale) == wanted
        assert script.tokens(fixed, "--scale", scale, "--fixed") == wanted
        assert script.tokens(fixed, "--scale", scale, "--fixed", "--cuda-graph") == wanted
