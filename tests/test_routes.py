"""Every route out steers alike: attached == product reloaded from disk == written-out truth.

The truth is steered by hooks written here, x * (1 + γ) spelled out, with module paths spelled
out, too: nothing of ours takes part in it.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import TRANSFORMERS_4
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from austeer.adapters import RouteError, SiteError, SteeringAdapter
from austeer.adapters.weights import Checkpoint
from austeer.exporter.code_export import export_code
from austeer.exporter.merge import merge_checkpoint
from austeer.exporter.peft_export import convert_peft
from austeer.exporter.routes import Route as Product

Run = Callable[[Tensor], Tensor]
Route = Callable[[Path, Any, SteeringAdapter, Path], Run]

# model type: (attention output projection, last projection of the MLP) of layer {i}
PATHS = {
    "llama": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "mistral": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "qwen2": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "qwen3": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "gemma2": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "phi3": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "gpt2": ("transformer.h.{i}.attn.c_proj", "transformer.h.{i}.mlp.c_proj"),
    "gpt_neox": (
        "gpt_neox.layers.{i}.attention.dense",
        "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    ),
    "gemma3": (
        "model.language_model.layers.{i}.self_attn.o_proj",
        "model.language_model.layers.{i}.mlp.down_proj",
    ),
    "gemma3_text": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "olmo2": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "cohere": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "granite": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "stablelm": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "smollm3": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj"),
    "starcoder2": ("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.c_proj"),
    "phi": ("model.layers.{i}.self_attn.dense", "model.layers.{i}.mlp.fc2"),
    "opt": ("model.decoder.layers.{i}.self_attn.out_proj", "model.decoder.layers.{i}.fc2"),
    "gptj": ("transformer.h.{i}.attn.out_proj", "transformer.h.{i}.mlp.fc_out"),
    "gpt_neo": ("transformer.h.{i}.attn.attention.out_proj", "transformer.h.{i}.mlp.c_proj"),
    "falcon": (
        "transformer.h.{i}.self_attention.dense",
        "transformer.h.{i}.mlp.dense_4h_to_h",
    ),
    "bloom": (
        "transformer.h.{i}.self_attention.dense",
        "transformer.h.{i}.mlp.dense_4h_to_h",
    ),
    "mpt": ("transformer.blocks.{i}.attn.out_proj", "transformer.blocks.{i}.ffn.down_proj"),
}
# Mixtures of experts: the block of layer {i}, and the layers that are dense.
_MIXTRAL = "block_sparse_moe" if TRANSFORMERS_4 else "mlp"
MIXTURES: dict[str, tuple[str, tuple[int, ...]]] = {
    "mixtral": (f"model.layers.{{i}}.{_MIXTRAL}", ()),
    "qwen2_moe": ("model.layers.{i}.mlp", (0,)),
    "qwen3_moe": ("model.layers.{i}.mlp", ()),
    "deepseek_v3": ("model.layers.{i}.mlp", (0,)),
    "gpt_oss": ("model.layers.{i}.mlp", ()),
    "llama4_text": ("model.layers.{i}.feed_forward", (0,)),
}
MIXTRAL_STORED = "model.layers.{i}.block_sparse_moe"
PATHS |= {
    name: ("model.layers.{i}.self_attn.o_proj", f"{block}.down_proj")
    for name, (block, _) in MIXTURES.items()
}
# Whose experts are stored [expert, in, out].
TRANSPOSED_EXPERTS = ("gpt_oss", "llama4_text")
# Whose last projection of the MLP has a bias.
BIASED = ("gpt2", "gpt_neox", "opt", "bloom", "gptj", "gpt_neo", "phi", "starcoder2")
COMPONENTS = ("attention", "ffn", "neuron")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LAYERS, UNITS, GAMMA = [0, 0, 0, 1, 1], [1, 5, 17, 2, 30], [1.5, -0.75, 2.0, -1.25, 0.8125]
SCALE_OF_FLOAT32 = 20 * 2.0**-24  # a few roundings of the logits' own size


def is_mixture(model_type: str, layer: int) -> bool:
    return model_type in MIXTURES and layer not in MIXTURES[model_type][1]


def places(model_type: str, component: str) -> list[tuple[int, int, float]]:
    """(layer, unit, γ); a mixture has no neuron."""
    return [
        place
        for place in zip(LAYERS, UNITS, GAMMA, strict=True)
        if not (component == "neuron" and is_mixture(model_type, place[0]))
    ]


def made(model: Any, component: str) -> SteeringAdapter:
    columns = zip(*places(model.config.model_type, component), strict=True)
    return SteeringAdapter.from_units(model, component, *map(list, columns))


def prompts() -> Tensor:
    return torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(1))


def logits_of(model: Any) -> Run:
    def run(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits.float()

    return run


@contextmanager
def truth_hooks(model: nn.Module, component: str) -> Iterator[None]:
    """x -> x * (1 + γ) at the units above, with torch alone."""
    handles = []
    model_type = model.config.model_type
    for layer in (0, 1):
        attention, mlp = (path.format(i=layer) for path in PATHS[model_type])
        if component == "ffn" and is_mixture(model_type, layer):
            mlp = MIXTURES[model_type][0].format(i=layer)
        if component == "neuron" and is_mixture(model_type, layer):
            continue
        module = model.get_submodule(attention if component == "attention" else mlp)
        factor = torch.ones(256)
        for at, unit, gamma in places(model_type, component):
            if at == layer:
                factor[unit] = 1 + gamma

        def scale(x: Any, factor: Tensor = factor) -> Any:
            if isinstance(x, tuple):
                return (scale(x[0], factor), *x[1:])
            return x * factor[: x.shape[-1]]

        if component == "ffn":
            hook = module.register_forward_hook(lambda _, args, out, scale=scale: scale(out))
        else:
            hook = module.register_forward_pre_hook(lambda _, args, scale=scale: scale(args))
        handles.append(hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def bases(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
) -> Callable[[str, torch.dtype], tuple[Path, Any]]:
    """Checkpoint on disk in a dtype, and its exact weights as a live float32 model."""
    from transformers import AutoModelForCausalLM

    made: dict[tuple[str, torch.dtype], tuple[Path, Any]] = {}

    def base(model_type: str, dtype: torch.dtype) -> tuple[Path, Any]:
        if (model_type, dtype) not in made:
            folder = tmp_path_factory.mktemp("bases") / model_type
            # With seed 0 one of its experts gets no token.
            seed = 1 if model_type == "llama4_text" else 0
            tiny_model(model_type, seed).to(dtype).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            live = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            made[model_type, dtype] = folder, live
        return made[model_type, dtype]

    return base


def fold(base: Path, model: Any, adapter: SteeringAdapter, out: Path) -> Run:
    """Folded into a checkpoint, reloaded with plain transformers."""
    from transformers import AutoModelForCausalLM

    merge_checkpoint(base, adapter, out)
    return logits_of(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval())


@pytest.fixture(autouse=True)
def _private(code_cache: Path) -> None:
    """Products with code leave it in a temporary folder."""


def with_code(base: Path, model: Any, adapter: SteeringAdapter, out: Path) -> Run:
    """A steered checkpoint with code, reloaded as its users do."""
    from transformers import AutoModelForCausalLM

    export_code(base, adapter, out)
    loaded = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, trust_remote_code=True
    )
    return logits_of(loaded.eval())


def attach(base: Path, model: Any, adapter: SteeringAdapter, out: Path) -> Run:
    """Attached to the live model."""

    def run(ids: Tensor) -> Tensor:
        with adapter.attached(model):
            return logits_of(model)(ids)

    return run


def peft(product: Product) -> Route:
    """Converted into a PEFT adapter, loaded by stock peft onto a copy of the live model."""

    def convert(base: Path, model: Any, adapter: SteeringAdapter, out: Path) -> Run:
        from peft import PeftModel

        convert_peft(base, adapter, out, route=product)
        return logits_of(PeftModel.from_pretrained(copy.deepcopy(model), str(out)).eval())

    return convert


lora, ia3 = peft(Product.LORA), peft(Product.IA3)


def refusal(route: Route, model_type: str, components: tuple[str, ...]) -> str | None:
    """What a route says that cannot take these components, None where it can."""
    if route in (lora, ia3) and "ffn" in components and model_type in MIXTURES:
        return "its experts are parts of larger parameters"
    if route is lora and "neuron" in components and model_type in MIXTURES:
        return "peft takes a LoRA of"
    if route is lora and "ffn" in components and model_type in BIASED:
        return "its projection adds a bias"
    if route is ia3 and {"ffn", "neuron"} <= set(components):
        return "neuron is steered there, too"
    return None


# A route is (base folder, live float32 model, adapter, empty
# place for its output) -> ids -> float32 logits.
ROUTES = [
    pytest.param(attach, id="attach"),
    pytest.param(fold, id="fold"),
    pytest.param(lora, id="lora"),
    pytest.param(ia3, id="ia3"),
    pytest.param(with_code, id="code"),
]
# Those that leave the weights alone do not care which half precision these have.
ROUTES_AND_DTYPES = [
    pytest.param(*route.values, dtype, id=f"{route.id}-{dtype}")
    for route in ROUTES
    for dtype in DTYPES
    if route.id in ("attach", "fold") or dtype is not torch.float16
]


def experts_of(named: Iterable[tuple[str, Any]], block: str) -> Iterator[tuple[str, Any]]:
    """What is last in each expert of a mixture, by whatever name it has."""
    last = re.compile(r"(^|\.)(w2|down_proj)(\.weight|_bias)?$")
    return ((name, x) for name, x in named if name.startswith(block) and last.search(name))


def units_last(name: str, x: Any, model_type: str) -> Any:
    """A view of what is last in an expert whose last axis counts the mixture's units."""
    if name.endswith("_bias") or (x.ndim == 3 and model_type in TRANSPOSED_EXPERTS):
        return x
    return x.swapaxes(-1, -2)


