"""The command line end to end: files, exit codes, what goes to stdout and what does not."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from austeer.adapters import NoEffectError, Ranking, SteeringAdapter, fit_strength
from austeer.exporter import cli as command_line
from austeer.exporter import run as run_module
from austeer.exporter.cli import cli
from austeer.exporter.report import without_times
from austeer.graphs.custom_op import library_file

FIGURES = ("accuracy", "base_accuracy", "margin", "base_margin", "kl", "fluency")


def invoke(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Path:
    return saved_model("llama")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"{who} {verb} {rest}", "positive": " happy", "negative": " sad"}
        for who in ("Tom", "Mia", "the sun", "rain", "one day Tom")
        for verb in ("felt", "was")
        for rest in ("very", "so", "so very", "and so")
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    made = SteeringAdapter.from_units(
        tiny_model("llama"), "attention", layers=[0, 1], units=[3, 5], gamma=[1.0, -0.5]
    )
    return made.save_pretrained(tmp_path / "adapter")


def as_json(result: Result) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(result.stdout)
    return values


@pytest.mark.parametrize(
    "command", ["run", "localize", "fit", "merge", "onnx", "peft", "verify", "show", "doctor"]
)
def test_every_command_explains_itself(command: str) -> None:
    assert "Usage:" in invoke(command, "--help").stdout


def test_usage_errors_exit_2() -> None:
    assert "Missing" in invoke("run", exit_code=2).stderr
    assert "--strenght" in invoke("run", "a", "b", "-o", "c", "--strenght", exit_code=2).stderr


# Refused before anything expensive


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--strength", "adaptive", "--to", "safetensors"), "adaptive"),
        (("--component", "layer", "--to", "safetensors"), "layer"),
        (("--component", "layer", "--component", "ffn", "--to", "safetensors"), "layer"),
        (("--kl-budget", "0"), "kl_budget"),
        (("--kl-budget", "nan"), "kl_budget"),
        (("--rank", "2", "--strength", "oriented"), "oriented has no γ predictor"),
        (("--rank", "2", "--to", "safetensors"), "fitted has no γ predictor"),
    ],
)
def test_what_cannot_come_out_is_refused_before_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], says: str
) -> None:
    monkeypatch.setattr("austeer.exporter.run.run_job", lambda *_: pytest.fail("too late"))
    result = invoke(
        "run", "no-model", "no-pairs", "-o", tmp_path / "out", *options, exit_code=2
    )
    assert result.stderr.startswith("error: ")
    assert says in result.stderr


def test_taken_output_is_refused_before_the_model(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("austeer.exporter.run.run_job", lambda *_: pytest.fail("too late"))
    assert "not empty" in invoke("run", "m", pairs, "-o", tmp_path, exit_code=2).stderr


def test_missing_runtime_is_refused_before_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("austeer.exporter.routes.find_spec", lambda name: None)
    arguments = ("run", "m", "p", "-o", tmp_path / "out", "--to", "onnx")
    assert "austeer[cpu]" in invoke(*arguments, exit_code=2).stderr


# Errors


@pytest.mark.parametrize(
    ("error", "exit_code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/some/file"), 2, "/some/file: No space"),
        (PermissionError(13, "Permission denied", "/f"), 2, "/f: Permission denied; check its"),
        (OSError("odd"), 2, "odd; check the path and the disk"),
        (MemoryError(), 2, "--batch-size"),
        (NoEffectError("nothing\nhelps"), 3, "error: nothing\\nhelps\n"),
    ],
)
def test_errors_become_one_line(
    tmp_path: Path,
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    exit_code: int,
    says: str,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("austeer.exporter.stages.localize_job", lambda *_, **__: fail())
    arguments = ("localize", "m", pairs, "-o", tmp_path / "r.safetensors")
    result = invoke(*arguments, exit_code=exit_code)
    assert len(result.stderr.splitlines()) == 1
    assert says in result.stderr
    assert result.stdout == ""


def test_an_unexpected_error_says_that_it_is_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("austeer.exporter.stages.localize_job", broken)
    arguments = ("localize", "m", "p", "-o", tmp_path / "r.safetensors")
    result = invoke(*arguments, exit_code=70)
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError: this is a bug" in result.stderr.splitlines()[-1]


# The commands on a tiny model


def test_localize_writes_a_ranking(tmp_path: Path, base: Path, pairs: Path) -> None:
    out = tmp_path / "ranking.safetensors"
    values = as_json(invoke("localize", base, pairs, "-o", out, "--component", "ffn", "--json"))
    ranking = Ranking.load(out)
    assert values["pairs"] == ranking.count == 40
    assert [row["component"] for row in values["components"]] == ["ffn"]
    beta = ranking.beta("ffn")
    assert values["components"][0]["certain"] == (np.abs(beta) == 1).sum()
    assert abs(values["components"][0]["best_beta"]) == round(np.abs(beta).max(), 4)


@pytest.mark.usefixtures("traced_before")
def test_merge_onnx_verify_agree(tmp_path: Path, base: Path, adapter: Path) -> None:
    for command, name in (("merge", "safetensors"), ("onnx", "onnx")):
        out = tmp_path / name
        made = as_json(invoke(command, base, adapter, "-o", out, "--json"))
        assert made["route"] == name
        assert made["verified"]
        assert Path(made["path"]) == out
        arguments = ("verify", out, "--base", base, "--adapter", adapter, "--json")
        again = as_json(invoke(*arguments))
        assert again["max_logit_difference"] == made["max_logit_difference"] < 1e-4
        assert again["steered_vs_base"] > 0.01


def test_merge_at_another_scale(
    tmp_path: Path, base: Path, adapter: Path, tiny_model: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    invoke("merge", base, adapter, "-o", out, "--scale", "2", "--json")
    model, ids = tiny_model("llama"), torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad(), SteeringAdapter.from_pretrained(adapter).attached(model, scale=2.0):
        wanted = model(ids).logits
        found = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    wrong = ("verify", out, "--base", base, "--adapter", adapter)
    assert invoke(*wrong, exit_code=4).stderr.startswith(f"error: {out}")
    assert "safetensors" in invoke(*wrong, "--scale", "2").stdout


def test_unverified_fold_says_so_and_loads_no_model(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "austeer.adapters.loading.load_model", lambda *_, **__: pytest.fail("loaded")
    )
    out = tmp_path / "out"
    made = as_json(invoke("merge", base, adapter, "-o", out, "--no-verify", "--json"))
    assert not made["verified"]
    assert made["path"] == str(out)
    assert (out / "model.safetensors").is_file()


def test_the_files_decide_whose_adapter_it_is_not_the_dtype(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    # Weights rounded to float16 on loading have another fingerprint.
    out, half = tmp_path / "out", ("--dtype", "float16", "--json")
    assert as_json(invoke("merge", base, adapter, "-o", out, *half))["verified"]
    arguments = ("verify", out, "--base", base, "--adapter", adapter, *half)
    assert as_json(invoke(*arguments))["verified"]


def test_product_that_fails_is_not_published(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from austeer.exporter import merge

    # A fold with the wrong factor: only a comparison with the live model can tell.
    fold = merge.fold_rows

    def too_much(
        rows: np.ndarray[Any, Any], first: int, edits: Sequence[Any], file: Path
    ) -> int:
        changed = fold(rows, first, edits, file)
        rows *= 1.5
        return changed

    monkeypatch.setattr(merge, "fold_rows", too_much)
    before = sorted(tmp_path.iterdir())
    result = invoke("merge", base, adapter, "-o", tmp_path / "out", exit_code=4)
    assert result.stderr.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


def test_show_lists_sites_and_checks_the_base(base: Path, adapter: Path) -> None:
    values = as_json(invoke("show", adapter, "--base", base, "--json"))
    assert values["base_matches"]
    assert values["sites"] == [
        {
            "site": f"layers.{layer}.attention",
            "units": 1,
            "gamma_min": gamma,
            "gamma_max": gamma,
            "flipped": 0,
            "strongest": [unit],
        }
        for layer, unit, gamma in ((0, 3, 1.0), (1, 5, -0.5))
    ]
    text = invoke("show", adapter).stdout
    assert "layers.1.attention" in text
    assert "fitted" in text


def test_doctor_reports_this_environment() -> None:
    import onnxruntime

    result = CliRunner().invoke(cli, ["doctor", "--json"])
    values = as_json(result)
    assert result.exit_code == bool(values["problems"])
    assert values["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert values["onnxruntime"]["providers"] == onnxruntime.get_available_providers()
    text = CliRunner().invoke(cli, ["doctor"]).stdout
    assert "onnxruntime providers" in text
    if library_file() is None:
        assert values["op_library"] is None
        assert "not built (portable function body is used)" in text
    else:
        assert values["op_library"]["path"] == str(library_file())
        assert 0.0 <= values["op_library"]["self_test"]["CPUExecutionProvider"] < 2e-2
        assert "op library self-test" in text and "op library built by" in text


def test_doctor_names_a_library_that_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib.so").write_text("not a library")
    monkeypatch.setattr("austeer.graphs.custom_op.library_file", lambda: tmp_path / "lib.so")
    result = invoke("doctor", exit_code=1)
    assert "lib.so: cannot be loaded" in result.stderr.replace("\n", "")


def test_doctor_names_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"transformers": "6.1.0", "onnxruntime": "1.30", "onnxruntime-gpu": "1.19.2"}
    monkeypatch.setattr("austeer.exporter.commands.environment._version", versions.get)
    result = invoke("doctor", exit_code=1)
    for words in ("transformers 6.1.0", "overwrite each other", "1.19.2", "torch is not"):
        assert words in result.stderr


@pytest.mark.slow
def test_run_publishes_everything_or_says_that_nothing_helps(
    tmp_path: Path, base: Path, pairs: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("run", base, pairs, "-o", out, "--strength", "oriented", "--kl-budget", "5")
    more = (
        "--max-units",
        "16",
        "--component",
        "attention",
        "--to",
        "safetensors",
        "--to",
        "code",
    )
    more = (*more, "--json")
    result = CliRunner().invoke(cli, [str(argument) for argument in (*arguments, *more)])
    assert result.exit_code in (0, 3), result.output
    values = as_json(result)
    report = json.loads((out / "report.json").read_text())
    assert without_times(values) == {**report, "out": str(out)}
    assert values["timings"]["total"] > 0
    names = {path.name for path in out.iterdir()}
    if result.exit_code == 3:
        assert names == {"SHA256SUMS", "austeer.json", "report.json", "report.md"}
        assert result.stderr.startswith("error: ")
        return
    products = {"code", "safetensors"}
    wanted = {"adapter", "ranking.safetensors", "report.json", "report.md", *products}
    assert names == wanted | {"SHA256SUMS", "austeer.json"}
    assert SteeringAdapter.from_pretrained(out / "adapter").config.k == values["selected"]["k"]
    for product in products:
        check = ("verify", out / product, "--base", base, "--adapter", out / "adapter")
        invoke(*check, "--pairs", pairs)


@pytest.mark.slow
def test_run_in_half_precision_makes_an_adapter_for_the_files(
    tmp_path: Path, base: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("austeer.adapters.fitting.fit.no_effect_reason", lambda *_: None)
    out = tmp_path / "out"
    arguments = ("run", base, pairs, "-o", out, "--strength", "oriented", "--kl-budget", "5")
    more = ("--component", "attention", "--dtype", "float16", "--to", "safetensors")
    invoke(*arguments, *more)
    values = as_json(invoke("show", out / "adapter", "--base", base, "--json"))
    assert values["base_matches"]


@pytest.mark.slow
def test_run_without_effect_is_loud_and_publishes_only_a_report(
    tmp_path: Path, base: Path, pairs: Path
) -> None:
    out = tmp_path / "out"
    options = ("--strength", "oriented", "--kl-budget", "1e-9", "--max-units", "4")
    arguments = ("run", base, pairs, "-o", out, "--component", "ffn", "--to", "safetensors")
    result = invoke(*arguments, *options, exit_code=3)
    names = {path.name for path in out.iterdir()}
    assert names == {"SHA256SUMS", "austeer.json", "report.json", "report.md"}
    assert "budget" in result.stderr
    assert "Nothing within the budget helps" in result.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["outcome"] == "no_effect"
    assert report["products"] == []
    assert "Nothing within the budget helps" in (out / "report.md").read_text()


@pytest.mark.slow
def test_fit_takes_up_a_ranking(tmp_path: Path, base: Path, pairs: Path) -> None:
    ranking, out = tmp_path / "ranking.safetensors", tmp_path / "out"
    invoke("localize", base, pairs, "-o", ranking, "--component", "attention")
    arguments = ("fit", base, pairs, "-o", out, "--ranking", ranking, "--strength", "oriented")
    assert "no ranking of component ffn" in invoke(*arguments, exit_code=2).stderr
    options = ("--component", "attention", "--kl-budget", "5", "--json")
    result = CliRunner().invoke(cli, [str(argument) for argument in (*arguments, *options)])
    assert result.exit_code in (0, 3), result.output
    assert as_json(result)["fit"]["ranking_on_fit_split"] is False
    assert any("may have seen the test pairs" in note for note in as_json(result)["notes"])
    assert (out / "adapter_config.json").is_file() == (result.exit_code == 0)


# The real model


@pytest.mark.shared
@pytest.mark.slow
def test_real_run_meets_its_figures(tmp_path: Path, shared: Path) -> None:
    out, data = tmp_path / "out", shared / "data"
    arguments = (
        "run", shared / "models" / "stories260K", data / "happy_vs_sad_train.jsonl",
        "--test-pairs", data / "happy_vs_sad_test.jsonl", "--component", "attention",
        "--strength", "oriented", "--kl-budget", "0.2", "--max-units", "64",
        "--to", "safetensors", "--to", "onnx", "-o", out, "--json",
    )  # fmt: skip
    values = as_json(invoke(*arguments))
    test = values["test"]
    assert round(test["base_accuracy"], 2) == 0.43
    assert test["accuracy"] >= 0.90
    assert test["kl"] <= 0.2
    for name in FIGURES:
        for split in ("test", "validation"):
            low, high = values[split][f"{name}_ci95"]
            assert low <= values[split][name] <= high
    assert values["selected"]["component"] == "attention"
    assert values["selected"]["strength"] == "oriented"
    assert {row["route"] for row in values["products"]} == {"safetensors", "onnx"}
    for row in values["products"]:
        assert row["max_logit_difference"] <= 1e-4
        assert row["argmax_agreement"] == 1.0
    assert all(0.5 <= site["beta_min"] <= site["beta_max"] <= 1 for site in values["steered"])
    assert len(values["samples"]) == 4
    assert any(sample["base"] != sample["steered"] for sample in values["samples"])


@pytest.mark.slow
def test_run_on_the_embedded_model_steers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's job: it must succeed, within the budget, and load without any of our code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(run_module, "fit_strength", partial(fit_strength, steps=60))
    examples, out = Path(__file__).resolve().parents[2] / "examples", tmp_path / "out"
    result = invoke(
        "run", examples / "demo_model", examples / "pairs" / "mood_train.jsonl",
        "--test-pairs", examples / "pairs" / "mood_test.jsonl", "--component", "ffn",
        "--strength", "fitted", "--to", "safetensors", "-o", out, "--json",
    )  # fmt: skip
    test = as_json(result)["test"]
    assert test["accuracy"] >= test["base_accuracy"] + 0.3
    assert test["kl"] <= 0.1
    tokenizer = AutoTokenizer.from_pretrained(out / "safetensors")
    ids = tokenizer("Tom found a red kite near the river. He felt", return_tensors="pt")
    texts = []
    for folder in (examples / "demo_model", out / "safetensors"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokens = model.generate(**ids, max_new_tokens=12, do_sample=False)
        texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    assert texts[0] != texts[1]


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["merge", "onnx"])
def test_a_signal_ends_a_command_as_an_interrupt_does(
    number: int,
    command: str,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    fork: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def struck(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    def work() -> dict[str, int]:
        # Whoever runs the tests may have the signal ignored, as nohup does.
        signal.signal(number, signal.SIG_DFL)
        monkeypatch.setattr("austeer.exporter.provenance.Seal.close_product", struck)
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        return {"code": int(str(ended.value.code))}

    out = tmp_path / "there" / "out"
    out.parent.mkdir()
    arguments = ("austeer-export", command, base, adapter, "-o", out)
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    child = fork(work)
    assert child.end() == 0 and child.result()["code"] == 130
    assert not list(out.parent.iterdir())


def test_nohup_is_respected(fork: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> dict[str, bool]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        monkeypatch.setattr(command_line, "cli", lambda: os.kill(os.getpid(), signal.SIGHUP))
        command_line.main()
        return {"ignored": signal.getsignal(signal.SIGHUP) is signal.SIG_IGN}

    child = fork(work)
    assert child.end() == 0 and child.result()["ignored"]


def test_a_seed_has_32_bits(base: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("fit", base, pairs, "-o", out, "--seed", 2**32, exit_code=2)
    assert "--seed" in result.stderr and not out.exists()
