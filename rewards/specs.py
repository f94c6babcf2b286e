"""Parser of reward specs: ``"0.6 * sentiment + 0.3 * min(keywords, length) - pangram"``.

A spec is a Python expression of names, numbers, ``+``, ``-``, ``*``, parentheses, and the functions ``min``, ``clip``
and ``normalise``. Rewards that take arguments are written as calls: ``"sentiment + forbidden_words('very')"``. A spec
is parsed, never evaluated.
"""

from __future__ import annotations

import ast
import contextlib
import sys
import warnings
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from ..errors import ConfigurationError, UnknownNameError
from .checking import shown

__all__ = ["Call", "Made", "Terms", "parse_spec"]


class Call(NamedTuple):
    """A function of rewards in a spec.

    Attributes:
        function: ``"product"``, ``"min"``, ``"clip"`` or ``"normalise"``.
        rewards: What it is a function of.
        numbers: Its further arguments.
    """

    function: str
    rewards: tuple[Terms, ...]
    numbers: tuple[float, ...] = ()


class Made(NamedTuple):
    """A reward made with arguments in a spec.

    Attributes:
        name: Of the reward.
        arguments: Strings, numbers, booleans, None, and lists and dicts of these.
        options: The same, by name.
    """

    name: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()


Terms = list[tuple[float, str | Call | Made]]

_DEEPEST = 30
_SHOWN = 100  # characters before and after the place of an error

# How many rewards and how many numbers each function takes.
_FUNCTIONS = {"min": (range(2, 100), (0,)), "clip": (range(1, 2), (2,)), "normalise": (range(1, 2), (0, 2))}


def parse_spec(spec: str, known: Collection[str]) -> Terms:
    """Parse the spec of a weighted sum of rewards and functions of rewards.

    >>> parse_spec("0.5 * (sentiment - 2 * length)", known=["sentiment", "length"])
    [(0.5, 'sentiment'), (-1.0, 'length')]

    Args:
        spec: The spec; line breaks count as spaces.
        known: The names that may occur.

    Returns:
        The weights and names, in the order of the spec; at least one.

    Raises:
        ConfigurationError: The spec is not a weighted sum of names; the message points at the place.
        UnknownNameError: A name is not one of `known`; the message says where it stands.
    """
    return _Parser(" ".join(spec.split()), known).parse()


