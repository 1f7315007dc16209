"""Contrastive pairs: read JSONL, CSV, Parquet or Hub rows, and check each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.adapters._errors import PairsError
from austeer.adapters._json import is_writable
from austeer.adapters._rows import kind_of, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ContrastivePair:
    """One prompt with a completion that shows the behaviour and one that shows the opposite.

    Attributes:
        prompt: text before both completions, may be empty; of a `messages` row it stays
            empty until `render_pairs`.
        positive: completion to steer towards.
        negative: completion to steer away from.
        messages: chat turns (`role`, `content`) that stand in for the prompt, or None.
        where: `file:line` for error messages.
    """

    prompt: str
    positive: str
    negative: str
    messages: tuple[dict[str, Any], ...] | None = None
    where: str = ""

    @property
    def is_chat(self) -> bool:
        """Whether a chat template writes the prompt, special tokens included."""
        return self.messages is not None

    @property
    def place(self) -> str:
        """What an error message calls the pair."""
        return self.where or f"the pair with positive {self.positive[:40]!r}"

    @property
    def content(self) -> str:
        """Canonical JSON of the pair; `where` and a rendered prompt are no part of it."""
        return _canonical([self.context, self.positive, self.negative])

    @property
    def context(self) -> Any:
        """What comes before the completions: the messages if there are any, else the prompt."""
        return self.prompt if self.messages is None else list(self.messages)

    @property
    def context_text(self) -> str:
        """The same in one line, to compare."""
        return _canonical(self.context)


def read_pairs(source: str | Path, *, split: str = "train") -> list[ContrastivePair]:
    """Read and check every pair of a file or a Hub dataset.

    Args:
        source: a .jsonl, .csv or .parquet file, or the id of a Hub dataset.
        split: split of a Hub dataset.

    Raises:
        PairsError: unreadable, empty, or a bad or repeated row; names file and line.
    """
    pairs: list[ContrastivePair] = []
    seen: dict[bytes, str] = {}
    for pair in iter_pairs(source, split=split):
        key = hashlib.sha256(pair.content.encode()).digest()
        if key in seen:
            raise PairsError(
                f"{pair.where}: repeats the pair of {seen[key]}; remove one of the two"
            )
        seen[key] = pair.where
        pairs.append(pair)
    if not pairs:
        raise PairsError(
            f"{source}: has no pairs; give it rows with prompt, positive and negative"
        )
    return pairs


def iter_pairs(source: str | Path, *, split: str = "train") -> Iterator[ContrastivePair]:
    """Stream the pairs of `source`, each checked for itself; see `read_pairs`.

    Raises:
        PairsError: unreadable, or a bad row; names file and line.
    """
    for where, row in read_rows(str(source), split):
        yield _pair(where, row)


def check_pairs(pairs: Sequence[ContrastivePair]) -> None:
    """Refuse what is no list of pairs, such as the name of a file.

    Raises:
        PairsError: names the type that came, or the pair without whole texts.
    """
    listed = isinstance(pairs, Sequence) and not isinstance(pairs, str | bytes)
    others = (
        [one for one in pairs if not isinstance(one, ContrastivePair)] if listed else [pairs]
    )
    if others:
        raise PairsError(
            f"pairs: expected ContrastivePair objects, got {type(others[0]).__name__}; "
            "read_pairs(file) gives them"
        )
    for number, pair in enumerate(pairs, 1):
        try:
            "".join((pair.prompt, pair.positive, pair.negative)).encode()
        except (TypeError, UnicodeEncodeError) as error:
            where = pair.where or f"pair {number}"
            raise PairsError(f"{where}: expected three texts of whole characters") from error


def render_pairs(
    pairs: Sequence[ContrastivePair], tokenizer: PreTrainedTokenizerBase
) -> list[ContrastivePair]:
    """Fill the prompt of every `messages` pair by the tokenizer's chat template.

    Such a prompt is whole: its tokens come without those that the tokenizer adds to a text.

    Raises:
        PairsError: no pairs, no template in the tokenizer, or one that refuses the messages.
    """
    check_pairs(pairs)
    return [
        pair if pair.messages is None else replace(pair, prompt=_rendered(pair, tokenizer))
        for pair in pairs
    ]


def pairs_digest(pairs: Iterable[ContrastivePair]) -> str:
    """`sha256:` digest of a set of pairs, whatever their order."""
    total = hashlib.sha256()
    for line in sorted(text_digest(pair.content) for pair in pairs):
        total.update(line.encode())
    return f"sha256:{total.hexdigest()}"


def _pair(where: str, row: Mapping[str, Any]) -> ContrastivePair:
    if row.get("messages") is not None:
        if row.get("prompt") is not None:
            raise PairsError(f"{where}: has both prompt and messages; keep one of the two")
        prompt, messages = "", _messages(where, row["messages"])
    else:
        prompt, messages = _text(where, row, "prompt"), None
    positive = _completion(where, row, "positive")
    negative = _completion(where, row, "negative")
    if positive == negative:
        raise PairsError(f"{where}: positive and negative are the same text; nothing contrasts")
    return ContrastivePair(prompt, positive, negative, messages, where)


def _completion(where: str, row: Mapping[str, Any], key: str) -> str:
    text = _text(where, row, key)
    if not text.strip():
        raise PairsError(f"{where}: {key} is empty; a completion needs text")
    return text


def _text(where: str, row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        found = ", ".join(map(str, row))[:120]
        wanted = "prompt (or messages)" if key == "prompt" else key
        raise PairsError(f"{where}: key {wanted} is missing, found {found!r}")
    text = row[key]
    if not isinstance(text, str):
        raise PairsError(f"{where}: {key}: expected text, found {kind_of(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PairsError(
            f"{where}: {key}: half of a surrogate pair ({error.reason})"
        ) from error
    return text


def _messages(where: str, turns: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(turns, list) or not turns:
        raise PairsError(
            f"{where}: messages: expected a non-empty list of turns, found {kind_of(turns)}"
        )
    for number, turn in enumerate(turns, 1):
        at = f"{where}: messages, turn {number}"
        if not isinstance(turn, dict):
            raise PairsError(f"{at}: expected an object, found {kind_of(turn)}")
        for key in ("role", "content"):
            _text(at, turn, key)
        # Templates read other keys, too; of a dataset's row they can be anything.
        if not is_writable(turn):
            raise PairsError(f"{at}: expected JSON values and whole characters in all its keys")
    return tuple(turns)


def _rendered(pair: ContrastivePair, tokenizer: PreTrainedTokenizerBase) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise PairsError(
            f"{pair.place}: has messages, but the tokenizer has no chat template; "
            "use prompt instead, or a chat model"
        )
    turns = list(pair.messages or ())
    # The completion goes on with what the assistant has begun, in its turn.
    begun = bool(turns) and turns[-1].get("role") == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
        )
    except Exception as error:  # templates raise jinja2's errors, and any other
        reason = " ".join(str(error).split())[:200]
        raise PairsError(
            f"{pair.place}: the chat template refuses the messages ({reason})"
        ) from error
    return str(text)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def text_digest(text: str, seed: int | None = None) -> str:
    """Of a text, and of the seed."""
    salted = text if seed is None else f"{seed}:{text}"
    return hashlib.sha256(salted.encode()).hexdigest()