def parts_of(model: Any, component: str, layer: int) -> list[Tensor]:
    """What a gain of this layer scales, as views whose last axis counts units."""
    model_type = model.config.model_type
    if component == "ffn" and is_mixture(model_type, layer):
        found = experts_of(model.named_parameters(), MIXTURES[model_type][0].format(i=layer))
        return [units_last(name, x, model_type) for name, x in found]
    attention, mlp = (path.format(i=layer) for path in PATHS[model_type])
    module = model.get_submodule(attention if component == "attention" else mlp)
    along_rows = (component == "ffn") != (model_type == "gpt2")
    parts = [module.weight.T if along_rows else module.weight]
    if component == "ffn" and module.bias is not None:
        parts.append(module.bias)
    return parts


def rounded(model: Any, component: str, dtype: torch.dtype) -> Any:
    """A copy with the gains in its weights, rounded once to `dtype`, with torch alone."""
    copied = copy.deepcopy(model).requires_grad_(False)
    for layer, unit, gamma in places(model.config.model_type, component):
        for part in parts_of(copied, component, layer):
            scaled = part[..., unit].double() * (1 + gamma)
            part[..., unit] = scaled.float().to(dtype)
    return copied


@pytest.mark.parametrize("model_type", MIXTURES)
def test_the_prompts_reach_every_expert(bases: Any, model_type: str) -> None:
    """A mistake in one expert would stay unseen where no token goes."""
    model = copy.deepcopy(bases(model_type, torch.float32)[1]).requires_grad_(True)
    model(prompts(), use_cache=False).logits.square().sum().backward()
    block, dense = MIXTURES[model_type]
    for layer in {0, 1} - {*dense}:
        experts = dict(experts_of(model.named_parameters(), block.format(i=layer)))
        assert experts
        for name, x in experts.items():
            each = x.grad if x.ndim == 3 or name.endswith("_bias") else x.grad[None]
            assert each.flatten(1).abs().amax(1).gt(0).all(), name


