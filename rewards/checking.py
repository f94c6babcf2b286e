"""Checks of what a reward is given and of what it returns."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError, RewardError

FloatArray = npt.NDArray[np.float64]


_TOLERANCE = 1e-6  # how far rounding may carry a score past its bounds before it is an error


_SHOWN = 200  # characters of a text, or of a value, that an error shows


@dataclass(frozen=True)
class _CallSpec:
    """What is asked of a subclass's code, a score or a potential, and what is expected of it."""

    subject: str  # who an error says did wrong
    method: Callable[..., Sequence[float | None]]
    lower: float
    upper: float
    fallback: float  # what a text gets whose value is bad, where `on_error` tolerates that

    def one_per_text(self, returned: Any, count: int) -> list[Any]:
        """Return what `method` returned as a list, if it has `count` values."""
        is_list = hasattr(returned, "__len__") and not isinstance(returned, str | bytes | Mapping | Set)
        try:
            values = list(returned) if is_list else None
        except TypeError:  # 0-d arrays and tensors have a length and an iterator, but only in name
            values = None
        if values is None:
            raise RewardError(
                f"{self.subject} returned {_shown(returned)} ({type(returned).__name__}) where a list was expected. "
                f"Return a list of {count} value(s), one per completion."
            )
        if len(values) != count:
            raise RewardError(
                f"{self.subject} returned {len(values)} value(s) for {count} completion(s): {_shown(returned)}. "
                "Return one value per completion, in their order, and None for one that cannot be scored."
            )
        return values

    def checked(self, value: Any) -> float:
        """Return one value as a float, NaN for None.

        Raises:
            TypeError: It is no number. The message is a clause: "which is ...".
            ValueError: It is not finite, or out of bounds; likewise.
        """
        if value is None:
            return math.nan
        number = _number(value)
        if not math.isfinite(number):
            raise ValueError("which is not finite")
        if not self.lower - _TOLERANCE <= number <= self.upper + _TOLERANCE:
            raise ValueError(f"which is outside the stated bounds {_interval(self.lower, self.upper)}")
        return min(max(number, self.lower), self.upper)


@dataclass(frozen=True)
class _Texts:
    """The arguments of one call, known to be sequences of one length n."""

    prompts: Sequence[str]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]] | None
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.completions)

    @classmethod
    def of(
        cls,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None,
        columns: Mapping[str, Sequence[Any]],
    ) -> _Texts:
        """Check the lengths, which a single text given where a list belongs would upset."""
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        for name, values in given.items():
            if values is not None and (isinstance(values, str) or len(values) != len(completions)):
                what = "one text" if isinstance(values, str) else f"{len(values)} value(s)"
                raise ConfigurationError(
                    f"a reward got {what} as {name!r} where a list as long as 'completions' was expected; "
                    "rewards are batched: score one text as reward([prompt], [completion])."
                )
        return cls(prompts, completions, completion_ids, columns)

    def take(self, rows: Sequence[int]) -> _Texts:
        """Return the texts of these rows."""
        return _Texts(
            [self.prompts[row] for row in rows],
            [self.completions[row] for row in rows],
            None if self.completion_ids is None else [self.completion_ids[row] for row in rows],
            {name: [column[row] for row in rows] for name, column in self.columns.items()},
        )

    def keys(self, *, with_token_ids: bool) -> list[Hashable]:
        """Return [n] keys, equal where everything that a score may depend on is equal."""
        ids = self.completion_ids if with_token_ids else None
        names = sorted(self.columns)
        return [
            (
                self.prompts[row],
                self.completions[row],
                None if ids is None else tuple(map(int, ids[row])),
                *((name, _hashable(self.columns[name][row])) for name in names),
            )
            for row in range(len(self))
        ]


def _hashable(value: Any) -> Hashable:
    """Return a key that is equal for equal values only, whatever a data set's column holds."""
    try:
        hash(value)
        return type(value), value  # the type, because 1 == 1.0 == True but their texts differ
    except TypeError:
        try:
            return pickle.dumps(value)
        except Exception:  # anything may go wrong in a stranger's __reduce__; then nothing equals this value
            return object()


def _is_number(value: object) -> bool:
    """Whether the value is a real number: an int, a float, one of NumPy's scalars, ..."""
    return isinstance(value, Real)


def _number(value: Any) -> float:
    """Return a number, or a NumPy or torch scalar, as a float; raise TypeError for anything else."""
    try:
        scalar = value.item() if hasattr(value, "item") else value
    except (TypeError, ValueError, RuntimeError):  # an array or tensor of several numbers
        scalar = None
    if not isinstance(scalar, Real):
        raise TypeError(f"which is not a number but a {type(value).__name__}")
    try:
        return float(scalar)
    except OverflowError:  # an int beyond any float
        return math.inf


def _interval(lower: float, upper: float) -> str:
    return f"[{lower:g}, {upper:g}]"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def _shown(value: Any) -> str:
    """Return a text or value as an error shows it; a text is cut before it is quoted, so that the quotes close."""
    if isinstance(value, str) and len(value) > _SHOWN:
        return f"{value[:_SHOWN]!r}… ({len(value)} characters)"
    return _shortened(repr(value))
