"""Hard constraints on what is written: masks over the vocabulary, so that nothing illegal is even a candidate.

A constraint is given to the environment (``gym.make("TokenDecoding-v0", constraint=…)``) or to the MDP: the k
candidates of a state are then the k likeliest *allowed* tokens, with the log-probabilities of the full softmax. Several
are given as a list, and all must hold.
"""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checks import check_integer
from ..errors import ConfigurationError
from ..models.base import LanguageModel

__all__ = ["BannedStrings", "Constraint", "ForcedStrings", "JSONConstraint", "MinTokens", "RegexConstraint", "Rules"]

BoolArray = npt.NDArray[np.bool_]
_REMEMBERED = 1 << 16  # prefixes


class Constraint(ABC):
    """What a completion must be like, for any language model."""

    @abstractmethod
    def bind(self, model: LanguageModel) -> Rule:
        """Return the rule for one language model's tokens.

        Raises:
            ConfigurationError: The constraint cannot be kept with these tokens.
        """


class Rule(ABC):
    """A constraint on the tokens of one language model."""

    @abstractmethod
    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        """Return which tokens may follow, bool [V]; what it says of end-of-sequence tokens does not count."""

    def may_end(self, token_ids: Sequence[int]) -> bool:
        """Tell whether the completion may end after these tokens."""
        del token_ids
        return True


class Rules:
    """All rules of one process together."""

    def __init__(self, constraints: Any, model: LanguageModel) -> None:
        """Bind a constraint, or a list of them, to a language model.

        Raises:
            ConfigurationError: There is something else among them, or one cannot be kept.
        """
        given = list(constraints) if isinstance(constraints, (list, tuple)) else [constraints]
        for constraint in given:
            if not isinstance(constraint, Constraint):
                raise ConfigurationError(
                    "constraint is a Constraint, such as RegexConstraint(r' [A-Z].*'), or a list of them; "
                    f"got {constraint!r}"
                )
        self._rules = [constraint.bind(model) for constraint in given]
        self._eos = np.array(sorted(model.eos_token_ids), dtype=np.int64)

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        """Return which tokens may follow, bool [V], end-of-sequence tokens included."""
        allowed: BoolArray = np.logical_and.reduce([rule.allowed(token_ids) for rule in self._rules])
        allowed[self._eos] = self.may_end(token_ids)
        return allowed

    def may_end(self, token_ids: Sequence[int]) -> bool:
        """Tell whether the completion may end after these tokens."""
        return all(rule.may_end(token_ids) for rule in self._rules)


class RegexConstraint(Constraint):
    r"""The whole completion matches a regular expression.

    Compiled to an automaton over the model's tokens by outlines-core (Willard & Louf 2023), so look-around and
    back-references are not available. Mind the space that most continuations begin with: ``r" ?(yes|no)\\."``. Tokens
    that are only a part of a character are never allowed.
    """

    def __init__(self, pattern: str) -> None:
        """Keep the pattern; it is compiled when the model is known.

        Raises:
            ConfigurationError: It is not a non-empty string.
        """
        [self.pattern] = _strings([pattern])

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        return _Automaton(self, model)

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"{type(self).__name__}({self.pattern!r})"


class JSONConstraint(RegexConstraint):
    """The whole completion is JSON that follows a schema; see :class:`RegexConstraint`, which it becomes."""

    def __init__(self, schema: Mapping[str, Any] | str) -> None:
        """Turn a JSON schema, as a dict or as text, into a regular expression.

        Raises:
            ConfigurationError: outlines-core is not installed, or cannot make anything of the schema.
        """
        text = schema if isinstance(schema, str) else json.dumps(schema)
        try:
            pattern = _outlines().json_schema.build_regex_from_schema(text)
        except ConfigurationError:
            raise
        except Exception as error:  # whatever the library raises, it is the schema's fault
            raise ConfigurationError(
                f"no regular expression can be made of the JSON schema {text[:200]}: {error}"
            ) from error
        super().__init__(pattern)


class BannedStrings(Constraint):
    """The completion never contains any of these strings, whatever their case."""

    def __init__(self, *strings: str) -> None:
        """Ban ``strings``.

        Raises:
            ConfigurationError: There is none, or one is empty.
        """
        self.strings = [string.lower() for string in _strings(strings)]

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        return _Banned(self.strings, model)


class ForcedStrings(Constraint):
    """The completion contains each of these strings, whatever their case, before it may end."""

    def __init__(self, *strings: str) -> None:
        """Demand ``strings``.

        Raises:
            ConfigurationError: There is none, or one is empty.
        """
        self.strings = [string.lower() for string in _strings(strings)]

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        return _Ending(model, lambda ids: all(s in model.decode(ids).lower() for s in self.strings))