@pytest.mark.parametrize("model_type", MIXTURES)
def test_neuron_of_a_mixture_is_refused(bases: Any, model_type: str) -> None:
    _, model = bases(model_type, torch.float32)
    layer = next(i for i in (0, 1) if is_mixture(model_type, i))
    with pytest.raises(SiteError, match=r"mixture of experts.*steer ffn"):
        SteeringAdapter.from_units(model, "neuron", [layer], [3], [1.0])


# A mixture that is one throughout has no neuron at all.
CASES = [
    (model_type, component)
    for model_type in PATHS
    for component in COMPONENTS
    if places(model_type, component)
]


@pytest.mark.parametrize(("route", "dtype"), ROUTES_AND_DTYPES)
@pytest.mark.parametrize(("model_type", "component"), CASES)
def test_route_equals_the_truth(
    bases: Any,
    tmp_path: Path,
    route: Route,
    model_type: str,
    component: str,
    dtype: torch.dtype,
) -> None:
    base, model = bases(model_type, dtype)
    adapter = made(model, component)
    ids = prompts()
    with truth_hooks(model, component):
        truth = logits_of(model)(ids)
    if reason := refusal(route, model_type, (component,)):
        with pytest.raises(RouteError, match=reason):
            route(base, model, adapter, tmp_path / "out")
        return
    got = route(base, model, adapter, tmp_path / "out")(ids)

    tolerance = SCALE_OF_FLOAT32 * float(truth.abs().max())
    if route is fold:
        # The stored weights are rounded once more, which the truth must be, too.
        truth = logits_of(rounded(model, component, dtype))(ids)
    assert float((got - truth).abs().max()) <= tolerance
    effect = float((got - logits_of(model)(ids)).abs().max())
    assert effect > 10 * tolerance, "steered must differ from the base"


