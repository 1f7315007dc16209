"""Fixtures: a decoder graph small enough to be computed by hand, and adapters for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from austeer.adapters import (
    AdapterConfig,
    Predictor,
    Site,
    SteeredSite,
    SteeringAdapter,
    Strength,
)

WIDTH, HIDDEN = 4, 24


class ToyDecoder:
    """`h + o_proj(h * w)`, then `h + down_proj(relu(up(h)))`, per layer, as dynamo writes it.

    Every activation that a test looks at is also listed in `self.values` by name.
    """

    def __init__(self, layers: int = 2, wrapper: str = "", bias: bool = True) -> None:
        rng = np.random.default_rng(0)
        self.wrapper, self.bias = wrapper, bias
        self.weights = {
            f"{i}.{name}": rng.normal(scale=0.4, size=shape).astype(np.float32)
            for i in range(layers)
            for name, shape in (
                ("w", (WIDTH,)),
                ("o", (WIDTH, WIDTH)),
                ("up", (WIDTH, HIDDEN)),
                ("down", (HIDDEN, WIDTH)),
                ("bias", (WIDTH,)),
            )
        }
        self.values: dict[str, ir.Value] = {}
        x = ir.val("x", ir.DataType.FLOAT, ["B", "T", WIDTH])
        self.graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="toy")
        hidden = x
        for layer in range(layers):
            hidden = self._layer(layer, hidden)
        logits = self.add("Identity", [hidden], "logits", "model.norm", WIDTH)
        self.graph.outputs.append(logits)
        self.model = ir.Model(self.graph, ir_version=10)

    def _layer(self, i: int, h: ir.Value) -> ir.Value:
        at = f"model.layers.{i}"
        mixed = self.add("Mul", [h, self.weight(f"{i}.w")], f"{i}.mixed", f"{at}.self_attn")
        o = self.add(
            "MatMul", [mixed, self.weight(f"{i}.o")], f"{i}.o_out", f"{at}.self_attn.o_proj"
        )
        h = self.add("Add", [h, o], f"{i}.middle", at)
        up = self.add(
            "MatMul", [h, self.weight(f"{i}.up")], f"{i}.up_out", f"{at}.mlp.up_proj", HIDDEN
        )
        act = self.add("Relu", [up], f"{i}.act", f"{at}.mlp.act_fn", HIDDEN)
        down = self.add(
            "MatMul", [act, self.weight(f"{i}.down")], f"{i}.product", f"{at}.mlp.down_proj"
        )
        if self.bias:
            down = self.add(
                "Add", [down, self.weight(f"{i}.bias")], f"{i}.down_out", f"{at}.mlp.down_proj"
            )
        return self.add("Add", [h, down], f"{i}.out", at)

    def add(
        self, op: str, inputs: Sequence[ir.Value], name: str, module: str, width: int = WIDTH
    ) -> ir.Value:
        """Append a node with one output in a module's scope."""
        path = [part for part in (self.wrapper,) if part]
        scopes = [""]
        for part in [*path, *module.split(".")]:
            scopes.append(f"{scopes[-1]}.{part}".removeprefix("."))
        value = ir.val(name, ir.DataType.FLOAT, ["B", "T", width])
        metadata = {"pkg.torch.onnx.name_scopes": str([*scopes, name])}
        self.graph.append(
            ir.node(op, inputs, outputs=[value], name=f"node_{name}", metadata_props=metadata)
        )
        self.values[name] = value
        return value

    def weight(self, name: str) -> ir.Value:
        """Register a weight as initializer."""
        tensor = ir.tensor(self.weights[name], name=name)
        value = ir.val(name, tensor.dtype, self.weights[name].shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def compute(
        self, x: np.ndarray, steer: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    ) -> np.ndarray:
        """The same in numpy; `steer` rewrites activations at `{layer}.{component}`."""
        same = lambda value: value  # noqa: E731
        h = x.astype(np.float64)
        for i in range(len(self.weights) // 5):
            w = {n.split(".")[1]: v for n, v in self.weights.items() if n.startswith(f"{i}.")}
            h = h + steer.get(f"{i}.attention", same)(h * w["w"]) @ w["o"]
            act = steer.get(f"{i}.neuron", same)(np.maximum(h @ w["up"], 0))
            down = act @ w["down"] + (w["bias"] if self.bias else 0)
            h = steer.get(f"{i}.layer", same)(h + steer.get(f"{i}.ffn", same)(down))
        return h


@pytest.fixture
def toy() -> Callable[..., ToyDecoder]:
    """Factory of toy decoders: `toy(layers=2, wrapper="", bias=True)`."""
    return ToyDecoder


class ToyCausalLM(ToyDecoder):
    """The toy decoder behind an embedding, with a KV cache that it keeps and never reads."""

    def __init__(self, layers: int = 2, *, half: bool = False, **options: Any) -> None:
        super().__init__(layers, **options)
        self.table = np.random.default_rng(5).normal(size=(WIDTH, WIDTH)).astype(np.float32)
        (x,) = self.graph.inputs
        ints = ir.DataType.INT64
        ids = ir.val("input_ids", ints, ["B", "T"])
        mask = ir.val("attention_mask", ints, ["B", "S"])
        past = [
            ir.val(f"past_key_values.0.{part}", ir.DataType.FLOAT, ["B", 1, "P", WIDTH])
            for part in ("key", "value")
        ]
        table = self.constant("table", self.table)
        embedded = ir.node("Gather", [table, ids])
        heads = ir.node("Unsqueeze", [*embedded.outputs, self.constant("one", np.array([1]))])
        nodes = [embedded, heads]
        presents = []
        for value in past:
            name = str(value.name).replace("past_key_values", "present")
            present = ir.val(name, ir.DataType.FLOAT, ["B", 1, "S", WIDTH])
            nodes.append(
                ir.node("Concat", [value, *heads.outputs], {"axis": 2}, outputs=[present])
            )
            presents.append(present)
        ir.convenience.replace_all_uses_with(x, embedded.outputs[0])
        self.graph.insert_before(self.graph[0], nodes)
        self.graph.inputs[:] = [ids, mask, *past]
        self.graph.outputs.extend(presents)
        if half:
            self._halve()

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Register a constant that is not among the decoder's weights."""
        tensor = ir.tensor(array, name=name)
        value = ir.val(name, tensor.dtype, array.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _halve(self) -> None:
        """Everything in float16, the weights rounded."""
        values = [*self.graph.inputs, *(v for node in self.graph for v in node.outputs)]
        for value in [*values, *self.graph.initializers.values()]:
            if value.dtype == ir.DataType.FLOAT:
                value.dtype = ir.DataType.FLOAT16
            if value.const_value is not None and value.dtype == ir.DataType.FLOAT16:
                rounded = value.const_value.numpy().astype(np.float16)
                value.const_value = ir.tensor(rounded, name=value.name)

    def logits(self, ids: np.ndarray, steer: Mapping[str, Any]) -> np.ndarray:
        """What `compute` says for these tokens."""
        return self.compute(self.table[ids], steer)


@pytest.fixture
def toy_lm() -> Callable[..., ToyCausalLM]:
    """Factory of toy causal language models: `toy_lm(layers=2, half=False)`."""
    return ToyCausalLM


@pytest.fixture
def make_adapter() -> Callable[..., SteeringAdapter]:
    """Factory: `make_adapter({"layers.0.attention": ([0, 2], [0.5, -1.0])}, rank=0)`."""

    def build(units: Mapping[str, tuple[Sequence[int], Sequence[float]]], rank: int = 0) -> Any:
        rng = np.random.default_rng(1)
        sites = []
        for key, (index, gamma) in units.items():
            k = len(index)
            weights = [
                rng.normal(size=s).astype(np.float32) for s in ((k, rank), rank, (rank, k))
            ]
            sites.append(
                SteeredSite(
                    Site.parse(key),
                    np.array(index, np.int64),
                    np.array(gamma, np.float32),
                    Predictor(*weights) if rank else None,
                )
            )
        config = AdapterConfig(
            base_model_name_or_path="toy",
            base_model_fingerprint="sha256:" + "0" * 64,
            model_type="llama",
            components=tuple(sorted({s.site.component for s in sites})),
            strength=Strength.ADAPTIVE if rank else Strength.FITTED,
            k=sum(len(s.index) for s in sites),
            rank=rank,
        )
        return SteeringAdapter(config, sites)

    return build


@pytest.fixture
def run_onnx() -> Callable[..., list[np.ndarray]]:
    """Run a model (path or `ir.Model`) on onnxruntime: `run_onnx(model, {"x": array})`."""
    ort = pytest.importorskip("onnxruntime")

    def run(model: Any, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if isinstance(model, ir.Model):
            model = ir.to_proto(model).SerializeToString()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        source = model if isinstance(model, bytes) else str(model)
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return [np.asarray(array) for array in session.run(None, dict(feeds))]

    return run
