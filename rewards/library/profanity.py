"""Rudeness of a text."""

from __future__ import annotations

from typing import Unpack

from ..base import Reward
from ..types import Column, RewardOptions, Scores, Texts, TokenIds
from .helpers import library, readable

__all__ = ["Profanity"]


class Profanity(Reward):
    """The probability that the completion is profane or offensive, 0 to 1; to be subtracted.

    alt-profanity-check: a linear support vector machine on bags of words, calibrated, trained on 200,000 labelled
    comments of Wikipedia and tweets. It knows words, not meanings: "damn good" is rude to it, a polite threat is not.
    For toxicity in a wider sense, give a model to ``classifier``. The potential is the probability so far.
    """

    name, lower, upper = "profanity", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, **options: Unpack[RewardOptions]) -> None:
        """Load the classifier; the arguments are those of `Reward`.

        Raises:
            ConfigurationError: The library alt-profanity-check is not installed.
        """
        super().__init__(**options)
        _predict([""])

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the probability for each completion."""
        return _predict([readable(text) for text in completions])

    score_prefixes = score


def _predict(texts: list[str]) -> list[float]:
    return [float(p) for p in library("profanity_check", "alt-profanity-check", "profanity").predict_prob(texts)]
