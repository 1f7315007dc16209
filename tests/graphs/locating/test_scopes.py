"""Module paths come from metadata or node names; what is malformed says nothing."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from plain_graphs import NAME_SCOPES

from austeer.graphs.locating.scopes import NAME_SCOPES as KEY
from austeer.graphs.locating.scopes import module_path


def path_of(name: str = "node", metadata: str | None = None) -> tuple[str, ...]:
    properties = {} if metadata is None else {NAME_SCOPES: metadata}
    return module_path(ir.node("Add", [], name=name, metadata_props=properties))


def test_the_key_is_the_one_that_torch_writes() -> None:
    assert KEY == "pkg.torch.onnx.name_scopes"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (
            "/model/layers.3/mlp/down_proj/MatMul",
            ("model", "model.layers.3", "model.layers.3.mlp", "model.layers.3.mlp.down_proj"),
        ),
        (
            "/transformer/h.11/attn/c_proj/Gemm",
            (
                "transformer",
                "transformer.h.11",
                "transformer.h.11.attn",
                "transformer.h.11.attn.c_proj",
            ),
        ),
        # quantizers put a suffix behind the operator, whose name is no module
        (
            "/model/layers.0/attn/o_proj/MatMul_Q4",
            ("model", "model.layers.0", "model.layers.0.attn", "model.layers.0.attn.o_proj"),
        ),
        ("/lm_head/MatMul_quant", ("lm_head",)),
        ("/MatMul", ()),
    ],
)
def test_names_of_optimum_and_the_builder(name: str, path: tuple[str, ...]) -> None:
    assert path_of(name) == ("", *path)


@pytest.mark.parametrize("name", ["node_linear_3", "MatMul_12", "", "model/layers.0/MatMul"])
def test_other_names_say_nothing(name: str) -> None:
    assert path_of(name) == ()


@pytest.mark.parametrize(
    "text", ["['', 'model', 'model.norm', 'mul_1']", "('', 'model', 'model.norm', 'mul_1')"]
)
def test_metadata_without_the_traced_operation(text: str) -> None:
    assert path_of("node_mul_1", text) == ("", "model", "model.norm")


def test_metadata_comes_before_the_name() -> None:
    assert path_of("/other/place/Mul", "['', 'model', 'mul_1']") == ("", "model")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "['', 'model'",
        "model.layers.0",
        "__import__('os').getcwd()",
        "{'a': 1}",
        "7",
        "None",
        "'text'",
        "\x00",
        "[" * 5000,
    ],
)
def test_malformed_metadata_says_nothing_and_runs_nothing(text: str) -> None:
    assert path_of("/model/norm/Mul", text) == ()


def test_a_list_without_entries_says_nothing() -> None:
    assert path_of("node", "[]") == path_of("node", "['only']") == ()
