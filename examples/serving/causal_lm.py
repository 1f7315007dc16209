"""Inputs and outputs of a causal language model in ONNX with its KV cache.

Inputs  `input_ids`, `attention_mask`[, `position_ids`], `past_key_values.{i}.{key|value}`
        [, `steering_scale`]
Outputs `logits`, `present.{i}.{key|value}`

These are the names of optimum, of austeer and of the onnxruntime-genai builder. Needs numpy.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from model_folder import BadInput, read_json

__all__ = ["MODEL", "SCALE", "Signature", "best_token", "model_file"]

MODEL = "model.onnx"
SCALE = "steering_scale"
_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
_TOKENS = ("input_ids", "attention_mask", "position_ids")


def model_file(folder: Path) -> Path:
    """The model in a folder.

    Raises:
        BadInput: there is none.
    """
    path = folder / MODEL
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    return path


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        path: the model file, for messages.
        positions: whether it takes `position_ids`.
        scale: the strength of every run; None where the model does not take one, or has one of
            its own.
        cache: each cache input with its number of heads and their size.
    """

    path: Path
    positions: bool
    scale: float | None
    cache: Mapping[str, tuple[int, int]]

    @classmethod
    def of(
        cls,
        path: Path,
        inputs: Mapping[str, Sequence[int | str | None]],
        optional: Collection[str],
        outputs: Collection[str],
        scale: float | None = None,
    ) -> Signature:
        """Read it from what a runtime says of a loaded model.

        Args:
            path: the model file.
            inputs: shapes of the inputs that a run must give, by name.
            optional: names of those with a default.
            outputs: names.
            scale: the strength asked for.

        Raises:
            BadInput: another kind of model, or a strength for one that takes none.
        """
        past = [name for name in inputs if _PAST.fullmatch(name)]
        wanted = {*_TOKENS[:2], *(past or ["past_key_values.0.key"])}
        missing = [name for name in sorted(wanted) if name not in inputs]
        missing += [n for n in ("logits", *map(present_name, past)) if n not in outputs]
        unknown = [name for name in inputs if name not in (*_TOKENS, SCALE, *past)]
        if missing or unknown:
            raise BadInput(
                f"{path}: not a causal language model with KV cache in optimum's naming "
                f"(missing: {', '.join(missing) or 'nothing'}; "
                f"unknown: {', '.join(unknown) or 'nothing'})"
            )
        if scale is not None and SCALE not in inputs and SCALE not in optional:
            raise BadInput(
                f"--scale: {path} has no {SCALE} input, its strength is fixed; make it with "
                "--strength-input"
            )
        if scale is None and SCALE in inputs:
            scale = 1.0
        cache = {name: _heads(path, name, inputs[name]) for name in past}
        return cls(path, "position_ids" in inputs, scale, cache)

    @property
    def presents(self) -> list[str]:
        """Outputs that are the next run's cache, in the order of `cache`."""
        return [present_name(name) for name in self.cache]

    def feeds(self, fresh: Sequence[int], length: int) -> dict[str, np.ndarray]:
        """All inputs but the cache, for one text.

        Args:
            fresh: token ids that the cache does not hold yet.
            length: how many tokens the cache holds.
        """
        total = length + len(fresh)
        found = {
            "input_ids": np.array([fresh], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
        }
        if self.positions:
            found["position_ids"] = np.arange(length, total, dtype=np.int64)[None]
        if self.scale is not None:
            found[SCALE] = np.array([self.scale], np.float32)
        return found


def present_name(past: str) -> str:
    """The output that goes on from a cache input."""
    return past.replace("past_key_values", "present")


def best_token(logits: np.ndarray) -> int:
    """The likeliest next token after the last position of one text."""
    return int(logits[0, -1].argmax())


def _heads(path: Path, name: str, shape: Sequence[int | str | None]) -> tuple[int, int]:
    if len(shape) != 4:
        raise BadInput(f"{path}: {name} has shape {list(shape)}, expected four dimensions")
    heads, size = shape[1], shape[3]
    if not isinstance(size, int):
        # The onnxruntime-genai builder leaves it open and writes it beside the graph.
        model = read_json(path.with_name("genai_config.json")).get("model", {})
        size = model.get("decoder", {}).get("head_size")
    if not isinstance(heads, int) or not isinstance(size, int):
        raise BadInput(f"{path}: {name} does not say its heads and their size")
    return heads, size
