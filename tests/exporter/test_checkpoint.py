"""What is copied, what stays behind, and that a patch touches nothing else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import safetensors
from safetensors.numpy import save_file

from austeer.adapters import ModelError, tensors
from austeer.adapters.weights import Checkpoint
from austeer.exporter import copying
from austeer.exporter.checkpoint import (
    check_companions,
    copy_checkpoint,
    shared_names,
    source_files,
)
from austeer.exporter.copying import Change, copy_file

TAKEN = (
    "LICENSE",
    "LICENSE-MODEL.txt",
    "USE_POLICY.md",
    "chat_template.jinja",
    "configuration_custom.py",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
)
LEFT = (
    ".gitattributes",
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "consolidated.safetensors",
    "flax_model.msgpack",
    "model.fp16.safetensors",
    "model.gguf",
    "model.onnx",
    "optimizer.pt",
    "picture.png",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "training_args.bin",
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A made-up model directory with every kind of file."""
    folder = tmp_path / "base"
    folder.mkdir()
    weights = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.ones(5, np.float16),
        "c": np.zeros((2, 2), np.float32),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", *TAKEN, *LEFT):
        (folder / name).write_bytes(f"content of {name}".encode())
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_copies_what_loading_needs_and_nothing_else(base: Path, out: Path) -> None:
    names = copy_checkpoint(Checkpoint(base), out).names
    template = "additional_chat_templates/tool_use.jinja"
    expected = {"config.json", "model.safetensors", template, *TAKEN}
    found = listing(out)
    assert set(found) == expected == set(names)
    assert all(found[name] == (base / name).read_bytes() for name in expected)


def test_links_of_a_hub_cache_become_files(base: Path, tmp_path: Path, out: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = base.rename(_made(blobs.parent / "snapshots") / "0123")
    for path in list(snapshot.iterdir()):
        if path.is_file():
            blob = path.rename(blobs / f"sha-{path.name}")
            path.symlink_to(os.path.relpath(blob, snapshot))
            blob.chmod(0o444)
    copy_checkpoint(Checkpoint(snapshot), out)
    for name in ("model.safetensors", "config.json"):
        assert not (out / name).is_symlink()
        assert (out / name).read_bytes() == (blobs / f"sha-{name}").read_bytes()
        assert (out / name).stat().st_mode & 0o200, "a copy must be writable to be patched"


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "link", ["notes.txt", "LICENSE", "additional_chat_templates/more.jinja"]
)
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_brings_no_foreign_file_into_a_product(
    base: Path, tmp_path: Path, out: Path, link: str, relative: bool
) -> None:
    secret = tmp_path / "credentials"
    secret.write_text("secret")
    path = base / link
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(secret, path.parent) if relative else secret)
    with pytest.raises(ModelError, match=r"link out of the model's directory, to .*credential"):
        copy_checkpoint(Checkpoint(base), out)
    assert listing(out) == {}


def test_a_folder_of_templates_that_is_a_link(base: Path, tmp_path: Path, out: Path) -> None:
    templates = base / "additional_chat_templates"
    templates.rename(tmp_path / "elsewhere")
    templates.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="link out of the model's directory"):
        copy_checkpoint(Checkpoint(base), out)


def test_links_within_the_directory_and_to_weights_are_followed(
    base: Path, tmp_path: Path, out: Path
) -> None:
    (base / "copy.txt").symlink_to("merges.txt")
    # Weights are read and checked first: they cannot be any other file.
    (base / "model.safetensors").rename(tmp_path / "on-another-disk")
    (base / "model.safetensors").symlink_to(tmp_path / "on-another-disk")
    entry = tmp_path / "named-otherwise"
    entry.symlink_to(base)
    copy_checkpoint(Checkpoint(entry), out)
    assert (out / "copy.txt").read_bytes() == (base / "merges.txt").read_bytes()
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "on-another-disk"
    ).read_bytes()


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(base: Path, out: Path) -> None:
    os.mkfifo(base / "extra.json")
    with pytest.raises(ModelError, match=r"extra\.json: expected a file"):
        copy_checkpoint(Checkpoint(base), out)


