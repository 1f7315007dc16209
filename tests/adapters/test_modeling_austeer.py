"""The modelling file: steered as attached, and still so after whatever is done to a model."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plain_steering import random_adapter
from reference import MODEL_TYPES, TRANSFORMERS_4
from samples import random_site
from steering_formula import steer_of
from torch import Tensor, nn

from austeer.adapters import (
    AdapterError,
    Component,
    ModelError,
    Site,
    SteeringAdapter,
    load_model,
    load_steered,
    load_tokenizer,
)
from austeer.adapters import modeling_austeer as code
from austeer.adapters import steered_format as form
from austeer.adapters.weights import INDEX
from austeer.exporter.code_export import export_code

IDS = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(1))
# Every component constant and adaptive, every architecture with three sites of four.
CASES = [
    (model_type, component, (place + number) % 3)
    for place, model_type in enumerate(MODEL_TYPES)
    for number, component in enumerate(Component)
    if (place + number) % 4
]


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def attached(model: Any, adapter: SteeringAdapter, scale: float = 1.0) -> Tensor:
    with adapter.attached(model, scale):
        return logits(model)


def numbers(model: Any) -> dict[str, Tensor]:
    found = {name: t for name, t in model.named_buffers() if ".austeer." in name}
    assert found
    return found


def trusted(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options
    ).eval()


@pytest.fixture
def product(
    tmp_path: Path, saved_model: Callable[..., Path], code_cache: Path
) -> Callable[..., tuple[Any, SteeringAdapter, Path]]:
    """Base as loaded from disk, adapter, and the steered checkpoint of both."""
    from transformers import AutoModelForCausalLM

    def make(
        model_type: str = "llama", component: str = "layer", rank: int = 1
    ) -> tuple[Any, SteeringAdapter, Path]:
        base = saved_model(model_type)
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        adapter = random_adapter(model, component, rank)
        export_code(base, adapter, tmp_path / "steered")
        return model, adapter, tmp_path / "steered"

    return make


@pytest.mark.parametrize(("model_type", "component", "rank"), CASES)
def test_steered_as_attached(product: Any, model_type: str, component: str, rank: int) -> None:
    model, adapter, folder = product(model_type, component, rank)
    expected, base = attached(model, adapter), logits(model)
    for steered in (load_steered(folder), trusted(folder)):
        assert torch.equal(logits(steered), expected)
    assert float((expected - base).abs().max()) > 0.05


@pytest.mark.parametrize("rank", [0, 2])
def test_one_site_is_the_formula(rank: int) -> None:
    site = random_site(Site(0, Component.FFN), [4, 0, 9], rank, np.random.default_rng(rank))
    steer = code.Steer("", "output", 3, rank, SimpleNamespace(steering_scale=0.7))
    parts = {"index": site.index, "gamma": site.gamma}
    if site.predictor:
        parts |= {name: getattr(site.predictor, name) for name in "VbU"}
    steer.load_state_dict({name: torch.from_numpy(part) for name, part in parts.items()})
    x = np.random.default_rng(5).normal(size=(2, 3, 12)).astype(np.float32)
    found, expected = steer.steer(torch.from_numpy(x)).numpy(), steer_of(site, 0.7)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    rest = np.setdiff1d(np.arange(12), site.index)
    assert found[..., rest].tobytes() == x[..., rest].tobytes()


def test_format_is_the_same_on_both_sides() -> None:
    assert code.FORMAT_VERSION == form.STEERED_VERSION
    assert code.SteeredConfig.model_type == form.STEERED_TYPE
    assert form.code_file() == Path(code.__file__)
    for module, name in (reference.split(".") for reference in form.AUTO_MAP.values()):
        assert f"{module}.py" == form.CODE_NAME and hasattr(code, name)


def test_who_runs_the_code_of_the_folder(product: Any) -> None:
    model, adapter, folder = product()
    file = folder / form.CODE_NAME
    file.write_text("raise RuntimeError('this code ran')\n")
    with pytest.raises(RuntimeError, match="this code ran"):
        trusted(folder)
    assert torch.equal(logits(load_steered(folder)), attached(model, adapter))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_nothing_loads_without_the_steering(product: Any, model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    model, _, folder = product(model_type)
    with pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    # Whoever names the native class is refused by its config; transformers would only warn.
    with pytest.raises(Exception, match=r"steered model: load it|str"):
        type(model).from_pretrained(folder)


@pytest.mark.parametrize("load", [load_steered, trusted])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_saved_again_it_is_still_steered(
    product: Any, tmp_path: Path, load: Callable[..., Any], model_type: str
) -> None:
    model, adapter, folder = product(model_type)
    expected = attached(model, adapter, 0.5)
    steered = load(folder)
    steered.steering_scale = 0.5
    for name in ("once", "twice"):
        steered.save_pretrained(tmp_path / name)
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert {form.CODE_NAME, "config.json", "model.safetensors"} <= files
        for again in (load_steered(tmp_path / name), trusted(tmp_path / name)):
            assert again.steering_scale == 0.5
            assert torch.equal(logits(again), expected)
        with pytest.raises(Exception, match=r"steered model: load it|str"):
            type(model).from_pretrained(tmp_path / name)
        steered = trusted(tmp_path / name)


def test_generation_padded_in_a_batch_is_that_of_each_alone(product: Any) -> None:
    model, adapter, folder = product("llama", "attention")
    steered = trusted(folder)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    rows = [IDS[0, :9], IDS[1, :4], IDS[2, :1]]
    alone = [
        steered.generate(row[None], attention_mask=torch.ones_like(row[None]), **settings)
        for row in rows
    ]
    padded = torch.stack([nn.functional.pad(row, (9 - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(9) >= 9 - len(row)).long() for row in rows])
    batch = steered.generate(padded, attention_mask=mask, **settings)
    for row, single, together in zip(rows, alone, batch, strict=True):
        assert together[9:].tolist() == single[0, len(row) :].tolist()
    with adapter.attached(model):
        expected = model.generate(padded, attention_mask=mask, **settings)
    assert batch.tolist() == expected.tolist()
    assert batch.tolist() != model.generate(padded, attention_mask=mask, **settings).tolist()


def test_pipeline(product: Any, tiny_tokenizer: Any) -> None:
    from transformers import pipeline

    model, adapter, folder = product("mistral")
    generator = pipeline("text-generation", str(folder), trust_remote_code=True, device="cpu")
    settings = {"max_new_tokens": 8, "do_sample": False}
    found = generator("one day Tom", return_tensors=True, **settings)[0]
    inputs = tiny_tokenizer("one day Tom", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with adapter.attached(model):
        expected = model.generate(**inputs, **settings)[0]
    assert found["generated_token_ids"] == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reduced_dtypes_round_activations_only(
    product: Any, tmp_path: Path, dtype: Any
) -> None:
    from transformers import AutoModelForCausalLM

    _, adapter, folder = product("gemma2", "neuron", 2)
    exact = {name: tensor.clone() for name, tensor in numbers(load_steered(folder)).items()}
    loaded = load_steered(folder, dtype=str(dtype).split(".")[1])
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base-gemma2", dtype=dtype).eval()
    assert loaded.dtype == dtype and logits(loaded).dtype == dtype
    expected = attached(live, adapter) if dtype == torch.bfloat16 else None
    cast = load_steered(folder).to(dtype)
    for steered in (loaded, cast, trusted(folder, dtype=dtype), load_steered(folder).half()):
        found = numbers(steered)
        assert all(torch.equal(found[name], tensor) for name, tensor in exact.items())
        assert {tensor.dtype for tensor in found.values()} == {torch.int64, torch.float32}
        assert torch.isfinite(logits(steered)).all()
    if expected is not None:
        assert torch.equal(logits(loaded), expected)


def test_moving_and_casting_back(product: Any) -> None:
    model, adapter, folder = product("phi3", "ffn")
    steered = load_steered(folder)
    expected = attached(model, adapter)
    assert torch.equal(logits(steered.double().float()), expected)
    assert {t.device.type for t in numbers(copy.deepcopy(steered).to("meta")).values()} == {
        "meta"
    }
    steered.load_state_dict(steered.state_dict())
    assert torch.equal(logits(steered), expected)


def test_a_copy_steers_by_its_own_numbers(product: Any) -> None:
    model, adapter, folder = product("gpt_neox", "attention")
    original = trusted(folder)
    copied = copy.deepcopy(original)
    expected, base = attached(model, adapter), logits(model)
    assert torch.equal(logits(copied), expected)
    copied.steering_scale = 0.0
    assert torch.equal(logits(copied), base)
    for name, tensor in numbers(original).items():
        if name.endswith("gamma"):
            tensor.zero_()
    copied.steering_scale = 1.0
    assert torch.equal(logits(original), base)
    assert torch.equal(logits(copied), expected)


def test_strength_at_run_time(product: Any) -> None:
    model, adapter, folder = product("llama", "ffn", 0)
    steered = load_steered(folder)
    assert steered.steering_scale == 1.0
    for scale in (0.0, 0.25, -1.0):
        steered.steering_scale = scale
        assert torch.equal(logits(steered), attached(model, adapter, scale))
    with pytest.raises(ValueError, match="finite number, got nan"):
        steered.steering_scale = float("nan")
    asked = trusted(folder, steering_scale=0.25)
    assert torch.equal(logits(asked), attached(model, adapter, 0.25))


def test_replaced_modules_are_steered(product: Any) -> None:
    model, adapter, folder = product("llama", "attention")
    steered, expected = load_steered(folder), attached(model, adapter)
    steered.attach_steering()
    assert torch.equal(logits(steered), expected), "a second hook would steer twice"
    for layer in steered.model.layers:
        old = layer.self_attn.o_proj
        layer.self_attn.o_proj = nn.Linear(old.in_features, old.out_features, bias=False)
        layer.self_attn.o_proj.weight = old.weight
    copied = copy.deepcopy(steered)
    assert torch.equal(logits(steered), expected)
    assert torch.equal(logits(copied), expected)
    with torch.no_grad():
        steered.model.layers[0].self_attn.o_proj.weight.zero_()
    assert not torch.equal(logits(steered), expected), "that module is the one in use"


@pytest.mark.parametrize("component", ["attention", "ffn", "layer"])
def test_peft_comes_and_goes(component: str, product: Any) -> None:
    peft = pytest.importorskip("peft")
    model, adapter, folder = product("llama", component)
    steered, expected = load_steered(folder), attached(model, adapter)
    config = peft.LoraConfig(target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(steered, config)
    assert torch.equal(logits(wrapped), expected), "a new LoRA changes nothing"
    assert torch.equal(logits(wrapped.merge_and_unload()), expected)


@pytest.mark.skipif(TRANSFORMERS_4, reason="4.57 collects inside of each layer's forward")
def test_hidden_states_are_those_that_layers_read(product: Any) -> None:
    model, adapter, folder = product("llama", "layer")
    steered = load_steered(folder)
    read: list[Any] = []
    for one in (model, steered):
        # transformers collects through hooks that stay from the first time on.
        one(IDS, output_hidden_states=True)
        one.model.layers[1].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    steered.attach_steering()
    with adapter.attached(model):
        found = model(IDS, output_hidden_states=True).hidden_states[1]
    also = steered(IDS, output_hidden_states=True).hidden_states[1]
    assert torch.equal(found, read[0]) and torch.equal(also, read[1])
    assert torch.equal(found, also)


def test_a_config_that_was_replaced_has_the_strength(product: Any) -> None:
    model, adapter, folder = product("llama", "ffn", 0)
    steered = load_steered(folder)
    steered.config = copy.deepcopy(steered.config)
    steered.steering_scale = 0.25
    assert torch.equal(logits(steered), attached(model, adapter, 0.25))


def test_a_wrapped_module_is_steered_once(product: Any) -> None:
    """As peft wraps a projection: the hook of before sits on what is inside now."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return self.inner(x)

    model, adapter, folder = product("llama", "attention")
    steered = load_steered(folder)
    for layer in steered.model.layers:
        layer.self_attn.o_proj = Wrapped(layer.self_attn.o_proj)
    steered.attach_steering()
    assert torch.equal(logits(steered), attached(model, adapter))


