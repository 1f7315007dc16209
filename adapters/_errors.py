"""The one error family. A message says where, what was expected, what came, what to do."""

from __future__ import annotations

from typing import Any


class AusteerError(Exception):
    """Base of every error that a user's input can cause.

    The message is one line, fit to be printed without a traceback.
    """

    exit_code = 2


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
