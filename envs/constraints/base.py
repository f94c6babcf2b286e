"""Base classes of constraints: a condition on completions, and its rule for the tokens of one model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...models.base import LanguageModel

__all__ = ["BoolArray", "Constraint", "EqualByValue", "Rule"]

BoolArray = npt.NDArray[np.bool_]


class Constraint(ABC):
    """A condition on completions, independent of the language model.

    Constraints are compared by ``==`` where a process is looked up by its settings.

    Attributes:
        least_tokens: Fewest tokens of a completion that satisfies it, the end-of-sequence token not counted; a horizon
            below it is refused. 0 where that is not known.
    """

    least_tokens: int = 0

    @abstractmethod
    def bind(self, model: LanguageModel) -> Rule:
        """Return the rule for one language model's tokens.

        A constraint that differs from prompt to prompt takes a second argument, ``bind(self, model, prompt=None)``. It
        is then called for every prompt, a :class:`~qstar_decoding.envs.Prompt`, whose ``columns`` it may read.

        Raises:
            ConfigurationError: These tokens cannot satisfy the constraint.
        """


class Rule(ABC):
    """A constraint bound to the tokens of one language model."""

    @abstractmethod
    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        """Return which tokens may follow ``token_ids``, bool [V]; the entries of end-of-sequence tokens are ignored."""

    @abstractmethod
    def accepts(self, text: str, token_ids: Sequence[int]) -> bool:
        """Tell whether ``text`` may be returned.

        Args:
            text: A finished completion, without its stop string.
            token_ids: All its tokens, without the end-of-sequence token.
        """

    def can_become(self, text: str) -> bool:
        """Tell whether a text that begins with ``text`` may be accepted; False where only :meth:`allowed` knows."""
        del text
        return False


class EqualByValue(Constraint):
    """A constraint that equals those of the same kind with the same values."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), repr(vars(self))))

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        values = [v for value in vars(self).values() for v in (value if isinstance(value, (tuple, list)) else [value])]
        return f"{type(self).__name__}({', '.join(map(repr, values))})"