class _Parser:
    """Reads one spec, in one line, by walking the syntax tree that Python's own parser makes of it."""

    def __init__(self, spec: str, known: Collection[str]) -> None:
        self.spec = spec
        self.known = known
        self.depth = 0

    def parse(self) -> Terms:
        try:
            with warnings.catch_warnings():  # what Python finds odd, such as "1if", is refused below
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(self.spec, mode="eval")
        except (RecursionError, MemoryError):
            raise self.error("this is too long or too deeply nested", 0) from None
        except (SyntaxError, ValueError) as error:  # a null character is a ValueError to Python 3.11.3
            offset = getattr(error, "offset", 0) or len(self.spec) + 1  # 0 means the end, where something is missing
            raise self.error("this is no expression", offset - 1) from None
        try:
            return self.terms(tree.body)
        except RecursionError:
            raise self.error("this is too deeply nested", 0) from None

    def terms(self, node: ast.expr) -> Terms:
        """Read an expression that stands for rewards."""
        further: list[Terms] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):  # in a loop, for it may be long
            further.append(_scaled(1.0 if isinstance(node.op, ast.Add) else -1.0, self.terms(node.right)))
            node = node.left
        return [term for terms in (self.summand(node), *reversed(further)) for term in terms]

    def summand(self, node: ast.expr) -> Terms:
        """Read an expression without + and - between rewards."""
        match node:
            case ast.Name(id=name):
                return [(1.0, self.known_name(name, node))]
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.terms(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return _scaled(-1.0, self.terms(operand))
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                for factor, other in ((left, right), (right, left)):
                    weight = self.number(factor)
                    if weight is not None:
                        return _scaled(weight, self.terms(other))
                with self.nested(node):
                    return [(1.0, Call("product", (self.terms(left), self.terms(right))))]
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                with self.nested(node):
                    return [(1.0, self.call(name, arguments, self.column(node)))]
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=options) if name not in _FUNCTIONS:
                self.known_name(name, node)
                positional = tuple(self.literal(argument) for argument in arguments)
                names = [option.arg for option in options]
                if None in names or len(set(names)) < len(names):
                    raise self.error("an argument is written name=value, each name once", self.column(node))
                named = tuple((str(option.arg), self.literal(option.value)) for option in options)
                return [(1.0, Made(name, positional, named))]
        if self.number(node) is not None:
            raise self.error("a number alone is no reward", self.column(node))
        raise self.error(
            "only reward names, numbers, +, -, *, parentheses, min(…), clip(…) and normalise(…) may stand here",
            self.column(node),
        )

    @contextlib.contextmanager
    def nested(self, node: ast.expr) -> Iterator[None]:
        """Count how deep products and functions stand in each other; each level costs frames when a text is scored."""
        self.depth += 1
        if self.depth > _DEEPEST:
            reason = f"products and functions stand more than {_DEEPEST} deep in each other"
            raise self.error(reason, self.column(node))
        yield
        self.depth -= 1

    def call(self, name: str, arguments: list[ast.expr], column: int) -> Call:
        """Read a function's arguments: rewards first, then numbers."""
        numbers = [self.number(argument) for argument in arguments]
        count = next((i for i, number in enumerate(numbers) if number is not None), len(numbers))
        rewards, further = arguments[:count], [number for number in numbers[count:] if number is not None]
        many, few = _FUNCTIONS[name]
        if count not in many or len(numbers) - count not in few or len(further) != len(numbers) - count:
            shapes = {
                "min": "min(a, b, …)",
                "clip": "clip(a, low, high)",
                "normalise": "normalise(a) or (a, low, high)",
            }
            raise self.error(f"{name} is written {shapes[name]}", column)
        return Call(name, tuple(self.terms(reward) for reward in rewards), tuple(further))

    def known_name(self, name: str, node: ast.expr) -> str:
        if name not in self.known:
            where = f"It stands at column {self.column(node) + 1} of {shown(self.spec)}."
            raise UnknownNameError("reward", name[:_SHOWN], self.known, hint=where)
        return name

    def literal(self, node: ast.expr) -> Any:
        """Read a reward's argument."""
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):  # a TypeError where a list is a key
            reason = "a reward's arguments are strings, numbers, and lists and dicts of these"
            raise self.error(reason, self.column(node)) from None

    def number(self, node: ast.expr) -> float | None:
        """Read a finite number, or return None if the expression is something else."""
        match node:
            case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
                number = self.number(operand)
                return -number if number is not None and isinstance(sign, ast.USub) else number
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                if value > sys.float_info.max:
                    raise self.error("this number is too large", self.column(node))
                return float(value)
        return None

    def column(self, node: ast.expr) -> int:
        """Return where an expression starts, in characters from 0; the syntax tree counts bytes."""
        return len(self.spec.encode()[: node.col_offset].decode())

    def error(self, reason: str, column: int) -> ConfigurationError:
        start = max(column - _SHOWN, 0)  # of the part that is shown
        before, after = "…" if start else "", "…" if len(self.spec) > column + _SHOWN else ""
        return ConfigurationError(
            f"cannot read the reward spec at column {column + 1}: {reason}.\n"
            f"    {before}{self.spec[start : column + _SHOWN]}{after}\n"
            f"    {' ' * (column - start + len(before))}^\n"
            "Write a weighted sum of registered rewards, such as '0.7 * sentiment - 0.3 * other'."
        )


def _scaled(weight: float, terms: Terms) -> Terms:
    return [(weight * inner, name) for inner, name in terms]
