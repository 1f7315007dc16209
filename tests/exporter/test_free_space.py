"""Room is asked for before anything is written, and what is asked for is enough."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from austeer.adapters import OutputError, SteeringAdapter
from austeer.adapters.weights import Checkpoint
from austeer.exporter import free_space
from austeer.exporter.cli import cli
from austeer.exporter.free_space import check_space, product_size, run_size
from austeer.exporter.routes import Route
from austeer.exporter.settings import StoredAs


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make every filesystem have so many bytes free."""

    def set_free(count: int) -> None:
        found = SimpleNamespace(f_bavail=count, f_frsize=1, f_blocks=1 << 40)
        monkeypatch.setattr(os, "statvfs", lambda _: found)

    return set_free


@pytest.fixture
def adapter(tiny_model: Callable[..., Any]) -> SteeringAdapter:
    return SteeringAdapter.from_units(
        tiny_model("llama"), "attention", [0, 1], [3, 5], [1.0, -0.5]
    )


def test_both_numbers_are_said(tmp_path: Path, free: Callable[[int], None]) -> None:
    free(2_500_000_000)
    check_space(tmp_path / "out", 2_500_000_000)
    says = "needs up to 2501 MB, its filesystem has 2500 MB free"
    with pytest.raises(OutputError, match=says):
        check_space(tmp_path / "new" / "deep" / "out", 2_500_500_001)
    assert not any(tmp_path.iterdir())


def test_a_filesystem_of_no_size_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = SimpleNamespace(f_bavail=0, f_frsize=1, f_blocks=0)
    monkeypatch.setattr(os, "statvfs", lambda _: nothing)
    check_space(tmp_path / "out", 10)


def test_leftovers_are_freed_first(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-abcd1234").mkdir()
    check_space(tmp_path / "out", 10)
    assert not any(tmp_path.iterdir())


def test_shared_blocks_take_no_room(
    tmp_path: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "base"
    source.write_bytes(b"x" * 4096)
    free(10)
    asked: list[int] = []

    def clone(_target: int, request: int, _source: int) -> int:
        asked.append(request)
        return 0

    monkeypatch.setattr("fcntl.ioctl", clone)
    check_space(tmp_path / "out", 4096, [source])
    assert asked == [free_space._CLONE] and [p.name for p in tmp_path.iterdir()] == ["base"]

    def refuse(*_: object) -> int:
        raise OSError(95, "not supported")

    monkeypatch.setattr("fcntl.ioctl", refuse)
    with pytest.raises(OutputError, match="needs up to 4 kB"):
        check_space(tmp_path / "out", 4096, [source])
    with pytest.raises(OutputError):
        check_space(tmp_path / "out", 4096)


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize(
    "command",
    [("merge", "--no-verify"), ("merge", "--code"), ("onnx",), ("peft", "--as", "lora")],
    ids=" ".join,
)
def test_every_route_asks_before_the_model_and_needs_no_more(
    tmp_path: Path,
    saved_model: Callable[..., Path],
    adapter: SteeringAdapter,
    free: Callable[[int], None],
    command: tuple[str, ...],
) -> None:
    base, saved = saved_model("llama"), adapter.save_pretrained(tmp_path / "adapter")
    name, *options = command
    names = [saved, base] if name == "peft" else [base, saved]
    arguments = [name, *map(str, names), "-o", str(tmp_path / "out"), *options]
    route = {"--code": Route.CODE, "lora": Route.LORA}.get(command[-1])
    route = route or (Route.ONNX if name == "onnx" else Route.SAFETENSORS)
    wanted = product_size(route, base, adapter)
    free(wanted - 1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("austeer.exporter.products.load_base", lambda *_: pytest.fail("too late"))
        result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2 and "needs up to" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    free(wanted)
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert written <= wanted


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_an_exported_model_is_counted_in_its_dtype(
    saved_model: Callable[..., Path],
    tiny_model: Callable[..., Any],
    model_type: str,
    dtype: str | None,
) -> None:
    base = saved_model(model_type)
    made = SteeringAdapter.from_units(tiny_model(model_type), "attention", [0], [3], [1.0])
    parameters = sum(p.numel() for p in tiny_model(model_type).parameters())
    size = product_size(Route.ONNX, base, made, dtype)
    assert size > parameters * (2 if dtype else 4)


def test_a_run_needs_what_its_products_need(
    saved_model: Callable[..., Path], adapter: SteeringAdapter
) -> None:
    base = saved_model("llama")
    alone = run_size((), base, 8)
    for route in Route:
        rest = run_size((route,), base, 8) - alone
        own = sum(tensor.nbytes for tensor in adapter.tensors().values())
        assert rest >= product_size(route, base, adapter) - own


def test_no_run_steers_more_units_than_there_are(saved_model: Callable[..., Path]) -> None:
    base = saved_model("llama")
    most = run_size((Route.LORA,), base, 20_000_000)
    # down_proj: 48 inputs and 32 outputs, in two layers.
    assert most == run_size((Route.LORA,), base, 2 * 80) < 3_000_000


def test_a_tensor_that_keeps_its_dtype_needs_its_room(
    saved_model: Callable[..., Path], tiny_model: Callable[..., Any]
) -> None:
    base = saved_model("deepseek_v3")
    made = SteeringAdapter.from_units(tiny_model("deepseek_v3"), "ffn", [0], [3], [1.0])
    half, whole = (
        product_size(Route.SAFETENSORS, base, made, stored=StoredAs(dtype=dtype))
        for dtype in ("bfloat16", "float32")
    )
    entries = Checkpoint(base).values()
    kept = sum(entry.size for entry in entries if "e_score" in entry.name)
    assert kept and whole - half == (sum(entry.size for entry in entries) - kept) // 2


def test_a_run_asks_before_the_model(
    tmp_path: Path, saved_model: Callable[..., Path], free: Callable[[int], None]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "Tom was", "positive": " happy", "negative": " sad"}\n')
    base = saved_model("llama")
    free(1000)
    arguments = ["run", str(base), str(pairs), "-o", str(tmp_path / "out"), "--to", "onnx"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("austeer.exporter.run.load_base", lambda *_: pytest.fail("too late"))
        result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2 and "its filesystem has 1 kB free" in result.stderr
