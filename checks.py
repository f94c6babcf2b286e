"""Checks of arguments, shared by all rooms: each returns the value or raises an error in one line."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import tempfile
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = [
    "CheckedKeywords",
    "check_choice",
    "check_flag",
    "check_integer",
    "check_keywords",
    "check_kv_budget",
    "check_number",
    "check_texts",
    "check_writable",
    "describe_invalid",
    "first_line",
]


def check_integer(name: str, value: Any, *, low: int = 1, high: int | None = None, meaning: str = "") -> int:
    """Return ``value`` as an int.

    Raises:
        ConfigurationError: It is not an integer from ``low`` to ``high``.
    """
    # numpy's integers are Integral too; True is an int that nobody means
    good = type(value) is not bool and isinstance(value, Integral)
    if not good or int(value) < low or (high is not None and int(value) > high):
        wanted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
        raise ConfigurationError(f"{name} is {wanted}{f' ({meaning})' if meaning else ''}, got {value!r}")
    return int(value)


def check_number(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    """Return ``value`` as a finite float.

    Raises:
        ConfigurationError: It is not a number from ``low`` (excluded if ``open_low``) to ``high``.
    """
    try:
        number = float(value) if type(value) is not bool and isinstance(value, Real) else math.nan
    except OverflowError:  # an integer beyond any float
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
        raise ConfigurationError(
            f"{name} is a finite number in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r:.100}"
        )
    return number


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Check that ``value`` is one of a few.

    Raises:
        ConfigurationError: It is not.
    """
    listed = list(choices)
    if not isinstance(value, str) or value not in listed:
        raise ConfigurationError(f"{name} is {' or '.join(map(repr, listed))}, got {value!r}")


def check_flag(name: str, value: Any) -> bool:
    """Return ``value``, which is true or false.

    Raises:
        ConfigurationError: It is something else.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} is true or false, got {value!r}")
    return value


def check_kv_budget(kv_budget: Any) -> int | None:
    """Return ``kv_budget``, bytes of keys and values, or None for the default.

    Raises:
        ConfigurationError: It is no positive number.
    """
    is_number = isinstance(kv_budget, Real) and not isinstance(kv_budget, bool)
    if kv_budget is not None and not (is_number and 0 < kv_budget < math.inf):
        raise ConfigurationError(f"kv_budget is a number of bytes > 0 (or None), got {kv_budget!r}")
    budget: int | None = kv_budget
    return budget


def check_texts(name: str, value: Any) -> tuple[str, ...]:
    """Return a string, or several, as a tuple.

    Raises:
        ConfigurationError: Something else is among them, or an empty string.
    """
    given = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(string, str) and string for string in given):
        raise ConfigurationError(f"{name} is a non-empty string or a list of them, got {value!r}")
    return given


def check_keywords(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Check the names of keyword arguments that are collected in ``**kwargs``.

    Raises:
        ConfigurationError: One is not known; the message names the likeliest, or all.
    """
    known = list(known)
    public = sorted(name for name in known if not name.startswith("_"))
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), public, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(public)}"
            raise ConfigurationError(f"{owner} has no argument {name!r}; {hint}")


class CheckedKeywords:
    """A base of dataclasses: a misspelt field is a :class:`ConfigurationError` that names the nearest right one."""

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Check the names of the fields that are given; ``__init__`` does the rest."""
        check_keywords(cls.__name__, given, inspect.signature(cls.__init__).parameters.keys() - {"self"})
        return super().__new__(cls)


def check_writable(folder: Path) -> Path:
    """Check that files can be written into a folder, or that it could be made where it does not exist yet.

    Returns:
        The folder, or the nearest one above it that exists.

    Raises:
        ConfigurationError: They cannot.
    """
    # os.path.exists, for Path.exists raises where the folders above may not be looked into.
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    try:
        # Tried, not asked: permissions, quotas and read-only mounts all say no in their own ways.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"nothing can be written into {existing}: {error.strerror}; write elsewhere"
        ) from error
    return existing


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe_invalid(error: ValidationError) -> str:
    """Return the place and the message of the first thing that pydantic found wrong, in one line."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, problem["loc"]))
    return " ".join((f"{place}: " if place else "").split() + problem["msg"].split())