def test_the_strength_in_the_config_is_the_strength(product: Any) -> None:
    model, adapter, folder = product("llama", "ffn", 0)
    steered = load_steered(folder)
    steered.config.steering_scale = 0.25
    assert steered.steering_scale == 0.25
    assert torch.equal(logits(steered), attached(model, adapter, 0.25))


def test_the_config_in_memory_loads_the_checkpoint(product: Any) -> None:
    _, _, folder = product()
    config = load_steered(folder).config
    again = type(config).from_pretrained(folder)
    assert again.steering == config.steering and again.hidden_size == config.hidden_size


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda sites: sites.clear(), "steering has no sites"),
        (lambda sites: sites.pop(next(iter(sites))), "config.json has no site for"),
        (lambda sites: next(iter(sites.values())).update(side="Input "), "unknown side"),
    ],
)
def test_a_damaged_config_does_not_load_unsteered(
    product: Any, tmp_path: Path, change: Any, says: str
) -> None:
    _, _, folder = product()
    copied = shutil.copytree(folder, tmp_path / "damaged")
    config = json.loads((copied / "config.json").read_text())
    change(config["steering"]["sites"])
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=says):
        load_steered(copied)


def test_made_from_its_config(product: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    _, _, folder = product()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    made = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    made.load_state_dict(load_steered(folder).state_dict())
    assert torch.equal(logits(made), logits(load_steered(folder)))
    with pytest.raises(TypeError, match="AutoModelForCausalLM"):
        code.SteeredForCausalLM(config)
    with pytest.raises(ValueError, match="expected a config"):
        code.SteeredForCausalLM.from_pretrained(folder)


def test_device_map(product: Any) -> None:
    pytest.importorskip("accelerate")
    model, adapter, folder = product("llama", "layer")
    # Hooks of accelerate on every module, as where a model is spread over devices.
    devices = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu"}
    devices |= {"model.rotary_emb": "cpu", "model.austeer": "cpu", "lm_head": "cpu"}
    for device_map in ("auto", devices):
        steered = load_steered(folder, device_map=device_map)
        assert torch.equal(logits(steered), attached(model, adapter))


def test_tensor_parallelism_is_refused(product: Any) -> None:
    _, _, folder = product()
    with pytest.raises(ValueError, match="tp_plan is not supported"):
        trusted(folder, tp_plan="auto")


def _without_steering(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if file != form.STEERING_NAME
    }
    (folder / INDEX).write_text(json.dumps(index))


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _site(**facts: Any) -> Callable[[Path], None]:
    return _config(lambda c: c["steering"]["sites"]["layers.0.layer"].update(facts))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_steering, r"austeer\.layers\.0\.layer\.\w+ is not in the weights"),
        (_config(lambda c: c["steering"].update(format_version=2)), "format_version 2, this"),
        (_config(lambda c: c["steering"].update(format_version=True)), "format_version True"),
        (_config(lambda c: c.pop("steering")), "format_version None"),
        (_config(lambda c: c["steering"].update(base_model_type="x")), "base_model_type 'x'"),
        (
            _config(lambda c: c["steering"].update(base_model_type=[1])),
            r"base_model_type '\[1\]'",
        ),
        (_config(lambda c: c["steering"].update(sites=[1])), "cannot load the steered model"),
        (_config(lambda c: c["steering"].update(sites={"a": 1})), "expected an object"),
        (_site(units=10**9), "1000000000 units of rank 1, the weights hold"),
        (_site(rank=10**9), "units of rank 1000000000, the weights hold"),
        (_site(units="many"), "'many' units"),
        (_site(module=5), "cannot load the steered model"),
        (_config(lambda c: c.update(num_hidden_layers=10**8)), "100000000 layers, the weights"),
        (_config(lambda c: c["steering"]["sites"]["layers.0.layer"].update(units=5)), "size"),
        (lambda folder: (folder / form.STEERING_NAME).unlink(), form.STEERING_NAME),
    ],
)
def test_incomplete_or_unknown_products(product: Any, damage: Any, message: str) -> None:
    _, _, folder = product()
    damage(folder)
    with pytest.raises(ModelError, match=message) as error:
        load_steered(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        _without_steering,
        _config(lambda c: c.pop("steering")),
        _site(units=5),
        lambda folder: (folder / form.STEERING_NAME).unlink(),
    ],
)
def test_transformers_alone_refuses_them_too(product: Any, damage: Any) -> None:
    _, _, folder = product()
    damage(folder)
    with pytest.raises((ValueError, RuntimeError, OSError)):
        trusted(folder)


