"""Rewards for right answers."""

from __future__ import annotations

import ast
import functools
import logging
import operator
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Unpack

from ...errors import ConfigurationError
from ...processes import Limited, TimeLimitError
from ..base import Reward
from ..checking import shown
from ..types import Bounds, Column, Counts, RewardOptions, Scores, Texts, TokenIds
from .guidelines import MatchesRegex
from .helpers import column_of, library, whole

__all__ = ["AnswerFormat", "Countdown", "ExactAnswer", "NumericAnswer", "ReasoningGym"]


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
            for begun, wanted in zip(map(whole, completions), column, strict=True)
        ]


class Countdown(Reward):
    """1 if the completion reaches the column ``target`` with the column ``numbers``, each used once, else 0.

    The game of Countdown, and with the target 24 the Game of 24 (Yao et al. 2023, "Tree of Thoughts"). An answer is an
    expression with + - * / and parentheses, ``25-3*7``, evaluated exactly. Or it is a list of steps, each of which
    combines two numbers that are left, ``3*7=21 (21 25), 25-21=4``; the numbers in parentheses may be left out. There
    is no potential. Where the last operator stands and one number is left, the result is settled: a wrong one has the
    bound 0.
    """

    lower, upper = 0.0, 1.0
    reads_token_ids = False
    name = "countdown"
    example = "{'prompt': 'Make 4 of 3 7 25: ', 'numbers': [3, 7, 25], 'target': 4}"

    def __init__(self, **options: Unpack[RewardOptions]) -> None:
        """Check answers; the arguments are those of `Reward`."""
        super().__init__(**options)

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return 1 for a right answer and 0 for a wrong one; None where a prompt lacks one of the columns.

        Raises:
            ConfigurationError: No prompt has the columns, or they hold no integers.
        """
        return [
            None if puzzle is None else float(_reached(text.strip(), *puzzle))
            for text, puzzle in zip(completions, self._puzzles(columns), strict=True)
        ]

    def bound_prefixes(
        self, prompts: Texts, completions: Texts, remaining: Counts, completion_ids: TokenIds = None, **columns: Column
    ) -> Bounds:
        """Return 0 where the result is settled and wrong, else 1."""
        return [
            1.0 if puzzle is None else _still_possible(begun.lstrip(), *puzzle)
            for begun, puzzle in zip(completions, self._puzzles(columns), strict=True)
        ]

    def _puzzles(self, columns: Mapping[str, Column]) -> list[tuple[list[int], int] | None]:
        numbers, target = (column_of(columns, name, self.name, self.example) for name in ("numbers", "target"))
        puzzles: list[tuple[list[int], int] | None] = []
        for given, wanted in zip(numbers, target, strict=True):
            if given is None or wanted is None:
                puzzles.append(None)
            elif (
                isinstance(given, (list, tuple))
                and all(type(n) is int for n in (*given, wanted))
                and min(given, default=0) >= 0
            ):
                puzzles.append((list(given), wanted))
            else:
                raise ConfigurationError(
                    f"the columns 'numbers' and 'target' hold a list of integers from 0 on and an integer, such as "
                    f"{self.example}; got {given!r} and {wanted!r}"
                )
        return puzzles


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

    def bound_prefixes(
        self, prompts: Texts, completions: Texts, remaining: Counts, completion_ids: TokenIds = None, **columns: Column
    ) -> Bounds:
        """Return 1 where the answer begins so, else its share of the shortest text that contains it; 1 in doubt."""
        column = column_of(columns, self.column, self.name, self.example)
        return [
            1.0 if wanted is None else _gym_bound(whole(begun).lstrip(), wanted)
            for begun, wanted in zip(completions, column, strict=True)
        ]


# ---------------------------------------------------------------------------------------------------------------------

_NUMBER = "(0|[1-9][0-9]{0,8})"  # in an expression too, no number begins with a zero
_NUMERIC = {"chain_sum", "products"}  # data sets of reasoning-gym that compare answers as `Decimal`
_STEP = re.compile(rf"{_NUMBER} ?([-+*/]) ?{_NUMBER} ?= ?(0|[1-9][0-9]{{0,17}})(?: \(([0-9 ]*)\))?")
_BEGUN_STEP = re.compile(rf"{_NUMBER} ?([-+*/])")
_SYMBOLS = re.compile(r"[0-9]+|[-+*/()]")
_OPERATORS: dict[type[ast.operator] | str, Callable[[Fraction, Fraction], Fraction]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv},
}


def _reached(text: str, numbers: list[int], target: int) -> bool:
    """Tell whether a finished answer is right."""
    if "=" in text:
        return _left_after(text.split(", "), numbers) == [target]
    return _used(text) == sorted(numbers) and _value(text) == target


def _still_possible(text: str, numbers: list[int], target: int) -> float:
    """Return 0 where a begun answer can only have one result, and that is wrong, or is not legal; else 1."""
    if "=" not in text:
        return _expression_possible(text, numbers, target)
    *steps, last = text.split(", ")
    left = _left_after(steps, numbers)
    if left is None:
        return 0.0
    begun = _BEGUN_STEP.match(last)
    if len(left) == 2 and begun and int(begun[1]) in left:
        first = int(begun[1])
        left.remove(first)
        return float(_combine(begun[2], Fraction(first), Fraction(left[0])) == target)
    return 1.0


def _expression_possible(text: str, numbers: list[int], target: int) -> float:
    used, left = _used(text), list(numbers)
    if used is None or not text or text[-1] not in "+-*/":
        return 1.0
    for number in used:
        if number not in left:
            return 0.0
        left.remove(number)
    if len(left) != 1:
        return 1.0
    closing = ")" * (text.count("(") - text.count(")"))
    return float(_value(f"{text}{left[0]}{closing}") == target)


def _used(text: str) -> list[int] | None:
    """Return the numbers in an expression, ascending; None where it holds anything but numbers and operators."""
    symbols = _SYMBOLS.findall(text)
    numbers = [symbol for symbol in symbols if symbol.isdigit()]
    if len("".join(symbols)) != len(text.replace(" ", "")) or not all(re.fullmatch(_NUMBER, n) for n in numbers):
        return None
    return sorted(map(int, numbers))


def _value(text: str) -> Fraction | None:
    """Return the value of an expression; None where it has none."""
    if len(text) > 400:  # deeper ones would exceed the parser's stack
        return None
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    raise ValueError("no number and no operation")


def _combine(symbol: str, a: Fraction, b: Fraction) -> Fraction | None:
    return None if symbol == "/" and not b else _OPERATORS[symbol](a, b)


def _left_after(steps: list[str], numbers: list[int]) -> list[int] | None:
    """Return the numbers that are left after some steps; None where a step is not legal."""
    left = list(numbers)
    for step in steps:
        found = _STEP.fullmatch(step.strip())
        if found is None:
            return None
        a, b, result = int(found[1]), int(found[3]), int(found[4])
        for number in (a, b):
            if number not in left:
                return None
            left.remove(number)
        left.append(result)
        if _combine(found[2], Fraction(a), Fraction(b)) != result:
            return None
        if found[5] is not None and sorted(found[5].split()) != sorted(map(str, left)):
            return None
    return left


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


def _gym_bound(begun: str, entry: Any) -> float:
    source, answer = _source(entry), entry.get("answer")
    if not isinstance(answer, str):
        return 1.0
    if source in _NUMERIC:
        begun, answer = begun.replace(",", ""), answer.replace(",", "")
        return 1.0 if _may_equal(begun, answer) else _largest_share(begun, answer)
    is_plain = getattr(_scorer(source), "__func__", None) is gym_module().dataset.ProceduralDataset.score_answer
    return _largest_share(begun, answer) if is_plain else 1.0


def _largest_share(begun: str, answer: str) -> float:
    """Return the answer's share of the shortest text that begins so and contains it."""
    if answer in begun:
        return min(len(answer) / max(len(begun.rstrip()), 1), 1.0)
    overlap = max(n for n in range(len(answer)) if begun.endswith(answer[:n]))
    return len(answer) / (len(begun) + len(answer) - overlap)


def _may_equal(begun: str, answer: str) -> bool:
    """Return whether a text that begins so can be the same `Decimal` as the answer; True in doubt."""
    number, text = (re.fullmatch(r"([+-]?)0*([0-9]*)", part) for part in (answer, begun))
    if not (number and text):
        return not number or re.fullmatch(r"[\d\s+\-._eE]*", begun) is not None
    significant = number[2].rstrip("0")
    same_sign = not begun or not significant or (text[1] == "-") == (number[1] == "-")
    return same_sign and (significant.startswith(text[2]) or text[2].rstrip("0") == significant)


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
