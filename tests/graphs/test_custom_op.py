"""Compiled kernels against the function bodies and a float64 reference, on onnxruntime."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from steering_ops import (
    DTYPES,
    INDEX,
    D,
    activations,
    bound,
    hold_constants,
    one_node_model,
    reference,
    site_tensors,
)

from austeer.adapters import GraphError
from austeer.graphs import (
    STEER_AU,
    STEER_AU_ADAPTIVE,
    custom_op,
    custom_op_library,
    register,
)

needs_library = pytest.mark.skipif(
    custom_op.library_file() is None and os.environ.get("AUSTEER_OPS") != "require",
    reason="no operator library was built (no C++ compiler?)",
)


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = [
    CPU,
    pytest.param(
        CUDA,
        marks=pytest.mark.skipif(
            CUDA not in onnxruntime.get_available_providers(),
            reason=f"onnxruntime has no {CUDA}: needs a GPU and onnxruntime-gpu",
        ),
    ),
]


def session(
    model: ir.Model, *, kernels: bool = True, threads: int = 1, provider: str = CPU
) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if kernels:
        register(options)
    found = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=[provider]
    )
    # One that does not come up leaves its work to the CPU with no more than a warning.
    assert found.get_providers()[0] == provider
    return found


def run(model: ir.Model, feeds: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    (y,) = session(model, **options).run(None, feeds)
    return np.asarray(y)


def feeds_for(x: np.ndarray, rank: int, scale: float = 0.7) -> dict[str, np.ndarray]:
    return {"x": x, "scale": np.array([scale], np.float32), **site_tensors(rank)}


@needs_library
@pytest.mark.parametrize("provider", PROVIDERS)
def test_parity_matrix(provider: str) -> None:
    """Prints it: largest error in units of the allowed one, function body and kernel."""
    worst = 0.0
    for rank in (0, 1, 4):
        op = STEER_AU_ADAPTIVE if rank else STEER_AU
        for dtype in DTYPES:
            model = one_node_model(op, dtype, rank=3)
            sessions = [
                session(model, kernels=kernels, provider=provider) for kernels in (False, True)
            ]
            for shape in [(batch, tokens) for batch in (1, 3) for tokens in (1, 17, 512)]:
                x = activations(shape, dtype)
                expected = reference(x, site_tensors(rank), np.float32(0.7))
                found = [one.run(None, feeds_for(x, rank))[0] for one in sessions]
                errors = [
                    float((np.abs(y - expected) / bound(x, expected, dtype)).max())
                    for y in found
                ]
                print(f"{op.name:16s} r={rank} {dtype:9s} {shape!s:9s}", *errors)
                worst = max(worst, *errors)
                others = np.setdiff1d(np.arange(D), INDEX)
                assert np.array_equal(found[1][..., others], x[..., others])
                assert np.abs(found[1] - x)[..., INDEX].max() > 0.1
                if rank == 0:
                    assert np.array_equal(*found), "constant gains: the same bits"
    assert worst <= 1.0


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("fed", [(), ("scale",), ("gamma", "scale"), ("idx",)])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_constants_of_the_graph_are_those_fed(
    fed: tuple[str, ...], rank: int, dtype: str, provider: str
) -> None:
    """What the kernel copies when the session is made, and what it asks for in every run."""
    x, feeds = activations((2, 3), dtype), feeds_for(activations((2, 3), dtype), rank)
    constants = {name: feeds[name] for name in feeds if name not in ("x", *fed)}
    op = STEER_AU_ADAPTIVE if rank else STEER_AU
    expected = run(one_node_model(op, dtype, rank=3), feeds, provider=provider)
    model = hold_constants(one_node_model(op, dtype, rank=3), constants)
    one = session(model, provider=provider)
    fed_now = {name: feeds[name] for name in ("x", *fed)}
    np.testing.assert_array_equal(one.run(None, fed_now)[0], expected)
    assert not np.array_equal(expected, x)
    if "scale" in fed:
        off = one.run(None, fed_now | {"scale": np.zeros(1, np.float32)})[0]
        np.testing.assert_array_equal(off, x)


@needs_library
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_nodes_one_after_another_in_place(provider: str, rank: int, threads: int) -> None:
    """Whichever end of the rows each begins at, in however many blocks."""
    op, width, nodes = STEER_AU_ADAPTIVE if rank else STEER_AU, 4096, 3
    tensors = {**site_tensors(rank), "scale": np.array([0.1], np.float32)}
    tensors |= {"idx": np.array([4095, 0, 1000, 1001, 17])}
    model = one_node_model(op, "float16", rank=3, width=width)
    for _ in range(nodes - 1):
        steering = model.graph.node(1)
        again = ir.node(
            op.name, [steering.outputs[0], *steering.inputs[1:]], domain=steering.domain
        )
        readers = [use.node for use in steering.outputs[0].uses() if use.node is not again]
        for reader in readers:
            reader.replace_input_with(0, again.outputs[0])
        model.graph.insert_after(steering, again)
    one = session(hold_constants(model, tensors), threads=threads, provider=provider)
    rng = np.random.default_rng(0)
    for tokens in (1, 700, 2, 700):
        x = expected = rng.normal(size=(1, tokens, width)).astype(np.float16).astype(np.float32)
        for _ in range(nodes):
            expected = reference(expected, tensors, np.float32(0.1))
        (y,) = one.run(None, {"x": x})
        np.testing.assert_allclose(y, expected, rtol=4e-3, atol=1e-5)
        others = np.setdiff1d(np.arange(width), tensors["idx"])
        np.testing.assert_array_equal(y[..., others], x[..., others])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_threads_change_nothing(rank: int, dtype: str) -> None:
    # Wide enough for several blocks of tokens.
    model = one_node_model(STEER_AU_ADAPTIVE if rank else STEER_AU, dtype, rank=3)
    feeds = feeds_for(activations((3, 4096), dtype), rank)
    assert np.array_equal(run(model, feeds), run(model, feeds, threads=4))


@needs_library
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("units", [0, 3])
def test_few_units_in_place(units: int, rank: int) -> None:
    """What no unit touches costs nothing, so that a block has more tokens than are in a row."""
    rng = np.random.default_rng(0)
    width, tokens = 1000, 5000
    arrays = {"idx": np.arange(units) * 300 + 7, "gamma": rng.normal(size=units)}
    if rank:
        arrays |= {"V": rng.normal(size=(units, rank)), "b": rng.normal(size=rank)}
        arrays |= {"U": rng.normal(size=(rank, units))}
    site = {n: a if n == "idx" else a.astype(np.float32) for n, a in arrays.items()}
    op = STEER_AU_ADAPTIVE if rank else STEER_AU
    # The cast before it is what the operator may overwrite.
    model = one_node_model(op, "float16", rank=2, width=width)
    x = rng.normal(size=(tokens, width)).astype(np.float16).astype(np.float32)
    feeds = {"x": x, "scale": np.ones(1, np.float32), **site}
    for threads in (1, 2):
        found = run(model, feeds, threads=threads)
        np.testing.assert_allclose(found, reference(x, site, 1.0), rtol=5e-4, atol=1e-7)


@needs_library
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("k", [8, 9, 13, 257, 700])
@pytest.mark.parametrize("op", [STEER_AU, STEER_AU_ADAPTIVE])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_any_number_of_units(provider: str, op: Any, k: int, dtype: str) -> None:
    """In groups and blocks; in float16 the kernel overwrites what the cast before it wrote."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 2000)).astype(DTYPES[dtype]).astype(np.float32)
    rank = 2
    tensors = {"idx": rng.permutation(2000)[:k], "gamma": rng.normal(size=k)}
    if op is STEER_AU_ADAPTIVE:
        tensors |= {"V": rng.normal(size=(k, rank)) / 30, "b": rng.normal(size=rank)}
        tensors |= {"U": rng.normal(size=(rank, k))}
    tensors = {n: t if n == "idx" else t.astype(np.float32) for n, t in tensors.items()}
    model = one_node_model(op, dtype, rank=3, width=2000)
    feeds = {"x": x, "scale": np.ones(1, np.float32), **tensors}
    y = run(model, feeds, provider=provider)
    expected = reference(x, tensors, 1.0)
    rtol = 2e-5 if dtype == "float" else 1e-3
    np.testing.assert_allclose(y, expected, rtol=rtol, atol=1e-6)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_activations(dtype: str) -> None:
    x = np.zeros((1, 8, D), np.float32)
    special = [np.inf, -np.inf, np.nan, 0.0, -0.0, 6e-8, 65504.0, 3e38]
    with np.errstate(over="ignore"):
        x[0, :, INDEX] = np.asarray(special).astype(DTYPES[dtype]).astype(np.float32)
    for rank in (0, 1):
        model = one_node_model(STEER_AU_ADAPTIVE if rank else STEER_AU, dtype, rank=3)
        with np.errstate(all="ignore"):
            body, kernel = (
                run(model, feeds_for(x, rank), kernels=kernels) for kernels in (False, True)
            )
        if rank == 0:
            np.testing.assert_array_equal(kernel, body)
        finite = np.isfinite(x).all(-1)
        np.testing.assert_allclose(kernel[finite], body[finite], rtol=2e-2)