class MinTokens(Constraint):
    """The completion has at least so many tokens before it may end. Likelihood alone favours the empty text."""

    def __init__(self, count: int) -> None:
        """Demand ``count`` tokens.

        Raises:
            ConfigurationError: It is not a positive integer.
        """
        self.count = check_integer("count", count)

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        return _Ending(model, lambda ids: len(ids) >= self.count)


class _Ending(Rule):
    """Any token may follow; only the end is subject to a condition."""

    def __init__(self, model: LanguageModel, condition: Callable[[Sequence[int]], bool]) -> None:
        self._any, self._condition = np.ones(model.vocab_size, dtype=bool), condition

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        return self._any.copy()

    def may_end(self, token_ids: Sequence[int]) -> bool:
        return self._condition(token_ids)


class _Banned(Rule):
    def __init__(self, strings: Sequence[str], model: LanguageModel) -> None:
        self._model = model
        self._any = np.ones(model.vocab_size, dtype=bool)
        texts = [text.lower() for text in token_texts(model)]
        # What completes a string: the tokens that begin with its rest, by how much of it has been written.
        self._completes: dict[str, BoolArray] = {}
        for string in strings:
            self._any &= np.array([string not in text for text in texts])
            for written in range(1, len(string)):
                ends = np.array([text.startswith(string[written:]) for text in texts])
                before = string[:written]
                self._completes[before] = self._completes.get(before, np.zeros_like(ends)) | ends
                # A token that is all inside the string completes nothing by itself; the next one will be refused.

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        allowed, text = self._any.copy(), self._model.decode(token_ids).lower()
        for before, completes in self._completes.items():
            if text.endswith(before):
                allowed &= ~completes
        return allowed


class _Automaton(Rule):
    """A regular expression over the tokens of one model."""

    def __init__(self, constraint: RegexConstraint, model: LanguageModel) -> None:
        outlines, self._size = _outlines(), model.vocab_size
        by_text: dict[str, list[int]] = {}
        for token, text in enumerate(token_texts(model)):
            if text and token not in model.eos_token_ids and "\ufffd" not in text:
                by_text.setdefault(text, []).append(token)
        # The library wants one end of sequence; where the model has none, a number that is no token serves.
        eos = min(model.eos_token_ids, default=model.vocab_size)
        try:
            self._index = outlines.Index(constraint.pattern, outlines.Vocabulary(eos, by_text))
        except Exception as error:  # whatever the library raises, it is the pattern's fault
            raise ConfigurationError(
                f"{constraint!r} cannot be followed with the tokens of {model.name!r}: {error}"
            ) from error
        self._state = functools.lru_cache(_REMEMBERED)(self._state_after)

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        allowed, state = np.zeros(self._size, dtype=bool), self._state(tuple(token_ids))
        if state is not None:
            tokens = np.array(self._index.get_allowed_tokens(state) or [], dtype=np.int64)
            allowed[tokens[tokens < self._size]] = True
        return allowed

    def may_end(self, token_ids: Sequence[int]) -> bool:
        state = self._state(tuple(token_ids))
        return state is not None and bool(self._index.is_final_state(state))

    def _state_after(self, token_ids: tuple[int, ...]) -> int | None:
        """Return where the automaton stands, None where it has refused a token."""
        state = self._index.get_initial_state()
        if token_ids:
            before = self._state(token_ids[:-1])
            state = None if before is None else self._index.get_next_state(before, token_ids[-1])
        return None if state is None else int(state)


@functools.lru_cache(8)
def token_texts(model: LanguageModel) -> list[str]:
    """Return what each token adds to a text, [V]; a leading space is one that a lone ``decode`` might drop."""
    lead = next((t for t in range(model.vocab_size) if model.decode([t]).isalnum()), None)
    if lead is None:
        return [model.decode([token]) for token in range(model.vocab_size)]
    start = len(model.decode([lead]))
    return [model.decode([lead, token])[start:] for token in range(model.vocab_size)]


def _strings(given: Sequence[Any]) -> list[str]:
    if not given or not all(isinstance(string, str) and string for string in given):
        raise ConfigurationError(f"non-empty strings are needed, each as an argument of its own; got {given!r}")
    return list(given)


def _outlines() -> Any:
    try:
        import outlines_core
        import outlines_core.json_schema
    except ImportError as error:
        raise ConfigurationError(
            "regular expressions and JSON schemas need outlines-core, which is not installed: pip install outlines-core"
        ) from error
    return outlines_core
