"""LoRA and IA3: the files that stock peft loads, what is refused, and their proof."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from austeer.adapters import (
    AdapterError,
    OutputError,
    Predictor,
    RouteError,
    SteeredSite,
    SteeringAdapter,
    Strength,
    VerificationError,
)
from austeer.adapters.sites import Component, Site
from austeer.exporter.cli import cli
from austeer.exporter.merge import merge_checkpoint
from austeer.exporter.peft_export import check_peft_base, convert_peft, write_peft
from austeer.exporter.proofs.peft_parity import verify_peft
from austeer.exporter.routes import Route, candidate_components, route_of

LORA, IA3 = Route.LORA, Route.IA3
O_PROJ, DOWN = "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"
NAME = "base_model.model.{}.{}"
PROMPTS = ["Tom felt very happy .", "one day Mia went home and", "the sun was so"]


def site(layer: int, component: str, units: dict[int, float]) -> SteeredSite:
    gamma = np.array(list(units.values()), np.float32)
    return SteeredSite(Site(layer, Component(component)), np.array(list(units)), gamma)


def adapter_of(model: Any, *sites: SteeredSite) -> SteeringAdapter:
    return SteeringAdapter.from_sites(model, sites, Strength.FITTED)


def mixed(model: Any) -> SteeringAdapter:
    """attention in layer 0; neuron and ffn of one projection, crossing, in layer 1."""
    return adapter_of(
        model,
        site(0, "attention", {3: 1.5, 9: -0.75}),
        site(1, "neuron", {7: 2.0, 40: -1.25}),
        site(1, "ffn", {5: 0.8125}),
    )


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return values


def tensors_of(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def with_peft(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    # Warnings are errors here: a missing tensor, or a config key that peft does not know.
    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found


def assert_steers_alike(model: Any, adapter: SteeringAdapter, folder: Path) -> None:
    with adapter.attached(model):
        expected = logits(model)
    tolerance = 20 * 2.0**-24 * float(expected.abs().max())
    assert float((logits(with_peft(model, folder)) - expected).abs().max()) <= tolerance
    assert float((logits(model) - expected).abs().max()) > 100 * tolerance


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama")


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Path:
    return saved_model("llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def unchanged(tmp_path: Path, base: Path) -> Iterator[None]:
    """Around a failure: no file or folder appears."""
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    yield
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


# What is in the files


def test_lora_covers_what_its_short_names_match(base: Path, model: Any, out: Path) -> None:
    summary = convert_peft(base, mixed(model), out, route=LORA)
    tensors = tensors_of(out)
    shapes = {
        NAME.format(path.format(layer), f"lora_{half}.weight"): shape
        for path, width in ((O_PROJ, 32), (DOWN, 48))
        for layer in (0, 1)
        for half, shape in (("A", (3, width)), ("B", (32, 3)))
    }
    assert {name: values.shape for name, values in tensors.items()} == shapes
    assert {values.dtype for values in tensors.values()} == {np.dtype(np.float32)}
    for module in (O_PROJ.format(1), DOWN.format(0)):
        for half in "AB":
            assert not tensors[NAME.format(module, f"lora_{half}.weight")].any()
    # Two units in attention, three in the MLP: the third rank of attention is padding.
    assert not tensors[NAME.format(O_PROJ.format(0), "lora_A.weight")][2].any()
    assert not tensors[NAME.format(O_PROJ.format(0), "lora_B.weight")][:, 2].any()
    assert summary.modules == (O_PROJ.format(0), DOWN.format(1))
    assert (summary.units, summary.rank, summary.path) == (5, 3, out)
    assert sorted(summary.files) == sorted(path.name for path in out.iterdir())
    assert "rank 3" in summary.summary()
    assert json.loads(json.dumps(summary.as_dict()))["route"] == "lora"


def test_lora_config_is_what_peft_and_servers_read(base: Path, model: Any, out: Path) -> None:
    from peft import LoraConfig

    convert_peft(base, mixed(model), out, route=LORA)
    assert config_of(out) == {
        "base_model_name_or_path": mixed(model).config.base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": [0, 1],
        "lora_alpha": 3,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 3,
        "revision": None,
        "target_modules": ["down_proj", "o_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    assert set(config_of(out)) <= set(LoraConfig().to_dict())


def test_only_steered_layers_are_matched(base: Path, model: Any, out: Path) -> None:
    adapter = adapter_of(model, site(1, "neuron", {7: 2.0}))
    convert_peft(base, adapter, out, route=LORA)
    assert config_of(out)["layers_to_transform"] == [1]
    names = [NAME.format(DOWN.format(1), f"lora_{half}.weight") for half in "AB"]
    assert sorted(tensors_of(out)) == names
    assert_steers_alike(model, adapter, out)


def test_lora_is_the_difference_of_the_weights(base: Path, model: Any, out: Path) -> None:
    convert_peft(base, mixed(model), out, route=LORA)
    tensors, weights = tensors_of(out), load_file(base / "model.safetensors")
    weight = weights[f"{DOWN.format(1)}.weight"].astype(np.float64)
    steered = weight.copy()
    steered[:, [7, 40]] *= [3.0, -0.25]
    steered[5] *= 1.8125
    A, B = (
        tensors[NAME.format(DOWN.format(1), f"lora_{half}.weight")].astype(np.float64)
        for half in "AB"
    )
    error = np.abs(B @ A - (steered - weight))
    assert (error <= 2.0**-22 * (np.abs(weight) + np.abs(steered))).all()
    assert_steers_alike(model, mixed(model), out)


def test_ia3_names_modules_in_full(base: Path, model: Any, out: Path) -> None:
    from peft import IA3Config

    adapter = adapter_of(
        model,
        site(0, "attention", {3: 1.5}),
        site(0, "neuron", {40: -1.25}),
        site(1, "ffn", {5: 0.8125}),
    )
    summary = convert_peft(base, adapter, out, route=IA3)
    tensors = tensors_of(out)
    inputs = [DOWN.format(0), O_PROJ.format(0)]
    shapes = {O_PROJ.format(0): (1, 32), DOWN.format(0): (1, 48), DOWN.format(1): (32, 1)}
    wanted = {NAME.format(module, "ia3_l"): shape for module, shape in shapes.items()}
    assert {name: values.shape for name, values in tensors.items()} == wanted
    down = tensors[NAME.format(DOWN.format(0), "ia3_l")]
    assert down[0, 40] == -0.25 and (np.delete(down[0], 40) == 1.0).all()
    assert config_of(out)["feedforward_modules"] == inputs
    assert config_of(out)["target_modules"] == sorted(shapes)
    assert config_of(out)["peft_type"] == "IA3"
    assert set(config_of(out)) <= set(IA3Config().to_dict())
    assert (summary.rank, summary.units) == (0, 3)
    assert_steers_alike(model, adapter, out)


@pytest.mark.parametrize("route", [LORA, IA3])
def test_peft_would_save_the_same_tensors(
    base: Path, model: Any, out: Path, route: Route
) -> None:
    adapter = adapter_of(model, site(0, "attention", {3: 1.5}), site(1, "ffn", {5: 0.5}))
    convert_peft(base, adapter, out, route=route)
    with_peft(model, out).save_pretrained(out.parent / "again")
    ours, theirs = tensors_of(out), tensors_of(out.parent / "again")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


@pytest.mark.parametrize(
    ("component", "name"), [("attention", "attn.c_proj"), ("neuron", "mlp.c_proj")]
)
def test_gpt2_names_and_orientation(
    saved_model: Callable[..., Path],
    tiny_model: Callable[..., Any],
    out: Path,
    component: str,
    name: str,
) -> None:
    adapter = adapter_of(tiny_model("gpt2"), site(1, component, {3: 1.5}))
    convert_peft(saved_model("gpt2"), adapter, out, route=LORA)
    # Both projections end in c_proj: one part more keeps the other out.
    assert config_of(out)["target_modules"] == [name]
    assert config_of(out)["fan_in_fan_out"] is True
    assert_steers_alike(tiny_model("gpt2"), adapter, out)


@pytest.mark.parametrize("route", [LORA, IA3])
def test_gpt2_saved_without_its_prefix(
    tiny_model: Callable[..., Any], tmp_path: Path, out: Path, route: Route
) -> None:
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "bare")
    adapter = adapter_of(model, site(0, "neuron", {3: 1.5}), site(1, "attention", {2: -2.0}))
    convert_peft(tmp_path / "bare", adapter, out, route=route)
    assert all(name.startswith("base_model.model.transformer.h.") for name in tensors_of(out))
    assert_steers_alike(model, adapter, out)


def test_ia3_scales_a_bias_with_the_output(
    saved_model: Callable[..., Path], tiny_model: Callable[..., Any], out: Path
) -> None:
    model = tiny_model("gpt2")
    adapter = adapter_of(model, site(0, "ffn", {3: 1.5, 30: -1.25}))
    convert_peft(saved_model("gpt2"), adapter, out, route=IA3)
    merged = with_peft(model, out).merge_and_unload().transformer.h[0].mlp.c_proj.bias
    factor = torch.ones(32)
    factor[[3, 30]] = torch.tensor([2.5, -0.25])
    assert torch.equal(merged, model.transformer.h[0].mlp.c_proj.bias * factor)


def test_the_card_names_base_library_and_scale(base: Path, model: Any, out: Path) -> None:
    convert_peft(base, mixed(model), out, route=LORA, scale=0.5)
    card = (out / "README.md").read_text()
    assert 'library_name: "peft"' in card and 'base_model_relation: "adapter"' in card
    assert "0.5 times" in card and "--max-lora-rank" in card


@pytest.mark.parametrize("route", [LORA, IA3])
def test_scale_is_linear_in_gamma(base: Path, model: Any, tmp_path: Path, route: Route) -> None:
    adapter = adapter_of(model, site(0, "attention", {3: 1.5, 9: -0.75}))
    convert_peft(base, adapter, tmp_path / "a", route=route, scale=0.5)
    convert_peft(base, adapter.scaled(0.5), tmp_path / "b", route=route)
    one, two = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


# Against the fold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", [LORA, IA3])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_merged_by_peft_it_is_the_fold(
    tiny_model: Callable[..., Any],
    tmp_path: Path,
    model_type: str,
    route: Route,
    dtype: torch.dtype,
) -> None:
    from transformers import AutoModelForCausalLM

    base, model = tmp_path / "base", tiny_model(model_type).to(dtype)
    model.save_pretrained(base)
    gammas = {3: 1.5, 9: -0.75, 30: -1.25}
    adapter = adapter_of(model, site(0, "attention", gammas), site(1, "neuron", gammas))
    convert_peft(base, adapter, tmp_path / "peft", route=route)
    merge_checkpoint(base, adapter, tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=dtype)
    merged = with_peft(model, tmp_path / "peft").merge_and_unload()
    wanted, before = folded.state_dict(), model.state_dict()
    found = merged.state_dict()
    assert found.keys() == wanted.keys()
    assert any(not torch.equal(wanted[name], before[name]) for name in wanted)
    for name in wanted:
        difference = (found[name].double() - wanted[name].double()).abs()
        # These gains are short: the IA3 rounds their product once, as the fold does. So does
        # the LoRA from half precision, whose γ·W is exact in float32; from float32 γ·W and
        # the sum with W are rounded as well, by 2^-24 each.
        exact = route is IA3 or dtype is not torch.float32
        bound = 0.0 if exact else 2.0**-24 * (1.5 + 2 * 2.5) * before[name].double().abs()
        assert bool((difference <= bound).all()), name


# Refusals


@pytest.mark.parametrize("route", [LORA, IA3])
def test_layer_and_adaptive_are_refused(
    base: Path, model: Any, out: Path, route: Route, unchanged: None
) -> None:
    layer = adapter_of(model, site(0, "layer", {3: 1.5}))
    with pytest.raises(RouteError, match=r"cannot become an? .*layers\.0\.layer: .*ONNX"):
        convert_peft(base, layer, out, route=route)
    ones = np.ones((1, 1), np.float32)
    steered = SteeredSite(
        Site(0, Component.FFN), np.array([5]), ones[0], Predictor(ones, ones[0], ones)
    )
    adaptive = SteeringAdapter.from_sites(model, [steered], Strength.ADAPTIVE)
    with pytest.raises(RouteError, match=r"adaptive .*ONNX"):
        convert_peft(base, adaptive, out, route=route)


def test_lora_refuses_an_output_with_a_bias(
    saved_model: Callable[..., Path], tiny_model: Callable[..., Any], out: Path
) -> None:
    adapter = adapter_of(tiny_model("gpt_neox"), site(1, "ffn", {3: 1.5}))
    with pytest.raises(RouteError, match=r"a LoRA: layers\.1\.ffn: .*bias.*route ia3"):
        convert_peft(saved_model("gpt_neox"), adapter, out, route=LORA)
    assert not out.exists()


def test_ia3_refuses_both_sides_of_a_projection(
    base: Path, model: Any, out: Path, unchanged: None
) -> None:
    with pytest.raises(RouteError, match=r"an IA3: layers\.1\.ffn: .*neuron.*route lora"):
        convert_peft(base, mixed(model), out, route=IA3)


@pytest.mark.parametrize("route", [LORA, IA3])
def test_nothing_to_steer_is_refused(
    base: Path, model: Any, out: Path, route: Route, unchanged: None
) -> None:
    adapter = adapter_of(model, site(0, "attention", {3: 1.5}))
    with pytest.raises(RouteError, match=r"scale 0 would change no activation"):
        convert_peft(base, adapter, out, route=route, scale=0.0)


@pytest.mark.parametrize(
    ("route", "component", "says"),
    [
        (LORA, "neuron", r"down_proj\.weight: .*range of float32"),
        (LORA, "ffn", r"down_proj\.weight: .*range of float32"),
        (IA3, "neuron", r"down_proj\.weight: the gain of unit 3 .*range of float32"),
    ],
)
def test_overflow_is_refused(
    base: Path, model: Any, out: Path, route: Route, component: str, says: str, unchanged: None
) -> None:
    adapter = adapter_of(model, site(1, component, {3: 3e38}))
    with pytest.raises(RouteError, match=says):
        convert_peft(base, adapter, out, route=route, scale=1e4)


def test_other_bases_and_routes_are_refused(
    base: Path, model: Any, tiny_model: Callable[..., Any], out: Path, unchanged: None
) -> None:
    with pytest.raises(RouteError, match="expected lora or ia3"):
        convert_peft(base, mixed(model), out, route=Route.ONNX)
    other = mixed(tiny_model("llama", seed=1))
    with pytest.raises(AdapterError, match="sha256"):
        convert_peft(base, other, out, route=LORA)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    before = (base / "config.json").read_bytes()
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(RouteError, match="convert for the unquantized model"):
        convert_peft(base, mixed(model), out, route=LORA)
    (base / "config.json").write_bytes(before)


def test_taken_output_is_left_alone(base: Path, model: Any, out: Path) -> None:
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(OutputError, match="not empty"):
        convert_peft(base, mixed(model), out, route=LORA)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_shared_weights_fold_not_but_convert(base: Path, model: Any, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    shared = {"elsewhere.weight": f"{O_PROJ.format(0)}.weight", "format": "pt"}
    save_file(weights, base / "model.safetensors", metadata=shared)
    adapter = adapter_of(model, site(0, "attention", {3: 1.5}))
    with pytest.raises(RouteError, match=r"shares its values with elsewhere\.weight"):
        merge_checkpoint(base, adapter, tmp_path / "folded")
    for route in (LORA, IA3):
        convert_peft(base, adapter, tmp_path / route, route=route)
        assert_steers_alike(model, adapter, tmp_path / route)


# What it costs


def test_neither_torch_nor_peft_on_this_path(base: Path, model: Any, out: Path) -> None:
    mixed(model).save_pretrained(base.parent / "adapter")
    code = (
        "import sys; from pathlib import Path\n"
        "from austeer.adapters.adapter import SteeringAdapter\n"
        "from austeer.exporter import Route, convert_peft\n"
        "base, adapter, out = map(Path, sys.argv[1:])\n"
        "adapter = SteeringAdapter.from_pretrained(adapter)\n"
        "convert_peft(base, adapter, out, route=Route.LORA)\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    paths = [str(path) for path in (base, base.parent / "adapter", out)]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
    assert (out / "adapter_model.safetensors").is_file()


def test_memory_is_that_of_one_tensor(
    saved_model: Callable[..., Path], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = {"intermediate_size": 2048, "hidden_size": 128, "num_hidden_layers": 6}
    base = saved_model("llama", **sizes)
    sites = [site(layer, "neuron", {9: 0.5}) for layer in range(6)]
    adapter, one = adapter_of(tiny_model("llama", **sizes), *sites), 2048 * 128 * 4
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    write_peft(base, adapter, tmp_path / "out", route=LORA)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * one, f"{peak} bytes for tensors of {one}"


# The proof


@pytest.fixture
def proof(
    base: Path, model: Any, tiny_tokenizer: Any, out: Path
) -> Callable[..., Callable[[], Any]]:
    """Write a LoRA of the base; the call that verifies what is in its folder by then."""

    def written(route: Route = LORA) -> Callable[[], Any]:
        adapter = adapter_of(model, site(0, "attention", {3: 1.5, 9: -0.75}))
        convert_peft(base, adapter, out, route=route)
        return lambda: verify_peft(out, model, tiny_tokenizer, adapter, PROMPTS, base=base)

    return written


@pytest.mark.parametrize("route", [LORA, IA3])
def test_a_sound_product_passes_and_leaves_the_model_alone(
    proof: Any, model: Any, route: Route
) -> None:
    before = logits(model)
    report = proof(route)()
    assert report.passed and report.route == route.value
    assert report.steered_vs_base > 100 * report.tolerance
    assert torch.equal(logits(model), before)


def edit(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = tensors_of(out)
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("factor", [0.0, 1.001, np.nan])
def test_another_strength_is_seen(proof: Any, out: Path, factor: float) -> None:
    check = proof()
    edit(out, lambda tensors: [values.__imul__(factor) for values in tensors.values()])
    assert not check().passed


def test_a_missing_tensor_is_an_error(proof: Any, out: Path) -> None:
    check = proof()
    edit(out, lambda tensors: tensors.popitem())
    with pytest.raises(VerificationError, match=r"cannot load it .*missing adapter keys"):
        check()


def test_a_damaged_file_is_an_error(proof: Any, out: Path) -> None:
    check = proof()
    weights = out / "adapter_model.safetensors"
    weights.rename(out / "elsewhere")
    with pytest.raises(VerificationError, match="peft cannot load it"):
        check()
    (out / "elsewhere").rename(weights)
    (out / "adapter_config.json").write_text('{"peft_type": "LORA", "r": "many"}')
    with pytest.raises(VerificationError, match="peft cannot load it"):
        check()


# The command line


def invoke(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    if exit_code:
        assert len(result.stderr.splitlines()) == 1
    return result


@pytest.fixture
def adapter(tmp_path: Path, model: Any) -> Path:
    made = adapter_of(model, site(0, "attention", {3: 1.5}), site(1, "ffn", {5: -1.25}))
    return made.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("route", ["lora", "ia3"])
def test_peft_and_verify_agree(base: Path, adapter: Path, out: Path, route: str) -> None:
    made = json.loads(invoke("peft", adapter, base, "--as", route, "-o", out, "--json").stdout)
    assert (made["route"], made["verified"], made["passed"]) == (route, True, True)
    assert Path(made["path"]) == out and route_of(out) is Route(route)
    again = ("verify", out, "--base", base, "--adapter", adapter)
    found = json.loads(invoke(*again, "--json").stdout)
    assert found["max_logit_difference"] == made["max_logit_difference"] < 1e-4
    wrong = invoke(*again, "--scale", "1.5", exit_code=4)
    assert wrong.stderr.startswith(f"error: {route} product {out}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_live_model_is_no_reference(
    base: Path, adapter: Path, out: Path, dtype: str
) -> None:
    arguments = ("peft", adapter, base, "--as", "lora", "-o", out, "--dtype", dtype, "--json")
    made = json.loads(invoke(*arguments).stdout)
    assert made["max_logit_difference"] < 1e-5


def test_refusals_on_the_command_line(
    tmp_path: Path, base: Path, model: Any, out: Path
) -> None:
    mixed(model).save_pretrained(tmp_path / "mixed")
    found = invoke("peft", tmp_path / "mixed", base, "--as", "ia3", "-o", out, exit_code=2)
    assert "route lora or safetensors" in found.stderr
    layer = adapter_of(model, site(0, "layer", {3: 1.5}))
    layer.save_pretrained(tmp_path / "layer")
    found = invoke("peft", tmp_path / "layer", base, "--as", "lora", "-o", out, exit_code=2)
    assert "route lora: component layer" in found.stderr
    assert not out.exists()


@pytest.mark.parametrize("route", ["lora", "ia3"])
def test_without_peft_only_unverified(
    base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    monkeypatch.setattr("austeer.exporter.routes.find_spec", lambda name: None)
    arguments = ("peft", adapter, base, "--as", route, "-o", out)
    message = f"route {route}: package peft is not installed; pip install 'austeer[peft]'"
    assert message in invoke(*arguments, exit_code=2).stderr
    assert not out.exists()
    monkeypatch.setattr("austeer.adapters.loading.load_model", lambda *_, **__: pytest.fail())
    made = json.loads(invoke(*arguments, "--no-verify", "--json").stdout)
    assert not made["verified"] and route_of(out) is Route(route)
    check = ("verify", out, "--base", base, "--adapter", adapter)
    assert message in invoke(*check, exit_code=2).stderr


def test_a_product_that_fails_is_not_published(
    base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(out.parent.iterdir())
    monkeypatch.setattr(
        "austeer.exporter.peft_content.ia3_vector",
        lambda width, edit: np.full(width, 1.5, "f4"),
    )
    arguments = ("peft", adapter, base, "--as", "ia3", "-o", out)
    assert "logits differ" in invoke(*arguments, exit_code=4).stderr
    assert sorted(out.parent.iterdir()) == before


# Recognizing and choosing


def test_products_are_recognized(base: Path, adapter: Path, out: Path, model: Any) -> None:
    with pytest.raises(RouteError, match="found none of them"):
        route_of(adapter)
    convert_peft(base, mixed(model), out, route=LORA)
    (out / "model.safetensors").write_bytes(b"")
    with pytest.raises(RouteError, match="found lora and safetensors"):
        route_of(out)


def test_components_to_choose_from() -> None:
    safe = (Component.ATTENTION, Component.NEURON)
    for route in (LORA, IA3):
        assert candidate_components((), [Route.ONNX, route]) == safe
    asked = (Component.FFN,)
    assert candidate_components(asked, [LORA]) == asked


@pytest.mark.parametrize(
    ("model_type", "options", "says"),
    [
        ("llama", ("--to", "ia3", "--component", "neuron", "--component", "ffn"), "not both"),
        ("gpt2", ("--to", "lora", "--component", "ffn"), "transformer.h.0.mlp.c_proj.bias"),
    ],
)
def test_a_run_that_cannot_end_is_refused_before_it_fits(
    tmp_path: Path,
    saved_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    options: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.setattr("austeer.exporter.run.localize", lambda *_, **__: pytest.fail("late"))
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "Tom felt", "positive": " happy", "negative": " sad"}
    pairs.write_text(json.dumps(row) + "\n")
    arguments = ("run", saved_model(model_type), pairs, "-o", tmp_path / "run", *options)
    assert says in invoke(*arguments, exit_code=2).stderr


def test_a_run_writes_both(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Random weights need not be steerable, and this is not about steering.
    monkeypatch.setattr("austeer.adapters.fitting.fit.no_effect_reason", lambda *_: None)
    prompts = [
        f"{who} {verb} {rest}"
        for who in ("Tom", "Mia", "the sun", "rain") for verb in ("felt", "was")
        for rest in ("very", "so", "so very", "and so", "then")
    ]  # fmt: skip
    ends = {"positive": " happy", "negative": " sad"}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": p, **ends}) + "\n" for p in prompts))
    arguments = ("run", base, pairs, "-o", tmp_path / "run", "--strength", "oriented")
    routes = ("--to", "lora", "--to", "ia3", "--kl-budget", "5", "--max-units", "8", "--json")
    values = json.loads(invoke(*arguments, *routes).stdout)
    assert [(row["route"], row["passed"]) for row in values["products"]] == [
        ("lora", True), ("ia3", True)
    ]  # fmt: skip
    assert route_of(tmp_path / "run" / "lora") is LORA


@pytest.mark.parametrize("route", [Route.LORA, Route.IA3])
@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text"])
def test_ffn_of_a_mixture_is_refused_before_the_fit(
    saved_model: Any, route: Route, model_type: str
) -> None:
    base = saved_model(model_type)
    with pytest.raises(RouteError, match=f"route {route}: component ffn: its experts"):
        check_peft_base(base, route, [Component.ATTENTION, Component.FFN])
    check_peft_base(base, route, [Component.ATTENTION])
    check_peft_base(base, Route.SAFETENSORS, [Component.FFN])
