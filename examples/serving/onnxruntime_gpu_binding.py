"""Greedy text on onnxruntime-gpu with the KV cache kept on the GPU.

    python onnxruntime_gpu_binding.py FOLDER "Tom found a red kite. He felt"
    python onnxruntime_gpu_binding.py FOLDER "Tom felt" --fixed --cuda-graph

Without binding, every output comes back to the CPU, the cache too, and goes up again with the
next token. Here each run's cache stays where it was made, and only the logits come back.

**CUDA graphs.** `--cuda-graph` records the work of one decoding step and replays it, which
saves the time to launch its kernels. onnxruntime asks for

- the provider option `enable_cuda_graph`, and every operator on the GPU: no `If`, `Loop` or
  `Scan`, and none that falls back to the CPU;
- the same shapes at the same addresses in every step: all is bound to buffers made once.

The second rules out most exports: a cache that grows by one row a token has another shape in
every step and **cannot be captured**. This holds for every model of optimum, of
`torch.onnx.export` and of `austeer-export onnx`. What can be are models whose cache is one
buffer of fixed length, read and written in place, such as those of the onnxruntime-genai
builder (`GroupQueryAttention`; build with `-e cuda --extra_options enable_cuda_graph=true`).
`--fixed` serves these so, on any device. A prompt has its own length, so it runs outside of the
graph.

The project had no GPU to run this on: both loops are tested on the CPU (`--device cpu`), the
capture is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from causal_lm import best_token, model_file, present_name
from model_folder import BadInput, Text, answer, parser, prompt_ids, read_json, requests, run
from onnxruntime import OrtValue, RunOptions
from onnxruntime_plain import (
    ELEMENTS,
    cache_element,
    check_adapter,
    check_disjoint,
    complete,
    first_line,
    load_session,
    read_signature,
)

CUDA_GRAPH = {"enable_cuda_graph": "1"}
GRAPH_ID = "gpu_graph_id"
NOT_CAPTURED = "-1"


class BoundModel:
    """A loaded model whose cache stays on the device, and grows there.

    Args:
        folder: with `model.onnx` in it.
        device: `cuda` or `cpu`.
        library: an operator library to register.
        scale: strength of its runs, for a model that takes one.
        cuda: options of the CUDA provider.

    Raises:
        BadInput: onnxruntime cannot load it, or it is another kind of model.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        library: Path | None = None,
        scale: float | None = None,
        cuda: dict[str, str] | None = None,
    ) -> None:
        path = model_file(folder)
        self.device = device
        self.session = load_session(path, library, (cuda or {}) if device == "cuda" else None)
        self.signature = read_signature(path, self.session, scale)
        self.element = cache_element(self.session, self.signature)
        self._asked_scale = scale
        self._adapters: dict[Path, dict[str, OrtValue]] = {}

    def generate(
        self, prompt: Sequence[int], tokens: int, adapters: Sequence[Path] = ()
    ) -> Iterator[int]:
        """The likeliest continuation, token by token.

        Args:
            prompt: token ids, at least one.
            tokens: how many to add.
            adapters: `.onnx_adapter` files that are active in this text's runs.

        Raises:
            BadInput: not an adapter file, or a failed run.
        """
        active = self.active(adapters)
        cache = {name: self.buffer(name, 0) for name in self.signature.cache}
        fresh, length = list(prompt), 0
        for _ in range(tokens):
            logits, cache = self._step(fresh, length, cache, active)
            length += len(fresh)
            fresh = [best_token(logits)]
            yield fresh[0]

    def active(self, adapters: Sequence[Path]) -> dict[str, OrtValue]:
        """The tensors of adapters on the device, by the graph inputs that they set."""
        # A run with bindings leaves out the adapters of its RunOptions without a word.
        for file in adapters:
            if file not in self._adapters:
                tensors = check_adapter(file, self._asked_scale)
                self._adapters[file] = {n: self.value(t) for n, t in tensors.items()}
        check_disjoint({file: self._adapters[file] for file in adapters})
        return {name: v for file in adapters for name, v in self._adapters[file].items()}

    def value(self, array: np.ndarray) -> OrtValue:
        """A copy of an array on the device."""
        return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def buffer(self, name: str, length: int) -> OrtValue:
        """Memory on the device for one cache input of that many tokens."""
        heads, size = self.signature.cache[name]
        shape = (1, heads, length, size)
        return OrtValue.ortvalue_from_shape_and_type(shape, self.element, self.device, 0)

    def bind(self, inputs: dict[str, OrtValue]) -> Any:
        """A binding with these inputs.

        Raises:
            BadInput: the model has no such input.
        """
        binding = self.session.io_binding()
        try:
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
        except RuntimeError as error:
            raise BadInput(f"{self.signature.path}: {first_line(error)}") from error
        return binding

    def run(self, binding: Any, options: RunOptions | None = None) -> None:
        """Run once with everything bound.

        Raises:
            BadInput: onnxruntime fails.
        """
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:  # onnxruntime's errors have no common class
            raise BadInput(f"{self.signature.path}: {first_line(error)}") from error

    def _step(
        self,
        fresh: Sequence[int],
        length: int,
        cache: dict[str, OrtValue],
        active: dict[str, OrtValue],
    ) -> tuple[np.ndarray, dict[str, OrtValue]]:
        inputs = {n: self.value(a) for n, a in self.signature.feeds(fresh, length).items()}
        binding = self.bind(inputs | active | cache)
        binding.bind_output("logits", "cpu")
        for name in self.signature.presents:
            binding.bind_output(name, self.device, 0)  # onnxruntime makes room for it there
        self.run(binding)
        logits, *presents = binding.get_outputs()
        return logits.numpy(), dict(zip(cache, presents, strict=True))


