"""The numpy runner on a toy model: logits follow positions, the cache grows token by token."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from austeer.adapters import GraphError
from austeer.graphs import OnnxCausalLM, save_model

pytest.importorskip("onnxruntime")

DTYPES = {"FLOAT": np.float32, "FLOAT16": np.float16, "BFLOAT16": ml_dtypes.bfloat16}
VOCABULARY = 11
TABLE = np.random.default_rng(0).normal(size=(32, VOCABULARY))
NEXT = TABLE.argmax(-1)
Build = Callable[..., Path]


@pytest.fixture
def toy_lm(tmp_path: Path) -> Build:
    """logits = table[position]; the cache holds the embedded tokens, two heads of three."""

    def build(dtype: str = "FLOAT", positions: bool = True, last: str = "Identity") -> Path:
        kind, array = ir.DataType[dtype], DTYPES[dtype]
        ints = ir.DataType.INT64
        ids = ir.val("input_ids", ints, ["B", "T"])
        mask = ir.val("attention_mask", ints, ["B", "S"])
        place = ir.val("position_ids", ints, ["B", "T"])
        past = [
            ir.val(f"past_key_values.0.{part}", kind, ["B", 2, "P", 3])
            for part in ("key", "value")
        ]
        constants = {
            "table": TABLE.astype(array),
            "embedding": np.arange(VOCABULARY * 6).reshape(VOCABULARY, 6).astype(array),
            "split": np.array([0, 0, 2, 3]),
        }
        weights = {}
        for name, value in constants.items():
            tensor = ir.tensor(value, name=name)
            weights[name] = ir.val(name, tensor.dtype, value.shape, const_value=tensor)
        logits = ir.val("logits", kind, ["B", "T", VOCABULARY])
        embedded = ir.node("Gather", [weights["embedding"], ids])
        split = ir.node("Reshape", [*embedded.outputs, weights["split"]])
        heads = ir.node("Transpose", split.outputs, {"perm": [0, 2, 1, 3]})
        nodes = [embedded, split, heads]
        presents = []
        for value in past:
            present = ir.val(
                str(value.name).replace("past_key_values", "present"), kind, ["B", 2, "S", 3]
            )
            nodes.append(
                ir.node("Concat", [value, *heads.outputs], {"axis": 2}, outputs=[present])
            )
            presents.append(present)
        rows = ir.node("Gather", [weights["table"], place if positions else ids])
        inputs_of_last = [*rows.outputs] * (2 if last == "Add" else 1)
        nodes += [rows, ir.node(last, inputs_of_last, outputs=[logits])]
        inputs = [ids, mask, *([place] if positions else []), *past]
        graph = ir.Graph(
            inputs,
            [logits, *presents],
            nodes=nodes,
            initializers=list(weights.values()),
            opset_imports={"": 20},
            name="toy",
        )
        path = tmp_path / "model.onnx"
        save_model(ir.Model(graph, ir_version=10), path)
        return path

    return build


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_in_every_dtype(dtype: str, toy_lm: Build) -> None:
    logits = OnnxCausalLM(toy_lm(dtype), threads=1).logits(np.array([[4, 5, 6], [1, 2, 3]]))
    expected = TABLE.astype(DTYPES[dtype]).astype(np.float32)[:3]
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, np.stack([expected, expected]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_decoding_follows_the_positions(dtype: str, toy_lm: Build) -> None:
    model = OnnxCausalLM(toy_lm(dtype), threads=1)
    found = model.generate(np.array([[4, 5, 6]]), 5)
    assert found.dtype == np.int64
    assert found.tolist() == [[4, 5, 6, *NEXT[2:7]]]


def test_left_padding_shifts_the_positions(toy_lm: Build) -> None:
    ids, mask = np.array([[0, 0, 6], [4, 5, 6]]), np.array([[0, 0, 1], [1, 1, 1]])
    found = OnnxCausalLM(toy_lm(), threads=1).generate(ids, 4, attention_mask=mask)
    assert found[:, 3:].tolist() == [NEXT[0:4].tolist(), NEXT[2:6].tolist()]


def test_the_cache_grows_by_one_token_a_step(toy_lm: Build) -> None:
    model = OnnxCausalLM(toy_lm(), threads=1)
    seen = []
    run = model._session.run_with_ort_values

    def spy(names: Any, feeds: Any, options: Any) -> Any:
        shapes = [feeds[name].shape() for name in ("input_ids", "past_key_values.0.key")]
        seen.append([*shapes[0], shapes[1][2]])
        outputs = run(names, feeds)
        seen[-1].append(outputs[1].shape()[2])
        return outputs

    model._session = type("Spy", (), {"run_with_ort_values": staticmethod(spy)})()
    model.generate(np.array([[4, 5, 6], [7, 8, 9]]), 3)
    assert seen == [[2, 3, 0, 3], [2, 1, 3, 4], [2, 1, 4, 5]]


def test_end_of_text(toy_lm: Build) -> None:
    model, ids = OnnxCausalLM(toy_lm(), threads=1), np.array([[4, 5, 6]])
    stop = int(NEXT[4])
    first = next(i for i in range(2, 9) if NEXT[i] == stop)
    assert model.generate(ids, 9, stop)[0, 3:].tolist() == NEXT[2 : first + 1].tolist()
    absent = next(token for token in range(VOCABULARY) if token not in NEXT[2:11])
    assert model.generate(ids, 9, [absent])[0, 3:].tolist() == NEXT[2:11].tolist()
    assert (
        model.generate(ids, 9, [absent, stop]).tolist() == model.generate(ids, 9, stop).tolist()
    )


def test_an_ended_row_repeats_its_last_token(toy_lm: Build) -> None:
    ids, mask = np.array([[0, 0, 6], [4, 5, 6]]), np.array([[0, 0, 1], [1, 1, 1]])
    model = OnnxCausalLM(toy_lm(), threads=1)
    stop = next(int(NEXT[i]) for i in range(4) if NEXT[i] not in NEXT[2:8])
    length = NEXT[:4].tolist().index(stop) + 1
    row, other = model.generate(ids, 6, stop, attention_mask=mask)[:, 3:].tolist()
    assert row == NEXT[:length].tolist() + [stop] * (6 - length)
    assert other == NEXT[2:8].tolist()


def test_no_new_tokens(toy_lm: Build) -> None:
    assert OnnxCausalLM(toy_lm()).generate(np.array([[4, 5]]), 0).tolist() == [[4, 5]]


def test_a_folder_is_its_model_and_position_ids_are_optional(toy_lm: Build) -> None:
    model = OnnxCausalLM(toy_lm(positions=False).parent)
    np.testing.assert_array_equal(
        model.logits(np.array([[4, 5]]))[0], TABLE[[4, 5]].astype(np.float32)
    )


@pytest.mark.unchecked
@pytest.mark.parametrize("shape", [(3,), (1, 0), (1, 2, 3)])
def test_wrong_shapes(shape: tuple[int, ...], toy_lm: Build) -> None:
    with pytest.raises(GraphError, match=r"expected \[batch, tokens\]"):
        OnnxCausalLM(toy_lm()).logits(np.zeros(shape, np.int64))


@pytest.mark.unchecked
def test_mask_of_another_shape(toy_lm: Build) -> None:
    with pytest.raises(GraphError, match="mask of that shape"):
        OnnxCausalLM(toy_lm()).logits(np.ones((1, 3)), np.ones((1, 2)))


def test_failure_while_running_is_one_line(toy_lm: Build) -> None:
    with pytest.raises(GraphError, match="out of") as error:
        OnnxCausalLM(toy_lm()).logits(np.array([[VOCABULARY + 5]]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_unreadable_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError) as error:
        OnnxCausalLM(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="no such ONNX model"):
        OnnxCausalLM(tmp_path)


def test_another_kind_of_model(tmp_path: Path, toy: Any) -> None:
    save_model(toy().model, tmp_path / "model.onnx")
    with pytest.raises(GraphError, match="missing: attention_mask, input_ids"):
        OnnxCausalLM(tmp_path)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("FLOAT", ["BH", 3, "P"]),
        ("FLOAT", None),
        ("INT8", ["B", 2, "P", 3]),
        ("DOUBLE", ["B", 2, "P", 3]),
    ],
)
def test_another_kind_of_cache(kind: str, shape: list[Any] | None, tmp_path: Path) -> None:
    element = onnx.TensorProto.DataType.Value(kind)
    info = helper.make_tensor_value_info
    ids, mask = (
        info(n, onnx.TensorProto.INT64, ["B", n]) for n in ("input_ids", "attention_mask")
    )
    past, present = (info(f"{n}.0.key", element, shape) for n in ("past_key_values", "present"))
    logits = info("logits", onnx.TensorProto.FLOAT, ["B", "T"])
    nodes = [
        helper.make_node("Identity", [past.name], [present.name]),
        helper.make_node("Cast", [ids.name], [logits.name], to=onnx.TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "toy", [ids, mask, past], [logits, present])
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(
        GraphError, match=r"past_key_values\.0\.key is tensor\(.*expected"
    ) as error:
        OnnxCausalLM(tmp_path)
    assert "\n" not in str(error.value)


def test_bfloat16_arithmetic_on_cpu_is_refused_clearly(toy_lm: Build) -> None:
    with pytest.raises(GraphError, match="does not compute in bfloat16") as error:
        OnnxCausalLM(toy_lm("BFLOAT16", last="Add"))
    assert "\n" not in str(error.value)


def test_onnxruntime_missing(toy_lm: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(GraphError, match=r"pip install 'austeer\[cpu\]'"):
        OnnxCausalLM(toy_lm())


def test_neither_torch_nor_transformers_is_loaded(toy_lm: Build) -> None:
    code = f"""