@pytest.mark.parametrize("note", [{"b": ["a"]}, ["a"], {"b": {"a": 1}}, {"b": 5}, "a"])
def test_a_note_of_shared_names_that_is_no_text(tmp_path: Path, note: Any) -> None:
    header = {"__metadata__": note, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    (tmp_path / "model.safetensors").write_bytes(safetensors(header, b"x"))
    with pytest.raises(ModelError, match="metadata is not an object of texts"):
        shared_names(Checkpoint(tmp_path))


def test_links_of_a_cache_that_repositories_share(
    base: Path, tmp_path: Path, out: Path
) -> None:
    """huggingface_hub 2.4: a repository's blobs are links to those of the whole cache."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--a--b" / "snapshots" / "0123"
    own, shared = cache / "models--a--b" / "blobs", cache / "blobs" / "ab"
    for folder in (snapshot, own, shared):
        folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.is_file():
            path.rename(shared / path.name)
            (own / path.name).symlink_to(os.path.relpath(shared / path.name, own))
            (snapshot / path.name).symlink_to(os.path.relpath(own / path.name, snapshot))
    names = copy_checkpoint(Checkpoint(snapshot), out).names
    assert {"config.json", "model.safetensors", "vocab.json"} <= set(names)


def test_facts_of_a_base_need_no_copies(base: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    (base / "linked.json").symlink_to(tmp_path / "elsewhere")
    (base / "gone.json").symlink_to(tmp_path / "gone")
    names = {path.name for path in source_files(Checkpoint(base))}
    assert "linked.json" in names and "gone.json" not in names
    with pytest.raises(ModelError, match=r"gone\.json|linked\.json"):
        check_companions(Checkpoint(base))


def test_dangling_link_is_named(base: Path, out: Path) -> None:
    (base / "vocab.json").unlink()
    (base / "vocab.json").symlink_to(base / "gone")
    with pytest.raises(ModelError, match=r"vocab\.json: expected a file"):
        copy_checkpoint(Checkpoint(base), out)


def test_sharded_copies_the_index(saved_model: Callable[..., Path], out: Path) -> None:
    base = saved_model("llama", max_shard_size="20KB")
    names = copy_checkpoint(Checkpoint(base), out).names
    assert "model.safetensors.index.json" in names
    assert sum(name.endswith(".safetensors") for name in names) > 1
    assert listing(out).items() <= listing(base).items()


def test_stale_index_beside_a_single_file_stays_behind(base: Path, out: Path) -> None:
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    copy_checkpoint(Checkpoint(base), out)
    assert not (out / "model.safetensors.index.json").exists()


def test_a_change_touches_one_tensor_and_is_counted(base: Path, out: Path) -> None:
    checkpoint = Checkpoint(base)
    entry = checkpoint["a"]

    def double_last_row(rows: np.ndarray[Any, Any], first: int) -> int:
        rows[2 - first] *= 2
        return 4

    assert copy_checkpoint(checkpoint, out, {"a": Change(double_last_row)}).changed == 4
    assert Checkpoint(out)["a"].read()[2].tolist() == [16, 18, 20, 22]
    before, after = ((f / "model.safetensors").read_bytes() for f in (base, out))
    assert before[: entry.start] == after[: entry.start]
    assert before[entry.start + entry.size :] == after[entry.start + entry.size :]


def test_changes_come_in_blocks_of_rows(
    base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "_BLOCK", 9)
    seen = []

    def negate(rows: np.ndarray[Any, Any], first: int) -> int:
        seen.append((first, rows.tolist()))
        rows *= -1
        return rows.size

    found = copy_checkpoint(Checkpoint(base), out, {"a": Change(negate), "c": Change(negate)})
    assert found.changed == 16
    assert seen == [
        (0, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, [[8, 9, 10, 11]]),
        (0, [[0, 0], [0, 0]]),
    ]
    copied, original = Checkpoint(out), Checkpoint(base)
    assert copied["a"].read().tobytes() == (-original["a"].read()).tobytes()
    assert copied["b"].read().tobytes() == original["b"].read().tobytes()
    assert np.signbit(copied["c"].read()).all()


def test_a_change_of_the_whole_gets_all_rows(
    base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "_BLOCK", 1)
    shapes = []
    note = Change(lambda rows, first: shapes.append((first, rows.shape)) or 0, whole=True)
    copy_checkpoint(Checkpoint(base), out, {"a": note})
    assert shapes == [(0, (3, 4))]


def test_a_failed_check_ends_the_copy(base: Path, out: Path) -> None:
    def refuse() -> None:
        raise ModelError("the wrong base")

    with pytest.raises(ModelError, match="the wrong base"):
        copy_checkpoint(Checkpoint(base), out, check=refuse)


def test_a_file_that_shrinks_while_it_is_read(base: Path, out: Path) -> None:
    def truncate(rows: np.ndarray[Any, Any], first: int) -> int:
        os.truncate(base / "model.safetensors", 20)
        return 0

    first = min(Checkpoint(base).values(), key=lambda entry: entry.start)
    with pytest.raises(ModelError, match=r"model\.safetensors: became shorter"):
        copy_checkpoint(Checkpoint(base), out, {first.name: Change(truncate)})


def test_shared_names_come_from_the_writers_note(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_model

    first, second, third = (torch.nn.Linear(3, 3, bias=False) for _ in range(3))
    second.weight = first.weight
    net = torch.nn.ModuleDict({"first": first, "second": second, "third": third})
    save_model(net, str(tmp_path / "model.safetensors"))
    assert shared_names(Checkpoint(tmp_path)) == {
        "first.weight": ("second.weight",),
        "second.weight": ("first.weight",),
    }


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EINVAL])
def test_copy_without_the_kernels_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    kernel, calls = os.copy_file_range, []

    def gives_up(source: int, target: int, count: int, offset: int) -> int:
        if calls:
            raise OSError(number, os.strerror(number))
        calls.append(count)
        return kernel(source, target, 1000, offset)

    monkeypatch.setattr(os, "copy_file_range", gives_up)
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_copy_where_the_kernel_claims_the_end_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    (tmp_path / "a").write_bytes(b"content")
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"


def test_writing_begins_beside_the_copying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def advise(_: int, start: int, length: int, __: int) -> None:
        begun.append((start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(copying, "_RANGE", 1000)
    (tmp_path / "a").write_bytes(bytes(range(256)) * 10)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert begun == [(0, 1000), (1000, 1000), (2000, 560)]

    def refuses(*_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuses)
    copy_file(tmp_path / "a", tmp_path / "c")
    monkeypatch.delattr(os, "posix_fadvise")
    copy_file(tmp_path / "a", tmp_path / "d")
    for name in "bcd":
        assert (tmp_path / name).read_bytes() == (tmp_path / "a").read_bytes()


def test_full_disk_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(5000))
    program = (
        "import resource, signal, sys; from pathlib import Path;"
        "from austeer.exporter.copying import copy_file;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "copy_file(*map(Path, sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a", tmp_path / "b"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "OSError: [Errno 27] File too large" in done.stderr


def test_copy_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"old"
