"""Checks of the arguments and the return values of a reward's own code."""

from __future__ import annotations

import inspect
import math
import pickle
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import ConfigurationError, RewardError, nearest_first
from .types import RESERVED_COLUMNS, Column, Counts, OnError, RewardOptions, Scores, Texts, TokenIds

_TOLERANCE = 1e-6  # how far rounding may carry a score past its bounds
_SHOWN = 200  # characters of a text or value that an error shows


@dataclass(frozen=True)
class TextBatch:
    """The arguments of one call, checked to be sequences of one length n."""

    prompts: Texts
    completions: Texts
    completion_ids: TokenIds
    columns: Mapping[str, Column]

    def __len__(self) -> int:
        return len(self.completions)

    @classmethod
    def of(
        cls,
        prompts: Texts,
        completions: Texts,
        completion_ids: TokenIds,
        columns: Mapping[str, Column],
        remaining: Counts | None = None,
    ) -> TextBatch:
        """Check the lengths.

        Raises:
            ConfigurationError: They differ, one text is given instead of a list, or a text is no string.
        """
        columns = passable(columns, RESERVED_COLUMNS)
        given: dict[str, Any] = {"completions": completions, "prompts": prompts, **columns}
        optional = {"completion_ids": completion_ids, "remaining": remaining}
        given |= {name: values for name, values in optional.items() if values is not None}
        for name, values in given.items():
            count = _length(values)
            if count is None or count != _length(completions):
                what = f"no list ({shown(values)})" if count is None else f"{count} value(s)"
                raise ConfigurationError(
                    f"a reward got {what} as {name!r} where a list as long as 'completions' was expected; "
                    "rewards are batched: score one text as reward([prompt], [completion])."
                )
        for name, texts in (("prompts", prompts), ("completions", completions)):
            for text in texts:
                if not isinstance(text, str):
                    raise ConfigurationError(
                        f"{name} are strings, got {shown(text)}; for chats see rewards.adapters.from_trl(…, "
                        "conversational=True)."
                    )
        return cls(prompts, completions, completion_ids, columns)

    def take(self, rows: Sequence[int]) -> TextBatch:
        """Return the texts of these rows."""
        return TextBatch(
            [self.prompts[row] for row in rows],
            [self.completions[row] for row in rows],
            None if self.completion_ids is None else [self.completion_ids[row] for row in rows],
            {name: [column[row] for row in rows] for name, column in self.columns.items()},
        )

    def keys(self, *, with_token_ids: bool) -> list[Hashable]:
        """Return [n] keys, equal where everything that a score may depend on is equal."""
        ids = self.completion_ids if with_token_ids else None
        try:
            ids = None if ids is None else [tuple(map(int, row)) for row in ids]
        except (TypeError, ValueError):
            raise ConfigurationError(
                f"completion_ids hold a list of token ids for each completion, got {shown(ids)}"
            ) from None
        names = sorted(self.columns)
        return [
            (
                self.prompts[row],
                self.completions[row],
                None if ids is None else ids[row],
                *((name, _hashable(self.columns[name][row])) for name in names),
            )
            for row in range(len(self))
        ]


