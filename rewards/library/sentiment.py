"""Sentiment of a text."""

from __future__ import annotations

import functools
import math
from typing import Any, Unpack

from ..base import Reward
from ..types import Column, RewardOptions, Scores, Texts, TokenIds
from .helpers import library

__all__ = ["Afinn", "Sentiment"]


class Sentiment(Reward):
    """VADER's compound polarity of the completion, from -1 (most negative) to 1 (most positive).

    Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.
    A lexicon gives every word a valence; rules for negation, intensifiers, capitals and punctuation adjust it; the
    sum x becomes x / √(x² + 15), rounded to four decimals. A text without sentiment, such as an empty one, has 0.

    The prompt does not count, so that a glowing prompt leaves something to be gained. The potential is the polarity
    of the unfinished completion.

    A search raises it by repetition ("I love it. I love it."): the task ``sentiment`` is kept as an example of that.
    Combine it with rewards that pull the other way, as the task ``review`` does.

    Scoring takes some 50 µs a text; the first `Sentiment` of a process loads the lexicon, some 60 ms.
    """

    name, lower, upper = "sentiment", -1.0, 1.0
    reads_token_ids = False

    def __init__(self, **options: Unpack[RewardOptions]) -> None:
        """Load the lexicon unless this process has it already.

        Args:
            **options: Those of every reward; see `RewardOptions`.

        Raises:
            ConfigurationError: The library vaderSentiment is not installed.
        """
        super().__init__(**options)
        _analyzer()

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the polarity of each completion."""
        return [_analyzer().polarity_scores(text)["compound"] for text in completions]

    score_prefixes = score


class Afinn(Reward):
    """AFINN's valence of the completion, from -1 to 1: a second opinion on sentiment, to check the first one with.

    Nielsen, "A new ANEW: evaluation of a word list for sentiment analysis in microblogs", 2011. The words' valences,
    -5 to 5, rated by another person for another list, are summed to x without any rules, and x becomes x / √(x² + 15).
    """

    name, lower, upper = "afinn", -1.0, 1.0
    reads_token_ids = False

    def __init__(self, **options: Unpack[RewardOptions]) -> None:
        """Load the word list; the arguments are those of `Reward`.

        Raises:
            ConfigurationError: The library afinn is not installed.
        """
        super().__init__(**options)
        _afinn()

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the valence of each completion."""
        sums = [_afinn().score(text) for text in completions]
        return [x / math.sqrt(x * x + 15) for x in sums]

    score_prefixes = score


@functools.cache
def _afinn() -> Any:
    return library("afinn", "afinn", "afinn").Afinn()


@functools.cache
def _analyzer() -> Any:
    """Return the process's one analyzer; it is not kept in the reward, so that this pickles without the lexicon."""
    return library("vaderSentiment.vaderSentiment", "vaderSentiment", "sentiment").SentimentIntensityAnalyzer()
