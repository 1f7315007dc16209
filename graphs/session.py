"""Run an exported causal language model on stock onnxruntime, with numpy and no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from austeer.adapters._errors import GraphError
from austeer.graphs.custom_op import register
from austeer.graphs.opset import PREFIX, SCALE_INPUT
from austeer.graphs.runtime import (
    as_array,
    config_number,
    failure_reason,
    model_file,
    onnxruntime_module,
)

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_ELEMENTS = {"tensor(float)": (1, 4), "tensor(float16)": (10, 2), "tensor(bfloat16)": (16, 2)}
"""Element type of a tensor as onnxruntime names it → its number in ONNX, bytes per element."""


class OnnxCausalLM:
    """A causal language model with KV cache, in optimum's naming.

    Inputs `input_ids, attention_mask[, position_ids], past_key_values.{i}.{key|value}`,
    outputs `logits, present.{i}.{key|value}`.

    Args:
        path: the `.onnx` file, or a folder with `model.onnx` or one other in it.
        threads: threads per operator; None leaves the choice to onnxruntime.
        providers: execution providers, first choice first.
        kernels: run steering nodes by the compiled kernels instead of their function bodies.

    Attributes:
        scale: strength factor of the next runs, for a model with the input `steering_scale`;
            None leaves the input's default.
        active: `.onnx_adapter` files (or `onnxruntime.LoraAdapter`) that steer the next runs,
            for a model grafted with `--as-adapter`; empty runs the base. A file that holds a
            strength of its own excludes `scale`.

    Raises:
        GraphError: onnxruntime is not installed, or cannot load the model, or the model has
            no KV cache in the naming above; or `kernels` without a library of them.
    """

    scale: float | None = None
    active: Sequence[Any] = ()

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        kernels: bool = False,
    ) -> None:
        self._path = model_file(path)
        self._runtime = onnxruntime_module()
        self._loaded: dict[str, tuple[Any, frozenset[str]]] = {}
        self._session = self._load(threads, providers, kernels)
        inputs = {item.name: item for item in self._session.get_inputs()}
        self._past = [name for name in inputs if _PAST.fullmatch(name)]
        self._presents = [name.replace("past_key_values", "present") for name in self._past]
        self._has_positions = "position_ids" in inputs
        self._check_names(set(inputs))
        self._heads = {name: self._cache_shape(inputs[name]) for name in self._past}
        self._element, self._size = _ELEMENTS[inputs[self._past[0]].type]

    @property
    def half(self) -> bool:
        """Whether the model computes in a 16-bit float."""
        return bool(self._size == 2)

    @property
    def adjustable(self) -> bool:
        """Whether the model takes its strength from the input `steering_scale`."""
        items = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        return any(item.name == SCALE_INPUT for item in items)

    @property
    def switchable(self) -> bool:
        """Whether the model's sites are empty until an adapter is active."""
        items = self._session.get_overridable_initializers()
        return any(item.name.startswith(f"{PREFIX}.") for item in items)

    @property
    def vocabulary(self) -> int:
        """Number of token ids; 1 where neither the graph nor a config beside it says so."""
        (logits,) = [item for item in self._session.get_outputs() if item.name == "logits"]
        if isinstance(logits.shape[-1], int):
            return logits.shape[-1]
        return config_number(self._path.parent, ("vocab_size",)) or 1

    def logits(
        self,
        input_ids: Int[np.ndarray, "B T"],
        attention_mask: Int[np.ndarray, "B T"] | None = None,
    ) -> Float[np.ndarray, "B T V"]:
        """Logits of every position, in float32.

        Args:
            input_ids: token ids.
            attention_mask: 0 where a token is padding (on the left), 1 elsewhere.

        Raises:
            GraphError: shapes that differ, or onnxruntime fails.
        """
        ids, mask = _batch(input_ids, attention_mask)
        return self._step(ids, mask, self._empty_cache(len(ids)))[0]

    def values(
        self, input_ids: Int[np.ndarray, "B T"], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Outputs of one prefill by name, in their own dtype; bfloat16 as float32.

        Raises:
            GraphError: no such output, or onnxruntime fails.
        """
        ids, mask = _batch(input_ids, None)
        feeds = self._feeds(ids, mask, self._empty_cache(len(ids)))
        found = self._run(list(names), feeds)
        return {name: as_array(value) for name, value in zip(names, found, strict=True)}

    def generate(
        self,
        input_ids: Int[np.ndarray, "B T"],
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        attention_mask: Int[np.ndarray, "B T"] | None = None,
    ) -> Int[np.ndarray, "B T_and_new"]:
        """Greedy continuation: one prefill, then one token at a time with the KV cache.

        Args:
            input_ids: token ids of the prompts, padded on the left.
            max_new_tokens: most tokens to add.
            eos_token_id: tokens that end a row; an ended row repeats its last token until
                all rows have ended. None never ends early.
            attention_mask: 0 where a token is padding, 1 elsewhere.

        Raises:
            GraphError: shapes that differ, or onnxruntime fails.
        """
        ids, mask = _batch(input_ids, attention_mask)
        stop = np.atleast_1d(np.asarray([] if eos_token_id is None else eos_token_id, np.int64))
        cache, fresh = self._empty_cache(len(ids)), ids
        ended = np.zeros((len(ids), 1), bool)
        for _ in range(max_new_tokens):
            logits, cache = self._step(fresh, mask, cache)
            best = logits[:, -1].argmax(-1, keepdims=True)
            fresh = np.where(ended, ids[:, -1:], best)
            ids = np.concatenate([ids, fresh], axis=1)
            mask = np.concatenate([mask, np.ones_like(fresh)], axis=1)
            ended |= np.isin(fresh, stop)
            if ended.all():
                break
        return ids

    def _step(
        self, fresh: Int[np.ndarray, "B T"], mask: Int[np.ndarray, "B total"], cache: list[Any]
    ) -> tuple[Float[np.ndarray, "B T V"], list[Any]]:
        feeds = self._feeds(fresh, mask, cache)
        logits, *cache = self._run(["logits", *self._presents], feeds)
        return as_array(logits).astype(np.float32, copy=False), cache

    def _feeds(
        self, fresh: Int[np.ndarray, "B T"], mask: Int[np.ndarray, "B total"], cache: list[Any]
    ) -> dict[str, Any]:
        arrays = {"input_ids": fresh, "attention_mask": mask}
        if self._has_positions:
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
            arrays["position_ids"] = positions[:, mask.shape[1] - fresh.shape[1] :]
        if self.scale is not None:
            arrays[SCALE_INPUT] = np.array([self.scale], np.float32)
        feeds = {name: self._value(array) for name, array in arrays.items()}
        return feeds | dict(zip(self._past, cache, strict=True))

    def _run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        options = None
        try:
            if self.active:
                options = self._runtime.RunOptions()
                self._check_active()
                for adapter in self.active:
                    options.add_active_adapter(self._adapter(adapter)[0])
            # The cache stays in the runtime's own values: no copy, any dtype.
            return list(self._session.run_with_ort_values(names, feeds, options))
        except GraphError:
            raise
        except Exception as error:
            raise GraphError(f"{self._path}: {failure_reason(error)}") from error

    def _adapter(self, adapter: Any) -> tuple[Any, frozenset[str]]:
        """A loaded adapter, and the inputs that it sets as far as they are known."""
        if not isinstance(adapter, (str, Path)):
            return adapter, frozenset()
        key = str(adapter)
        if key not in self._loaded:
            held = self._runtime.AdapterFormat.read_adapter(key)
            loaded = self._runtime.LoraAdapter()
            loaded.Load(key)
            self._loaded[key] = loaded, frozenset(held.get_parameters())
        return self._loaded[key]

    def _check_active(self) -> None:
        """Refuse what onnxruntime would settle by dropping a value, without a word."""
        owners = {} if self.scale is None else {SCALE_INPUT: "the scale"}
        for adapter in self.active:
            for name in sorted(self._adapter(adapter)[1]):
                if name in owners:
                    raise GraphError(
                        f"{adapter}: sets {name}, which {owners[name]} sets, too; graft with "
                        "--together for several adapters at once, with --strength-input for a "
                        "scale"
                    )
                owners[name] = str(adapter)

    def _value(self, array: np.ndarray) -> Any:
        return self._runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _empty_cache(self, batch: int) -> list[Any]:
        shapes = ((batch, heads, 0, size) for heads, size in self._heads.values())
        create = self._runtime.OrtValue.ortvalue_from_numpy_with_onnx_type
        return [create(np.zeros(shape, f"u{self._size}"), self._element) for shape in shapes]

    def _cache_shape(self, past: Any) -> tuple[int, int]:
        """Heads and head size of one cache input."""
        if past.type not in _ELEMENTS or len(past.shape) != 4:
            raise GraphError(
                f"{self._path}: {past.name} is {past.type} of shape {past.shape}, expected "
                f"{', '.join(_ELEMENTS)} of [batch, heads, past, head size]; export the base "
                "with a cache of that kind"
            )
        heads, size = past.shape[1], past.shape[3]
        if isinstance(size, str):
            # The onnxruntime-genai builder leaves it open and writes it beside the graph.
            size = config_number(self._path.parent, ("decoder", "head_size"))
        if not isinstance(heads, int) or not isinstance(size, int):
            raise GraphError(
                f"{self._path}: {past.name} has shape {past.shape}, expected numbers of heads "
                "and head size there, or head_size in a genai_config.json beside the model"
            )
        return heads, size

    def _load(self, threads: int | None, providers: Sequence[str], kernels: bool) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if kernels:
            register(options)
        if not self._path.is_file():
            raise GraphError(f"{self._path}: no such ONNX model")
        try:
            return self._runtime.InferenceSession(
                str(self._path), options, providers=list(providers)
            )
        except Exception as error:
            # Each failure of onnxruntime has a class of its own, without a common base.
            raise GraphError(f"{self._path}: {failure_reason(error)}") from error

    def _check_names(self, inputs: set[str]) -> None:
        outputs = {item.name for item in self._session.get_outputs()}
        missing = sorted({"input_ids", "attention_mask"} - inputs)
        missing += sorted({"logits", *self._presents} - outputs)
        if missing or not self._past:
            raise GraphError(
                f"{self._path}: not a causal language model with KV cache in optimum's naming "
                f"(missing: {', '.join(missing) or 'past_key_values.0.key'})"
            )


def _batch(
    input_ids: Int[np.ndarray, "B T"], attention_mask: Int[np.ndarray, "B T"] | None
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    ids = np.asarray(input_ids, np.int64)
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int64)
    if ids.ndim != 2 or ids.shape != mask.shape or not ids.size:
        raise GraphError(
            "input_ids: expected [batch, tokens] and a mask of that shape, "
            f"got {ids.shape} and {mask.shape}"
        )
    return ids, mask
