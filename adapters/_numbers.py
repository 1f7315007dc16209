"""What a number given by a caller may be."""

from __future__ import annotations

from numbers import Integral

from austeer.adapters._errors import FitError


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse all but a whole number from `least` on; a flag is none.

    Raises:
        FitError: as said, with the name.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise FitError(f"{name}: expected a whole number from {least} on, got {value}")
