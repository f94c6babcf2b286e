"""Number puzzles: reach a target with some numbers, each used once (Countdown, Game of 24)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, cast, get_args

from ...checks import check_choice
from ...errors import ConfigurationError
from ...rewards.checking import plain
from ..prompts import Prompt
from .moves import MovesConstraint

__all__ = ["CountdownConstraint", "Format", "Numbers", "legal_steps", "write_step"]

Format = Literal["expression", "steps", "short steps"]
Numbers = tuple[int, ...]  # in ascending order

_MOST_NUMBERS = 5  # of an expression; with six, a mask can take minutes


class CountdownConstraint(MovesConstraint):
    """Legal moves of a number puzzle, from the column ``numbers``: each number is used exactly once.

    The target is not looked at. Every result on the way is a positive integer, as the game of Countdown has it.

    An expression, ``25-7*3``, is written in one order: what is added before what is subtracted, factors before
    divisors, composed operands before numbers, larger numbers before smaller ones. Parentheses stand only around a sum
    or difference that is a factor or a divisor. Every value that steps can reach has such an expression.

    Steps, ``7*3=21 (21 25), 25-21=4``, combine two numbers, the larger one first; the numbers that are left follow in
    parentheses, ascending. Short steps do not list these.
    """

    def __init__(self, format: Format = "expression", operators: str = "+-*/") -> None:
        """Allow one format, and some of the operators ``+-*/``.

        Raises:
            ConfigurationError: There is no such format, or an operator is unknown.
        """
        check_choice("format", format, get_args(Format))
        if not isinstance(cast("Any", operators), str) or not operators or not {*operators} <= {*"+-*/"}:
            raise ConfigurationError(f"operators are some of '+-*/', in one text, got {operators!r}")
        self.format, self.operators = format, operators

    def start(self, prompt: Prompt) -> Hashable:
        """See :class:`MovesConstraint`."""
        numbers = plain(prompt.columns.get("numbers"))
        if not isinstance(numbers, (list, tuple)) or not numbers or not all(type(n) is int and n > 0 for n in numbers):
            raise ConfigurationError(
                f"{self!r} reads the column 'numbers', a list of positive integers; got {numbers!r} for the prompt "
                f"{prompt.text[-60:]!r}"
            )
        left = tuple(sorted(numbers))
        if self.format == "expression" and len(left) > _MOST_NUMBERS:
            raise ConfigurationError(
                f"{self!r} takes at most {_MOST_NUMBERS} numbers, since it looks ahead to the end of every expression; "
                f"got {len(left)} for the prompt {prompt.text[-60:]!r}. The format 'steps' takes more"
            )
        return _Expression(left, operators=self.operators) if self.format == "expression" else left

    def moves(self, state: Hashable) -> Iterable[tuple[str, Hashable]]:
        """See :class:`MovesConstraint`."""
        if isinstance(state, _Expression):
            return state.moves()
        steps = legal_steps(cast("Numbers", state), self.operators)
        return ((write_step(step, after, self.format), after) for step, after in steps)

    def is_final(self, state: Hashable) -> bool:
        """See :class:`MovesConstraint`."""
        return state.is_final if isinstance(state, _Expression) else len(cast("Numbers", state)) == 1


def write_step(step: str, after: Numbers, format: Format) -> str:
    """Return the text of a step, with what separates it from the next one."""
    if len(after) == 1:
        return step
    return f"{step} ({' '.join(map(str, after))}), " if format == "steps" else f"{step}, "


def legal_steps(numbers: Numbers, operators: str = "+-*/") -> Iterator[tuple[str, Numbers]]:
    """Yield the steps that combine two numbers, ``"7*3=21"``, each with the numbers that are left, ascending.

    The larger number comes first. Results are positive integers, and nothing is divided by 1.
    """
    for small, large in sorted(set(itertools.combinations(numbers, 2))):
        rest = list(numbers)
        rest.remove(small)
        rest.remove(large)
        results = {"+": large + small, "*": large * small}
        if large > small:
            results["-"] = large - small
        if small > 1 and large % small == 0:
            results["/"] = large // small
        for operator, result in results.items():
            if operator in operators:
                yield f"{large}{operator}{small}={result}", tuple(sorted((*rest, result)))


class _Sum(NamedTuple):
    """A begun sum, and the product that is its last term.

    Attributes:
        total: The value of the terms before the last one.
        terms: Number of terms begun.
        negative: Whether the last term is subtracted; none is added after that.
        term_limit: The largest number that may be this term, which is then no product; 0 for no limit.
        product: The value of the last term so far.
        factors: Number of its factors and divisors begun.
        dividing: Whether it has a divisor; no factor comes after that.
        factor_limit: The largest number that may be this factor, which is then no parenthesis; 0 for no limit.
        number: The last operand; 0 for a parenthesis.
    """

    total: int = 0
    terms: int = 1
    negative: bool = False
    term_limit: int = 0
    product: int = 1
    factors: int = 1
    dividing: bool = False
    factor_limit: int = 0
    number: int = 0

    @property
    def value(self) -> int:
        """The value of the whole sum."""
        return self.total - self.product if self.negative else self.total + self.product

    def with_operand(self, value: int, number: int = 0) -> _Sum | None:
        """Return the sum with one more operand; None for a divisor that is 1 or leaves a remainder."""
        if self.dividing and (value == 1 or self.product % value):
            return None
        product = self.product // value if self.dividing else self.product * value
        return self._replace(product=product, number=number)


class _Expression(NamedTuple):
    """A begun expression in normal form.

    In a sum, what is added comes before what is subtracted; in a product, factors come before divisors. Within each of
    these, composed operands come first, then numbers in descending order. So expressions that differ in the order
    of operands alone are written once. Every result on the way is a positive integer.

    Attributes:
        left: The numbers still to be used, ascending.
        sums: The sums that are begun, each within a parenthesis of the one before it.
        after_operand: Whether an operator may follow, else an operand.
        operators: Those that are allowed.
    """

    left: Numbers
    sums: tuple[_Sum, ...] = (_Sum(),)
    after_operand: bool = False
    operators: str = "+-*/"

    @property
    def is_final(self) -> bool:
        done = self.after_operand and not self.left and len(self.sums) == 1 and not self._must_multiply
        return done and self.sums[0].value > 0

    @property
    def _must_multiply(self) -> bool:
        """Whether a parenthesis was closed that neither multiplies nor divides anything yet."""
        return self.after_operand and not self.sums[-1].number and self.sums[-1].factors == 1

    def moves(self) -> Iterator[tuple[str, Hashable]]:
        return ((text, after) for text, after in self.all_moves() if _can_finish(after))

    def all_moves(self) -> Iterator[tuple[str, _Expression]]:
        """Yield the moves, those included after which the expression cannot be finished."""
        return self._after_operand() if self.after_operand else self._operands()

    def _operands(self) -> Iterator[tuple[str, _Expression]]:
        *outer, here = self.sums
        limit = here.factor_limit if here.factors > 1 else here.term_limit
        for number in sorted(set(self.left)):
            if (not limit or number <= limit) and (after := here.with_operand(number, number)):
                at = self.left.index(number)
                left = self.left[:at] + self.left[at + 1 :]
                yield str(number), self._replace(left=left, sums=(*outer, after), after_operand=True)
        if not limit and len(self.left) > len(self.sums):
            yield "(", self._replace(sums=(*self.sums, _Sum()))

    def _after_operand(self) -> Iterator[tuple[str, _Expression]]:
        *outer, here = self.sums
        for operator, after in self._operations(here):
            if operator in self.operators:
                yield operator, self._replace(sums=(*outer, after), after_operand=False)
        if outer and here.terms > 1 and here.value > 0 and not self._must_multiply:
            closed = outer[-1].with_operand(here.value)
            if closed:
                yield ")", self._replace(sums=(*outer[:-1], closed))

    def _operations(self, here: _Sum) -> Iterator[tuple[str, _Sum]]:
        alone = here.number if here.factors == 1 else 0  # the term, where it is a number
        if not self._must_multiply and here.value > 0:
            begun = _Sum(here.value, here.terms + 1)
            if not here.negative:
                yield "+", begun._replace(term_limit=alone)
            yield "-", begun._replace(negative=True, term_limit=alone if here.negative else 0)
        if not here.term_limit:
            more = here._replace(factors=here.factors + 1)
            if not here.dividing:
                yield "*", more._replace(factor_limit=here.number)
            yield "/", more._replace(dividing=True, factor_limit=here.number if here.dividing else 0)


@functools.lru_cache(1 << 18)
def _can_finish(state: _Expression) -> bool:
    return state.is_final or any(_can_finish(after) for _, after in state.all_moves())
