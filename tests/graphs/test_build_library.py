"""What an installation builds of the operator library where not everything can be built."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

setuptools = pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its CMake is a shell script")

SOURCE = Path(__file__).resolve().parents[2] / "graphs" / "csrc" / "build_library.py"
CMAKE = """\
#!/bin/sh
echo "$@" >> {log}
case "$1" in
  -S) case "$*" in *AUSTEER_CUDA=[OR][NE]*) touch {work}/cuda ;; *) rm -f {work}/cuda ;; esac ;;
  --build) [ {fails} ] && exit 1; touch "$2/{name}" ;;
esac
exit 0
"""


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build with a CMake that fails on a condition of the shell: the log, the library."""
    spec = importlib.util.spec_from_file_location("build_library", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name = module.FILE_NAMES.get(sys.platform, "libausteer_ops.so")
    for variable in ("AUSTEER_OPS", "AUSTEER_CUDA", "AUSTEER_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(variable, raising=False)

    def run(fails: str) -> tuple[list[str], Path]:
        log, cmake = tmp_path / "log", tmp_path / "cmake"
        fails = fails.format(work=tmp_path)
        cmake.write_text(CMAKE.format(log=log, work=tmp_path, fails=fails, name=name))
        cmake.chmod(0o755)
        monkeypatch.setattr(module, "_cmake", lambda: str(cmake))
        monkeypatch.setattr(module, "_compiler", lambda: "c++")
        extension = setuptools.Extension("austeer.graphs.libausteer_ops", [])
        command = module.BuildLibrary(setuptools.Distribution({"ext_modules": [extension]}))
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        command.ensure_finalized()
        command.run()
        return log.read_text().splitlines(), tmp_path / "lib" / "austeer" / "graphs" / name

    return run


def test_an_nvcc_that_fails_leaves_the_kernels_of_the_cpu(build: Any, capfd: Any) -> None:
    log, library = build("-e {work}/cuda")
    assert library.is_file()
    assert ["ON" if "=ON" in line else "OFF" for line in log if line.startswith("-S")] == [
        "ON",
        "OFF",
    ]
    assert "built without CUDA kernels" in capfd.readouterr().err


def test_a_build_that_succeeds_is_not_repeated(build: Any, capfd: Any) -> None:
    log, library = build("")
    assert library.is_file() and len(log) == 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("cuda", "tries"), [("0", 1), ("1", 2)])
def test_a_compiler_that_fails_is_said(
    cuda: str, tries: int, build: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUSTEER_CUDA", cuda)
    log, library = build("1")
    assert not library.exists() and len(log) == 2 * tries
    said = capfd.readouterr().err
    assert "operator library not built" in said and "without CUDA" not in said
    monkeypatch.setenv("AUSTEER_OPS", "require")
    with pytest.raises(SystemExit, match="not built"):
        build("1")


def test_cuda_kernels_that_are_required_must_build(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUSTEER_CUDA", "require")
    log, library = build("")
    assert library.is_file() and "-DAUSTEER_CUDA=REQUIRE" in log[0]
    library.unlink()
    with pytest.raises(SystemExit, match="not built"):
        build("-e {work}/cuda")
    assert not library.exists()


def test_architectures_are_passed_on(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ARCHITECTURES" not in build("")[0][0]
    monkeypatch.setenv("AUSTEER_CUDA_ARCHITECTURES", "70-real;90")
    log, _ = build("")
    assert "-DAUSTEER_CUDA_ARCHITECTURES=70-real;90" in log[-2]
