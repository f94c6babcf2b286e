"""Types of the arguments and results of rewards, and the options that every reward takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

__all__ = [
    "RESERVED_COLUMNS",
    "Bounds",
    "Column",
    "Counts",
    "FloatArray",
    "FunctionOptions",
    "OnError",
    "RewardOptions",
    "Scores",
    "Texts",
    "TokenIds",
]

Texts = Sequence[str]  # [n] prompts or completions
TokenIds = Sequence[Sequence[int]] | None  # [n][tokens]; None where the caller has none
Column = Sequence[Any]  # [n] values of one field of the prompts' data set
Counts = Sequence[int]  # [n] numbers of tokens
Scores = Sequence[float | None]  # [n]; None for a text that cannot be scored
Bounds = Sequence[float]  # [n]
FloatArray = npt.NDArray[np.float64]

# Arguments of every reward; a column of such a name is left out.
RESERVED_COLUMNS = frozenset({"self", "prompts", "completions", "completion_ids", "remaining"})

OnError = Literal["raise", "skip", "penalty"]


class RewardOptions(TypedDict, total=False):
    """Keyword arguments that every reward of the library takes.

    Attributes:
        name: Replaces the class's name in errors, logs and the names of sums.
        on_error: Treatment of a text whose score is missing or wrong; see `Reward`.
        penalty: Score of such a text with ``on_error="penalty"``.
    """

    name: str | None
    on_error: OnError
    penalty: float | None


class FunctionOptions(RewardOptions, total=False):
    """Keyword arguments of a function that becomes a reward.

    Attributes:
        lower: The least value that the function returns; by default its attribute ``lower``, or else ``-inf``: unknown.
        upper: The greatest; by default its attribute ``upper``, or else ``inf``: unknown. Certificates rest on it.
    """

    lower: float | None
    upper: float | None
