"""Problems of number puzzles with their solutions: Countdown and the Game of 24."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..envs.constraints.countdown import Format, Numbers, legal_steps, write_step
from ..errors import ConfigurationError

__all__ = ["draw_problems", "is_solvable", "solutions", "write_prompts"]

Problem = tuple[Numbers, int]  # numbers in the order of the prompt, and the target


@functools.lru_cache(1 << 18)
def is_solvable(numbers: Numbers, target: int, operators: str = "+-*/") -> bool:
    """Tell whether the numbers, ascending, reach the target. By brute force, for up to five numbers."""
    if len(numbers) == 1:
        return numbers[0] == target
    return any(is_solvable(after, target, operators) for _, after in legal_steps(numbers, operators))


def solutions(numbers: Numbers, target: int, format: Format, operators: str = "+-*/") -> list[str]:
    """Return the right answers that :class:`~qstar_decoding.envs.constraints.CountdownConstraint` allows.

    Args:
        numbers: Ascending.
        target: The target.
        format: The format.
        operators: Those that are allowed.
    """
    ways = _ways(numbers, target, operators)
    if format != "expression":
        return ["".join(write_step(step, after, format) for step, after in way) for way in ways]
    terms = [_Term("0", number) for number in numbers]
    return sorted({text for way in ways for text in _expressions(terms, [step for step, _ in way])})


def draw_problems(
    *, numbers: int, low: int, high: int, target: int, count: int, operators: str, rng: np.random.Generator
) -> list[Problem]:
    """Return different problems of ``numbers`` numbers from ``low`` to ``high`` with targets from 1 to ``target``.

    Each target is the result of random legal steps, so every problem can be solved. Two problems differ in the target
    or in more than the order of the numbers.

    Raises:
        ConfigurationError: There are too few.
    """
    found: dict[Problem, Problem] = {}
    most = math.comb(high - low + numbers, numbers) * target
    for _ in range(100 * count if most >= count else 100):
        drawn = tuple(rng.integers(low, high + 1, numbers).tolist())
        left = ordered = tuple(sorted(drawn))
        while len(left) > 1 and (steps := list(legal_steps(left, operators))):
            left = steps[rng.integers(len(steps))][1]
        if len(left) == 1 and left[0] <= target:
            found.setdefault((ordered, left[0]), (drawn, left[0]))
        if len(found) == count:
            return list(found.values())
    raise ConfigurationError(
        f"{numbers} numbers from {low} to {high} with targets up to {target} gave {len(found)} different problems, not "
        f"{count}; widen the ranges or ask for fewer"
    )


def write_prompts(problems: Sequence[Problem], solved: Sequence[Problem], format: Format, operators: str) -> list[Any]:
    """Return the problems as prompts after some solved ones, with the columns ``numbers`` and ``target``."""
    given = ""
    for i, (numbers, target) in enumerate(solved):
        right = solutions(tuple(sorted(numbers)), target, format, operators)
        given += f"{_ask(numbers, target)}{right[i % len(right)]}\n"
    return [
        {"prompt": given + _ask(numbers, target), "numbers": list(numbers), "target": target}
        for numbers, target in problems
    ]


def _ask(numbers: Numbers, target: int) -> str:
    return f"Numbers: {' '.join(map(str, numbers))}. Target: {target}. Solution: "


def _ways(numbers: Numbers, target: int, operators: str) -> Iterator[list[tuple[str, Numbers]]]:
    if len(numbers) == 1 and numbers[0] == target:
        yield []
    for step, after in legal_steps(numbers, operators):
        if is_solvable(after, target, operators):
            yield from ([(step, after), *rest] for rest in _ways(after, target, operators))


# -- steps as one expression ------------------------------------------------------------------------------------------


class _Term(NamedTuple):
    """A number, a sum or a product; ``plus`` are terms or factors, ``minus`` what is subtracted or divided by."""

    kind: str  # "0", "+" or "*"
    value: int
    plus: tuple[_Term, ...] = ()
    minus: tuple[_Term, ...] = ()


def _expressions(terms: Sequence[_Term], steps: Sequence[str]) -> Iterator[str]:
    """Yield the expressions that compute what the steps do; the order of composed operands is free."""
    if not steps:
        yield from _written(terms[0])
        return
    calculation, result = steps[0].split("=")
    symbol = next(char for char in calculation if not char.isdigit())
    kind, (first, second) = "+" if symbol in "+-" else "*", map(int, calculation.split(symbol))
    for one, two in {(a, b) for a, b in itertools.permutations(terms, 2) if (a.value, b.value) == (first, second)}:
        rest = list(terms)
        rest.remove(one)
        rest.remove(two)
        (plus, minus), (more, less) = ((t.plus, t.minus) if t.kind == kind else ((t,), ()) for t in (one, two))
        if symbol in "-/":
            more, less = less, more
        term = _Term(kind, int(result), plus + more, minus + less)
        if kind == "+" or all(divisor.value > 1 for divisor in term.minus):  # else it is written as a factor elsewhere
            yield from _expressions([*rest, term], steps[1:])


def _written(term: _Term) -> Iterator[str]:
    if term.kind == "0":
        yield str(term.value)
        return
    joins = "+-" if term.kind == "+" else "*/"
    for plus, minus in itertools.product(_orders(term.plus), _orders(term.minus)):
        parts = [*((joins[0], t) for t in plus), *((joins[1], t) for t in minus)]
        for texts in itertools.product(*(list(_written(t)) for _, t in parts)):
            joined = "".join(
                symbol + (f"({text})" if t.kind == "+" else text)
                for (symbol, t), text in zip(parts, texts, strict=True)
            )
            yield joined[1:]


def _orders(terms: Sequence[_Term]) -> Iterator[list[_Term]]:
    """Yield the orders of composed terms, each followed by the numbers, descending."""
    numbers = sorted((t for t in terms if t.kind == "0"), key=lambda t: -t.value)
    for composed in itertools.permutations(t for t in terms if t.kind != "0"):
        yield [*composed, *numbers]