def test_a_steered_model_is_not_steered_again(product: Any) -> None:
    _, adapter, folder = product()
    with pytest.raises(AdapterError, match="steered in code already"):
        attached(load_steered(folder), adapter)
    with pytest.raises(ModelError, match=r"steered model already.*load_steered"):
        load_model(folder)


def test_a_plain_checkpoint_is_no_steered_one(saved_model: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"'llama', expected 'austeer_steered'.*load_model"):
        load_steered(saved_model("llama"))


def test_its_tokenizer_is_the_bases(product: Any) -> None:
    """By the model type transformers may take another class than the files name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model, adapter, folder = product("olmo2", "ffn", 0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: n for n, piece in enumerate([*letters, "</s>", "12", "123"])}
    core = Tokenizer(models.BPE(vocab, [("1", "2"), ("12", "3")]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    core.decoder = decoders.ByteLevel()
    base, steered = folder.parent / "named", folder.parent / "again"
    model.save_pretrained(base)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(base)
    path = base / "tokenizer_config.json"
    named = json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    path.write_text(json.dumps(named))
    export_code(base, adapter, steered)
    wanted, found = load_tokenizer(base), load_tokenizer(steered)
    assert type(found) is type(wanted)
    assert found("in 1234 days")["input_ids"] == wanted("in 1234 days")["input_ids"]