class FixedModel(BoundModel):
    """A loaded model whose cache is one buffer of fixed length, read and written in place.

    Arguments not named here are those of `BoundModel`.

    Args:
        capacity: most tokens of prompt and continuation together.
        capture: record a decoding step as a CUDA graph, and replay it.

    Raises:
        BadInput: as `BoundModel`; or a model whose cache grows.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        capacity: int,
        capture: bool = False,
        library: Path | None = None,
        scale: float | None = None,
    ) -> None:
        check_shares_buffer(folder)
        super().__init__(folder, device, library, scale, CUDA_GRAPH if capture else None)
        self._capture = capture
        self._capacity = capacity
        # Made once: a captured graph reads and writes these very addresses.
        self._cache = {name: self.buffer(name, capacity) for name in self.signature.cache}
        self._inputs = {n: self.value(array) for n, array in self._feeds([0], 0).items()}
        self._logits = self._logits_buffer()
        self._graphs: dict[tuple[Path, ...], int] = {}

    def generate(
        self, prompt: Sequence[int], tokens: int, adapters: Sequence[Path] = ()
    ) -> Iterator[int]:
        """As `BoundModel.generate`; one text at a time, since there is one cache."""
        active = self.active(adapters)
        token = best_token(self._prefill(prompt, active))
        binding = self._bind_cached(self._inputs | active)
        binding.bind_ortvalue_output("logits", self._logits)
        options = self._options(tuple(adapters))
        for length in range(len(prompt), len(prompt) + tokens - 1):
            yield token
            for name, array in self._feeds([token], length).items():
                self._inputs[name].update_inplace(array)
            self.run(binding, options)
            token = best_token(self._logits.numpy())
        if tokens:
            yield token

    def _prefill(self, prompt: Sequence[int], active: dict[str, OrtValue]) -> np.ndarray:
        inputs = {n: self.value(a) for n, a in self.signature.feeds(prompt, 0).items()}
        binding = self._bind_cached(inputs | active)
        binding.bind_output("logits", "cpu")
        options = RunOptions()
        options.add_run_config_entry(GRAPH_ID, NOT_CAPTURED)
        self.run(binding, options)
        return np.asarray(binding.get_outputs()[-1].numpy())

    def _bind_cached(self, inputs: dict[str, OrtValue]) -> Any:
        binding = self.bind(inputs | self._cache)
        for name, value in self._cache.items():
            binding.bind_ortvalue_output(present_name(name), value)
        return binding

    def _feeds(self, fresh: Sequence[int], length: int) -> dict[str, np.ndarray]:
        """Inputs of a decoding step; the mask is as long as the cache, 0 where it is empty."""
        feeds = self.signature.feeds(fresh, length)
        mask = np.zeros((1, self._capacity), np.int64)
        mask[:, : length + len(fresh)] = 1
        return {**feeds, "attention_mask": mask}

    def _logits_buffer(self) -> OrtValue:
        (item,) = [item for item in self.session.get_outputs() if item.name == "logits"]
        if not isinstance(item.shape[-1], int):
            raise BadInput(f"{self.signature.path}: its logits do not say their width")
        shape = (1, 1, item.shape[-1])
        return OrtValue.ortvalue_from_shape_and_type(shape, ELEMENTS[item.type], self.device, 0)

    def _options(self, adapters: tuple[Path, ...]) -> RunOptions:
        """Other adapters have other shapes and addresses: each set has its own graph."""
        options = RunOptions()
        if self._capture:
            number = self._graphs.setdefault(adapters, len(self._graphs) + 1)
            options.add_run_config_entry(GRAPH_ID, str(number))
        return options


def check_shares_buffer(folder: Path) -> None:
    """Refuse a model whose cache has another shape in every step.

    Raises:
        BadInput: it does not say that it reads and writes one buffer.
    """
    search = read_json(folder / "genai_config.json").get("search", {})
    if not search.get("past_present_share_buffer"):
        raise BadInput(
            f"--fixed: the cache of {folder} grows with every token; a model of the "
            "onnxruntime-genai builder, with past_present_share_buffer in its "
            "genai_config.json, has one of fixed length"
        )


def _arguments() -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0], scale=True, adapters=True)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--library", type=Path, help="operator library, libausteer_ops.so")
    options.add_argument("--fixed", action="store_true", help="a cache of fixed length")
    options.add_argument(
        "--cuda-graph", action="store_true", help="capture decoding steps; needs --fixed"
    )
    chosen = options.parse_intermixed_args()
    if chosen.cuda_graph and not (chosen.fixed and chosen.device == "cuda"):
        raise BadInput("--cuda-graph: needs shapes that do not change; add --fixed, on cuda")
    return chosen


def load(options: argparse.Namespace, length: int) -> BoundModel:
    """The model as the command line wants it, with room for so many tokens."""
    where, how = (options.folder, options.device), (options.library, options.scale)
    if options.fixed:
        return FixedModel(*where, length, options.cuda_graph, *how)
    return BoundModel(*where, *how)


def main() -> None:
    """Answer the requests of the command line."""
    options = _arguments()
    wanted = requests(options)
    text = Text.of(options.folder)
    prompt = prompt_ids(options, text)
    model = load(options, len(prompt) + text.room(len(prompt), options.tokens))
    for label, adapters in wanted:
        ids = complete(model, text, prompt, options.tokens, adapters=adapters)
        answer(options, text, prompt, ids, label)


if __name__ == "__main__":
    run(main)
