"""Greedy text on OpenVINO, with the KV cache handed from run to run.

    python openvino_inline.py FOLDER "Tom found a red kite. He felt" --scale 0.5

OpenVINO knows no model-local functions, so FOLDER holds a model of plain operators:
`austeer-export graft BASE ADAPTER --inline -o FOLDER`, with `--strength-input` for `--scale`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from causal_lm import Signature, best_token, model_file
from model_folder import BadInput, Text, answer, parser, prompt_ids, run

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""Compute as the model was proved; a CPU with bfloat16 units would compute in bfloat16."""


class Model:
    """A loaded model.

    Args:
        folder: with `model.onnx` in it.
        device: as OpenVINO names it.
        scale: strength of its runs, for a model that takes one.
        options: of OpenVINO's `compile_model`.

    Raises:
        BadInput: OpenVINO cannot load it, or it is another kind of model.
    """

    def __init__(
        self, folder: Path, device: str, scale: float | None, options: dict[str, str]
    ) -> None:
        path = model_file(folder)
        core = openvino.Core()
        graph = _read(core, path)
        self._signature = Signature.of(
            path,
            {port.get_any_name(): _dims(port) for port in graph.inputs},
            (),
            [port.get_any_name() for port in graph.outputs],
            scale,
        )
        (kind,) = {graph.input(name).element_type for name in self._signature.cache}
        self._element = kind.to_dtype()
        try:
            compiled = core.compile_model(graph, device, options)
        except RuntimeError as error:
            raise BadInput(f"{path}: cannot compile this model ({_reason(error)})") from error
        self._request = compiled.create_infer_request()

    def generate(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        """The likeliest continuation, token by token.

        Args:
            prompt: token ids, at least one.
            tokens: how many to add.

        Raises:
            BadInput: a failed run.
        """
        cache = {
            name: np.zeros((1, heads, 0, size), self._element)
            for name, (heads, size) in self._signature.cache.items()
        }
        fresh, length = list(prompt), 0
        for _ in range(tokens):
            self._run({**self._signature.feeds(fresh, length), **cache})
            length += len(fresh)
            fresh = [best_token(self._output("logits"))]
            # Copied: the next run writes its outputs where this one's are.
            presents = (self._output(name).copy() for name in self._signature.presents)
            cache = dict(zip(cache, presents, strict=True))
            yield fresh[0]

    def _output(self, name: str) -> np.ndarray:
        return np.asarray(self._request.get_tensor(name).data)

    def _run(self, inputs: dict[str, np.ndarray]) -> None:
        try:
            self._request.infer(inputs)
        except RuntimeError as error:
            raise BadInput(f"{self._signature.path}: {_reason(error)}") from error


def _read(core: Any, path: Path) -> Any:
    try:
        return core.read_model(path)
    except RuntimeError as error:
        raise BadInput(
            f"{path}: OpenVINO cannot read this model ({_reason(error)}); graft with --inline, "
            "onto a graph without onnxruntime's own quantized operators"
        ) from error


def _dims(port: Any) -> list[int | None]:
    """Its dimensions; None where they are free."""
    return [dim.get_length() if dim.is_static else None for dim in port.partial_shape]


def _reason(error: RuntimeError) -> str:
    """The line that says what failed; those before it name OpenVINO's own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return telling[-1].removeprefix("-- ") if telling else (lines or [type(error).__name__])[-1]


def _arguments() -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0], scale=True)
    options.add_argument("--device", default="CPU", help="CPU, GPU, NPU, AUTO")
    options.add_argument(
        "--fast",
        action="store_true",
        help="let OpenVINO compute in 16 bits",
    )
    return options.parse_intermixed_args()


def main() -> None:
    """Answer the prompt of the command line."""
    options = _arguments()
    text = Text.of(options.folder)
    prompt = prompt_ids(options, text)
    exact = {} if options.fast else EXACT
    model = Model(options.folder, options.device, options.scale, exact)
    ids = []
    for token in model.generate(prompt, text.room(len(prompt), options.tokens)):
        ids.append(token)
        if token in text.stop:
            break
    answer(options, text, prompt, ids)


if __name__ == "__main__":
    run(main)
