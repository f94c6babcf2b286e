"""How a text holds its reader: easy to read, addressed to somebody, varied, with feeling."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigurationError
from .base import OnError, Reward, WeightedSum
from .creativity import Distinct
from .sentiment import Sentiment

__all__ = ["Address", "Intensity", "Readability", "engagement"]

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE = re.compile(r"[^.!?]+[.!?]*")
_YOU = frozenset({"you", "your", "yours", "yourself", "yourselves", "you're", "you'll", "you've", "you'd"})


class Readability(Reward):
    """Flesch's reading ease over 100, cut off at 0 and 1: 1 is very easy, 0.6 plain English, 0 very hard.

    Flesch 1948, "A new readability yardstick": 206.835 - 1.015 · words per sentence - 84.6 · syllables per word.
    Syllables are where pyphen's English dictionary would hyphenate, which misses some of a single letter. A text
    without words has 0. The potential is the ease so far.
    """

    name, lower, upper = "readability", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, *, on_error: OnError = "raise", penalty: float | None = None) -> None:
        """Load the dictionary; the arguments are those of `Reward`.

        Raises:
            ConfigurationError: The library pyphen is not installed.
        """
        super().__init__(on_error=on_error, penalty=penalty)
        _hyphenation()

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Return the ease of each completion."""
        return [_ease(completion) for completion in completions]

    score_prefixes = score


class Address(Reward):
    """Whether the reader is spoken to: half for a "you", half for a question; 0, 0.5 or 1."""

    name, lower, upper = "address", 0.0, 1.0
    reads_token_ids = False

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Return the score of each completion."""
        return [
            0.5 * any(word.lower().replace("’", "'") in _YOU for word in _WORD.findall(text)) + 0.5 * ("?" in text)
            for text in completions
        ]

    score_prefixes = score


class Intensity(Sentiment):
    """The strength of the sentiment, good or bad: the absolute value of VADER's compound, 0 to 1."""

    name, lower, upper = "intensity", 0.0, 1.0

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Return the strength of each completion."""
        return [abs(value or 0.0) for value in super().score(prompts, completions)]

    score_prefixes = score


def engagement() -> Reward:
    """Return the mean of readability, address, variety (distinct-1) and intensity, 0 to 1.

    A stipulation, not a finding: each part is something that guides to good writing recommend, all weigh the same, and
    each is shown beside the sum (``info["rewards"]``), so that one can see which of them a text was bought with.
    """
    return WeightedSum([(0.25, part) for part in (Readability(), Address(), Distinct(1), Intensity())])


def _ease(text: str) -> float:
    words = _WORD.findall(text)
    if not words:
        return 0.0
    sentences = max(sum(bool(_WORD.search(part)) for part in _SENTENCE.findall(text)), 1)
    syllables = sum(_syllables(word.lower()) for word in words)
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    return float(np.clip(ease / 100, 0.0, 1.0))


@functools.lru_cache(maxsize=1 << 16)
def _syllables(word: str) -> int:
    return len(_hyphenation().positions(word)) + 1


@functools.cache
def _hyphenation() -> Any:
    try:
        import pyphen
    except ImportError as error:
        raise ConfigurationError(
            "the reward 'readability' needs pyphen, which is not installed: run pip install pyphen"
        ) from error
    return pyphen.Pyphen(lang="en_US")
