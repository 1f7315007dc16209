"""Builds the operator library with CMake while the wheel is made, where a compiler is there.

Without a C++ compiler the package installs all the same: steered graphs then run by their
function bodies. With `AUSTEER_OPS=require` a missing or failing build is an error, with
`AUSTEER_OPS=skip` the library is left out, with `AUSTEER_CUDA=0` its CUDA kernels. Where those
cannot be built, as by an nvcc too old for a listed architecture, the library does without them,
unless `AUSTEER_CUDA=require`. `AUSTEER_CUDA_ARCHITECTURES`, such as `70-real;90`, names others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
FILE_NAMES = {"darwin": "libausteer_ops.dylib", "win32": "austeer_ops.dll"}


class BuildLibrary(build_ext):
    """`build_ext` that leaves the compiling to CMake."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library is loaded by onnxruntime, so it is named like one, not like a module."""
        name = FILE_NAMES.get(sys.platform, "libausteer_ops.so")
        return str(Path(*fullname.split(".")[:-1]) / name)

    def run(self) -> None:
        """Build the library, or say why not."""
        self._cmake, self._compiler = _cmake() or "", _compiler() or ""
        if os.environ.get("AUSTEER_OPS") == "skip":
            self._skip("AUSTEER_OPS=skip")
        elif not (self._cmake and self._compiler):
            self._skip(f"found no {'C++ compiler' if self._cmake else 'CMake'}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Let CMake build the one extension there is, without CUDA where it fails with it."""
        target = Path(self.get_ext_fullpath(ext.name))
        wish = os.environ.get("AUSTEER_CUDA", "")
        tries = {"0": ("OFF",), "require": ("REQUIRE",)}.get(wish, ("ON", "OFF"))
        failures: list[str] = []
        for cuda in tries:
            try:
                self._build(target, cuda)
                break
            except subprocess.CalledProcessError as error:
                failures.append(f"{error.cmd[0]} failed with {error.returncode}")
        if len(failures) == len(tries):
            self._skip(failures[-1])
        elif failures:
            _say(
                f"operator library built without CUDA kernels: with them, {failures[0]}; "
                "AUSTEER_CUDA=0 leaves them out from the start"
            )

    def _build(self, target: Path, cuda: str) -> None:
        work = Path(self.build_temp).resolve() / "austeer_ops"
        work.mkdir(parents=True, exist_ok=True)
        options = [f"-DCMAKE_CXX_COMPILER={self._compiler}", f"-DAUSTEER_CUDA={cuda}"]
        if architectures := os.environ.get("AUSTEER_CUDA_ARCHITECTURES"):
            options.append(f"-DAUSTEER_CUDA_ARCHITECTURES={architectures}")
        subprocess.run([self._cmake, "-S", HERE, "-B", work, *options], check=True)
        subprocess.run([self._cmake, "--build", work, "--config", "Release"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        found = next(path for path in work.rglob(target.name) if path.is_file())
        shutil.copyfile(found, target)

    def _skip(self, reason: str) -> None:
        # Not an extension of this build any more: what is listed must exist.
        self.extensions = []
        wishes = os.environ.get("AUSTEER_OPS"), os.environ.get("AUSTEER_CUDA")
        if "require" in wishes:
            raise SystemExit(f"austeer: operator library not built: {reason}")
        _say(
            f"operator library not built: {reason}; steered graphs run by their function bodies"
        )


def _say(text: str) -> None:
    print(f"austeer: {text}", file=sys.stderr)


def _cmake() -> str | None:
    try:
        from cmake import CMAKE_BIN_DIR
    except ImportError:
        return shutil.which("cmake")
    return shutil.which("cmake", path=CMAKE_BIN_DIR)


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next((found for name in names if (found := shutil.which(name))), None)
