"""`SteeringAdapter`: made, saved, loaded, attached; malformed ones refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import attacked, changed_bytes, changed_json, memory_limit, safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from austeer.adapters import (
    AdapterError,
    Component,
    ModelError,
    OutputError,
    Predictor,
    Site,
    SiteError,
    SteeredSite,
    SteeringAdapter,
    Strength,
)

WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(3, 15).reshape(2, 6)


def make(model: Any, component: str = "ffn") -> SteeringAdapter:
    # Units of layer 0 are given out of order on purpose.
    return SteeringAdapter.from_units(
        model, component, [1, 0, 0], [4, 9, 2], [0.1, -1.7, 1 / 3]
    )


def adaptive(model: Any, k: int = 3, r: int = 2) -> SteeringAdapter:
    rng = np.random.default_rng(0)
    shapes = ((k, r), (r,), (r, k))
    predictor = Predictor(*(rng.normal(size=s).astype(np.float32) for s in shapes))
    gamma = rng.normal(size=k).astype(np.float32)
    site = SteeredSite(Site(1, Component.LAYER), np.arange(k) * 2, gamma, predictor)
    return SteeringAdapter.from_sites(model, [site], Strength.ADAPTIVE, fit={"seed": 3})


def steered_logits(model: Any, adapter: SteeringAdapter, scale: float = 1.0) -> Any:
    with torch.no_grad(), adapter.attached(model, scale):
        return model(IDS).logits


def hook_count(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", [*Component, "adaptive"])
def test_round_trip_is_bit_for_bit(
    tiny_model: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    model = tiny_model("llama")
    adapter = adaptive(model) if kind == "adaptive" else make(model, kind)
    assert adapter.save_pretrained(tmp_path / "a") == tmp_path / "a"
    loaded = SteeringAdapter.from_pretrained(tmp_path / "a")
    assert loaded.config == adapter.config
    before, after = adapter.tensors(), loaded.tensors()
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].tobytes() == after[name].tobytes()
    assert torch.equal(steered_logits(model, loaded), steered_logits(model, adapter))
    assert not torch.equal(steered_logits(model, loaded), model(IDS).logits)
    loaded.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_files_are_those_of_the_format(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    adaptive(tiny_model("llama")).save_pretrained(tmp_path / "a")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["README.md", "adapter_config.json", WEIGHTS]
    shapes = {
        n: (t.dtype.name, t.shape) for n, t in load_file(tmp_path / "a" / WEIGHTS).items()
    }
    assert shapes == {
        "layers.1.layer.index": ("int64", (3,)),
        "layers.1.layer.gamma": ("float32", (3,)),
        "layers.1.layer.V": ("float32", (3, 2)),
        "layers.1.layer.b": ("float32", (2,)),
        "layers.1.layer.U": ("float32", (2, 3)),
    }
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["k"], config["rank"], config["fit"]) == (3, 2, {"seed": 3})


def test_units_are_grouped_by_site(tiny_model: Callable[..., Any]) -> None:
    adapter = make(tiny_model("llama"))
    found = [(s.site.key, s.index.tolist(), s.gamma.tolist()) for s in adapter.sites]
    third, tenth, most = (float(np.float32(x)) for x in (1 / 3, 0.1, -1.7))
    assert found == [
        ("layers.0.ffn", [2, 9], [third, most]),
        ("layers.1.ffn", [4], [tenth]),
    ]
    assert adapter.config.k == 3 and adapter.config.components == (Component.FFN,)


def test_hooks_are_gone_after_the_context_and_after_an_exception(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model("llama")
    plain = model(IDS).logits
    with make(model).attached(model):
        assert hook_count(model) == 2
    assert hook_count(model) == 0
    with pytest.raises(ValueError, match="mine"), make(model).attached(model):
        raise ValueError("mine")
    assert hook_count(model) == 0 and torch.equal(model(IDS).logits, plain)


def test_scale_is_a_factor_on_gamma(tiny_model: Callable[..., Any]) -> None:
    model, adapter = tiny_model("llama"), make(tiny_model("llama"))
    assert torch.equal(steered_logits(model, adapter, 0.0), model(IDS).logits)
    half = steered_logits(model, adapter, 0.5)
    assert torch.equal(half, steered_logits(model, adapter.scaled(0.5)))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("layers", "units", "gamma", "message"),
    [
        ([0], [32], [1.0], "unit 32 outside width 32"),
        ([0], [-1], [1.0], "unit -1 is negative"),
        ([2], [0], [1.0], "layer 2 outside the model's 2 layers"),
        ([-1], [0], [1.0], "layer -1 outside"),
        ([0, 0], [5, 5], [1.0, 2.0], "unit 5 is given 2 times"),
        (0, 5, 1.0, r"expected lists .* arrays of shape \(\), \(\), \(\)"),
        ([0, 0], [5], [1.0], "equally many layers, units and gammas, got 2, 1, 1"),
        ([0], [5], [float("nan")], "NaN or infinity"),
        ([], [], [], "at least one steered unit"),
        ([0], [1.9], [1.0], "layers.0.ffn: expected whole unit numbers, got float64"),
        ([0.7], [1], [1.0], "expected whole layer numbers, got float64"),
    ],
)
def test_bad_units(
    tiny_model: Callable[..., Any], layers: Any, units: Any, gamma: Any, message: str
) -> None:
    with pytest.raises(SiteError, match=message) as error:
        SteeringAdapter.from_units(tiny_model("llama"), "ffn", layers, units, gamma)
    assert "\n" not in str(error.value)


@pytest.mark.unchecked
def test_dtypes_of_the_caller_are_those_of_the_file(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    """float64 gammas attached as they are would steer otherwise than after a reload."""
    model = tiny_model("llama")
    site = SteeredSite(Site(0, Component.FFN), np.array([1, 2], np.int32), np.array([0.1, 0.2]))
    adapter = SteeringAdapter.from_sites(model, [site], Strength.FITTED)
    assert (site.index.dtype, site.gamma.dtype) == (np.int64, np.float32)
    loaded = SteeringAdapter.from_pretrained(adapter.save_pretrained(tmp_path / "adapter"))
    assert torch.equal(steered_logits(model, adapter), steered_logits(model, loaded))
    with pytest.raises(SiteError, match="expected whole unit numbers, got float64"):
        SteeredSite(Site(0, Component.FFN), np.array([1.9]), np.array([0.1]))


def test_same_unit_in_two_layers_is_fine(tiny_model: Callable[..., Any]) -> None:
    adapter = SteeringAdapter.from_units(tiny_model("llama"), "ffn", [0, 1], [5, 5], [1, 1])
    assert adapter.config.k == 2


def test_unknown_component_and_architecture(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    with pytest.raises(SiteError, match="'heart': expected one of attention, ffn, neuron"):
        make(model, "heart")
    model.config.model_type = "bert"
    with pytest.raises(ModelError, match="'bert': not supported"):
        make(model)


def test_another_base_is_refused_with_both_digests_unless_forced(
    tiny_model: Callable[..., Any],
) -> None:
    adapter, other = make(tiny_model("llama")), tiny_model("llama", seed=1)
    with pytest.raises(AdapterError) as error, adapter.attached(other):
        pytest.fail("the body must not run")
    digests = [
        make(model).config.base_model_fingerprint for model in (tiny_model("llama"), other)
    ]
    assert all(digest in str(error.value) for digest in digests)
    assert hook_count(other) == 0
    with adapter.attached(other, force=True):
        assert hook_count(other) == 2
    wanted, mistral = "for a llama model, this one is mistral", tiny_model("mistral")
    with pytest.raises(AdapterError, match=wanted), adapter.attached(mistral, force=True):
        pytest.fail("the body must not run")


def test_a_base_in_float16_is_told_why(tiny_model: Callable[..., Any]) -> None:
    """Its weights have been rounded to fewer powers of two than bfloat16 has."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e-6
    adapter = make(model)
    wanted = "load it in float32"
    with pytest.raises(AdapterError, match=wanted) as error, adapter.attached(model.half()):
        pytest.fail("the body must not run")
    assert "\n" not in str(error.value)


