"""Rewards for variety and novelty."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

from ...checks import check_integer
from ...errors import ConfigurationError
from ..base import Reward
from ..checking import shown
from ..types import Column, RewardOptions, Scores, Texts, TokenIds

__all__ = ["Distinct", "Novelty", "Repetition", "self_bleu"]

_WORD = re.compile(r"\w+")


class Distinct(Reward):
    """The share of different n-grams of words among all n-grams of the completion, 0 to 1: distinct-n.

    Li et al. 2016, "A diversity-promoting objective function", for one text. One too short for an n-gram has 0. The
    potential is the share so far.
    """

    name, lower, upper = "distinct", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, n: int = 2, **options: Unpack[RewardOptions]) -> None:
        """Count n-grams of ``n`` words; the other arguments are those of `Reward`.

        Raises:
            ConfigurationError: ``n`` is not a positive integer.
        """
        super().__init__(**options)
        self.n = check_integer("n", n)

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the share for each completion."""
        grams = [_grams(completion, self.n) for completion in completions]
        return [len(set(of)) / len(of) if of else 0.0 for of in grams]

    score_prefixes = score


class Repetition(Reward):
    """The share of the completion's n-grams of words that were there before, 0 to 1; to be subtracted.

    A text without repetition has 0, the empty text included; `Distinct` gives the empty text 0 as its worst value.
    """

    name, lower, upper = "repetition", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, n: int = 3, **options: Unpack[RewardOptions]) -> None:
        """Count n-grams of ``n`` words; the other arguments are those of `Reward`.

        Raises:
            ConfigurationError: ``n`` is not a positive integer.
        """
        super().__init__(**options)
        self.n = check_integer("n", n)

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the share for each completion."""
        grams = [_grams(completion, self.n) for completion in completions]
        return [1 - len(set(of)) / len(of) if of else 0.0 for of in grams]

    score_prefixes = score


class Novelty(Reward):
    """The share of the completion's n-grams of words that no reference text has, 0 to 1.

    McCoy et al. 2023, "How much do language models copy from their training data?", against given texts. One too
    short for an n-gram has 0.
    """

    name, lower, upper = "novelty", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, references: Iterable[str], n: int = 3, **options: Unpack[RewardOptions]) -> None:
        """Remember the n-grams of ``references``; the other arguments are those of `Reward`.

        Raises:
            ConfigurationError: ``n`` is not a positive integer, or the references are one string instead of many.
        """
        super().__init__(**options)
        self.n = check_integer("n", n)
        try:
            texts = [] if isinstance(references, str) else list(references)
        except TypeError:
            texts = []
        if not texts or not all(map(_is_text, texts)):
            raise ConfigurationError(
                f"references are several texts; for a single one give [text]; got {shown(references)}"
            )
        self._known = {gram for text in texts for gram in _grams(text, self.n)}

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the share for each completion."""
        grams = [_grams(completion, self.n) for completion in completions]
        return [sum(gram not in self._known for gram in of) / len(of) if of else 0.0 for of in grams]

    score_prefixes = score


def self_bleu(texts: Sequence[str], n: int = 3) -> float:
    """Return how alike several texts are, 0 to 1: the mean BLEU of each against the others (Zhu et al. 2018, Texygen).

    For what one plan found: ``self_bleu([c.text for c in plan.best(5)])``. Precisions of 1- to n-grams of words, their
    geometric mean without smoothing, and BLEU's brevity penalty. Fewer than two texts are not alike: 0.

    Args:
        texts: The texts.
        n: The longest n-grams.
    """
    check_integer("n", n)
    scores = [_bleu(text, [*texts[:i], *texts[i + 1 :]], n) for i, text in enumerate(texts)]
    return sum(scores) / len(scores) if len(texts) > 1 else 0.0


def _bleu(text: str, references: Sequence[str], n: int) -> float:
    length, precisions = len(_grams(text, 1)), []
    for order in range(1, n + 1):
        found = Counter(_grams(text, order))
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= Counter(_grams(reference, order))
        matched = sum((found & most).values())
        if not matched:
            return 0.0
        precisions.append(matched / sum(found.values()))
    nearest = min((len(_grams(reference, 1)) for reference in references), key=lambda other: abs(other - length))
    brevity = min(1.0, math.exp(1 - nearest / length))
    return brevity * math.prod(precisions) ** (1 / n)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return list(zip(*(words[i:] for i in range(n)), strict=False))