@needs_library
def test_every_float16_survives() -> None:
    """γ = 0 gives back all 65 536 bit patterns: the conversions are exact both ways."""
    patterns = np.arange(65536, dtype=np.uint16)
    for dtype in ("float16", "bfloat16"):
        x = patterns.view(DTYPES[dtype]).reshape(1, -1, D - 8)
        x = np.concatenate([x, np.zeros((*x.shape[:2], 8), x.dtype)], -1).astype(np.float32)
        k = D
        tensors = {"idx": np.arange(k), "gamma": np.zeros(k, np.float32)}
        feeds = {"x": x, "scale": np.ones(1, np.float32), **tensors}
        np.testing.assert_array_equal(run(one_node_model(STEER_AU, dtype, rank=3), feeds), x)


@needs_library
def test_subnormal_float16_where_the_float_unit_has_none() -> None:
    """With `set_denormal_as_zero` float32 loses its subnormal numbers, float16 does not."""
    x = np.arange(1, D + 1, dtype=np.uint16).view(np.float16)[None, None].astype(np.float32)
    feeds = {"x": x, "scale": np.ones(1, np.float32), **site_tensors(0)}
    model = ir.to_proto(one_node_model(STEER_AU, "float16", rank=3)).SerializeToString()
    found: list[Any] = []

    def work() -> None:
        for kernels in (False, True):
            options = onnxruntime.SessionOptions()
            options.add_session_config_entry("session.set_denormal_as_zero", "1")
            if kernels:
                register(options)
            found.append(onnxruntime.InferenceSession(model, options).run(None, feeds)[0])

    # The setting is the thread's, and must not outlive the test.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(*found)
    assert (found[1][..., INDEX] != 0).all() and (found[1] != x)[..., INDEX].any()


