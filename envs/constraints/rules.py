"""All constraints of one process together: the tokens that may follow, and the texts that may be returned."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import ConfigurationError, QStarError
from ...models.base import LanguageModel
from ..prompts import Prompt
from .base import BoolArray, Constraint, Rule
from .strings import Finder, StopStrings

__all__ = ["Rules"]


class Rules:
    """All constraints of one process, bound to its language model and its stop strings.

    Attributes:
        constraints: The constraints.
        of_prompt: Whether any of them differs from prompt to prompt.
    """

    def __init__(self, constraints: Any, model: LanguageModel, stop: StopStrings) -> None:
        """Bind a constraint, or a list of them; :meth:`bound_to` binds those that differ from prompt to prompt.

        Raises:
            ConfigurationError: Something else is among them, or the model's tokens cannot satisfy one.
        """
        given = list(constraints) if isinstance(constraints, (list, tuple)) else [constraints]
        for constraint in given:
            if not isinstance(constraint, Constraint):
                raise ConfigurationError(
                    "constraint is a Constraint, such as RegexConstraint(r' [A-Z].*'), or a list of them; "
                    f"got {constraint!r}"
                )
        self.constraints: list[Constraint] = given
        self._fixed: dict[int, Rule] = {}
        for index, constraint in enumerate(given):
            if len(inspect.signature(constraint.bind).parameters) < 2:
                self._fixed[index] = constraint.bind(model)
        self.of_prompt = len(self._fixed) < len(given)
        self._rules = list(self._fixed.values())
        self._model, self._stop = model, stop
        ends = {*model.eos_token_ids, *stop.token_ids(model)}
        self._ends = np.array([token for token in ends if 0 <= token < model.vocab_size], dtype=np.int64)
        self._stops = Finder(stop.strings, model) if stop.strings else None

    def bound_to(self, prompt: Prompt) -> Rules:
        """Return the rules of one prompt; all that does not depend on the prompt is shared.

        Raises:
            ConfigurationError: A constraint cannot be bound to this prompt.
        """
        bound = copy.copy(self)
        bound._rules = [
            self._fixed[index] if index in self._fixed else self._bind(constraint, prompt)
            for index, constraint in enumerate(self.constraints)
        ]
        return bound

    def _bind(self, constraint: Any, prompt: Prompt) -> Rule:
        try:
            rule = constraint.bind(self._model, prompt)
        except QStarError:
            raise  # says what is wrong by itself
        except Exception as error:
            raise ConfigurationError(
                f"{constraint!r} raised {type(error).__name__} for the prompt {prompt.text[:60]!r}: {error}"
            ) from error
        if not isinstance(rule, Rule):
            raise ConfigurationError(f"{constraint!r}.bind returned {rule!r}, which is no Rule")
        return rule

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        """Return which tokens may follow, bool [V], end-of-sequence tokens included."""
        by_rule = np.stack([rule.allowed(token_ids) for rule in self._rules])
        allowed: BoolArray = np.logical_and.reduce(by_rule)
        for token, text in self._stops.extending(token_ids) if self._stops else ():
            if (cut := self._stop.cut(text)) is not None:
                allowed[token] = self.accepts(cut, [*token_ids, token])
            elif not allowed[token]:  # what looks like the beginning of a stop string may be cut off
                settled, alone = self._stop.settled(text), by_rule[:, token].tolist()
                allowed[token] = all(
                    ok or rule.can_become(settled) for ok, rule in zip(alone, self._rules, strict=True)
                )
        allowed[self._ends] = self.accepts(self._model.decode_continuation(list(token_ids)), token_ids)
        return allowed

    def accepts(self, text: str, token_ids: Sequence[int]) -> bool:
        """Tell whether ``text``, a completion of these tokens up to its stop string, may be returned."""
        return all(rule.accepts(text, token_ids) for rule in self._rules)
