"""Greedy text on onnxruntime with numpy and tokenizers: no torch, nothing of austeer.

    python onnxruntime_plain.py FOLDER "Tom found a red kite. He felt" --scale 0.5
    python onnxruntime_plain.py FOLDER "Tom felt" --adapter none --adapter happy.onnx_adapter

FOLDER holds `model.onnx`, `tokenizer.json` and the configs beside them. One session serves
every request: strength and adapters belong to the run and not to the loaded model, so
changing them costs nothing, and requests with different ones may run in threads at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from causal_lm import SCALE, Signature, best_token, model_file
from model_folder import BadInput, Text, answer, parser, prompt_ids, requests, run

ELEMENTS: dict[str, type[np.floating]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
FATAL_ONLY = 4
"""onnxruntime logs what it throws as well; errors are said once, by the script."""
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Model:
    """A loaded model.

    Args:
        folder: with `model.onnx` in it.
        library: an operator library to register, such as `libausteer_ops.so`.
        gpu: run on CUDA.
        scale: strength of its runs, for a model that takes one.

    Raises:
        BadInput: onnxruntime cannot load it, or it is another kind of model.
    """

    def __init__(
        self,
        folder: Path,
        library: Path | None = None,
        gpu: bool = False,
        scale: float | None = None,
    ) -> None:
        path = model_file(folder)
        self._session = load_session(path, library, {} if gpu else None)
        self._signature = read_signature(path, self._session, scale)
        self._element = cache_element(self._session, self._signature)
        self._asked_scale = scale
        self._adapters: dict[Path, tuple[Any, set[str]]] = {}

    def generate(
        self, prompt: Sequence[int], tokens: int, adapters: Sequence[Path] = ()
    ) -> Iterator[int]:
        """The likeliest continuation, token by token.

        Args:
            prompt: token ids, at least one.
            tokens: how many to add.
            adapters: `.onnx_adapter` files that are active in this text's runs.

        Raises:
            BadInput: an adapter that this model has no place for, or a failed run.
        """
        options = onnxruntime.RunOptions()
        loaded = {file: self._adapter(file) for file in adapters}
        check_disjoint({file: names for file, (_, names) in loaded.items()})
        for adapter, _ in loaded.values():
            options.add_active_adapter(adapter)
        cache, fresh, length = self._empty_cache(), list(prompt), 0
        for _ in range(tokens):
            feeds = self._signature.feeds(fresh, length)
            logits, cache = self._step(feeds, cache, options)
            length += len(fresh)
            fresh = [best_token(logits)]
            yield fresh[0]

    def _step(
        self, feeds: dict[str, np.ndarray], cache: list[Any], options: Any
    ) -> tuple[np.ndarray, list[Any]]:
        values = {name: _value(array) for name, array in feeds.items()}
        values |= dict(zip(self._signature.cache, cache, strict=True))
        try:
            # The cache goes round in the runtime's own values and is never copied here.
            logits, *cache = self._session.run_with_ort_values(
                ["logits", *self._signature.presents], values, options
            )
        except Exception as error:  # onnxruntime's errors have no common class
            raise BadInput(f"{self._signature.path}: {first_line(error)}") from error
        return logits.numpy(), cache

    def _empty_cache(self) -> list[Any]:
        shapes = ((1, heads, 0, size) for heads, size in self._signature.cache.values())
        return [_value(np.zeros(shape, self._element)) for shape in shapes]

    def _adapter(self, file: Path) -> tuple[Any, set[str]]:
        """A loaded adapter, and the graph inputs that it sets."""
        if file not in self._adapters:
            names = set(check_adapter(file, self._asked_scale))
            adapter = onnxruntime.LoraAdapter()
            adapter.Load(str(file))
            self._adapters[file] = adapter, names
        return self._adapters[file]


def _value(array: np.ndarray) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def load_session(path: Path, library: Path | None, cuda: dict[str, str] | None) -> Any:
    """An onnxruntime session.

    Args:
        path: the model file.
        library: an operator library to register.
        cuda: options of the CUDA provider; None runs on the CPU.

    Raises:
        BadInput: CUDA is asked for and absent, or onnxruntime cannot load a file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    if cuda is not None and CUDA not in onnxruntime.get_available_providers():
        raise BadInput(
            f"this onnxruntime has no {CUDA}; install onnxruntime-gpu in place of onnxruntime"
        )
    if cuda is not None:
        # Finds CUDA and cuDNN that pip installed, which the dynamic linker does not.
        onnxruntime.preload_dlls()
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        providers = [CPU] if cuda is None else [(CUDA, cuda), CPU]
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's errors have no common class
        raise BadInput(f"{path}: cannot load this model ({first_line(error)})") from error
    if cuda is not None and CUDA not in session.get_providers():
        # onnxruntime falls back to the CPU without an error.
        raise BadInput(f"{CUDA} did not start; nvidia-smi says whether the driver works")
    return session


