"""`localize` on the command line: killed and taken up again, alone or with other processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from austeer.adapters import FitError, PairsError, Ranking, localize
from austeer.exporter import stages
from austeer.exporter.cli import cli
from austeer.exporter.stages import read_texts

STOPPED = "the same command goes on with"


@pytest.fixture
def base(saved_model: Callable[..., Path]) -> Path:
    return saved_model("llama")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    words = ("Tom", "Mia", "rain", "sun", "home", "park")
    path = tmp_path / "pairs.jsonl"
    prompts = [f"{a} {b} {c} felt" for a in words for b in words for c in words]
    ends = {"positive": " happy", "negative": " sad"}
    path.write_text("".join(json.dumps({"prompt": p, **ends}) + "\n" for p in prompts))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def assert_same(first: Path, second: Path) -> None:
    mine, theirs = Ranking.load(first), Ranking.load(second)
    assert mine.info == theirs.info and mine.components == theirs.components
    for component in mine.components:
        ours, others = mine.counts(component), theirs.counts(component)
        for name in ours.__slots__:
            assert getattr(ours, name).tobytes() == getattr(others, name).tobytes()


@pytest.fixture
def stop_at(
    fork: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Run a command in a child, signal it after some batches: exit code and stderr."""

    def stopped(number: int, batches: int, *arguments: object) -> tuple[int, str]:
        heard, told = os.pipe()

        def slowed(*given: Any, progress: Any, **options: Any) -> Any:
            return localize(
                *given, **options, state_every=0.0, progress=lambda *_: os.write(told, b".")
            )

        def work() -> dict[str, Any]:
            monkeypatch.setattr(stages, "localize", slowed)
            # In the background, as CI may be, a shell has it ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            result = invoke(*arguments)
            return {"code": result.exit_code, "says": result.stderr}

        child = fork(work)
        os.close(told)
        for _ in range(batches):
            assert os.read(heard, 1)
        os.kill(child.pid, number)
        code = child.end()
        os.close(heard)
        if code:
            return code, ""
        found = child.result()
        return int(found["code"]), str(found["says"])

    return stopped


def test_a_killed_command_goes_on(
    tmp_path: Path,
    base: Path,
    pairs: Path,
    stop_at: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = ("--component", "ffn", "--batch-size", "2")
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    command = ("localize", base, pairs, "-o", out, *options)
    assert stop_at(signal.SIGKILL, 30, *command) == (-signal.SIGKILL, "")
    state = tmp_path / "out.safetensors.state"
    assert state.is_dir() and not out.exists()
    code, says = stop_at(signal.SIGINT, 20, *command)
    assert code == 130 and STOPPED in says and str(state) in says
    assert len([line for line in says.splitlines() if line.startswith("error")]) == 1
    done(*command)
    assert "of 216 pairs were done" in caplog.text
    assert not state.exists()
    done("localize", base, pairs, "-o", whole, *options)
    assert_same(out, whole)


def test_restart_discards_the_state(
    tmp_path: Path,
    base: Path,
    pairs: Path,
    stop_at: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out.safetensors"
    command = ("localize", base, pairs, "-o", out, "--component", "ffn")
    stop_at(signal.SIGKILL, 10, *command, "--batch-size", "2")
    other = invoke(*command, "--compat", "reference")
    assert other.exit_code == 2 and "made with other compat" in other.stderr
    assert len(other.stderr.splitlines()) == 1 and "--restart" in other.stderr
    done(*command, "--compat", "reference", "--restart")
    assert not caplog.records


def test_an_interrupt_before_any_pair_leaves_nothing(
    tmp_path: Path, base: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "localize", interrupted)
    result = invoke("localize", base, pairs, "-o", tmp_path / "out.safetensors")
    assert (result.exit_code, result.stderr) == (
        130,
        "error: interrupted; nothing was published\n",
    )
    assert not (tmp_path / "out.safetensors.state").exists()


def test_two_processes_write_once(
    tmp_path: Path, base: Path, pairs: Path, launch: Callable[..., Any]
) -> None:
    alone, together = tmp_path / "alone.safetensors", tmp_path / "together.safetensors"
    arguments = ("localize", base, pairs, "--component", "ffn", "--json", "-o")
    wanted = json.loads(done(*arguments, alone).stdout)

    def work(rank: int) -> dict[str, Any]:
        result = invoke(*arguments, together)
        return {"code": result.exit_code, "says": result.stdout}

    first, second = launch(work)
    assert first.end() == second.end() == 0
    assert json.loads(str(first.result()["says"])) == wanted | {"path": str(together)}
    assert first.result()["code"] == second.result()["code"] == 0
    assert str(second.result()["says"]) == ""
    assert_same(together, alone)
    assert not (tmp_path / "together.safetensors.state").exists()


def test_a_model_on_all_devices_is_not_for_several_processes(
    tmp_path: Path, base: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = invoke("localize", base, pairs, "-o", tmp_path / "out", "--device-map", "auto")
    assert result.exit_code == 2 and "use it in one process alone" in result.stderr


def test_device_map_gives_the_same_ranking(tmp_path: Path, base: Path, pairs: Path) -> None:
    pytest.importorskip("accelerate")
    outs = [tmp_path / "plain.safetensors", tmp_path / "mapped.safetensors"]
    for out, more in zip(outs, ((), ("--device-map", "auto")), strict=True):
        done("localize", base, pairs, "--component", "layer", "-o", out, *more)
    assert_same(*outs)


@pytest.mark.slow
def test_torchrun(tmp_path: Path, base: Path, pairs: Path) -> None:
    outs = [tmp_path / "alone.safetensors", tmp_path / "torchrun.safetensors"]
    command = ("localize", base, pairs, "--component", "ffn", "-o")
    done(*command, outs[0])
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    made = subprocess.run(
        [sys.executable, *launcher, "-m", "austeer.exporter", *command, outs[1]],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("216 pairs") == 1
    assert_same(*outs)


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.json", "t.JSONL"])
def test_neutral_text_in_json_lines(tmp_path: Path, name: str) -> None:
    """Only a line feed ends a line; a byte order mark is none of the text."""
    path = tmp_path / name
    rows = [{"text": "one\u2028day"}, {"text": "Tom felt", "other": 1}]
    lines = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert read_texts(path) == ["one\u2028day", "Tom felt"]


def test_neutral_text_in_lines(tmp_path: Path) -> None:
    path = tmp_path / "neutral.txt"
    path.write_bytes(b'one day\r\n\n{"text": 1}\n')
    assert read_texts(path) == ["one day", '{"text": 1}']
    assert read_texts(None) is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", b"text\none day\n", "expected a file ending in .jsonl"),
        ("t.jsonl", b"one day\n", "t.jsonl:1: expected a JSON object with text"),
        ("t.ndjson", b'{"text": " "}\n', "t.ndjson:1: expected text, found ' '"),
        ("t.txt", b"one\n\xff\n", "t.txt:2: not UTF-8"),
        ("t.txt", b"\n \n", "has no text"),
    ],
)
def test_neutral_text_that_is_none(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises((FitError, PairsError), match=re.escape(says)) as caught:
        read_texts(path)
    assert "\n" not in str(caught.value)
