"""What the scripts here share: a model folder's text, and a command line that ends in one line.

Needs `tokenizers`, and nothing of austeer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "BadInput",
    "Text",
    "answer",
    "parser",
    "prompt_ids",
    "read_json",
    "requests",
    "run",
]

BAD_INPUT = 2
NONE = "none"


class BadInput(Exception):  # noqa: N818 - it is no fault of the program
    """Said in one line to the person who gave it."""


@dataclass(frozen=True)
class Text:
    """Tokens of a model folder: text to ids and back, and where a text ends.

    Attributes:
        tokenizer: of `tokenizer.json`.
        stop: token ids that end a text; empty where no config names one.
        context: most tokens of prompt and continuation together.
    """

    tokenizer: Any
    stop: frozenset[int]
    context: float

    @classmethod
    def of(cls, folder: Path) -> Text:
        """Read it from the files beside the model.

        Raises:
            BadInput: no folder, no `tokenizer.json`, or an unreadable file.
        """
        from tokenizers import Tokenizer

        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadInput(f"{path} is missing; put it beside the model")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # its errors have no class of their own
            raise BadInput(f"{path}: cannot use this tokenizer ({error})") from error
        config = read_json(folder / "config.json")
        genai = read_json(folder / "genai_config.json").get("model", {})
        places = (read_json(folder / "generation_config.json"), config, genai)
        found = (place.get("eos_token_id") for place in places)
        stop = next((ids for ids in found if ids is not None), [])
        lengths = (
            config.get("max_position_embeddings"),
            config.get("n_positions"),
            genai.get("context_length"),
        )
        context = next((length for length in lengths if length), math.inf)
        return cls(tokenizer, frozenset([stop] if isinstance(stop, int) else stop), context)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds."""
        return list(self.tokenizer.encode(prompt).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def room(self, prompt: int, wanted: int) -> int:
        """How many of the wanted tokens may follow a prompt of that many tokens.

        Raises:
            BadInput: an empty prompt, or one that fills the context.
        """
        if not prompt:
            raise BadInput("the prompt has no tokens; write some text")
        if prompt >= self.context:
            raise BadInput(
                f"the prompt has {prompt} tokens, the model's context {self.context:g}; "
                "shorten it"
            )
        return int(min(wanted, self.context - prompt))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file.

    Raises:
        BadInput: another content.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: cannot read this file ({error})") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def parser(description: str, *, scale: bool = False, adapters: bool = False) -> Any:
    """The options that the scripts have in common.

    Args:
        description: first line of `--help`.
        scale: add `--scale`.
        adapters: add `--adapter`.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("folder", type=Path, help="holds the model and its tokenizer")
    made.add_argument("prompt", nargs="?", help="text to go on from; or give --ids")
    made.add_argument("--ids", type=_ids, help="the prompt as token ids: 1,2,3")
    made.add_argument("--tokens", type=_count, default=40, help="most tokens to add")
    made.add_argument("--json", action="store_true", help="print one JSON object a request")
    if scale:
        made.add_argument(
            "--scale", type=_number, help="strength: 0 is the base model, 1 as fitted"
        )
    if adapters:
        made.add_argument(
            "--adapter",
            action="append",
            default=[],
            metavar="FILE",
            help=f"answer with this .onnx_adapter active; repeat it for one answer each on one "
            f"loaded model; '{NONE}' answers as the base",
        )
    return made


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _count(text: str) -> int:
    if (count := int(text)) < 0:
        raise ValueError(text)
    return count


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def requests(options: argparse.Namespace) -> list[tuple[str, list[Path]]]:
    """Name of each answer, and the adapters that steer it; one answer where none is named.

    Raises:
        BadInput: no such file.
    """
    named = [None if name == NONE else Path(name) for name in options.adapter] or [None]
    for path in named:
        if path is not None and not path.is_file():
            raise BadInput(f"{path}: no such adapter file")
    files = [[path] if path else [] for path in named]
    if getattr(options, "together", False):
        files = [[path for path in named if path]]
    return [(_label(group), group) for group in files]


def _label(files: Iterable[Path]) -> str:
    return "+".join(path.stem for path in files) or NONE


def prompt_ids(options: argparse.Namespace, text: Text) -> list[int]:
    """Token ids of the prompt that the command line gives.

    Raises:
        BadInput: both a prompt and `--ids`, or neither.
    """
    if (options.prompt is None) == (options.ids is None):
        raise BadInput("expected FOLDER and either a prompt or --ids; see --help")
    return options.ids or text.encode(options.prompt or "")


def answer(
    options: argparse.Namespace,
    text: Text,
    prompt: list[int],
    ids: list[int],
    label: str = NONE,
) -> None:
    """Print one request's answer, labelled where there are several."""
    whole = text.decode(prompt + ids)
    if options.json:
        row = {"adapter": label, "prompt_ids": prompt, "ids": ids, "text": whole}
        print(json.dumps(row), flush=True)
    elif len(getattr(options, "adapter", ())) > 1:
        print(f"[{label}] {whole}", flush=True)
    else:
        print(whole)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; bad input ends it with one line on stderr and exit code 2."""
    try:
        main()
    except BadInput as error:
        line = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(BAD_INPUT)
