"""Rankings: scores from counters, order of ties, and files that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import attacked, changed_bytes, changed_json
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from austeer.adapters import Component, FitError, OutputError, Ranking, SiteError
from austeer.adapters.fingerprint import ends_fingerprint
from austeer.adapters.localization.ranking_file import Counts, RankingInfo

N = 10
INFO = RankingInfo(
    model_type="llama",
    num_layers=2,
    dtype="float32",
    base_fingerprint="sha256:1",
    pairs_digest="sha256:0",
    count=N,
)
# Unit:               0   1  2   3  4 |  5  6  7   8  9
P = np.array([[10, 2, 5, 0, 0], [10, 0, 7, 10, 5]])
M = np.array([[0, 7, 5, 10, 0], [0, 10, 3, 0, 4]])
DELTA = np.array([[1.0, -2, 0, -30, 0], [20, -40, 1, 10, 0]])
STD = np.array([[1.0, 1, 1, 2, 0], [1, 4, 1, 1, 1]])
MEAN = np.array([[0.5, -1, 0, 3, 2], [0, 0, 0, 0, 100]])


def counts(**changes: Any) -> Counts:
    whole: dict[str, Any] = {
        "positive": P,
        "negative": M,
        "near_ties": np.zeros_like(P),
        "delta": DELTA,
        "total": MEAN * 2 * N,
        "squares": (STD**2 + MEAN**2) * 2 * N,
    }
    return Counts(**{**whole, **changes})


def ranking() -> Ranking:
    return Ranking(INFO, {Component.FFN: counts()})


def test_beta() -> None:
    wanted = [[1, -0.7, 0.5, -1, 0], [1, -1, 0.7, 1, 0.5]]
    found = ranking().beta("ffn")
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, wanted)


def test_beta_when_most_pairs_tie() -> None:
    """β is a share of all pairs, ties included, and equal counts are positive."""
    one = Ranking(INFO, {Component.FFN: counts(positive=P * 0 + 1, negative=M * 0 + 1)})
    np.testing.assert_array_equal(one.beta("ffn"), np.full((2, 5), 0.1))
    none = Ranking(INFO, {Component.FFN: counts(positive=P * 0, negative=M * 0)})
    assert not np.signbit(none.beta("ffn")).any() and not none.beta("ffn").any()


def test_mean_std_and_effect() -> None:
    found = ranking()
    np.testing.assert_allclose(found.mean("ffn"), MEAN)
    np.testing.assert_allclose(found.std("ffn"), STD, atol=1e-6)
    wanted = np.abs(DELTA) / N / np.where(STD > 0, STD, 1)
    np.testing.assert_allclose(found.effect("ffn"), wanted, rtol=1e-9)


def test_top_by_effect() -> None:
    """|β| first; among |β| = 1 the effects are 0.1, 1.5 | 2, 1, 1: the tie goes by unit."""
    found = ranking().top("ffn", 7)
    assert found.component is Component.FFN
    assert list(zip(found.layer, found.unit, strict=True)) == [
        (1, 0), (0, 3), (1, 1), (1, 3), (0, 0), (0, 1), (1, 2),
    ]  # fmt: skip
    np.testing.assert_array_equal(found.beta, [1, -1, -1, 1, 1, -0.7, 0.7])


def test_top_by_reference_order() -> None:
    found = ranking().top("ffn", 10, tie_break="reference")
    strength = np.abs(ranking().beta("ffn")).ravel()
    wanted = sorted(range(10), key=lambda unit: -strength[unit])
    assert [int(r) for r in found.layer * 5 + found.unit] == wanted


@pytest.mark.parametrize("k", [0, -1, 11])
def test_more_units_than_exist(k: int) -> None:
    with pytest.raises(SiteError, match=f"{k} units asked for, 1 to 10 exist"):
        ranking().top("ffn", k)


def test_unknown_component_and_tie_break() -> None:
    for name in ("attention", "brain"):
        with pytest.raises(SiteError, match=f"'{name}'.*ffn"):
            ranking().beta(name)
    with pytest.raises(SiteError, match="'alphabet'"):
        ranking().top("ffn", 3, tie_break="alphabet")


def test_round_trip(tmp_path: Path) -> None:
    path = ranking().save(tmp_path / "deep" / "ranking.safetensors")
    found = Ranking.load(path)
    assert found.info == INFO and found.components == (Component.FFN,)
    for name in ("positive", "negative", "near_ties", "delta", "total", "squares"):
        loaded, saved = getattr(found.counts("ffn"), name), getattr(counts(), name)
        assert loaded.dtype == saved.dtype
        np.testing.assert_array_equal(loaded, saved)


def test_saving_replaces_a_ranking_but_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "ranking.safetensors"
    path.write_text("old")
    ranking().save(path)
    assert Ranking.load(path).count == N
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    with pytest.raises(OutputError):
        ranking().save(tmp_path)


def test_disk_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="no space left"):
        ranking().save(tmp_path / "ranking.safetensors")
    assert not list(tmp_path.iterdir())


Change = Callable[[dict[str, Any], dict[str, str]], None]


def rewrite(path: Path, change: Change) -> None:
    from safetensors import safe_open

    ranking().save(path)
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def info(**changes: Any) -> Change:
    def change(_: dict[str, Any], metadata: dict[str, str]) -> None:
        metadata["info"] = json.dumps({**json.loads(metadata["info"]), **changes})

    return change


def tensor(name: str, value: Any) -> Change:
    return lambda tensors, _: tensors.update({f"ffn.{name}": value})


BAD_FILES: dict[str, tuple[Change, str]] = {
    "no format": (lambda _, m: m.pop("format") and None, "not a ranking"),  # type: ignore[func-returns-value]
    "other format": (lambda _, m: m.update(format="pt"), "not a ranking"),
    "other version": (lambda _, m: m.update(format_version="2"), "format_version '2'"),
    "no description": (lambda _, m: m.update(info=""), "malformed description"),
    "description is a list": (lambda _, m: m.update(info="[1]"), "malformed description"),
    "unknown key": (info(colour="red"), "colour"),
    "count zero": (info(count=0), "count"),
    "count text": (info(count="10"), "count"),
    "count true": (info(count=True), "count"),
    "layers": (info(num_layers=3), "3 layers"),
    "digest": (info(pairs_digest=None), "pairs_digest"),
    "compat": (info(compat="other"), "compat"),
    "fewer pairs than counted": (info(count=9), "outside 0 to 9"),
    "negative counter": (tensor("positive", -P), "outside 0 to 10"),
    "more near ties than pairs": (tensor("near_ties", P + 5), "outside 0 to 10"),
    "dtype": (tensor("positive", P.astype(np.int32)), "ffn.positive"),
    "shape": (tensor("delta", DELTA[:, :4].copy()), "equal shapes"),
    "flat": (tensor("delta", DELTA.ravel()), "ffn.delta"),
    "not finite": (tensor("squares", DELTA * np.nan), "ffn.squares"),
    "missing sum": (lambda t, _: t.__delitem__("ffn.total"), "ffn.total"),
    "unknown component": (lambda t, _: t.update({"brain.total": DELTA}), "brain.total"),
    "nothing": (lambda t, _: t.clear(), "found none"),
    "description bomb": (lambda _, m: m.update(info="[" * 100_000), "nested too deeply"),
    "versions": (info(versions=[1]), "versions"),
    "count without end": (
        lambda _, m: m.update(info=m["info"].replace('"count": 10', '"count": 1e999')),
        "count",
    ),
    "counters that wrap around": (
        lambda t, _: t.update(
            {"ffn.positive": np.full_like(P, 2**62), "ffn.negative": np.full_like(P, 2**62)}
        ),
        "outside 0 to 10",
    ),
    "more signs than pairs": (tensor("negative", np.full_like(P, N)), "outside 0 to 10"),
    "no units": (
        lambda t, _: t.update({name: x[:, :0].copy() for name, x in t.items()}),
        "[layers, width]",
    ),
    "numbers beyond any sum": (tensor("total", DELTA + 1e200), "below 1e+100"),
    "negative squares": (tensor("squares", DELTA - 100), "negative"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path: Path, case: str) -> None:
    change, fault = BAD_FILES[case]
    path = tmp_path / "ranking.safetensors"
    rewrite(path, change)
    with pytest.raises(FitError) as caught:
        Ranking.load(path)
    message = str(caught.value)
    assert str(path) in message and fault in message and "\n" not in message


@attacked
@given(data=st.data())
def test_changed_files(tmp_path: Path, data: st.DataObject) -> None:
    path = ranking().save(tmp_path / "ranking.safetensors")
    raw = path.read_bytes()
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(changed_bytes(raw)))
    else:
        text = json.dumps(data.draw(changed_json(asdict(INFO))))
        rewrite(path, lambda _, metadata: metadata.update(info=text))
    try:
        read = Ranking.load(path)
    except FitError as error:
        assert str(error).isprintable()
        return
    # What was accepted has scores, without a warning (which is an error here).
    for component in read.components:
        assert np.abs(read.beta(component)).max() <= 1.0
        assert len(read.top(component, 10)) == 10


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = ranking().save(tmp_path / "ranking.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FitError, match=r"ranking\.safetensors"):
        Ranking.load(path)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FitError, match="expected a ranking file"):
            Ranking.load(path)


def test_check_model(tiny_model: Callable[..., Any]) -> None:
    made = ranking()
    digest = ends_fingerprint(tiny_model("llama"), made.components)
    own = Ranking(
        replace(INFO, base_fingerprint=digest), {c: made.counts(c) for c in made.components}
    )
    own.check_model(tiny_model("llama"))
    with pytest.raises(FitError, match="llama model with 2 layers, this one is qwen2 with 2"):
        own.check_model(tiny_model("qwen2"))
    with pytest.raises(FitError, match="llama with 3"):
        own.check_model(tiny_model("llama", num_hidden_layers=3))
    for other in (tiny_model("llama", seed=1), tiny_model("llama", hidden_size=64)):
        with pytest.raises(FitError, match=r"ranking for another base model.*localize again"):
            own.check_model(other)
