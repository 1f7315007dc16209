"""The one error family. A message says where, what was expected, what came, what to do."""

from __future__ import annotations

from typing import Any

_HALF = 1000  # characters of either end of a message that are shown


class AusteerError(Exception):
    """Base of every error that a user's input can cause.

    The message is one line, fit to be printed without a traceback: names and values of
    strangers' files are in it, so what would not print, or not end, is escaped or cut.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        shown = _cut(message)
        if not shown.isprintable():
            shown = _cut("".join(x if x.isprintable() else repr(x)[1:-1] for x in shown))
        super().__init__(shown)


class PairsError(AusteerError):
    """A pairs file, or one of its rows, is unusable."""


class ModelError(AusteerError):
    """A model directory, checkpoint or architecture is unusable."""


class SiteError(AusteerError):
    """A site or unit does not exist in the model."""


class AdapterError(AusteerError):
    """An adapter directory is malformed or belongs to another base model."""


class FitError(AusteerError):
    """Localization or strength fitting cannot go on with this input."""


class DistributedError(AusteerError):
    """The processes of a distributed run cannot meet, disagree, or one of them stopped."""

    exit_code = 5


class GraphError(AusteerError):
    """An ONNX graph cannot be read, grafted or run."""


class RouteError(AusteerError):
    """An adapter cannot take this route; the message says why and which one can."""


class OutputError(AusteerError):
    """An output cannot be written."""


class VerificationError(AusteerError):
    """A product differs from its reference; it was not published.

    Args:
        message: one line.
        details: a line for each thing that differs, to be printed before the message.
    """

    exit_code = 4

    def __init__(self, message: str, details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.details = details


class NoEffectError(AusteerError):
    """No candidate within the side-effect budget helps.

    Args:
        message: one line.
        report: the fit's report, figures of the best candidate included.
    """

    exit_code = 3

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report or {}


def _cut(text: str) -> str:
    return text if len(text) <= 2 * _HALF else f"{text[:_HALF]}…{text[-_HALF:]}"
