"""Names, axes and metadata of a fresh export, on a graph made by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from austeer.graphs.tidy import tidy_causal_lm

SCOPES = "pkg.torch.onnx.name_scopes"


@pytest.fixture
def fresh() -> ir.Model:
    """One layer, as the exporter leaves it under a wrapper that holds it as `core`."""
    ints, floats = ir.DataType.INT64, ir.DataType.FLOAT
    ids = ir.val("a", ints, ["s10", "s70"])
    mask = ir.val("b", ints, ["s10", "s15 + s70"])
    place = ir.val("c", ints, ["s10", "s70"])
    past = [ir.val(f"past_{i}", floats, ["s10", 2, "s15", 3]) for i in (0, 1)]
    array = np.zeros((6, 2), np.float32)
    tensor = ir.tensor(array, name="core.weight")
    weight = ir.val("core.weight", floats, [6, 2], const_value=tensor)
    weight.metadata_props["file"] = "/home/someone"
    outputs = [
        ir.val("y", floats, ["s10", "s70", 6]),
        *(ir.val(f"new_{i}", floats, ["s10", 2, "s15 + s70", 3]) for i in (0, 1)),
    ]
    flat = ir.val("flat", floats, ["s10*s70", None, "s99", 6])
    scopes = str(["", "core", "core.model", "core.model.mlp", "core"])
    node = ir.node(
        "SomeOp",
        [ids, mask, place, *past, weight],
        outputs=[*outputs, flat],
        doc_string="File /home/someone/x.py",
        metadata_props={SCOPES: scopes, "pkg.torch.onnx.stack_trace": "/home/someone/x.py"},
    )
    graph = ir.Graph(
        [ids, mask, place, *past],
        outputs,
        nodes=[node],
        initializers=[weight],
        opset_imports={"": 20},
        name="main_graph",
        metadata_props={"signature": "core"},
    )
    return ir.Model(graph, ir_version=10)


def test_ends_have_optimums_names(fresh: ir.Model) -> None:
    tidy_causal_lm(fresh, layers=1, wrapper="core")
    past = ["past_key_values.0.key", "past_key_values.0.value"]
    names = [value.name for value in fresh.graph.inputs]
    assert names == ["input_ids", "attention_mask", "position_ids", *past]
    outputs = [value.name for value in fresh.graph.outputs]
    assert outputs == ["logits", "present.0.key", "present.0.value"]


def test_axes_say_what_they_count(fresh: ir.Model) -> None:
    tidy_causal_lm(fresh, layers=1, wrapper="core")
    values = [*fresh.graph.inputs, *fresh.graph.outputs]
    shapes = {value.name: [str(dim) for dim in value.shape] for value in values}
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    past = ["batch_size", "2", "past_sequence_length", "3"]
    assert shapes["past_key_values.0.value"] == past
    assert shapes["present.0.key"] == ["batch_size", "2", "total_sequence_length", "3"]
    assert shapes["logits"] == ["batch_size", "sequence_length", "6"]
    flat = next(iter(fresh.graph)).outputs[-1].shape
    # A symbol without a meaning of its own stays as it is.
    assert [str(dim) for dim in flat] == ["batch_size*sequence_length", "None", "s99", "6"]


def test_traces_and_wrapper_are_gone_and_module_paths_stay(fresh: ir.Model) -> None:
    tidy_causal_lm(fresh, layers=1, wrapper="core")
    content = ir.to_proto(fresh).SerializeToString()
    assert b"someone" not in content
    assert b"signature" not in content
    assert list(fresh.graph.initializers) == ["weight"]
    node = next(iter(fresh.graph))
    # The last entry is the traced operation, whose name may equal the wrapper's.
    assert node.metadata_props == {SCOPES: str(["", "model", "model.mlp", "core"])}


def test_other_number_of_layers_is_an_error(fresh: ir.Model) -> None:
    with pytest.raises(ValueError, match="argument"):
        tidy_causal_lm(fresh, layers=2, wrapper="core")