@pytest.fixture
def saved(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    return make(tiny_model("llama")).save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"format_version": 99}, "format_version 99"),
        ({"k": 4}, "config says k = 4, the tensors hold 3"),
        (
            {"components": ["attention"]},
            "components attention, the tensors hold ffn",
        ),
        ({"strength": "adaptive", "rank": 1}, "config says predictor rank 1"),
    ],
)
def test_config_that_does_not_fit(saved: Path, changes: dict[str, Any], message: str) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AdapterError, match=message) as error:
        SteeringAdapter.from_pretrained(saved)
    assert "\n" not in str(error.value)


GOOD = {
    "layers.0.ffn.index": np.array([2, 9], np.int64),
    "layers.0.ffn.gamma": np.array([1.0, 2.0], np.float32),
    "layers.1.ffn.index": np.array([4], np.int64),
    "layers.1.ffn.gamma": np.array([3.0], np.float32),
}


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.0.ffn.index": np.array([2, 2], np.int64)}, "unit 2 is given 2 times"),
        ({"layers.0.ffn.index": np.array([-1, 2], np.int64)}, "negative"),
        ({"layers.0.ffn.index": np.array([1, 2, 3], np.int64)}, "as many gammas as units"),
        ({"layers.0.ffn.index": np.array([1, 2], np.int32)}, "expected int64, found int32"),
        ({"layers.0.ffn.gamma": np.array([1.0, 2.0])}, "expected float32, found float64"),
        ({"layers.0.ffn.gamma": np.array([1, np.nan], np.float32)}, "NaN or infinity"),
        ({"layers.0.ffn.V": np.ones((2, 1), np.float32)}, "or index, gamma, V, b and U"),
        ({"layers.0.ffn.extra": np.ones(1, np.float32)}, "expected tensors index and gamma"),
        ({"layers.0.head.index": np.array([1], np.int64)}, r"layers\.<number>"),
        ({"weight": np.ones(1, np.float32)}, r"'weight': expected layers\.<number>"),
        ({"layers.0.ffn.index": np.zeros(0, np.int64)}, "as many gammas as units"),
        ({"layers.0.ffn.index": np.array(3)}, "as many gammas as units"),
        ({"layers.0.ffn.gamma": np.array([1, -np.inf], np.float32)}, "NaN or infinity"),
        ({"layers.00.ffn.index": np.array([1], np.int64)}, r"layers\.<number>"),
        ({"layers." + "9" * 900 + ".ffn.index": np.array([1])}, r"layers\.<number>"),
        ({"..": np.ones(1, np.float32)}, r"layers\.<number>"),
    ],
)
def test_tampered_tensors(saved: Path, changes: dict[str, Any], message: str) -> None:
    save_file(GOOD | changes, saved / WEIGHTS)
    with pytest.raises(AdapterError, match=message) as error:
        SteeringAdapter.from_pretrained(saved)
    assert str(saved / WEIGHTS) in str(error.value) and "\n" not in str(error.value)


