"""Holds arrays to the shapes and dtypes that signatures state; jaxtyping calls it in tests."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, refusing arguments and results that are not the arrays it states.

    Other annotations are mypy's matter.
    """
    hints: dict[str, Any] | None = None
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal hints
        if hints is None:
            hints = _array_hints(function)
        if hints:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
                for one in value if several else (value,):
                    _hold(function, name, one, hints.get(name))
        result = function(*args, **kwargs)
        if hints:
            _hold(function, "return", result, hints.get("return"))
        return result

    return checked


def _array_hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        found = typing.get_type_hints(function)
    except NameError:  # of a name that only type checkers import
        return {}
    return {name: hint for name, hint in found.items() if _is_array(hint)}


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _hold(function: Callable[..., Any], name: str, value: Any, hint: Any) -> None:
    if hint is not None and not isinstance(value, hint):
        described = getattr(value, "shape", ""), getattr(value, "dtype", type(value))
        raise TypeError(f"{function.__qualname__}: {name}: expected {hint}, got {described}")
