"""What the tree promises: import direction, light imports, public names, a complete wheel."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from austeer import adapters
from austeer.graphs.custom_op import library_file

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("adapters", "graphs", "exporter")
LAYERS = (
    "activations",
    "localization",
    "measurement",
    "fitting",
    "composition",
    "analysis",
)  # of adapters; each may import itself and those before it
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "datasets")
# Each package may import itself and those after it.
ALLOWED = {
    "adapters": {"adapters"},
    "graphs": {"graphs", "adapters"},
    "exporter": {"exporter", "graphs", "adapters"},
}


def sources() -> list[Path]:
    """Modules of the packages; what only builds them is not installed."""
    found = [path for package in PACKAGES for path in sorted((REPO / package).rglob("*.py"))]
    found = [path for path in found if path.parent.name != "csrc"]
    assert len(found) > 20
    return found


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every imported module name with its line, `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(REPO)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(REPO).parts[0]
    for line, name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        where = f"{path.relative_to(REPO)}:{line}: {name}"
        assert parts[0] not in PACKAGES, f"{where}: import austeer.{parts[0]}"
        if parts[0] == "austeer":
            assert parts[1] in ALLOWED[package], f"{where}: against the import direction"


@pytest.mark.parametrize("layer", ["", *LAYERS])
def test_subpackages_of_adapters_are_layers(layer: str) -> None:
    later = LAYERS[LAYERS.index(layer) + 1 :] if layer else LAYERS
    for path in sorted((REPO / "adapters" / layer).glob("*.py")):
        if path == REPO / "adapters" / "__init__.py":
            continue
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(REPO)}:{line}: {name}"
            parts = name.split(".")
            if parts[:2] == ["austeer", "adapters"]:
                assert parts[2] not in later, where
                # What the package exports may come from any layer.
                assert parts[2] not in adapters.__all__, f"{where}: import its module"


def test_every_subpackage_of_adapters_has_its_layer() -> None:
    folders = {path.parent.name for path in (REPO / "adapters").glob("*/__init__.py")}
    assert folders == set(LAYERS)


@pytest.mark.parametrize("path", sorted((REPO / "graphs").rglob("*.py")), ids=lambda p: p.name)
def test_graphs_never_imports_torch(path: Path) -> None:
    names = {name.split(".")[0] for _, name in imported(ast.parse(path.read_text("utf-8")))}
    assert not names & {"torch", "transformers"}


def test_import_check_sees_a_wrong_direction() -> None:
    # The checks above would be blind if `imported` missed an import form.
    code = "import austeer.exporter.cli\nif 1:\n    from austeer.graphs import graft\n"
    assert [name for _, name in imported(ast.parse(code))] == [
        "austeer.exporter.cli",
        "austeer.graphs.graft",
    ]


def loaded_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after running `code`."""
    tail = (
        "\nimport sys, json; "
        f"print('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    print(f"{time.perf_counter() - started:.2f} s: {code.splitlines()[-1]}")
    return set(json.loads(done.stdout.splitlines()[-1]))


LIGHT = (
    "import austeer.adapters",
    "import austeer.adapters.tensors, austeer.adapters.architectures, austeer.adapters._files",
    "import austeer.exporter",
    "import austeer.exporter.cli",
)


@pytest.mark.parametrize("code", LIGHT)
def test_light_imports_load_nothing_heavy(code: str) -> None:
    assert loaded_after(code) == set()


def test_light_check_sees_torch() -> None:
    assert loaded_after("import torch") >= {"torch"}


@pytest.mark.parametrize("command", [[], ["run"], ["merge"], ["doctor"]], ids=" ".join)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["austeer-export", *{command!r}, "--help"]
from austeer.exporter.cli import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
"""
    assert loaded_after(code.strip()) == set()


def test_graphs_import_without_torch() -> None:
    assert not loaded_after("import austeer.graphs") & {"torch", "transformers"}


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in sources()}
    names = {"austeer." + ".".join(folder.relative_to(REPO).parts) for folder in folders}
    assert set(listed["packages"]) == names
    for package, folder in listed["package-dir"].items():
        assert package == f"austeer.{folder}"
        assert (REPO / folder / "py.typed").is_file()


def test_wheel_contains_every_module(tmp_path: Path) -> None:
    # A copy, because a build leaves its traces in the source tree.
    source = tmp_path / "source"
    source.mkdir()
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(REPO / name)
    build = (
        "import sys; from setuptools import build_meta; "
        "print('\\n' + build_meta.build_wheel(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=source,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]).namelist())
    wanted = {f"austeer/{path.relative_to(REPO)}" for path in sources()}
    wanted |= {f"austeer/{package}/py.typed" for package in PACKAGES}
    assert wanted <= names
    assert not any("csrc" in name for name in names)
    assert not any(
        name.startswith(("adapters/", "tests/", "austeer/__init__")) for name in names
    )
    assert any(name.endswith("licenses/LICENSE") for name in names)
    library = library_file()
    assert library is None or f"austeer/graphs/{library.name}" in names


def public_names(module: ModuleType) -> set[str]:
    """Names that the package itself makes public: not modules, not imported from elsewhere."""
    direct = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", module.__name__).startswith(module.__name__ + ".")
    }
    return direct | set(getattr(module, "_LAZY", {}))


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_the_public_api(package: str) -> None:
    module = importlib.import_module(f"austeer.{package}")
    assert list(module.__all__) == sorted(module.__all__, key=sort_key), "keep __all__ sorted"
    assert public_names(module) <= set(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        assert not inspect.ismodule(value), f"{name} resolves to a module"


def sort_key(name: str) -> tuple[int, str]:
    """Constants, classes, functions; as ruff sorts them."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_export_is_named_after_its_module(package: str) -> None:
    module = importlib.import_module(f"austeer.{package}")
    modules = {info.name for info in pkgutil.iter_modules(module.__path__)}
    assert not modules & set(module.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_is_an_attribute_error(package: str) -> None:
    module = importlib.import_module(f"austeer.{package}")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


def test_modules_stay_within_their_size() -> None:
    lengths = {
        str(p.relative_to(REPO)): len(p.read_text("utf-8").splitlines()) for p in sources()
    }
    assert {name: n for name, n in lengths.items() if n > 400} == {}