def test_weights_beyond_any_adapter_are_not_read(saved: Path) -> None:
    size = 1 << 36
    header = {
        "layers.0.ffn.index": {"dtype": "I64", "shape": [size // 8], "data_offsets": [0, size]}
    }
    (saved / WEIGHTS).write_bytes(safetensors(header))
    with (saved / WEIGHTS).open("r+b") as stream:
        stream.truncate(stream.seek(0, 2) + size)  # sparse
    with memory_limit(1 << 30), pytest.raises(AdapterError, match="more than any adapter"):
        SteeringAdapter.from_pretrained(saved)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("sites", [1, 32, 4000])
def test_a_million_units(saved: Path, sites: int) -> None:
    rng = np.random.default_rng(0)
    k = 1_000_000 // sites
    tensors = {}
    for layer in range(sites):
        # Not in order: that is no reason to refuse them.
        tensors[f"layers.{layer}.ffn.index"] = rng.permutation(k)
        tensors[f"layers.{layer}.ffn.gamma"] = rng.normal(size=k).astype(np.float32)
    save_file(tensors, saved / WEIGHTS)
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"k": k * sites}))
    with memory_limit(1 << 28):
        adapter = SteeringAdapter.from_pretrained(saved)
    assert adapter.config.k == sum(len(s.index) for s in adapter.sites) == 1_000_000
    assert adapter.sites[0].index.tolist() == tensors["layers.0.ffn.index"].tolist()


