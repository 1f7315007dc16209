"""A decoder as the onnxruntime-genai builder writes it: names in nodes, sums inside norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from plain_graphs import MICROSOFT, PlainGraph

WIDTH, HIDDEN = 4, 24
EPSILON = 1e-5


class BuilderDecoder(PlainGraph):
    """Per layer: norm, mixing, o_proj, norm, up, ReLU, down; each sum is part of a norm.

    Args:
        layers: number of decoder layers.
        norm: `SkipSimplifiedLayerNormalization` or `SkipLayerNormalization`.
        beta: whether norms add an offset (the simplified one has none).
        bias: whether the last projection of the MLP has one: `""`, `"add"` for a node of its
            own, as the builder writes it, or `"fused"` into the norm, as onnxruntime does.
        last: name of the last projection of the MLP.
        opset: version of the default domain.
    """

    def __init__(
        self,
        layers: int = 2,
        norm: str = "SkipSimplifiedLayerNormalization",
        *,
        beta: bool = False,
        bias: str = "",
        last: str = "down_proj",
        opset: int = 20,
    ) -> None:
        super().__init__(opset)
        rng = np.random.default_rng(0)
        self.layers, self.simple, self.beta = layers, "Simplified" in norm, beta
        self.bias, self.last, self.norm = bias, last, norm
        self.weights = {
            f"{i}.{name}": rng.normal(scale=0.5, size=shape).astype(np.float32)
            for i in range(layers + 1)
            for name, shape in (
                ("mix", (WIDTH,)),
                ("o", (WIDTH, WIDTH)),
                ("up", (WIDTH, HIDDEN)),
                ("down", (HIDDEN, WIDTH)),
                ("bias", (WIDTH,)),
                ("gamma", (WIDTH,)),
                ("gamma2", (WIDTH,)),
                ("beta", (WIDTH,)),
            )
        }
        self.values: dict[str, ir.Value] = {}
        h = self.input("x", ["B", "T", WIDTH])
        normed = self._first_norm(h)
        for i in range(layers):
            h, normed = self._layer(i, h, normed)
        self.output(normed, ["B", "T", WIDTH])

    def _weight(self, name: str) -> ir.Value:
        return self.constant(name, self.weights[name])

    def _first_norm(self, h: ir.Value) -> ir.Value:
        op = self.norm.removeprefix("Skip")
        parts = [h, self._weight("0.gamma")]
        parts += [self._weight("0.beta")] if self.beta else []
        module = "model.layers.0.input_layernorm"
        return self.add(op, parts, module, axis=-1, epsilon=EPSILON)

    def _skip(
        self, i: int, gamma: str, module: str, h: ir.Value, o: ir.Value, total: str, bias: bool
    ) -> tuple[ir.Value, ir.Value]:
        """The norm, and the sum unless `total` is empty (as in the last norm)."""
        parts: list[ir.Value | None] = [h, o, self._weight(f"{i}.{gamma}")]
        if not self.simple:
            parts.append(self._weight(f"{i}.beta") if self.beta else None)
        if bias:
            parts.append(self._weight(f"{i - 1}.bias"))
        while parts[-1] is None:
            parts.pop()
        outputs = [f"{module}/out", *(("", "", total) if total else ())]
        normed = self.add(
            self.norm, parts, module, outputs=outputs, domain=MICROSOFT, epsilon=EPSILON
        )
        node = normed.producer()
        assert node is not None
        return normed, node.outputs[-1]

    def _layer(self, i: int, h: ir.Value, normed: ir.Value) -> tuple[ir.Value, ir.Value]:
        at = f"model.layers.{i}"
        mixed = self.add("Mul", [normed, self._weight(f"{i}.mix")], f"{at}.attn")
        o = self.add("MatMul", [mixed, self._weight(f"{i}.o")], f"{at}.attn.o_proj")
        normed, middle = self._skip(
            i, "gamma2", f"{at}.post_attention_layernorm", h, o, f"{i}.middle", False
        )
        up = self.add("MatMul", [normed, self._weight(f"{i}.up")], f"{at}.mlp.up_proj")
        act = self.add("Relu", [up], f"{at}.mlp.act_fn")
        module = f"{at}.mlp.{self.last}"
        down = self.add("MatMul", [act, self._weight(f"{i}.down")], module)
        if self.bias == "add":
            down = self.add("Add", [down, self._weight(f"{i}.bias")], module)
        self.values |= {f"{i}.mixed": mixed, f"{i}.act": act, f"{i}.down": down}
        ends = i == self.layers - 1
        after = "final_norm_layernorm" if ends else "input_layernorm"
        normed, h = self._skip(
            i + 1,
            "gamma",
            f"model.layers.{i + 1}.{after}",
            middle,
            down,
            "" if ends else f"{i}.out",
            self.bias == "fused",
        )
        return h, normed

    def compute(
        self, x: np.ndarray, steer: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    ) -> np.ndarray:
        """The same in float64 numpy; `steer` rewrites activations at `{layer}.{component}`."""
        same = lambda value: value  # noqa: E731
        w, h = self.weights, x.astype(np.float64)
        for i in range(self.layers):
            mixed = self._norm(h, i, "gamma") * w[f"{i}.mix"]
            h = h + steer.get(f"{i}.attention", same)(mixed) @ w[f"{i}.o"]
            act = np.maximum(self._norm(h, i, "gamma2") @ w[f"{i}.up"], 0)
            down = steer.get(f"{i}.neuron", same)(act) @ w[f"{i}.down"]
            down = down + (w[f"{i}.bias"] if self.bias else 0)
            h = steer.get(f"{i}.layer", same)(h + steer.get(f"{i}.ffn", same)(down))
        return self._norm(h, self.layers, "gamma")

    def _norm(self, h: np.ndarray, i: int, gamma: str) -> np.ndarray:
        centred = h if self.simple else h - h.mean(-1, keepdims=True)
        size = np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
        offset = self.weights[f"{i}.beta"] if self.beta else 0
        return centred / size * self.weights[f"{i}.{gamma}"] + offset