# An export takes seconds. The others are built like one of these.
EXPORTED = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox"),
    *("opt", "bloom", "gpt_neo"),
    *(
        ()
        if TRANSFORMERS_4
        else ("mpt", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")
    ),
)


@pytest.mark.skipif(not TRANSFORMERS_4, reason="right with transformers 5")
def test_mpt_is_not_exported_by_transformers_4(exported_base: Any) -> None:
    with pytest.raises(RouteError, match="export it with transformers"):
        exported_base("mpt")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        *(
            [(name, "chosen by a loop") for name in MIXTURES]
            if TRANSFORMERS_4
            else [("llama4_text", "complex numbers")]
        ),
        ("gemma3", "also reads images"),
    ],
)
def test_what_is_not_exported(exported_base: Any, model_type: str, reason: str) -> None:
    with pytest.raises(RouteError, match=f"{reason}.*fold into safetensors"):
        exported_base(model_type)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "component"),
    [(m, c) for m in EXPORTED for c in (*COMPONENTS, "layer") if places(m, c)],
)
def test_grafted_graph_equals_attached(
    exported_base: Any, tmp_path: Path, model_type: str, component: str
) -> None:
    pytest.importorskip("onnxruntime")
    from austeer.graphs import OnnxCausalLM, graft_file
    from austeer.graphs.custom_op import library_file

    model, graph = exported_base(model_type)
    adapter = made(model, component)
    ids = prompts()
    expected = attach(tmp_path, model, adapter, tmp_path)(ids)
    graft_file(graph, adapter, tmp_path / "steered.onnx")
    base = logits_of(model)(ids)
    # Another runtime sums in another order than torch does: more roundings than a reload.
    tolerance = 10 * SCALE_OF_FLOAT32 * float(expected.abs().max())
    ways = [False, True] if library_file() else [False]
    for kernels in ways:
        runner = OnnxCausalLM(tmp_path / "steered.onnx", threads=1, kernels=kernels)
        got = torch.from_numpy(runner.logits(ids.numpy()))
        assert float((got - expected).abs().max()) <= tolerance
        assert float((got - base).abs().max()) > 10 * tolerance


def stored_parts(
    stored: dict[str, Any], model_type: str, component: str, layer: int
) -> list[Any]:
    """As `parts_of`, of the arrays in a checkpoint."""
    attention, mlp = (path.format(i=layer) for path in PATHS[model_type])
    if model_type == "gemma3":
        attention, mlp = (
            path.replace("model.language_model", "language_model.model")
            for path in (attention, mlp)
        )
    if component == "ffn" and is_mixture(model_type, layer):
        block = MIXTURES[model_type][0] if model_type != "mixtral" else MIXTRAL_STORED
        found = list(experts_of(stored.items(), block.format(i=layer)))
        assert len(found) >= (2 if model_type in TRANSPOSED_EXPERTS else 4)
        return [units_last(name, x, model_type) for name, x in found]
    weight = stored[f"{attention if component == 'attention' else mlp}.weight"]
    along_rows = (component == "ffn") != (model_type == "gpt2")
    bias = [stored[f"{mlp}.bias"]] if component == "ffn" and f"{mlp}.bias" in stored else []
    return [weight.T if along_rows else weight, *bias]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("model_type", "component"), CASES)
def test_folded_weights_are_the_scaled_weights_bit_for_bit(
    bases: Any, tmp_path: Path, model_type: str, component: str, dtype: torch.dtype
) -> None:
    base, model = bases(model_type, dtype)
    before = {name: entry.read() for name, entry in Checkpoint(base).items()}
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    merge_checkpoint(base, made(model, component), tmp_path / "out")
    after = {name: entry.read() for name, entry in Checkpoint(tmp_path / "out").items()}

    for layer, unit, gamma in places(model_type, component):
        for part in stored_parts(before, model_type, component, layer):
            scaled = part[..., unit].astype("float64") * (1 + gamma)
            part[..., unit] = scaled.astype(part.dtype)
    assert before.keys() == after.keys()
    different = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    assert different == []
    assert files == {path.name: path.read_bytes() for path in base.iterdir()}


# Published checkpoints of these often are the bare base model's, without the first name.
BARE = {
    "bloom": "transformer.",
    "falcon": "transformer.",
    "gpt_neo": "transformer.",
    "mpt": "transformer.",
    "opt": "model.",
}


