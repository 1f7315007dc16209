"""Model directories: what loads, and one clear line for each that cannot."""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from austeer.adapters import (
    ContrastivePair,
    ModelError,
    SteeringAdapter,
    load_model,
    load_tokenizer,
    localize,
)
from austeer.adapters.model_directory import model_directory

SaveModel = Callable[..., Path]
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox")


def refusal(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_weight(folder: Path, name: str) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    edit_weights(folder, drop)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_weights_arrive_bit_for_bit(
    saved_model: SaveModel, tiny_model: Callable[..., Any], model_type: str
) -> None:
    folder = saved_model(model_type)
    model = load_model(folder)
    wanted = tiny_model(model_type).state_dict()
    assert set(model.state_dict()) == set(wanted)
    assert all(torch.equal(model.state_dict()[name], wanted[name]) for name in wanted)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.name_or_path == str(folder)


def test_shards_and_tied_weights(saved_model: SaveModel, tiny_model: Any) -> None:
    folder = saved_model("llama", tie_word_embeddings=True, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = load_model(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    ids = torch.tensor([[1, 5, 9]])
    wanted = tiny_model("llama", tie_word_embeddings=True)(ids).logits
    assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16", torch.float16])
def test_dtype(saved_model: SaveModel, asked: str | torch.dtype | None) -> None:
    folder = saved_model("llama")
    own = torch.bfloat16
    edit_weights(
        folder, lambda tensors: tensors.update({k: v.to(own) for k, v in tensors.items()})
    )
    edit_config(folder, dtype="bfloat16")
    model = load_model(folder, dtype=asked)
    named = getattr(torch, asked) if isinstance(asked, str) else asked
    assert model.dtype == (named or own)


def test_unknown_dtype_and_device(saved_model: SaveModel) -> None:
    folder = saved_model()
    for dtype in ("float8", torch.int8, 3):
        assert "expected one of float32, bfloat16" in refusal(load_model, folder, dtype=dtype)
    for device in ("warp", "meta", "cuda:99", "cpu:x"):
        message = refusal(load_model, folder, device=device)
        assert repr(device) in message and "usable: cpu" in message


def test_loading_is_silent_and_leaves_logging_alone(
    saved_model: SaveModel, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as their_logging

    folder = saved_model()
    # The first of these would print a report, the second a warning.
    edit_weights(folder, lambda tensors: tensors.update({"extra.weight": torch.ones(2)}))
    edit_config(folder, bos_token_id=77, unheard_of=1)
    before = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    capfd.readouterr()
    load_model(folder)
    load_tokenizer(folder)
    drop_weight(folder, "model.norm.weight")
    refusal(load_model, folder)
    assert capfd.readouterr() == ("", "")
    assert (their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()) == before


def test_missing_directory(tmp_path: Path) -> None:
    for name in (tmp_path / "none", "./none", "a/b/c", "../none", "~/none", ""):
        assert "expected a model directory" in refusal(load_model, name)
    assert "expected a model directory" in refusal(load_tokenizer, tmp_path / "none")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    for load in (load_model, load_tokenizer):
        assert "revision 'v7' is one of the Hub" in refusal(load, tmp_path, revision="v7")


def test_file_instead_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "found a file" in refusal(load_model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "not a name/x", "a--b/c"])
def test_not_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(load_model, name, revision="v7")
    assert name in message and "v7" in message


def test_hub_snapshot_leaves_pickles_and_code_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fnmatch import fnmatch

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert model_directory("owner/name", "main") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", "main")

    def wanted(file: str) -> bool:
        return any(fnmatch(file, p) for p in asked["allow_patterns"]) and not any(
            fnmatch(file, p) for p in asked["ignore_patterns"]
        )

    for file in ("config.json", "model-1.safetensors", "tokenizer.model", "merges.txt"):
        assert wanted(file)
    for file in ("pytorch_model.bin", "modeling_x.py", "onnx/a.json", "x.gguf", "x.pt"):
        assert not wanted(file)


def test_no_config(saved_model: SaveModel) -> None:
    folder = saved_model()
    (folder / "config.json").unlink()
    assert "config.json" in refusal(load_model, folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff"])
def test_config_is_not_a_json_object(saved_model: SaveModel, text: bytes) -> None:
    folder = saved_model()
    (folder / "config.json").write_bytes(text)
    assert "config.json: " in refusal(load_model, folder)


def test_unsupported_architecture_is_named(saved_model: SaveModel) -> None:
    folder = saved_model()
    edit_config(folder, model_type="t5")
    message = refusal(load_model, folder)
    assert "'t5'" in message and "llama" in message and "architectures.py" in message
    edit_config(folder, model_type=None)
    assert "None" in refusal(load_model, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 7},
        {"hidden_size": "wide"},
        {"num_hidden_layers": -1},
        {"hidden_act": "no_such_activation"},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 10**8},
        {"num_hidden_layers": 10**40},
        {"hidden_size": 10**12},
        {"vocab_size": 10**15},
        {"model_type": ["llama"]},
        {"model_type": {"llama": 1}},
        {"rope_scaling": [[[[1]]]]},
    ],
)
@pytest.mark.timeout(60)
def test_config_with_impossible_values(saved_model: SaveModel, change: dict[str, Any]) -> None:
    folder = saved_model()
    edit_config(folder, **change)
    assert str(folder) in refusal(load_model, folder)


def test_config_without_weights(saved_model: SaveModel) -> None:
    folder = saved_model()
    (folder / "model.safetensors").unlink()
    assert "found no weights" in refusal(load_model, folder)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_pickles_are_never_opened(saved_model: SaveModel, tmp_path: Path) -> None:
    folder, marker = saved_model(), tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(marker)))
    load_model(folder)
    (folder / "model.safetensors").unlink()
    assert "only pickle weights" in refusal(load_model, folder)
    assert not marker.exists()


