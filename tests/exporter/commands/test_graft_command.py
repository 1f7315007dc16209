"""`austeer-export graft`: what it prints, and refusals in one line that leave no trace."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from austeer.adapters import SteeringAdapter
from austeer.exporter.cli import cli
from austeer.graphs import OnnxCausalLM, load_model

pytest.importorskip("onnxruntime")

IDS = np.array([[1, 5, 9, 7, 30]])


def invoke(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["graft", *(str(argument) for argument in arguments)])
    assert result.exit_code == exit_code, result.output
    return result


def as_json(result: Result) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def tree(root: Path) -> dict[str, Any]:
    """Every path, hidden ones too, with what a write would change."""
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else path.is_dir(),
            path.lstat().st_mode,
            path.lstat().st_nlink if path.is_file() else 0,
            path.lstat().st_mtime_ns if path.is_file() else 0,
        )
        for path in sorted(root.rglob("*"))
    }


def refused(root: Path, *arguments: object, says: Iterable[str], exit_code: int = 2) -> Result:
    """A command that must fail in one clear line and leave `root` as it is."""
    before = tree(root)
    result = invoke(*arguments, exit_code=exit_code)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    assert "bug" not in lines[0]
    assert ".partial-" not in lines[0]
    for words in says:
        assert words in lines[0], lines[0]
    assert result.stdout == ""
    assert tree(root) == before
    return result


@pytest.fixture
def base(base_folder: Callable[..., tuple[Any, Path]], tmp_path: Path) -> Path:
    """A folder with a model in one file."""
    _, source = base_folder()
    return Path(shutil.copytree(source, tmp_path / "base"))


@pytest.fixture
def with_data(base: Path) -> Path:
    """The same with `model.onnx.data` beside the model."""
    model = load_model(base / "model.onnx")
    (base / "model.onnx").unlink()
    ir.save(
        model, base / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=256
    )
    return base


@pytest.fixture
def adapter(adapter_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter_folder(), tmp_path / "mood"))


def logits(path: Path, **settings: Any) -> np.ndarray:
    model = OnnxCausalLM(path, threads=1)
    for name, value in settings.items():
        setattr(model, name, value)
    return model.logits(IDS)


# What it prints


def test_it_explains_itself() -> None:
    text = invoke("--help").stdout
    assert "Usage: " in text
    options = ("--scale", "--strength-input", "--as-adapter", "--together", "--inline")
    more = ("--replace", "--copy-data", "--library", "--force", "--no-verify", "--json")
    for option in (*options, *more):
        assert option in text


def test_a_table_with_the_figures(tmp_path: Path, base: Path, adapter: Path) -> None:
    result = invoke(base, adapter, "-o", tmp_path / "out")
    assert result.stderr == ""
    row = next(line for line in result.stdout.splitlines() if str(tmp_path / "out") in line)
    nodes, difference, moved = row.split()[1:]
    assert nodes == "2"
    assert 0.0 <= float(difference) <= 1.0
    assert float(moved) > 0.01
    assert "Verified" in result.stdout
    assert "note:" not in result.stdout


def test_json_is_all_that_goes_to_stdout(tmp_path: Path, base: Path, adapter: Path) -> None:
    result = invoke(base, adapter, "-o", tmp_path / "out", "--json")
    values = as_json(result)
    assert result.stderr == ""
    assert values["path"] == str(tmp_path / "out")
    assert (values["route"], values["nodes"], values["sites"]) == ("graft", 2, 2)
    assert values["verified"] is True and values["base_weights"] == "equal"
    assert values["adapter_files"] == []
    assert values["steered_vs_base"] > 0.01
    assert values["tokens"] == 24


def test_a_quantized_base_is_noted(
    tmp_path: Path, base_folder: Callable[..., tuple[Any, Path]], adapter: Path
) -> None:
    _, int8 = base_folder(int8=True)
    result = invoke(int8, adapter, "-o", tmp_path / "out")
    assert "note: the graph holds its weights rounded or quantized" in result.stdout
    assert as_json(invoke(int8, adapter, "-o", tmp_path / "2", "--json"))["verified"]


def test_no_verify_says_so(tmp_path: Path, base: Path, adapter: Path) -> None:
    result = invoke(base, adapter, "-o", tmp_path / "out", "--no-verify")
    assert "Not verified" in result.stdout
    assert result.stdout.count("not verified") == 2
    assert np.abs(logits(tmp_path / "out") - logits(base)).max() > 0.01


def test_the_scale(tmp_path: Path, base: Path, adapter: Path) -> None:
    invoke(base, adapter, "-o", tmp_path / "out", "--scale", "-0.5", "--json")
    half = SteeringAdapter.from_pretrained(adapter).scaled(-0.5)
    half.save_pretrained(tmp_path / "half")
    invoke(base, tmp_path / "half", "-o", tmp_path / "expected", "--json")
    assert np.array_equal(logits(tmp_path / "out"), logits(tmp_path / "expected"))


def test_one_kind_of_strength_input(tmp_path: Path, base: Path, adapter: Path) -> None:
    both = ("--optional-strength-input", "--strength-input")
    result = invoke(base, adapter, "-o", tmp_path / "out", *both, exit_code=2)
    assert "choose one of them" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        (("--strength-input",), "required"),
        (("--optional-strength-input",), "optional"),
    ],
)
def test_a_strength_input(
    option: tuple[str, ...], kind: str, tmp_path: Path, base: Path, adapter: Path
) -> None:
    # The option takes no value, so that it may stand before the arguments.
    invoke(*option, base, adapter, "-o", tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert [value.name for value in graph.input][-1] == "steering_scale"
    defaults = {tensor.name for tensor in graph.initializer}
    assert ("steering_scale" in defaults) == (kind == "optional")
    assert np.array_equal(logits(tmp_path / "out", scale=0.0), logits(base))


def test_adapter_files_are_listed(
    tmp_path: Path, base: Path, adapter: Path, adapter_folder: Callable[..., Path]
) -> None:
    other = adapter_folder("llama", "layer", 1)
    result = invoke(base, adapter, other, "-o", tmp_path / "out", "--as-adapter")
    names = ["mood.onnx_adapter", f"{other.name}.onnx_adapter"]
    listed = re.findall(r"^adapter: (.+)$", result.stdout, re.MULTILINE)
    assert listed == names
    for name, source in zip(names, (adapter, other), strict=True):
        invoke(base, source, "-o", tmp_path / f"of-{name}", "--no-verify", "--json")
        found = logits(tmp_path / "out", active=[tmp_path / "out" / name])
        assert np.abs(found - logits(tmp_path / f"of-{name}")).max() <= 1e-5
    assert np.array_equal(logits(tmp_path / "out"), logits(base))


def test_the_other_options_reach_the_job(
    tmp_path: Path, with_data: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def job(request: Any, progress: Any) -> dict[str, Any]:
        seen.append(request)
        return {}

    monkeypatch.setattr("austeer.exporter.graft.graft_job", job)
    flags = ("as_adapter", "together", "inline", "replace", "copy_data", "library", "force")
    invoke(with_data, adapter, adapter, "-o", "out", "--json",
           *(f"--{flag.replace('_', '-')}" for flag in flags))  # fmt: skip
    invoke(with_data, adapter, "-o", "out", "--json")
    every, none = seen
    assert all(getattr(every, flag) is True for flag in flags)
    assert all(getattr(none, flag) is False for flag in flags)
    assert every.adapters == (str(adapter),) * 2
    assert (none.base, none.out, none.scale) == (with_data, Path("out"), 1.0)
    assert none.verify and none.scale_as == "constant"


def test_replace_and_relative_paths(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base)
    invoke("model.onnx", adapter, "-o", "steered.onnx")
    invoke("steered.onnx", adapter, "-o", "half.onnx", "--replace", "--scale", "0.5")
    invoke("model.onnx", adapter, "-o", "expected.onnx", "--scale", "0.5")
    assert (base / "half.onnx").read_bytes() == (base / "expected.onnx").read_bytes()
    names = {path.name for path in base.iterdir()}
    files = {"steered.onnx", "half.onnx", "expected.onnx"}
    assert names == {"model.onnx", "config.json", *files}


# Bad input: the base


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_model(tmp_path: Path, base: Path, adapter: Path, keep: float) -> None:
    path = base / "model.onnx"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    refused(tmp_path, base, adapter, "-o", tmp_path / "out", says=(str(path),))


@pytest.mark.parametrize("content", [b"\x00" * 64, b"{}", b"version https://git-lfs"])
def test_what_is_no_model(tmp_path: Path, base: Path, adapter: Path, content: bytes) -> None:
    path = base / "model.onnx"
    path.write_bytes(content)
    refused(tmp_path, path, adapter, "-o", base / "steered.onnx", says=(str(path),))


def test_a_base_that_is_not_there(tmp_path: Path, adapter: Path) -> None:
    missing = tmp_path / "no.onnx"
    refused(tmp_path, missing, adapter, "-o", tmp_path / "out", says=(str(missing),))


def test_a_folder_without_a_model(tmp_path: Path, base: Path, adapter: Path) -> None:
    (base / "model.onnx").unlink()
    refused(tmp_path, base, adapter, "-o", tmp_path / "out", says=(str(base), ".onnx"))


def test_a_folder_with_two_models(tmp_path: Path, base: Path, adapter: Path) -> None:
    (base / "model.onnx").rename(base / "b.onnx")
    shutil.copyfile(base / "b.onnx", base / "a.onnx")
    says = (str(base), "expected one .onnx file", "a.onnx, b.onnx", "name the file")
    refused(tmp_path, base, adapter, "-o", tmp_path / "out", says=says)
    invoke(base / "a.onnx", adapter, "-o", tmp_path / "out")


def test_missing_data(tmp_path: Path, with_data: Path, adapter: Path) -> None:
    (with_data / "model.onnx.data").unlink()
    for out in (tmp_path / "out", with_data / "steered.onnx"):
        says = ("model.onnx.data", "is missing")
        refused(tmp_path, with_data, adapter, "-o", out, says=says)


def test_short_data(tmp_path: Path, with_data: Path, adapter: Path) -> None:
    data = with_data / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    says = ("model.onnx.data", "too short", "download it again")
    refused(tmp_path, with_data, adapter, "-o", with_data / "steered.onnx", says=says)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../b", "..\\secret"])
def test_data_outside_the_folder(
    tmp_path: Path, with_data: Path, adapter: Path, location: str
) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 10**6)
    proto = onnx.load(with_data / "model.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    (with_data / "model.onnx").write_bytes(proto.SerializeToString())
    says = ("outside the model's folder",)
    for out in (tmp_path / "out", with_data / "steered.onnx"):
        refused(tmp_path, with_data, adapter, "-o", out, "--no-verify", says=says)


def set_opset(path: Path, version: int) -> None:
    proto = onnx.load(path)
    for entry in proto.opset_import:
        entry.version = version
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("version", [1, 13, 14])
def test_an_opset_that_is_too_old(
    tmp_path: Path, base: Path, adapter: Path, version: int
) -> None:
    set_opset(base / "model.onnx", version)
    says = (f"opset {version}", "15 or newer")
    refused(tmp_path, base, adapter, "-o", tmp_path / "out", says=says)


def test_an_opset_that_nothing_knows(tmp_path: Path, base: Path, adapter: Path) -> None:
    set_opset(base / "model.onnx", 9999)
    refused(tmp_path, base, adapter, "-o", tmp_path / "out", says=("9999",))


def test_a_model_that_runs_nowhere(tmp_path: Path, base: Path, adapter: Path) -> None:
    proto = onnx.load(base / "model.onnx")
    proto.graph.node[3].op_type = "NoSuchOperator"
    (base / "model.onnx").write_bytes(proto.SerializeToString())
    refused(tmp_path, base, adapter, "-o", tmp_path / "out", says=("NoSuchOperator",))


@pytest.mark.parametrize(
    ("text", "damaged"), [(rb"node_mul_\d", b"node_mul_\xff"), (rb"silu_1", b"silu\xff1")]
)
def test_a_name_that_is_no_text(
    tmp_path: Path, base: Path, adapter: Path, text: bytes, damaged: bytes
) -> None:
    path = base / "model.onnx"
    data, found = re.subn(text, damaged, path.read_bytes())
    assert found
    path.write_bytes(data)
    refused(tmp_path, base, adapter, "-o", tmp_path / "out", says=(str(path),))


def test_an_input_that_nothing_makes(
    tmp_path: Path, base: Path, adapter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.load(base / "model.onnx")
    proto.graph.node[-1].input[0] = "nowhere"
    (base / "model.onnx").write_bytes(proto.SerializeToString())
    says = (str(base / "model.onnx"), "not a valid ONNX model itself")
    refused(tmp_path, base, adapter, "-o", tmp_path / "out", says=says)
    # nor does a library say anything beside that line
    assert capfd.readouterr() == ("", "")


def test_a_model_that_is_no_language_model(tmp_path: Path, base: Path, adapter: Path) -> None:
    proto = onnx.load(base / "model.onnx")
    for value in proto.graph.output:
        if value.name == "present.1.value":
            proto.graph.output.remove(value)
    (base / "model.onnx").write_bytes(proto.SerializeToString())
    says = ("not a causal language model", "present.1.value")
    refused(tmp_path, base, adapter, "-o", tmp_path / "out", says=says)


def test_a_model_without_module_paths(tmp_path: Path, base: Path, adapter: Path) -> None:
    proto = onnx.load(base / "model.onnx")
    for node in proto.graph.node:
        del node.metadata_props[:]
    (base / "model.onnx").write_bytes(proto.SerializeToString())
    says = ("layers.0.attention", "carry no module paths", "torch.onnx.export(dynamo=True)")
    refused(tmp_path, base, adapter, "-o", tmp_path / "out", says=says)


# Bad input: the adapter


def test_an_adapter_of_another_model(
    tmp_path: Path, base: Path, tiny_model: Callable[..., Any]
) -> None:
    other = SteeringAdapter.from_units(tiny_model("llama", seed=7), "ffn", [0], [3], [1.0])
    path = other.save_pretrained(tmp_path / "other")
    says = ("another base model", other.config.base_model_fingerprint, "--force")
    refused(tmp_path, base, path, "-o", tmp_path / "out", says=says)
    forced = as_json(invoke(base, path, "-o", tmp_path / "out", "--force", "--json"))
    assert forced["verified"] and forced["base_weights"] == "different"


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_an_adapter_of_another_architecture(
    tmp_path: Path, base: Path, adapter_folder: Callable[..., Path], force: tuple[str, ...]
) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    says = ("config.json", "llama", "mistral")
    refused(tmp_path, base, adapter_folder(), "-o", tmp_path / "out", *force, says=says)


def rename_site(adapter: Path, layer: int) -> None:
    from safetensors.numpy import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    moved = {name.replace("layers.1.", f"layers.{layer}."): t for name, t in tensors.items()}
    save_file(moved, path)


def test_a_site_that_the_graph_lacks(tmp_path: Path, base: Path, adapter: Path) -> None:
    rename_site(adapter, 9)
    result = refused(
        tmp_path, base, adapter, "-o", tmp_path / "out",
        says=("layers.9.attention", "model.layers.9.self_attn.o_proj is not in the graph"),
    )  # fmt: skip
    nearest = result.stderr.partition("nearest: ")[2].strip().split(", ")
    assert {"model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"} <= set(
        nearest
    )


def test_a_directory_that_is_no_adapter(tmp_path: Path, base: Path) -> None:
    says = ("adapter_config.json",)
    refused(tmp_path, base, base, "-o", tmp_path / "out", says=says)


def test_several_adapters_at_once(tmp_path: Path, base: Path, adapter: Path) -> None:
    says = ("expected one adapter, got 2", "--as-adapter")
    refused(tmp_path, base, adapter, adapter, "-o", tmp_path / "out", says=says)


def test_no_adapter(tmp_path: Path, base: Path) -> None:
    assert "Missing argument" in invoke(base, "-o", tmp_path / "out", exit_code=2).stderr


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_a_scale_that_is_no_number(
    tmp_path: Path, base: Path, adapter: Path, scale: str
) -> None:
    arguments = (base, adapter, "-o", tmp_path / "out", "--no-verify", "--scale", scale)
    refused(tmp_path, *arguments, says=(f"finite number, got {scale}",))


def test_a_scale_without_effect(tmp_path: Path, base: Path, adapter: Path) -> None:
    for out in (tmp_path / "out", base / "steered.onnx"):
        for more in ((), ("--no-verify",)):
            arguments = (base, adapter, "-o", out, "--scale", "0", *more)
            refused(tmp_path, *arguments, says=("nothing is steered at scale 0",))


@pytest.mark.parametrize("inline", [(), ("--inline",)])
def test_grafting_twice(
    tmp_path: Path, base: Path, adapter: Path, inline: tuple[str, ...]
) -> None:
    invoke(base, adapter, "-o", tmp_path / "once", *inline)
    arguments = (tmp_path / "once", adapter, "-o", tmp_path / "twice")
    if inline:
        for more in ((), ("--replace",)):
            says = ("steered already by an inlined graft, see austeer.", "cannot be taken out")
            result = refused(tmp_path, *arguments, *more, says=says)
            assert "--replace" not in result.stderr
    else:
        refused(tmp_path, *arguments, says=("steered already, see austeer.", "--replace"))


@pytest.mark.parametrize("scale", ["1e30", "-1e38"])
def test_a_scale_at_which_activations_overflow(
    tmp_path: Path, base: Path, adapter_folder: Callable[..., Path], scale: str
) -> None:
    """No gain does, so that it comes out when the graph runs: bad input all the same."""
    adapter = adapter_folder("llama", "layer")
    arguments = (base, adapter, "-o", tmp_path / "out", f"--scale={scale}")
    says = ("activations overflow their dtype, from austeer.layers.0.", "lower the scale")
    result = refused(tmp_path, *arguments, says=says)
    assert "--no-verify" not in result.stderr
    invoke(base, adapter, "-o", tmp_path / "out", "--scale=1e3")


def test_beside_a_base_of_links(tmp_path: Path, with_data: Path, adapter: Path) -> None:
    """As in the Hub's cache: what is a link is followed, what lies beside it is not."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in sorted(with_data.iterdir()):
        (snapshot / path.name).symlink_to(path.rename(blobs / f"sha-{path.name}"))
    says = ("model.onnx.data", "is a link", "--copy-data")
    for more in ((), ("--no-verify",)):
        arguments = (snapshot, adapter, "-o", snapshot / "steered.onnx", *more)
        refused(tmp_path, *arguments, says=says)
    invoke(snapshot, adapter, "-o", tmp_path / "out", "--copy-data")
    assert np.abs(logits(tmp_path / "out") - logits(snapshot)).max() > 0.01


