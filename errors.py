"""The errors that this package raises, one family.

Every message names what was wrong, what was expected and what to do.
Each class also derives from the built-in exception a caller would expect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigurationError",
    "DeadlineError",
    "EngineClosedError",
    "EpisodeError",
    "HeuristicError",
    "IllegalActionError",
    "InternalError",
    "LanguageModelError",
    "PromptError",
    "QStarError",
    "QueueFullError",
    "RewardError",
    "ServerError",
    "TrainingDivergedError",
    "UnknownNameError",
    "WorkerError",
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


class LanguageModelError(QStarError, ValueError):
    """Raised when a language model's outputs are not what its interface promises."""


class ServerError(QStarError, ConnectionError):
    """Raised when the server of a language model does not answer, refuses, or answers with something else."""


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


class QueueFullError(QStarError, RuntimeError):
    """Raised when a search engine has as many requests waiting as it takes; ask again later."""


class DeadlineError(QStarError, TimeoutError):
    """Raised when the deadline of a request passes while it waits for other searches; nothing was computed for it."""


class EngineClosedError(QStarError, RuntimeError):
    """Raised when a search engine that was closed is asked for something."""


class InternalError(QStarError, RuntimeError):
    """Raised when a result breaks a promise of this package; a mistake of the package, not of its caller."""


class WorkerError(QStarError, RuntimeError):
    """Raised when workers of a cluster die over the same work again and again, or none can be started."""


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Return ``known`` sorted by likeness to ``name``, the most alike first."""
    asked = str(name).lower()  # a file may hold a number in place of a name
    return sorted(known, key=lambda other: (-difflib.SequenceMatcher(None, asked, other.lower()).ratio(), other))