def test_code_beside_the_model_does_not_run(saved_model: SaveModel, tmp_path: Path) -> None:
    folder, marker = saved_model(), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    edit_config(
        folder, auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    )
    load_model(folder)
    load_tokenizer(folder)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [4, 100, 10_000])
def test_truncated_weights(saved_model: SaveModel, keep: int) -> None:
    folder = saved_model()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "corrupt or truncated" in refusal(load_model, folder)


def test_missing_shard(saved_model: SaveModel) -> None:
    folder = saved_model("llama", max_shard_size="20KB")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    message = refusal(load_model, folder)
    assert victim.name in message and "missing" in message


def test_missing_tensors_are_not_made_up(saved_model: SaveModel) -> None:
    folder = saved_model()
    drop_weight(folder, "model.layers.1.mlp.up_proj.weight")
    assert "model.layers.1.mlp.up_proj.weight" in refusal(load_model, folder)
    edit_config(folder, num_hidden_layers=3)
    assert "more" in refusal(load_model, folder)


def test_wrong_shape(saved_model: SaveModel) -> None:
    folder = saved_model()
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(3, 3)}))
    message = refusal(load_model, folder)
    assert name in message and "(3, 3)" in message and "(48, 32)" in message


def test_tokenizer(saved_model: SaveModel) -> None:
    assert load_tokenizer(saved_model())("Tom felt happy")["input_ids"][0] == 1


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_no_tokenizer(saved_model: SaveModel, model_type: str) -> None:
    folder = saved_model(model_type)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in refusal(load_tokenizer, folder)


@pytest.mark.parametrize("text", [b"", b"{", b"{}", b"[]", b"\xff\xfe"])
def test_malformed_tokenizer(saved_model: SaveModel, text: bytes) -> None:
    folder = saved_model()
    (folder / "tokenizer.json").write_bytes(text)
    assert str(folder) in refusal(load_tokenizer, folder)


def test_interrupted_load_restores_logging(
    saved_model: SaveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as their_logging

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = their_logging.get_verbosity()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_model(saved_model())
    assert their_logging.get_verbosity() == before != logging.CRITICAL


# Two layers of a tiny model of which the second, and what is behind it, stays on disk.
OFFLOADED = {
    "llama": {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
              "model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"},
    "gpt2": {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "cpu",
             "transformer.h.1": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"},
}  # fmt: skip


@pytest.mark.parametrize("model_type", list(OFFLOADED))
@pytest.mark.parametrize("layout", ["packed", "tree", "plain"])
def test_an_offloaded_model_scores_as_a_whole_one(
    saved_model: SaveModel, tiny_tokenizer: Any, model_type: str, layout: Any
) -> None:
    pytest.importorskip("accelerate")
    folder = saved_model(model_type, tie_word_embeddings=False)
    pairs = [ContrastivePair(f"Tom {verb} so", " happy", " sad !") for verb in ("was", "felt")]
    found = []
    for device_map in (None, {"": "cpu"}, OFFLOADED[model_type]):
        model = load_model(folder, device_map=device_map)
        assert any(p.is_meta for p in model.parameters()) == (device_map in OFFLOADED.values())
        ranking = localize(model, tiny_tokenizer, pairs, layout=layout)
        found.append((ranking, model))
    whole, *others = found
    for ranking, model in others:
        assert ranking.info == whole[0].info, "the fingerprint reads offloaded weights"
        for name in ranking.components:
            mine, theirs = ranking.counts(name), whole[0].counts(name)
            for part in mine.__slots__:
                assert getattr(mine, part).tobytes() == getattr(theirs, part).tobytes()
        ids = torch.tensor([[1, 5, 9, 7]])
        with steered(whole[1]), torch.no_grad():
            wanted = whole[1](ids).logits
        with steered(model), torch.no_grad():
            assert torch.equal(model(ids).logits, wanted)


def steered(model: Any) -> Any:
    units = {"layers": [0, 1], "units": [3, 5], "gamma": [1.0, -0.5]}
    return SteeringAdapter.from_units(model, "neuron", **units).attached(model)


def test_unusable_device_maps(saved_model: SaveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_model()
    assert "give one of the two" in refusal(
        load_model, folder, device="meta:0", device_map="auto"
    )
    if importlib.util.find_spec("accelerate"):
        said = refusal(load_model, folder, device_map={"": "disk"})
        # transformers 4.57 refuses a map to disk alone before we can.
        ours = int(transformers.__version__.split(".")[0]) >= 5
        expected = "offloads the token embedding" if ours else "cannot load the model"
        assert expected in said
        assert "transformers cannot load" in refusal(load_model, folder, device_map="sideways")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install accelerate" in refusal(load_model, folder, device_map="auto")


@pytest.mark.shared
def test_real_model(shared: Path) -> None:
    model = load_model(shared / "models" / "stories260K")
    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    ids = tokenizer("Once upon a time, there was a little")["input_ids"]
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.decode(ids[-4:]).strip().startswith("girl")
