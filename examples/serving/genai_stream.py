"""Streamed text on onnxruntime-genai, with adapters or a strength chosen for each request.

    python genai_stream.py FOLDER "Tom found a red kite. He felt" --scale 0.5
    python genai_stream.py FOLDER "Tom felt" --adapter none --adapter FOLDER/happy.onnx_adapter

FOLDER is one of the onnxruntime-genai model builder, grafted: `austeer-export graft BUILT
ADAPTER --copy-data --library -o FOLDER`, with `--strength-input` for `--scale`, or with
`--as-adapter` for `--adapter`. Its `genai_config.json` names the operator library beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from model_folder import BadInput, Text, answer, parser, prompt_ids, requests, run

SCALE = "steering_scale"
AS_FITTED = 1.0


class Model:
    """A loaded model.

    Args:
        folder: with `genai_config.json` in it.

    Raises:
        BadInput: onnxruntime-genai cannot load it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._model = genai.Model(str(folder))
            self.tokenizer = genai.Tokenizer(self._model)
        except RuntimeError as error:
            raise BadInput(
                f"{folder}: cannot load this model ({_first_line(error)})"
            ) from error
        # Off by default; without it the model never sees the tokens that open its texts.
        self.tokenizer.update_options(add_special_tokens="true")
        self._adapters = genai.Adapters(self._model)
        self._names: dict[Path, str] = {}

    def generate(
        self,
        prompt: Sequence[int],
        tokens: int,
        adapters: Sequence[Path] = (),
        scale: float | None = None,
    ) -> Iterator[int]:
        """The likeliest continuation, token by token; a stop token is the last one.

        Args:
            prompt: token ids, at least one.
            tokens: how many to add at most.
            adapters: `.onnx_adapter` files that steer this text.
            scale: strength, for a model with that input.

        Raises:
            BadInput: an adapter or strength that this model has no place for.
        """
        if not tokens:
            return
        settings = genai.GeneratorParams(self._model)
        settings.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
        # Adapters and strength belong to the generator, so to one text; the model is shared.
        generator = genai.Generator(self._model, settings)
        # The generator reads this memory in every step and does not keep it alive: a name does.
        strength = np.array([AS_FITTED if scale is None else scale], np.float32)
        try:
            for file in adapters:
                generator.set_active_adapter(self._adapters, self._name(file))
            # A model without such an input drops it without a word.
            generator.set_model_input(SCALE, strength)
            generator.append_tokens(np.array(prompt, np.int32))
            if scale is not None:
                _check_input(generator, SCALE)
            while not generator.is_done():
                generator.generate_next_token()
                yield int(generator.get_next_tokens()[0])
        except RuntimeError as error:
            raise BadInput(_first_line(error)) from error

    def _name(self, file: Path) -> str:
        if file not in self._names:
            name = str(len(self._names))
            self._adapters.load(str(file), name)
            self._names[file] = name
        return self._names[file]


def _check_input(generator: Any, name: str) -> None:
    try:
        generator.get_input(name)
    except RuntimeError:
        raise BadInput(
            f"--scale: this model takes no {name}; graft it with --strength-input (required: "
            "genai does not feed optional inputs, nor may an adapter file hold the strength)"
        ) from None


def _first_line(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def show(model: Model, prompt: Sequence[int], tokens: Iterable[int], label: str) -> None:
    """Print a text while its tokens come."""
    stream = model.tokenizer.create_stream()
    shown = label + "".join([stream.decode(token) for token in prompt])
    for token in tokens:
        # With the first token, so that nothing is printed of a request that fails.
        print(shown + stream.decode(token), end="", flush=True)
        shown = ""
    print(shown, flush=True)


def main() -> None:
    """Answer the requests of the command line."""
    options = parser(__doc__.splitlines()[0], scale=True, adapters=True).parse_intermixed_args()
    wanted = requests(options)
    text = Text.of(options.folder)
    model = Model(options.folder)
    prompt = prompt_ids(options, text)
    room = text.room(len(prompt), options.tokens)
    for label, adapters in wanted:
        tokens = model.generate(prompt, room, adapters, options.scale)
        if options.json:
            answer(options, text, prompt, list(tokens), label)
        else:
            show(model, prompt, tokens, f"[{label}] " if len(wanted) > 1 else "")


if __name__ == "__main__":
    run(main)
