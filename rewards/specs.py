"""The little language in which a weighted sum of rewards is written: ``"0.6 * sentiment + 0.3 * relevance - length"``.

A spec is a Python expression of names, numbers, ``+``, ``-``, ``*`` and parentheses. It is parsed, never evaluated.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection

from ..errors import ConfigurationError, UnknownNameError

__all__ = ["parse_spec"]

Terms = list[tuple[float, str]]


def parse_spec(spec: str, known: Collection[str]) -> Terms:
    """Parse the spec of a weighted sum.

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

    def parse(self) -> Terms:
        try:
            tree = ast.parse(self.spec, mode="eval")
        except (SyntaxError, ValueError) as error:  # a null character is a ValueError to Python 3.11.3
            offset = getattr(error, "offset", 0) or len(self.spec) + 1  # 0 means the end, where something is missing
            raise self.error("this is no expression", offset - 1) from None
        return self.terms(tree.body)

    def terms(self, node: ast.expr) -> Terms:
        """Read an expression that stands for rewards."""
        match node:
            case ast.Name(id=name):
                if name not in self.known:
                    where = f"It stands at column {self.column(node) + 1} of {self.spec!r}."
                    raise UnknownNameError("reward", name, self.known, hint=where)
                return [(1.0, name)]
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.terms(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return _scaled(-1.0, self.terms(operand))
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.terms(left) + self.terms(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return self.terms(left) + _scaled(-1.0, self.terms(right))
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                for factor, other in ((left, right), (right, left)):
                    weight = self.number(factor)
                    if weight is not None:
                        return _scaled(weight, self.terms(other))
                raise self.error("one of the two factors must be a number", self.column(node))
        if self.number(node) is not None:
            raise self.error("a number alone is no reward", self.column(node))
        raise self.error("only reward names, numbers, +, -, * and parentheses may stand here", self.column(node))

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
        return ConfigurationError(
            f"cannot read the reward spec at column {column + 1}: {reason}.\n"
            f"    {self.spec}\n"
            f"    {' ' * column}^\n"
            "Write a weighted sum of registered rewards, such as '0.7 * sentiment - 0.3 * other'."
        )


def _scaled(weight: float, terms: Terms) -> Terms:
    return [(weight * inner, name) for inner, name in terms]