@dataclass(frozen=True)
class CallSpec:
    """One method of a reward's own code, a score or a potential, and the values that it may return."""

    subject: str  # the method, as an error names it
    method: Callable[..., Scores]
    lower: float
    upper: float
    on_error: OnError
    fallback: float  # the value of a text that `on_error` tolerates
    warn: Callable[[str], None]  # called for such a text

    def run(self, texts: TextBatch) -> list[float]:
        """Call the method on all texts at once, and check the values.

        Returns:
            [n] values within the bounds; NaN for a text that cannot be scored.

        Raises:
            RewardError: The method raised or returned a wrong value and `on_error` is ``"raise"``, or it did not return
                one value per text.
            ConfigurationError: The method raised it: no single text is at fault.
        """
        try:
            returned = self.method(texts.prompts, texts.completions, texts.completion_ids, **texts.columns)
        except Exception as error:
            if isinstance(error, ConfigurationError) or (isinstance(error, RewardError) and self.on_error == "raise"):
                raise  # the message of a reward within this one needs no addition
            complaint = f"raised {type(error).__name__}: {_shortened(str(error))}"
            if len(texts) == 1:
                return [self._rejected(complaint, texts, 0, error)]
            # One by one, so that only the texts at fault are rejected, and the error names one of them.
            values = [value for row in range(len(texts)) for value in self.run(texts.take([row]))]
            if self.on_error == "raise":
                raise RewardError(
                    f"{self.subject} {complaint}, for {len(texts)} texts at once, though for none of them alone. "
                    "Let it score any batch of texts."
                ) from error
            return values
        values = []
        for row, value in enumerate(self.one_per_text(returned, len(texts))):
            try:
                values.append(self._checked(value))
            except (TypeError, ValueError) as error:
                values.append(self._rejected(f"returned {shown(value)}, {error}", texts, row, None))
        return values

    def one_per_text(self, returned: Any, count: int) -> list[Any]:
        """Return the method's return value as a list of `count` values.

        Raises:
            RewardError: It is no list, or has another length.
        """
        is_list = hasattr(returned, "__len__") and not isinstance(returned, str | bytes | Mapping | Set)
        try:
            values = list(returned) if is_list else None
        except TypeError:  # 0-d arrays and tensors have a length and an iterator, but only in name
            values = None
        if values is None:
            raise RewardError(
                f"{self.subject} returned {shown(returned)} ({type(returned).__name__}) where a list was expected. "
                f"Return a list of {count} value(s), one per completion."
            )
        if len(values) != count:
            raise RewardError(
                f"{self.subject} returned {len(values)} value(s) for {count} completion(s): {shown(returned)}. "
                "Return one value per completion, in their order, and None for one that cannot be scored."
            )
        return values

    def _checked(self, value: Any) -> float:
        """Return one value as a float, NaN for None.

        Raises:
            TypeError: It is no number. The message is a clause: "which is ...".
            ValueError: It is not finite, or out of bounds; likewise.
        """
        if value is None:
            return math.nan
        number = as_number(value)
        if not math.isfinite(number):
            raise ValueError("which is not finite")
        if not self.lower - _TOLERANCE <= number <= self.upper + _TOLERANCE:
            raise ValueError(f"which is outside the stated bounds {interval(self.lower, self.upper)}")
        return min(max(number, self.lower), self.upper)

    def _rejected(self, complaint: str, texts: TextBatch, row: int, cause: Exception | None) -> float:
        """Apply `on_error` to one text: raise, or warn and return the fallback."""
        message = (
            f"{self.subject} {complaint}, for the completion {shown(texts.completions[row])} "
            f"of the prompt {shown(texts.prompts[row])}."
        )
        if self.on_error == "raise":
            raise RewardError(
                f"{message} Return one finite number within {interval(self.lower, self.upper)}, or None if the "
                "text cannot be scored; on_error='skip' or 'penalty' tolerates such texts."
            ) from cause
        self.warn(message)
        return self.fallback


def passable(columns: Mapping[str, Column], reserved: Collection[str], taker: str = "a reward") -> dict[str, Column]:
    """Return the columns of the prompts that a reward can be given: all but those with the name of an argument.

    The argument keeps its own value, such as the model's text. A warning tells of each column left out.
    """
    for name in columns:
        if name in reserved:
            warnings.warn(
                f"the column {name!r} of the prompts is left out, as {taker} has an argument of that name; to pass it "
                f"on, rename it, for instance to 'data_{name}'",
                stacklevel=2,
            )
    return {name: column for name, column in columns.items() if name not in reserved}


def plain(value: Any) -> Any:
    """Return arrays, tensors and NumPy's numbers as lists and numbers of Python, also within lists and tuples.

    Tables read from Parquet files, and data sets in the format of NumPy or torch, hold such values.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return [*map(plain, value)] if isinstance(value, list) else value


def check_keywords(subject: str, given: Collection[str], known: Collection[str]) -> None:
    """Check that all keyword arguments exist.

    Raises:
        ConfigurationError: One does not; the message names the nearest ones that do.
    """
    for name in given:
        if name not in known:
            nearest = nearest_first(name, known)
            advice = f"did you mean {nearest[0]!r}? It takes {', '.join(nearest)}." if nearest else "It takes none."
            raise ConfigurationError(f"{subject} takes no argument {name!r}; {advice}")


def keywords_of(factory: Callable[..., Any]) -> list[str] | None:
    """Return the names of a reward class's or factory's keyword arguments; None where it takes any."""
    names: list[str] = []
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            annotation = str(parameter.annotation)
            if "RewardOptions" in annotation:
                names += RewardOptions.__annotations__
            elif "Never" not in annotation:
                return None
    return names


def _length(values: Any) -> int | None:
    """Return the length of a list, array or column; None for anything else, such as one text."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__getitem__"):
        return None
    try:
        return len(values)
    except TypeError:  # no length, or an array without dimensions
        return None


def _hashable(value: Any) -> Hashable:
    """Return a key that is equal for equal values only, for any value of a data set's column."""
    try:
        hash(value)
        return type(value), value  # the type, because 1 == 1.0 == True but their texts differ
    except TypeError:
        try:
            return pickle.dumps(value)
        except Exception:  # a foreign __reduce__ may raise anything; then nothing equals this value
            return object()


def is_number(value: object) -> bool:
    """Return whether the value is a real number: an int, a float, one of NumPy's scalars."""
    return isinstance(value, Real)


def as_number(value: Any) -> float:
    """Return a number, or a NumPy or torch scalar, as a float.

    Raises:
        TypeError: It is anything else.
    """
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


def interval(lower: float, upper: float) -> str:
    """Return an interval as errors write it."""
    return f"[{lower:g}, {upper:g}]"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def shown(value: Any) -> str:
    """Return a text or value as errors show it; a text is cut before it is quoted, so that the quotes close."""
    if isinstance(value, str) and len(value) > _SHOWN:
        return f"{value[:_SHOWN]!r}… ({len(value)} characters)"
    return _shortened(repr(value))