@needs_library
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_the_library_stays_when_its_last_session_ends() -> None:
    """Loaded anew each time, it would cost memory with each session."""
    code = (
        "import onnxruntime; from pathlib import Path; from austeer.graphs import *\n"
        "options = onnxruntime.SessionOptions(); register(options); del options\n"
        "import gc; gc.collect()\n"
        "assert custom_op_library().name in Path('/proc/self/maps').read_text()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_library_shows_its_entry_points_alone() -> None:
    """All else could be taken for functions of a host with a C++ library of its own."""
    command = ["nm", "-D", "--defined-only", custom_op_library()]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = [line.split()[-1] for line in shown.splitlines()]
    assert "RegisterCustomOps" in names and len(names) < 10, names


@needs_library
def test_a_value_that_others_read_is_not_overwritten() -> None:
    """The kernel works in place only where nothing else reads its input."""
    model = one_node_model(STEER_AU, "float", rank=3)
    before = model.graph.node(0).outputs[0]
    after = model.graph.node(1).outputs[0]
    total = ir.node("Add", [before, after])
    model.graph.insert_after(model.graph.node(1), total)
    model.graph.node(3).replace_input_with(0, total.outputs[0])
    x = activations((2, 5), "float")
    y = run(model, feeds_for(x, 0))
    np.testing.assert_allclose(y, x + reference(x, site_tensors(0), 0.7), rtol=1e-5, atol=1e-6)


@needs_library
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"idx": np.array([0, 7, 8, 21, D])}, "idx: expected numbers from 0"),
        ({"idx": np.array([0, 7, 8, 21, -1])}, "idx: expected numbers from 0"),
        ({"idx": np.array([0, 7, 8, 21, 7])}, "idx: expected each unit once"),
        ({"idx": np.array([0, 7, 7, 8, 21])}, "idx: expected each unit once"),
        ({"idx": np.arange(5)[None]}, r"idx: expected \[k\]"),
        ({"gamma": np.ones(4, np.float32)}, "gamma: expected one number for each index"),
        ({"gamma": np.ones((5, 1), np.float32)}, "gamma: expected one number for each index"),
        ({"scale": np.ones(2, np.float32)}, r"scale: expected one number, \[1\]"),
        ({"scale": np.ones((1, 1), np.float32)}, r"scale: expected one number, \[1\]"),
        ({"V": np.ones((4, 1), np.float32)}, r"V: expected \[k, r\]"),
        ({"V": np.ones((5, 65), np.float32)}, "a rank r from 1 to 64"),
        ({"b": np.ones(2, np.float32)}, r"b: expected \[r\]"),
        ({"b": np.ones((1, 1), np.float32)}, r"b: expected \[r\]"),
        ({"U": np.ones((2, 5), np.float32)}, r"U: expected \[r, k\]"),
        ({"U": np.ones((5, 1), np.float32)}, r"U: expected \[r, k\]"),
    ],
)
def test_constants_that_do_not_fit_are_refused(
    changes: dict[str, np.ndarray], says: str
) -> None:
    adaptive = changes.keys() & {"V", "b", "U"}
    model = one_node_model(STEER_AU_ADAPTIVE if adaptive else STEER_AU, "float", rank=3)
    feeds = feeds_for(activations((1, 2), "float"), 1 if adaptive else 0) | changes
    for value in model.graph.inputs:
        value.shape = None if value.name in changes else value.shape
    with pytest.raises(Exception, match=says):
        run(model, feeds)
    constants = {name: feeds.pop(name) for name in list(feeds) if name != "x"}
    with pytest.raises(Exception, match=says):
        run(hold_constants(model, constants), feeds)


