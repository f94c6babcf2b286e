"""Rewards for right answers."""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Unpack

from ...errors import ConfigurationError
from ...processes import Limited, TimeLimitError
from ..base import Reward
from ..checking import shown
from ..types import Bounds, Column, Counts, RewardOptions, Scores, Texts, TokenIds
from .guidelines import MatchesRegex
from .helpers import column_of, library

__all__ = ["AnswerFormat", "ExactAnswer", "NumericAnswer", "ReasoningGym"]


class _Verified(Reward):
    """A reward in [0, 1] that sets each completion against a column of its prompt; None where the prompt has none."""

    lower, upper = 0.0, 1.0
    reads_token_ids = False
    column = "answer"
    example: str  # of a prompt with the column

    def __init__(self, **options: Unpack[RewardOptions]) -> None:
        """Compare answers; the arguments are those of `Reward`."""
        super().__init__(**options)

    @abstractmethod
    def verify(self, completion: str, wanted: Any) -> float:
        """Return how right a completion is, where its prompt's column says ``wanted``."""

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return how right each completion is, None where the prompt's column is None.

        Raises:
            ConfigurationError: No prompt has the column, or it holds what nothing can be compared with.
        """
        column = column_of(columns, self.column, self.name, self.example)
        return [
            None if wanted is None else self.verify(completion, wanted)
            for completion, wanted in zip(completions, column, strict=True)
        ]


class ExactAnswer(_Verified):
    """1 if the completion is the column ``answer``, surrounding white space aside, else 0.

    The score that verifiable rewards give (Lambert et al. 2024, "Tülu 3", section 6). There is no potential, but what
    has begun otherwise than the answer does can only be wrong: its bound is 0.
    """

    name, example = "exact_answer", "{'prompt': '2+2=', 'answer': '4'}"

    def verify(self, completion: str, wanted: Any) -> float:
        """Return 1 for the right answer, 0 for a wrong one."""
        return float(completion.strip() == str(wanted).strip())

    def bound_prefixes(
        self, prompts: Texts, completions: Texts, remaining: Counts, completion_ids: TokenIds = None, **columns: Column
    ) -> Bounds:
        """Return 1 where the answer begins so, or stands there with white space after it, else 0."""
        column = column_of(columns, self.column, self.name, self.example)
        return [
            float(wanted is None or str(wanted).strip().startswith(begun.lstrip()) or self.verify(begun, wanted))
            for begun, wanted in zip(completions, column, strict=True)
        ]


class NumericAnswer(_Verified):
    r"""1 if the completion's answer equals the column ``answer`` as mathematics, else 0.

    math-verify (Kydlíček 2025) finds the answer in the text and compares: "so it is \\(\\frac{1}{2}\\)" and 0.5 are
    equal. The last expression in the text counts as its answer. There is no potential.

    The comparison runs in another process, one for each thread that asks. A text whose mathematics takes more than 2 s,
    such as a tower of powers, has 0.
    """

    name, example = "numeric_answer", "{'prompt': 'A half of 3 is', 'answer': '1.5'}"

    def __init__(self, **options: Unpack[RewardOptions]) -> None:
        """Compare answers; the arguments are those of `Reward`.

        Raises:
            ConfigurationError: The library math-verify is not installed.
        """
        super().__init__(**options)
        _compare("1", "1")

    def verify(self, completion: str, wanted: Any) -> float:
        """Return 1 for the right answer, 0 for a wrong one.

        Raises:
            ConfigurationError: The answer is no mathematics, or takes too long itself.
        """
        _check_answer(str(wanted))
        try:
            return float(_compare(str(wanted), completion))
        except TimeLimitError:
            return 0.0


class AnswerFormat(MatchesRegex):
    """1 if the completion thinks and then answers, ``<think>…</think><answer>…</answer>``, else 0.

    The format reward of DeepSeek-R1 (DeepSeek-AI 2025, section 2.2.2); another format is another ``pattern``.
    """

    name = "answer_format"

    def __init__(
        self,
        pattern: str = r"(?s)<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>",
        **options: Unpack[RewardOptions],
    ) -> None:
        """Compile ``pattern``; see :class:`~qstar_decoding.rewards.library.guidelines.MatchesRegex`."""
        super().__init__(pattern, **options)


class ReasoningGym(_Verified):
    """The score, 0 to 1, that a data set of reasoning-gym gives the answer, by the column ``entry``.

    Stojanovski et al. 2025, "Reasoning Gym". An entry is an item of its data sets, with ``metadata.source_dataset``, so
    that prompts of many data sets can be mixed; for a data set object of your own there is
    :func:`~qstar_decoding.rewards.adapters.from_reasoning_gym`. There is no potential.

    The library's own data sets score in another process, one for each thread that asks. An answer that takes more than
    2 s has 0. Data sets that you registered yourself score in this process, without a limit.
    """

    name, column, example = "reasoning_gym", "entry", "{'prompt': entry['question'], 'entry': entry}"

    def __init__(self, **options: Unpack[RewardOptions]) -> None:
        """Score answers; the arguments are those of `Reward`.

        Raises:
            ConfigurationError: The library reasoning-gym is not installed.
        """
        super().__init__(**options)
        gym_module()

    def verify(self, completion: str, wanted: Any) -> float:
        """Return the data set's score of the answer.

        Raises:
            ConfigurationError: The entry is of no data set that there is.
        """
        return gym_score(_scorer(_source(wanted)), completion, wanted)


# ---------------------------------------------------------------------------------------------------------------------


def gym_module() -> Any:
    """Return the package reasoning_gym.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigurationError(
            "reasoning-gym is needed, which is not installed: run pip install reasoning-gym"
        ) from error
    return reasoning_gym


