"""`SHA256SUMS`: what coreutils reads, and every kind of difference by name."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.adapters import VerificationError
from austeer.exporter import sums
from austeer.exporter.sums import check_sums, file_digests, require_sums, write_sums

ODD = [
    "plain.txt",
    "two  spaces",
    "back\\slash",
    "new\nline",
    "re\rturn",
    "grün",
    "*star",
    "-dash",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and a subfolder with one, with sums."""
    root = tmp_path / "product"
    (root / "sub").mkdir(parents=True)
    (root / "a.bin").write_bytes(b"\0\1\2")
    (root / "README.md").write_text("card\n")
    (root / "sub" / "b.txt").write_text("b")
    write_sums(root)
    return root


def test_sums_are_sorted_lines_of_sha256sum(folder: Path) -> None:
    names = ("README.md", "a.bin", "sub/b.txt")
    wanted = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    assert (folder / "SHA256SUMS").read_text() == "".join(wanted)
    assert require_sums(folder) == 3


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_coreutils_accepts_every_name(tmp_path: Path) -> None:
    for name in ODD:
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=False
    )
    assert done.returncode == 0
    assert require_sums(tmp_path) == len(ODD)
    (tmp_path / "new\nline").write_text("other")
    report = check_sums(tmp_path)
    assert report is not None and report.changed == ("new\nline",)


def test_sums_that_coreutils_wrote_are_read(folder: Path) -> None:
    lines = [f"{hashlib.sha256(b'b').hexdigest()} *./sub/b.txt\n"]
    for name in ("a.bin", "README.md"):
        lines.append(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))
    assert require_sums(folder) == 3


def test_every_difference_is_named(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"\0\1\3")
    (folder / "README.md").write_text("edited\n")
    (folder / "sub" / "b.txt").unlink()
    (folder / "sub" / "new.txt").write_text("x")
    (folder / "linked").symlink_to(folder / "sub")
    with pytest.raises(VerificationError, match="2 changed, 1 missing, 2 extra") as error:
        require_sums(folder)
    assert error.value.details == (
        "changed: README.md (the model card: text for people, no runtime reads it)",
        "changed: a.bin",
        "missing: sub/b.txt",
        "extra: linked",
        "extra: sub/new.txt",
    )
    assert "--accept-changes" in str(error.value)


def test_a_folder_in_the_place_of_a_file_is_missing(folder: Path) -> None:
    (folder / "a.bin").unlink()
    (folder / "a.bin").mkdir()
    report = check_sums(folder)
    assert report is not None and report.missing == ("a.bin",)


def test_dot_files_that_tools_leave_are_no_difference(folder: Path) -> None:
    (folder / ".gitattributes").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state").write_text("x")
    assert require_sums(folder) == 3


def test_dot_files_are_not_sealed(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    write_sums(folder)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/other")
    assert require_sums(folder) == 3


def test_links_of_a_download_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        blob = tmp_path / path.name
        path.rename(blob)
        path.symlink_to(blob)
    assert require_sums(folder) == 3


def test_no_sums_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert check_sums(tmp_path) is None and require_sums(tmp_path) is None


@pytest.mark.parametrize(
    "line",
    [
        "zz  a.bin",
        "0" * 64 + " a.bin",
        "0" * 64 + "  ",
        "0" * 64 + "  ../outside",
        "0" * 64 + "  /etc/passwd",
        "0" * 64 + "  a.bin\n" + "0" * 64 + "  a.bin",
        "\n",
    ],
)
def test_malformed_sums_are_refused_by_line(folder: Path, line: str) -> None:
    (folder / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(VerificationError, match=r"SHA256SUMS:[12]: expected a SHA-256"):
        check_sums(folder)


def test_what_a_subfolder_says_is_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "onnx"
    inner.mkdir()
    (inner / "model.onnx").write_text("graph")
    (tmp_path / "report.md").write_text("report")
    write_sums(inner)
    hashed: list[Path] = []
    real = sums.file_digest

    def digest(path: Path, *stopped: Any) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(sums, "file_digest", digest)
    write_sums(tmp_path)
    assert sorted(path.name for path in hashed) == ["SHA256SUMS", "report.md"]
    assert require_sums(tmp_path) == 3


@settings(deadline=None, max_examples=30)
@given(contents=st.lists(st.binary(max_size=300_000), max_size=6))
def test_digests_keep_the_order_of_the_paths(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / str(number) for number in range(len(contents))]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    assert file_digests(paths) == [hashlib.sha256(data).hexdigest() for data in contents]


@settings(deadline=None, max_examples=60)
@given(
    name=st.binary(min_size=1, max_size=40).filter(
        lambda raw: not set(raw) & {0, 47} and raw[:1] != b"." and raw != b"SHA256SUMS"
    )
)
def test_any_file_name_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, name: bytes
) -> None:
    folder = tmp_path_factory.mktemp("named")
    path = folder / os.fsdecode(name)
    path.write_bytes(name)
    write_sums(folder)
    assert require_sums(folder) == 1
    path.write_bytes(name + b"!")
    report = check_sums(folder)
    assert report is not None and report.changed == (os.fsdecode(name),)