def read_signature(path: Path, session: Any, scale: float | None) -> Signature:
    """What a loaded model takes and gives.

    Raises:
        BadInput: another kind of model, or a strength for one that takes none.
    """
    return Signature.of(
        path,
        {item.name: item.shape for item in session.get_inputs()},
        [item.name for item in session.get_overridable_initializers()],
        [item.name for item in session.get_outputs()],
        scale,
    )


def cache_element(session: Any, signature: Signature) -> type[np.floating]:
    """Element type of a loaded model's cache.

    Raises:
        BadInput: one that numpy does not have.
    """
    kinds = {item.name: item.type for item in session.get_inputs()}
    kind = kinds[next(iter(signature.cache))]
    if kind not in ELEMENTS:
        raise BadInput(f"{signature.path}: its cache is {kind}; numpy has float32 and float16")
    return ELEMENTS[kind]


def check_adapter(file: Path, scale: float | None) -> dict[str, np.ndarray]:
    """The graph inputs in an adapter file, by name.

    Args:
        file: an `.onnx_adapter`.
        scale: the strength asked for.

    Raises:
        BadInput: not an adapter file, or its own strength would hide the one asked for.
    """
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(file))
        # Copied: the values lie in the adapter's memory and do not keep it alive.
        tensors = {n: np.array(v.numpy()) for n, v in adapter.get_parameters().items()}
    except Exception as error:
        raise BadInput(f"{file}: not an adapter file ({first_line(error)})") from error
    if scale is not None and SCALE in tensors:
        # onnxruntime takes the adapter's value and drops the other without a word.
        raise BadInput(
            f"--scale: {file} holds a strength of its own; graft with --as-adapter and "
            "--strength-input to choose it here"
        )
    return tensors


def check_disjoint(adapters: Mapping[Path, Iterable[str]]) -> None:
    """Refuse adapters that set the same graph inputs: one would replace the other.

    Args:
        adapters: the inputs that each active file sets.

    Raises:
        BadInput: two files set one input.
    """
    owners: dict[str, Path] = {}
    for file, names in adapters.items():
        for name in sorted(names):
            if name in owners:
                raise BadInput(
                    f"{file}: steers where {owners[name]} does ({name}); graft with --together "
                    "to have both active in one run"
                )
            owners[name] = file


def first_line(error: Exception) -> str:
    """What a runtime's error says before its details."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def complete(
    model: Any, text: Text, prompt: list[int], tokens: int, **request: Any
) -> list[int]:
    """All tokens of one request; a stop token is the last."""
    ids = []
    for token in model.generate(prompt, text.room(len(prompt), tokens), **request):
        ids.append(token)
        if token in text.stop:
            break
    return ids


def _arguments() -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0], scale=True, adapters=True)
    options.add_argument(
        "--together", action="store_true", help="one answer with every --adapter active"
    )
    options.add_argument("--library", type=Path, help="operator library, libausteer_ops.so")
    options.add_argument("--gpu", action="store_true", help="run on CUDA (onnxruntime-gpu)")
    return options.parse_intermixed_args()


def main() -> None:
    """Answer the requests of the command line."""
    options = _arguments()
    wanted = requests(options)
    text = Text.of(options.folder)
    prompt = prompt_ids(options, text)
    model = Model(options.folder, options.library, options.gpu, options.scale)
    for label, adapters in wanted:
        ids = complete(model, text, prompt, options.tokens, adapters=adapters)
        answer(options, text, prompt, ids, label)


if __name__ == "__main__":
    run(main)