def test_units_in_any_order_steer_alike(tiny_model: Callable[..., Any], saved: Path) -> None:
    model = tiny_model("llama")
    before = SteeringAdapter.from_pretrained(saved)
    tensors = load_file(saved / WEIGHTS)
    for part in ("index", "gamma"):
        tensors[f"layers.0.ffn.{part}"] = tensors[f"layers.0.ffn.{part}"][::-1].copy()
    save_file(tensors, saved / WEIGHTS)
    after = SteeringAdapter.from_pretrained(saved)
    assert after.sites[0].index.tolist() == before.sites[0].index.tolist()[::-1] == [9, 2]
    assert torch.equal(steered_logits(model, after), steered_logits(model, before))


STORED = {
    name: {"dtype": dtype, "shape": [size], "data_offsets": [begin, begin + size * width]}
    for name, dtype, size, begin, width in (
        ("layers.0.ffn.index", "I64", 2, 0, 8),
        ("layers.0.ffn.gamma", "F32", 2, 16, 4),
        ("layers.1.ffn.index", "I64", 1, 24, 8),
        ("layers.1.ffn.gamma", "F32", 1, 32, 4),
    )
}
NUMBERS = b"".join(array.tobytes() for array in GOOD.values())


@pytest.mark.unchecked
@attacked
@given(
    raw=changed_json(STORED).map(lambda header: safetensors(header, NUMBERS))
    | changed_bytes(safetensors(STORED, NUMBERS))
    | st.binary(min_size=36, max_size=36).map(lambda data: safetensors(STORED, data))
)
def test_changed_weights(saved: Path, raw: bytes) -> None:
    (saved / WEIGHTS).write_bytes(raw)
    try:
        adapter = SteeringAdapter.from_pretrained(saved)
    except AdapterError as error:
        assert str(error).isprintable()
        return
    for steered in adapter.sites:
        assert np.isfinite(steered.gamma).all() and (steered.index >= 0).all()
        assert len(set(steered.index.tolist())) == len(steered.index) == len(steered.gamma)
    assert adapter.config.k == 3


def test_the_header_under_attack_is_that_of_a_good_adapter(saved: Path) -> None:
    (saved / WEIGHTS).write_bytes(safetensors(STORED, NUMBERS))
    found = SteeringAdapter.from_pretrained(saved).tensors()
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in GOOD.items()
    }


def test_missing_gamma(saved: Path) -> None:
    save_file(
        {name: t for name, t in GOOD.items() if name != "layers.1.ffn.gamma"}, saved / WEIGHTS
    )
    with pytest.raises(AdapterError, match=r"layers\.1\.ffn: expected tensors index and gamma"):
        SteeringAdapter.from_pretrained(saved)


def test_truncated_or_missing_weights(saved: Path) -> None:
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(AdapterError, match="corrupt or truncated"):
        SteeringAdapter.from_pretrained(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="complete adapter directory"):
        SteeringAdapter.from_pretrained(saved)