def _source(entry: Any) -> str:
    try:
        return str(entry["metadata"]["source_dataset"])
    except (TypeError, KeyError):
        raise ConfigurationError(
            "the column 'entry' holds what a data set of reasoning-gym yields, with metadata.source_dataset; "
            f"got {entry!r}"
        ) from None


@functools.lru_cache(256)
def _scorer(name: str) -> Callable[..., float]:
    try:
        scorer: Callable[..., float] = gym_module().get_score_answer_fn(name)
    except ValueError as error:
        raise ConfigurationError(f"reasoning-gym has no data set {name!r}: {error}") from error
    return scorer


def gym_score(scorer: Callable[..., float], completion: str, entry: Any) -> float:
    """Return a data set's score of an answer.

    A scorer of reasoning-gym itself works in another process, where an answer that takes more than 2 s has 0. Any
    other, such as one of a data set of your own, works in this process, without a limit.
    """
    owner = getattr(scorer, "__self__", scorer)
    if str(getattr(owner, "__module__", "")).partition(".")[0] != "reasoning_gym":
        return float(scorer(completion.strip(), entry))
    try:
        return float(_gym_score(scorer, completion.strip(), entry))
    except TimeLimitError:
        return 0.0


def _called(scorer: Callable[..., float], answer: str, entry: Any) -> float:
    return float(scorer(answer, entry))


@functools.lru_cache(1 << 14)
def _math(text: str) -> Any:
    """Return the mathematics that a text ends in; empty if there is none."""
    parse = library("math_verify", "math-verify", "numeric_answer").parse
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no time limit of its own
    # Its own time limits are signals, which end no C code and which only a main thread can have.
    return tuple(parse(text, parsing_timeout=None))


def _equal(answer: str, completion: str) -> bool:
    gold = _math(answer)
    if not gold:
        raise ConfigurationError(f"the column 'answer' holds {answer!r}, in which math-verify finds no mathematics")
    from math_verify import verify

    return bool(verify(list(gold), list(_math(completion)), timeout_seconds=None))


# Model text may hold any amount of work, such as 10^10^10: in a process that can be killed.
_SECONDS = 2.0
_compare = Limited(_equal, seconds=_SECONDS, prepare=(_equal, "1", "1"))
_gym_score = Limited(_called, seconds=_SECONDS, prepare=(gym_module,))


@functools.lru_cache(1 << 14)
def _check_answer(answer: str) -> None:
    """Check once that an answer can be compared at all, so that a text is to blame where a comparison takes too long.

    Raises:
        ConfigurationError: It is no mathematics, or takes too long.
    """
    try:
        _compare(answer, "1")
    except TimeLimitError:
        raise ConfigurationError(
            f"the column 'answer' holds {shown(answer)}, which math-verify does not evaluate within {_SECONDS:g} s; "
            "give its value"
        ) from None
