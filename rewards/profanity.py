"""Whether a text is rude."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigurationError
from .base import OnError, Reward

__all__ = ["Profanity"]


class Profanity(Reward):
    """The probability that the completion is profane or offensive, 0 to 1; to be subtracted.

    alt-profanity-check: a linear support vector machine on bags of words, calibrated, trained on 200,000 labelled
    comments of Wikipedia and tweets. It knows words, not meanings: "damn good" is rude to it, a polite threat is not.
    For toxicity in a wider sense, give a model to :class:`~qstar_decoding.rewards.classifier.Classifier`. The potential
    is the probability so far.
    """

    name, lower, upper = "profanity", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, *, on_error: OnError = "raise", penalty: float | None = None) -> None:
        """Load the classifier; the arguments are those of `Reward`.

        Raises:
            ConfigurationError: The library alt-profanity-check is not installed.
        """
        super().__init__(on_error=on_error, penalty=penalty)
        _predict([""])

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Return the probability for each completion."""
        return _predict([text.encode("utf-8", "replace").decode() for text in completions])

    score_prefixes = score


def _predict(texts: list[str]) -> list[float]:
    try:
        import profanity_check
    except ImportError as error:
        raise ConfigurationError(
            "the reward 'profanity' needs alt-profanity-check, which is not installed: "
            "run pip install alt-profanity-check"
        ) from error
    return [float(p) for p in profanity_check.predict_prob(texts)]
