"""The errors that this package raises, one family.

Every message names what was wrong, what was expected and what to do.
Each class also derives from the built-in exception a caller would expect.
"""

from __future__ import annotations

import difflib
import math
import os
import tempfile
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigurationError",
    "EpisodeError",
    "HeuristicError",
    "IllegalActionError",
    "PromptError",
    "QStarError",
    "RewardError",
    "TrainingDivergedError",
    "UnknownNameError",
    "WorkerError",
    "check_integer",
    "check_number",
    "check_writable",
    "first_line",
]


class QStarError(Exception):
    """Base class of every error raised by this package."""


class ConfigurationError(QStarError, ValueError):
    """Raised when an argument has a value that cannot work."""


class UnknownNameError(ConfigurationError):
    """Raised when a model, task, reward or decoder is asked for by a name that nobody registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        """Build the message: the known names, nearest first.

        Args:
            kind: What was looked up, e.g. ``"reward"``.
            name: The name that is not known.
            known: All names that are.
            hint: One sentence on what else would have been accepted.
        """
        self.kind, self.name, self.hint = kind, name, hint
        self.known = nearest_first(name, known)
        listed = ", ".join(repr(n) for n in self.known) or "(none)"
        super().__init__(f"unknown {kind} {name!r}; known, nearest first: {listed}.{' ' + hint if hint else ''}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments, not the message: it may be raised in another process."""
        return type(self), (self.kind, self.name, self.known, self.hint)


class PromptError(QStarError, ValueError):
    """Raised when a prompt is missing, empty, of the wrong type, or too long for the model."""


class IllegalActionError(QStarError, ValueError):
    """Raised when an action is not an integer, out of range, or masked; the state is left as it was."""


class EpisodeError(QStarError, RuntimeError):
    """Raised when ``step`` is called before ``reset`` or after the end of the episode."""


class RewardError(QStarError, ValueError):
    """Raised when a reward returns something that is not one finite number within its bounds per text."""


class RewardCheckError(QStarError, AssertionError):
    """Raised by ``check_reward`` when a reward breaks a law that others rely on."""


class HeuristicError(QStarError, ValueError):
    """Raised when a heuristic returns NaN or an array of the wrong shape."""


class ConstraintError(QStarError, ValueError):
    """Raised when nothing that could be written satisfies a constraint."""


class CheckpointError(QStarError, ValueError):
    """Raised when a checkpoint is broken, or belongs to another model, k or observation layout."""


class TrainingDivergedError(QStarError, FloatingPointError):
    """Raised when a loss becomes NaN or infinite; what was saved before is intact."""


class CacheError(QStarError, OSError):
    """Raised when the model cache cannot be written."""


class WorkerError(QStarError, RuntimeError):
    """Raised when workers of a cluster die over the same work again and again, or none can be started."""


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
    good = type(value) is not bool and isinstance(value, Real) and math.isfinite(value)
    if not good or not low <= value <= high or (open_low and value == low):
        raise ConfigurationError(
            f"{name} is a finite number in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}"
        )
    return float(value)


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


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Return ``known`` sorted by likeness to ``name``, the most alike first."""
    return sorted(known, key=lambda other: (-difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio(), other))
