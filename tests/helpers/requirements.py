"""What a test needs besides this package: skipped without, a failure where CI says so."""

from __future__ import annotations

import importlib.util
import os
from typing import NoReturn

import pytest


def unavailable(what: str, remedy: str = "run: make test-serving") -> NoReturn:
    """Skip, or fail where the runtimes are required."""
    message = f"{what} is missing; {remedy}"
    if os.environ.get("AUSTEER_RUNTIMES") == "require":
        pytest.fail(message)
    pytest.skip(message)


def need(*packages: str) -> None:
    """Go on only where these packages are installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            unavailable(name)
