"""`adapter_config.json`: what is written comes back; what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hostile import BOMB, attacked, changed_json
from hypothesis import given

from austeer.adapters import AdapterConfig, AdapterError, Component, Strength
from austeer.adapters.card import adapter_card
from austeer.adapters.config import figures_of_test

DIGEST = "sha256:" + "0123456789abcdef" * 4


def config(**changes: Any) -> AdapterConfig:
    facts: dict[str, Any] = {
        "base_model_name_or_path": "someone/model",
        "base_model_fingerprint": DIGEST,
        "model_type": "llama",
        "components": (Component.ATTENTION, Component.FFN),
        "strength": Strength.FITTED,
        "k": 3,
    }
    return AdapterConfig(**facts | changes)


def stored(**changes: Any) -> dict[str, Any]:
    """The JSON of a good config, with changes; None removes a key."""
    values: dict[str, Any] = {
        "alpha": None,
        "base_model_fingerprint": DIGEST,
        "base_model_name_or_path": "someone/model",
        "components": ["attention", "ffn"],
        "fit": {},
        "format_version": 1,
        "k": 3,
        "model_type": "llama",
        "peft_type": "AUSTEER",
        "rank": 0,
        "revision": None,
        "strength": "fitted",
        "versions": {},
    }
    values |= changes
    return {name: value for name, value in values.items() if value != "absent"}


def test_file_has_the_documented_keys(tmp_path: Path) -> None:
    config(versions={}).save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == stored()


def test_saved_config_comes_back(tmp_path: Path) -> None:
    written = config(
        strength=Strength.ADAPTIVE,
        rank=2,
        alpha=1.5,
        revision="main",
        fit={"test": {"kl": 0.05}, "pairs": "sha256:x"},
    )
    written.save(tmp_path)
    assert AdapterConfig.load(tmp_path) == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2, this release reads 1"),
        ({"format_version": "absent"}, "format_version None"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"strength": "absent"}, "key 'strength' is missing"),
        ({"components": "absent"}, "key 'components' is missing"),
        ({"k": "absent"}, "key 'k' is missing"),
        ({"format_version": True}, "format_version True, this release reads 1"),
        ({"components": ["ffn", "ffn"]}, "components: expected each one once"),
        ({"alpha": "strong"}, "alpha: expected a finite number or null, found 'strong'"),
        ({"alpha": float("inf")}, "alpha: expected a finite number or null, found inf"),
        ({"revision": 7}, "revision: expected a string or null, found 7"),
        ({"fit": [1]}, r"fit: expected an object, found \[1\]"),
        ({"versions": 3}, "versions: expected an object, found 3"),
        ({"strength": "brute"}, "strength: expected one of .* found 'brute'"),
        ({"components": ["heart"]}, "components: expected one of .* found 'heart'"),
        ({"components": []}, "components: expected at least one"),
        ({"components": 3}, "components: expected a list, found 3"),
        (
            {"peft_type": "LORA", "format_version": "absent"},
            "peft_type: expected AUSTEER, found 'LORA'",
        ),
        ({"base_model_fingerprint": "sha256:short"}, "64 hex digits"),
        ({"base_model_fingerprint": None}, "64 hex digits"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path: expected a string"),
        ({"model_type": None}, "model_type: expected a string"),
        ({"k": 0}, "k: expected a positive integer, found 0"),
        ({"k": True}, "k: expected a positive integer, found True"),
        ({"k": 2.5}, "k: expected a positive integer, found 2.5"),
        ({"rank": -1}, "rank: expected an integer"),
        ({"rank": 1}, "exactly for strength adaptive"),
        ({"strength": "adaptive"}, "exactly for strength adaptive"),
        ({"alpha": 10**400}, "alpha: expected a finite number or null"),
        ({"alpha": float("nan")}, "alpha: expected a finite number or null, found nan"),
        ({"base_model_name_or_path": "a\nb"}, "base_model_name_or_path: expected printable"),
        ({"base_model_name_or_path": "\ud800"}, "base_model_name_or_path: expected printable"),
        ({"model_type": "\x1b[2J"}, "model_type: expected printable text"),
        ({"revision": "\0"}, "revision: expected printable text"),
        ({"fit": {"kl": float("nan")}}, "fit: expected what JSON can hold"),
        ({"fit": {"kl": [float("inf")]}}, "fit: expected what JSON can hold"),
        ({"fit": {"\ud800": 1}}, "fit: expected what JSON can hold"),
        ({"versions": {"a": "\udfff"}}, "versions: expected what JSON can hold"),
        ({"k": 10**4000, "rank": -1}, "rank: expected an integer"),
        ({"rank": [[["x"] * 9] * 9] * 9}, "rank: expected an integer"),
        (
            {"strength": {"a": ["b"]}},
            "strength: expected one of paper, oriented, fitted, adaptive",
        ),
        ({"strength": "strong"}, "strength: expected one of paper, .*, found 'strong'"),
        ({"components": [{"a": 1}]}, "components: expected one of attention, ffn"),
        ({"components": "attention"}, "components: expected a list, found 'attention'"),
        ({"\n\x1b": 1}, "unknown key"),
        ({"x" * 10**6: 1}, "unknown key 'xxx"),
    ],
)
def test_bad_values_are_named_with_the_file(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(stored(**changes)))
    with pytest.raises(AdapterError, match=message) as error:
        AdapterConfig.load(tmp_path)
    shown = str(error.value)
    assert shown.startswith(f"{path}: ") and shown.isprintable() and len(shown) < 2100


@pytest.mark.parametrize(
    "path",
    [
        "/home/u/モデル\u3000一",
        "/home/u/می\u200cخواهم",
        "/home/u/Models\u00a0LLM",
        "/data/👩\u200d🔬/llama",
        "/data/\ufeffllama",
    ],
)
def test_paths_of_every_language(tmp_path: Path, path: str) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(stored(base_model_name_or_path=path))
    )
    loaded = AdapterConfig.load(tmp_path)
    loaded.save(tmp_path)
    assert AdapterConfig.load(tmp_path).base_model_name_or_path == path


@pytest.mark.parametrize("character", ["\0", "\x7f", "\x9b", "\u2028", "\u2029", "\udcff"])
def test_characters_that_a_path_must_not_have(tmp_path: Path, character: str) -> None:
    values = stored(base_model_name_or_path=f"a{character}b")
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="base_model_name_or_path: expected printable text"):
        AdapterConfig.load(tmp_path)


@attacked
@given(values=changed_json(stored(fit={"test": {"kl": 0.1, "kl_ci95": [0.0, 0.2]}, "x": [{}]})))
def test_changed_configs(tmp_path: Path, values: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    try:
        loaded = AdapterConfig.load(tmp_path)
    except AdapterError as error:
        assert str(error).isprintable()
        return
    # What was accepted can be shown, and written again.
    adapter_card(loaded).encode()
    loaded.save(tmp_path)
    assert AdapterConfig.load(tmp_path) == loaded


def test_figures_leave_out_what_a_stranger_wrote() -> None:
    good = {"kl": 0.5, "accuracy": 1, "kl_ci95": [0.25, 0.75], "neutral_perplexity": None}
    bad = {"a|b": 1.0, "a\nb": 1.0, "x": "text", "y": [1], "z": 10**400, "w": {}, "v": True}
    assert figures_of_test({"test": good | bad}) == good
    for fit in ({}, {"test": None}, {"test": [1]}, {"test": "kl"}):
        assert figures_of_test(fit) == {}
    assert "| kl | 0.5 |" in adapter_card(config(fit={"test": good | bad}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        (BOMB, "not valid JSON"),
        ('{"fit": ' + BOMB, "nested too deeply"),
        ('{"fit": ' + "[" * 200 + "]" * 200 + "}", "nested more than"),
        ('{"k": ' + "9" * 100_000 + "}", "not valid JSON"),
    ],
    ids=range(6),
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=message):
        AdapterConfig.load(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"is .* an adapter directory"):
        AdapterConfig.load(tmp_path)


@pytest.mark.parametrize("strength", Strength)
def test_only_adaptive_depends_on_the_token(strength: Strength) -> None:
    assert strength.foldable == (strength.value != "adaptive")
    assert strength.trained == (strength.value in ("fitted", "adaptive"))


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("owner/model-1.5", True),
        ("gpt2", True),
        ("/models/local", False),
        ("./local", False),
        ("some/folder/deep", False),
        ("here", False),
        ("", False),
    ],
)
def test_a_card_names_the_hubs_models_alone_as_base(
    name: str, listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    front, text = adapter_card(config(base_model_name_or_path=name)).split("---\n")[1:]
    assert (f'base_model: "{name}"\n' in front) == listed
    assert "base_model_relation" in front
    assert (f"`{name}`" if name else "a model in memory") in text