def test_together_without_adapters_to_switch(tmp_path: Path, base: Path, adapter: Path) -> None:
    arguments = (base, adapter, "-o", tmp_path / "out", "--together")
    refused(tmp_path, *arguments, says=("add --as-adapter",))


# Bad output


def test_a_directory_that_is_not_empty(tmp_path: Path, base: Path, adapter: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("precious")
    refused(tmp_path, base, adapter, "-o", taken, says=(str(taken), "not empty"))
    refused(tmp_path, base, adapter, "-o", base, says=(str(base), "not empty"))


@pytest.mark.parametrize("name", ["model.onnx", "taken.onnx", "taken"])
def test_a_file_that_exists(tmp_path: Path, base: Path, adapter: Path, name: str) -> None:
    taken = base / name
    if not taken.exists():
        taken.write_text("precious")
    refused(tmp_path, base, adapter, "-o", taken, says=(str(taken), "existing file"))


def test_a_link_that_leads_nowhere(tmp_path: Path, base: Path, adapter: Path) -> None:
    out = base / "steered.onnx"
    out.symlink_to(tmp_path / "precious")
    refused(tmp_path, base, adapter, "-o", out, says=(str(out),))


def test_a_directory_by_the_name_of_a_file(tmp_path: Path, base: Path, adapter: Path) -> None:
    out = tmp_path / "steered.onnx"
    out.mkdir()
    refused(tmp_path, base, adapter, "-o", out, says=(str(out),))


@pytest.mark.parametrize("name", ["out", "steered.onnx"])
def test_an_output_below_a_file(tmp_path: Path, base: Path, adapter: Path, name: str) -> None:
    out = base / "config.json" / name
    refused(tmp_path, base, adapter, "-o", out, says=(str(out), "a file is in the way"))


@pytest.mark.skipif(os.geteuid() == 0, reason="mode bits do not bind root")
@pytest.mark.parametrize("name", ["out", "steered.onnx"])
def test_a_folder_that_may_not_be_written(
    tmp_path: Path, base: Path, adapter: Path, name: str
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o555)
    refused(tmp_path, base, adapter, "-o", closed / name, says=("permission denied",))


@pytest.mark.parametrize(
    ("name", "call"), [("out", "tempfile.mkdtemp"), ("base/steered.onnx", "tempfile.mkstemp")]
)
def test_a_folder_that_the_system_refuses(
    tmp_path: Path,
    base: Path,
    adapter: Path,
    name: str,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(**options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

    monkeypatch.setattr(call, forbidden)
    out = tmp_path / name
    refused(tmp_path, base, adapter, "-o", out, says=(str(out), "permission denied"))


@pytest.mark.parametrize("name", ["out", "base/steered.onnx"])
def test_a_write_that_the_kernel_refuses(
    tmp_path: Path, base: Path, adapter: Path, name: str, file_size_limit: None
) -> None:
    out = tmp_path / name
    refused(tmp_path, base, adapter, "-o", out, says=(str(out), "file too large"))


@pytest.mark.parametrize("out", ["out", "elsewhere.onnx"])
def test_data_that_would_be_left_behind(
    tmp_path: Path, with_data: Path, adapter: Path, out: str
) -> None:
    says = ("--copy-data", str(with_data))
    refused(tmp_path, with_data, adapter, "-o", tmp_path / out, says=says)


@pytest.mark.parametrize("option", ["--as-adapter", "--library", "--copy-data"])
def test_several_files_into_one(tmp_path: Path, base: Path, adapter: Path, option: str) -> None:
    arguments = (base, adapter, "-o", base / "steered.onnx", option)
    refused(tmp_path, *arguments, says=("give a directory",))


def test_no_library(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("austeer.graphs.custom_op.library_file", lambda: None)
    arguments = (base, adapter, "-o", tmp_path / "out", "--library")
    refused(tmp_path, *arguments, says=("operator library", "none was built"))


def test_onnxruntime_is_not_installed(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = (base, adapter, "-o", tmp_path / "out")
    refused(tmp_path, *arguments, says=("austeer[cpu]",))
    assert not as_json(invoke(*arguments, "--no-verify", "--json"))["verified"]


def test_an_interruption_leaves_nothing(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("austeer.graphs.probe.prove_graft", interrupted)
    for out in (tmp_path / "out", base / "steered.onnx"):
        before = tree(tmp_path)
        result = invoke(base, adapter, "-o", out, exit_code=130)
        assert "interrupted" in result.stderr
        assert tree(tmp_path) == before
