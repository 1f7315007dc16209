"""Messages are one line that a terminal can show, whatever a stranger's file put in them."""

from __future__ import annotations

import pickle

import pytest
from hostile import TEXTS
from hypothesis import given
from hypothesis import strategies as st

from austeer.adapters import AusteerError, ModelError, NoEffectError


@given(st.text() | st.sampled_from(TEXTS))
def test_messages_are_printable(text: str) -> None:
    message = str(ModelError(f"file: {text}"))
    assert message.isprintable() and message.startswith("file: ")
    message.encode()
    if text.isprintable():
        assert message == f"file: {text}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\ud800", "\\ud800"),
        ("γ ≥ 1", "γ ≥ 1"),
        ("it's\t'x'", "it's\\t'x'"),
    ],
)
def test_what_would_not_print_is_escaped(text: str, shown: str) -> None:
    assert str(AusteerError(text)) == shown


def test_messages_end() -> None:
    message = str(ModelError("where: " + "x" * 10**6 + "; do this"))
    assert len(message) < 2100 and "x…x" in message
    assert message.startswith("where: xxx") and message.endswith("xxx; do this")


def test_what_is_escaped_ends_too() -> None:
    message = str(ModelError("where: " + "\x1b" * 10**4 + "; do this"))
    assert len(message) < 2100 and message.isprintable() and message.endswith("; do this")


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ModelError("a\nb")))
    assert type(error) is ModelError and str(error) == "a\\nb"
    assert str(NoEffectError("m", {"a": 1})) == "m"