@pytest.mark.parametrize("model_type", BARE)
def test_checkpoint_without_the_prefix(bases: Any, tmp_path: Path, model_type: str) -> None:
    folder, model = bases(model_type, torch.float32)
    base = shutil.copytree(folder, tmp_path / "bare")
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix(BARE[model_type]): x for name, x in tensors.items()}
    assert not bare.keys() & {name for name in tensors if name.startswith(BARE[model_type])}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    adapter = SteeringAdapter.from_units(model, "ffn", LAYERS, UNITS, GAMMA)
    ids = prompts()
    with truth_hooks(model, "ffn"):
        truth = logits_of(model)(ids)
    got = fold(base, model, adapter, tmp_path / "out")(ids)
    assert float((got - truth).abs().max()) <= SCALE_OF_FLOAT32 * float(truth.abs().max())


@pytest.mark.parametrize("pair", [("attention", "neuron"), ("ffn", "neuron")])
@pytest.mark.parametrize("model_type", [m for m in PATHS if places(m, "neuron")])
@pytest.mark.parametrize("route", ROUTES[1:])
def test_two_components_compose(
    bases: Any, tmp_path: Path, route: Route, model_type: str, pair: tuple[str, str]
) -> None:
    base, model = bases(model_type, torch.float32)
    parts = [made(model, component) for component in pair]
    sites = [site for part in parts for site in part.sites]
    adapter = SteeringAdapter.from_sites(model, sites, parts[0].config.strength)
    ids = prompts()
    with truth_hooks(model, pair[0]), truth_hooks(model, pair[1]):
        truth = logits_of(model)(ids)
    if reason := refusal(route, model_type, pair):
        with pytest.raises(RouteError, match=reason):
            route(base, model, adapter, tmp_path / "out")
        return
    got = route(base, model, adapter, tmp_path / "out")(ids)
    tolerance = SCALE_OF_FLOAT32 * float(truth.abs().max())
    assert float((got - truth).abs().max()) <= tolerance


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_folded_model_decodes_like_the_attached_one(
    bases: Any, tmp_path: Path, model_type: str
) -> None:
    from transformers import AutoModelForCausalLM

    base, model = bases(model_type, torch.float32)
    adapter = SteeringAdapter.from_units(model, "neuron", LAYERS, UNITS, GAMMA)
    merge_checkpoint(base, adapter, tmp_path / "out")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    ids = prompts()
    mask = torch.ones_like(ids)
    with adapter.attached(model):
        expected = model.generate(ids, attention_mask=mask, **settings)
    plain = model.generate(ids, attention_mask=mask, **settings)
    got = folded.generate(ids, attention_mask=mask, **settings)
    assert got.tolist() == expected.tolist()
    assert got.tolist() != plain.tolist()


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_vision_language_model_with_an_image(
    bases: Any, tmp_path: Path, component: str
) -> None:
    """As users load the whole of it; what the vision part computes stays as it was."""
    from transformers import AutoModelForImageTextToText

    base, live = bases("gemma3", torch.float32)
    merge_checkpoint(base, made(live, component), tmp_path / "out")
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[1, 36, 38, 38, 38, 38, 37, *range(5, 15)]])
    inputs = {"input_ids": ids, "pixel_values": image, "token_type_ids": (ids == 38).long()}

    def run(model: Any, **changes: Any) -> Tensor:
        with torch.no_grad():
            return model(**(inputs | changes)).logits

    whole, folded = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (base, tmp_path / "out")
    )
    with truth_hooks(whole, component):
        truth = run(whole)
        other = run(whole, pixel_values=-image)
    tolerance = SCALE_OF_FLOAT32 * float(truth.abs().max())
    assert float((run(folded) - truth).abs().max()) <= tolerance
    assert float((run(folded) - run(whole)).abs().max()) > 10 * tolerance
    assert float((truth - other).abs().max()) > 10 * tolerance, "the image must be seen"


def test_real_model(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = shared / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapter = SteeringAdapter.from_units(model, "attention", LAYERS, UNITS, GAMMA)
    ids = tokenizer("Once upon a time, Tom felt very sad.", return_tensors="pt")["input_ids"]
    with truth_hooks(model, "attention"):
        truth = logits_of(model)(ids)
    got = fold(base, model, adapter, tmp_path / "out")(ids)
    assert float((got - truth).abs().max()) <= 1e-4
    assert float((got - logits_of(model)(ids)).abs().max()) > 0.1