import sys, numpy as np
from austeer.graphs import OnnxCausalLM
assert "onnxruntime" not in sys.modules
OnnxCausalLM({str(toy_lm())!r}).generate(np.array([[1, 2]]), 2)
print(*sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_a_scale_beside_an_adapter_that_holds_one_is_refused(
    toy_lm: Build, tmp_path: Path
) -> None:
    """onnxruntime takes the adapter's value and drops the one that is fed, without a word."""
    from austeer.graphs.adapter_file import write_adapter_file

    file = tmp_path / "own.onnx_adapter"
    write_adapter_file(file, {"steering_scale": np.array([2.0], np.float32)})
    model = OnnxCausalLM(toy_lm(), threads=1)
    model.active, model.scale = [file], 0.5
    with pytest.raises(
        GraphError, match=r"own\.onnx_adapter: sets steering_scale, which the scale"
    ):
        model.logits(np.array([[4, 5, 6]]))


def test_adapters_that_set_the_same_input_are_refused(toy_lm: Build, tmp_path: Path) -> None:
    from austeer.graphs.adapter_file import write_adapter_file

    files = [tmp_path / f"{name}.onnx_adapter" for name in "ab"]
    for file in files:
        write_adapter_file(file, {"austeer.layers.0.ffn.gamma": np.ones(1, np.float32)})
    model = OnnxCausalLM(toy_lm(), threads=1)
    model.active = files
    with pytest.raises(GraphError, match=r"b\.onnx_adapter: sets .*gamma, which .*a\.onnx_ad"):
        model.logits(np.array([[4, 5, 6]]))
