"""Greedy text with optimum's `ORTModelForCausalLM`, which generates as transformers does.

    python optimum_ort.py FOLDER "Tom found a red kite. He felt"
    python optimum_ort.py FOLDER "Tom felt" --adapter none --adapter FOLDER/happy.onnx_adapter

FOLDER is what `austeer-export graft OPTIMUM_FOLDER ADAPTER -o FOLDER` makes. Where the operator
library lies in it (`--library`), it is registered.

optimum feeds the inputs that it knows and runs without options. A strength fixed in the graph
needs no more. `--scale` and `--adapter` need `SteeredSession` below, and a model whose inputs
for them have defaults (`--optional-strength-input`, `--as-adapter`): with a required one,
optimum refuses to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from causal_lm import SCALE, model_file
from model_folder import BadInput, Text, answer, parser, prompt_ids, requests, run
from onnxruntime import LoraAdapter, RunOptions, SessionOptions
from onnxruntime_plain import FATAL_ONLY, check_adapter, first_line
from optimum.onnxruntime import ORTModelForCausalLM

LIBRARY_NAMES = ("libausteer_ops.so", "libausteer_ops.dylib", "austeer_ops.dll")


class SteeredSession:
    """An onnxruntime session that adds to each run what optimum leaves out.

    Args:
        session: of a loaded model.

    Attributes:
        scale: strength of the next runs; None leaves the model's default.
        adapters: `.onnx_adapter` files that are active in the next runs.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._loaded: dict[Path, LoraAdapter] = {}
        self.scale: float | None = None
        self.adapters: Sequence[Path] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: Sequence[str] | None, feeds: dict[str, np.ndarray]) -> Any:
        """Run as the session does, steered."""
        options = RunOptions()
        for file in self.adapters:
            options.add_active_adapter(self._adapter(file))
        if self.scale is not None:
            feeds = {**feeds, SCALE: np.array([self.scale], np.float32)}
        return self._session.run(names, feeds, options)

    def _adapter(self, file: Path) -> LoraAdapter:
        if file not in self._loaded:
            self._loaded[file] = LoraAdapter()
            self._loaded[file].Load(str(file))
        return self._loaded[file]


def load(folder: Path, scale: float | None) -> ORTModelForCausalLM:
    """The model of a folder, with its operator library where there is one.

    Raises:
        BadInput: optimum cannot load it, or it takes no strength in the way asked for.
    """
    model_file(folder)
    options = SessionOptions()
    options.log_severity_level = FATAL_ONLY
    try:
        for library in (folder / name for name in LIBRARY_NAMES):
            if library.is_file():
                options.register_custom_ops_library(str(library))
        model = ORTModelForCausalLM.from_pretrained(
            folder,
            session_options=options,
            use_io_binding=False,  # with bindings, onnxruntime leaves adapters out
            local_files_only=True,
        )
    except Exception as error:  # optimum's and onnxruntime's errors have no common class
        raise BadInput(f"{folder}: cannot load this model ({first_line(error)})") from error
    model.session = SteeredSession(model.session)
    if SCALE in model.input_names:
        raise BadInput(
            f"{folder}: {SCALE} is a required input, which optimum does not feed; graft with "
            "--optional-strength-input"
        )
    defaults = [item.name for item in model.session.get_overridable_initializers()]
    if scale is not None and SCALE not in defaults:
        raise BadInput(
            f"--scale: {folder} has no {SCALE} input; graft with --optional-strength-input"
        )
    return model


def complete(
    model: ORTModelForCausalLM, text: Text, prompt: list[int], tokens: int
) -> list[int]:
    """All tokens of one request; a stop token is the last.

    Raises:
        BadInput: onnxruntime fails.
    """
    room = text.room(len(prompt), tokens)
    if not room:
        return []
    ids = torch.tensor([prompt])
    try:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=sorted(text.stop) or None,
            pad_token_id=next(iter(text.stop), None),
        )
    except Exception as error:
        raise BadInput(f"the model failed to run ({first_line(error)})") from error
    return [int(token) for token in output[0, len(prompt) :]]


def main() -> None:
    """Answer the requests of the command line."""
    options = parser(__doc__.splitlines()[0], scale=True, adapters=True).parse_intermixed_args()
    wanted = requests(options)
    for file in {file for _, adapters in wanted for file in adapters}:
        check_adapter(file, options.scale)
    text = Text.of(options.folder)
    prompt = prompt_ids(options, text)
    model = load(options.folder, options.scale)
    model.session.scale = options.scale
    for label, adapters in wanted:
        model.session.adapters = adapters
        answer(options, text, prompt, complete(model, text, prompt, options.tokens), label)


if __name__ == "__main__":
    run(main)