@needs_library
@pytest.mark.parametrize("name", ["V", "U"])
def test_a_transposed_matrix_is_refused_in_every_run(name: str) -> None:
    """As many numbers, and none where it belongs; the function body refuses it as well."""
    model = one_node_model(STEER_AU_ADAPTIVE, "float", rank=3)
    for value in model.graph.inputs:
        value.shape = None if value.name == name else value.shape
    x, one, body = activations((1, 2), "float"), session(model), session(model, kernels=False)
    right = feeds_for(x, 2)
    wrong = right | {name: np.ascontiguousarray(right[name].T)}
    for _ in range(2):
        np.testing.assert_allclose(
            one.run(None, right)[0], reference(x, right, right["scale"]), rtol=1e-5, atol=1e-6
        )
        with pytest.raises(Exception, match=f"{name}: expected"):
            one.run(None, wrong)
        with pytest.raises(Exception, match="MatMul"):
            body.run(None, wrong)


@needs_library
def test_registering_twice_is_once() -> None:
    options = onnxruntime.SessionOptions()
    register(options)
    register(options)
    model = ir.to_proto(one_node_model(STEER_AU, "float", rank=3)).SerializeToString()
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@needs_library
def test_an_older_onnxruntime_is_refused_with_its_version() -> None:
    said = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(_code: int, text: bytes) -> int:
        said.append(text.decode())
        return 1

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version: int) -> int | None:
        return ctypes.addressof(table) if version <= 17 else None

    version = ctypes.create_string_buffer(b"1.17.3")

    @ctypes.CFUNCTYPE(ctypes.c_void_p)
    def version_string() -> int:
        return ctypes.addressof(version)

    callbacks = (ctypes.cast(call, ctypes.c_void_p) for call in (get_api, version_string))
    base = (ctypes.c_void_p * 2)(*callbacks)
    entry = ctypes.CDLL(str(custom_op_library())).RegisterCustomOps
    entry.restype = ctypes.c_void_p
    assert entry(None, ctypes.byref(base)) == 1
    assert said == ["austeer's operators need onnxruntime 1.18 or newer, this is 1.17.3"]


@needs_library
def test_facts_of_the_library() -> None:
    facts = custom_op.library_facts()
    assert facts is not None and facts["compiler"] and "cuda" in facts


def test_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_op, "_NAMES", {})
    monkeypatch.setattr(custom_op.sys, "platform", "none")
    monkeypatch.setattr(custom_op, "__file__", "/nowhere/custom_op.py")
    assert custom_op.library_file() is None and custom_op.library_facts() is None
    with pytest.raises(GraphError, match="none was built with this installation"):
        register(onnxruntime.SessionOptions())


def test_a_file_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_op, "library_file", lambda: tmp_path / "lib.so")
    (tmp_path / "lib.so").write_text("not a library")
    with pytest.raises(GraphError, match="onnxruntime cannot load it"):
        register(onnxruntime.SessionOptions())
    with pytest.raises(GraphError, match="cannot be loaded"):
        custom_op.library_facts()
