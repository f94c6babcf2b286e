"""Constraints on strings and lengths, and the stop strings that end a completion."""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...checks import check_integer, check_texts
from ...errors import ConfigurationError
from ...models.base import LanguageModel
from .base import BoolArray, EqualByValue, Rule

__all__ = [
    "HALF",
    "BannedStrings",
    "Finder",
    "ForcedStrings",
    "MinTokens",
    "StopStrings",
    "check_strings",
    "token_texts",
]

HALF = "\ufffd"  # the text of a character whose bytes are not complete yet


class StopStrings:
    """Strings that end a completion where they appear."""

    def __init__(self, stop: str | Sequence[str] | None) -> None:
        """Take one string, several, or none.

        Raises:
            ConfigurationError: Something else is among them, or an empty string.
        """
        self.strings = () if stop is None else check_texts("stop", stop)

    def token_ids(self, model: LanguageModel) -> set[int]:
        """Return the special tokens among the strings; such tokens have no text, and end a completion by themselves.

        Raises:
            ConfigurationError: A string contains a special token and more, and so could never appear.
        """
        for string in self.strings:
            inside = next((s for s in model.special_tokens if s in string and string not in model.special_tokens), None)
            if inside:
                raise ConfigurationError(
                    f"stop string {string!r} contains the special token {inside!r}, which has no text; "
                    f"give {inside!r} by itself"
                )
        return {model.special_tokens[string] for string in self.strings if string in model.special_tokens}

    def cut(self, text: str) -> str | None:
        """Return the text before the first stop string; None where there is no stop string."""
        at = min((text.find(string) for string in self.strings if string in text), default=-1)
        return None if at < 0 else text[:at]

    def settled(self, text: str) -> str:
        """Return the part of an unfinished text that every completion of it begins with.

        The rest is half a character, which the next token may complete, or a possible beginning of a stop string, which
        would be cut off.
        """
        text = text.rstrip(HALF)
        begun = (n for s in self.strings for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
        return text[: len(text) - max(begun, default=0)]


class _Strings(EqualByValue):
    def __init__(self, *strings: str) -> None:
        """Take ``strings``.

        Raises:
            ConfigurationError: There is none, or one is empty.
        """
        self.strings = check_strings(strings)


class BannedStrings(_Strings):
    """The completion contains none of these strings, in any case (Unicode case folding)."""

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        return _Banned(self.strings, model)


class ForcedStrings(_Strings):
    """The completion contains each of these strings, in any case (Unicode case folding)."""

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        wanted = [_fold(string) for string in self.strings]
        return _Ending(model, lambda text, ids: all(string in _fold(text) for string in wanted))


class MinTokens(EqualByValue):
    """The completion has at least ``count`` tokens, the end-of-sequence token not counted.

    Likelihood alone favours the empty text.
    """

    def __init__(self, count: int) -> None:
        """Demand ``count`` tokens.

        Raises:
            ConfigurationError: It is not a positive integer.
        """
        self.count = check_integer("count", count)

    @property
    def least_tokens(self) -> int:  # type: ignore[override]
        """See :class:`Constraint`."""
        return self.count

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        return _Ending(model, lambda text, ids: len(ids) >= self.count)


class _Ending(Rule):
    """A condition on finished texts; any token may follow before the end."""

    def __init__(self, model: LanguageModel, condition: Callable[[str, Sequence[int]], bool]) -> None:
        self._any, self._condition = np.ones(model.vocab_size, dtype=bool), condition

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        return self._any.copy()

    def accepts(self, text: str, token_ids: Sequence[int]) -> bool:
        return self._condition(text, token_ids)


class _Banned(Rule):
    def __init__(self, strings: Sequence[str], model: LanguageModel) -> None:
        self._model, self._finder = model, Finder(strings, model, _fold)

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        if not self.can_become(self._model.decode_continuation(list(token_ids))):
            return np.zeros(self._model.vocab_size, dtype=bool)
        return ~self._finder.completing(token_ids)

    def can_become(self, text: str) -> bool:
        return not self._finder.contains(text)

    def accepts(self, text: str, token_ids: Sequence[int]) -> bool:
        return self.can_become(text)


class Finder:
    """Finds the tokens that complete one of some strings at the end of a completion.

    A token is compared by its text. Only where that is a part of a character, the whole completion is decoded: its
    bytes may complete a character of a string.
    """

    def __init__(self, strings: Sequence[str], model: LanguageModel, fold: Callable[[str], str] = str) -> None:
        self._strings, self._model, self._fold = [fold(string) for string in strings], model, fold
        self._texts = token_texts(model)
        folded = [fold(text) for text in self._texts]
        order = sorted(range(len(folded)), key=folded.__getitem__)
        ranked = [folded[token] for token in order]

        def beginning_with(start: str) -> list[int]:
            return order[bisect_left(ranked, start) : bisect_left(ranked, start + chr(0x10FFFF))]

        # By a beginning of a string: the tokens that begin with its rest, and those inside it that go on with it.
        self._completing: dict[str, list[int]] = {}
        self._inside: dict[str, list[int]] = {}
        by_text: dict[str, list[int]] = {}
        for token, text in enumerate(folded):
            by_text.setdefault(text, []).append(token)
        for string in self._strings:
            for written in range(1, len(string)):
                before, rest = string[:written], string[written:]
                self._completing.setdefault(before, []).extend(beginning_with(rest))
                parts = (by_text.get(rest[:end], []) for end in range(1, len(rest)))
                self._inside.setdefault(before, []).extend(token for part in parts for token in part)
        begun = tuple(self._completing)
        self._alone = np.array([any(string in text for string in self._strings) for text in folded])
        self._begins = np.array([text.endswith(begun) for text in folded]) if begun else np.zeros_like(self._alone)
        self._halves = np.array([HALF in text for text in self._texts])
        self._is_ascii = all(string.isascii() for string in self._strings)

    def contains(self, text: str) -> bool:
        """Tell whether a text contains one of the strings."""
        folded = self._fold(text)
        return any(string in folded for string in self._strings)

    def completing(self, token_ids: Sequence[int]) -> BoolArray:
        """Return the tokens after which the completion contains one of the strings, bool [V]."""
        text = self._model.decode_continuation(list(token_ids))
        found = self._alone.copy()
        folded = self._fold(text)
        for before, tokens in self._completing.items():
            if folded.endswith(before):
                found[tokens] = True
        if text.endswith(HALF):
            for token in np.flatnonzero(self._halves).tolist():
                found[token] = self.contains(self._model.decode_continuation([*token_ids, token]))
        return found

    def extending(self, token_ids: Sequence[int]) -> list[tuple[int, str]]:
        """Return the tokens after which the completion contains a string or ends in a part of one, with its text."""
        text = self._model.decode_continuation(list(token_ids))
        found, folded = self._alone | self._begins, self._fold(text)
        for tables in (self._completing, self._inside):
            for before, tokens in tables.items():
                if folded.endswith(before):
                    found[tokens] = True
        is_half = text.endswith(HALF)
        if is_half or not self._is_ascii:
            found |= self._halves
        joins = bool(token_ids) and not is_half  # a first token's text, and the rest of a character, depend on context
        return [
            (token, text + self._texts[token] if joins else self._model.decode_continuation([*token_ids, token]))
            for token in np.flatnonzero(found).tolist()
        ]


def _fold(text: str) -> str:
    """Fold the case of each character by itself, so that a part of a text folds as it does within the text."""
    return text.casefold()


@functools.lru_cache(8)
def token_texts(model: LanguageModel) -> list[str]:
    """Return the text that each token adds to a continuation, [V]."""
    return [model.decode_continuation([token]) for token in range(model.vocab_size)]


def check_strings(given: Sequence[Any]) -> list[str]:
    """Return the non-empty strings that were given, as a list.

    Raises:
        ConfigurationError: There is none, or something else among them, or half of a character.
    """
    if not given or not all(isinstance(string, str) and string for string in given):
        raise ConfigurationError(f"non-empty strings are needed, each as an argument of its own; got {given!r}")
    for string in given:
        if (half := re.search("[\ud800-\udfff]", string)) is not None:
            raise ConfigurationError(
                f"{string!r:.200} has half of a character ({half[0]!r}, a lone surrogate), as no text has; replace it"
            )
    return list(given)