@pytest.mark.parametrize("name", ["owner/na me", "owner/--x", "owner/a\nb", "owner/\0"])
def test_names_that_the_hub_cannot_have(name: str) -> None:
    with pytest.raises(AdapterError) as error:
        SteeringAdapter.from_pretrained(name)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "no-slash", "a/b/c"])
def test_names_that_are_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(AdapterError, match="found neither"):
        SteeringAdapter.from_pretrained(name)


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AdapterError, match="the Hub did not give it") as error:
        SteeringAdapter.from_pretrained("someone/no-such-adapter")
    assert "\n" not in str(error.value)


def test_saving_over_something_is_refused(tiny_model: Callable[..., Any], saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(OutputError, match="not empty"):
        make(tiny_model("llama")).save_pretrained(saved)
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_one_site_twice_is_refused(tiny_model: Callable[..., Any]) -> None:
    adapter = make(tiny_model("llama"))
    with pytest.raises(AdapterError, match="a site is given twice"):
        SteeringAdapter(adapter.config, [*adapter.sites, adapter.sites[0]])


def test_saved_files_are_readable_by_others(
    tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    adapter = SteeringAdapter.from_units(tiny_model("llama"), "attention", [0], [1], [0.5])
    adapter.save_pretrained(tmp_path / "adapter")
    plain = tmp_path / "plain"
    plain.touch()
    modes = {path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}
    assert modes == {plain.stat().st_mode}


def test_weights_are_hashed_once_until_they_change(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from austeer.adapters import adapter as module

    model = tiny_model("llama")
    made = SteeringAdapter.from_units(model, "attention", [0], [3], [0.5])
    calls: list[int] = []
    real = module.fingerprint
    monkeypatch.setattr(module, "fingerprint", lambda *a: (calls.append(1), real(*a))[1])
    for _ in range(3):
        with made.attached(model):
            pass
    assert len(calls) == 1
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.add_(1.0)
    with pytest.raises(AdapterError, match="another base model"), made.attached(model):
        pass
    with made.attached(model, force=True):
        pass
    with pytest.raises(AdapterError, match="another base model"), made.attached(model):
        pass


def test_an_adapter_can_be_pickled(tiny_model: Any) -> None:
    import pickle

    model = tiny_model("llama")
    made = SteeringAdapter.from_units(model, "attention", [0], [3], [0.5])
    with made.attached(model):
        copy = pickle.loads(pickle.dumps(made))
    assert copy.config == made.config
    assert copy.tensors().keys() == made.tensors().keys()
    with copy.attached(model):
        pass


def test_a_write_through_data_is_noticed(tiny_model: Any) -> None:
    model = tiny_model("gpt2")
    made = SteeringAdapter.from_units(model, "ffn", [0], [3], [0.5])
    with made.attached(model):
        pass
    model.transformer.h[0].mlp.c_proj.bias.data.mul_(3.0)
    with pytest.raises(AdapterError, match="another base model"), made.attached(model):
        pass


def test_a_scaled_adapter_does_not_claim_the_fits_figures(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    site = make(tiny_model("llama")).sites[0]
    fit = {"test": {"kl": 0.05}, "validation": {"kl": 0.04}, "seed": 3}
    model = tiny_model("llama")
    whole = SteeringAdapter.from_sites(model, [site], Strength.ORIENTED, 2.0, fit)
    assert whole.scaled(1.0).config == whole.config
    half = SteeringAdapter.from_pretrained(whole.scaled(0.5).save_pretrained(tmp_path / "half"))
    assert half.config.fit == {"seed": 3, "scaled_by": 0.5} and half.config.alpha == 1.0
    assert np.array_equal(half.sites[0].gamma, site.gamma / 2)
    assert half.scaled(4.0).config.fit["scaled_by"] == 2.0
    assert "0.05" not in (tmp_path / "half" / "README.md").read_text()


def test_a_revision_of_a_local_folder_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterError, match="revision 'v1' is one of the Hub"):
        SteeringAdapter.from_pretrained(saved, revision="v1")
