"""Hard constraints on completions, and the stop strings that end them.

A constraint is given to the environment (``gym.make("TokenDecoding-v0", constraint=…)``) or to the MDP. The k
candidates of a state are then the k likeliest *allowed* tokens, with the log-probabilities of the full softmax. All
constraints of a list must hold. Every constraint speaks of the returned text: the completion up to its stop string.

One file because every class here is an implementation of the same two methods.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checks import check_integer
from ..errors import ConfigurationError, QStarError
from ..models.base import LanguageModel
from .prompts import Prompt

__all__ = ["BannedStrings", "Constraint", "ForcedStrings", "JSONConstraint", "MinTokens", "RegexConstraint", "Rule"]
__all__ += ["Rules", "StopStrings"]

BoolArray = npt.NDArray[np.bool_]
_REMEMBERED = 1 << 16  # prefixes
_END = "\x03"  # follows every text that an automaton reads
_HALF = "\ufffd"  # the text of a character whose bytes are not complete yet


class Constraint(ABC):
    """A condition on completions, independent of the language model.

    Constraints are compared by ``==`` where a process is looked up by its settings.
    """

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


class _Equal(Constraint):
    """A constraint that equals those of the same kind with the same values."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), repr(vars(self))))

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        values = [v for value in vars(self).values() for v in (value if isinstance(value, (tuple, list)) else [value])]
        return f"{type(self).__name__}({', '.join(map(repr, values))})"


class StopStrings:
    """Strings that end a completion where they appear."""

    def __init__(self, stop: str | Sequence[str] | None) -> None:
        """Take one string, several, or none.

        Raises:
            ConfigurationError: Something else is among them, or an empty string.
        """
        given: Any = (stop,) if isinstance(stop, str) else () if stop is None else stop
        if not isinstance(given, Iterable) or not all(isinstance(string, str) and string for string in (*given,)):
            raise ConfigurationError(f"stop is a non-empty string or a list of them, got {stop!r}")
        self.strings = tuple(given)

    def token_ids(self, model: LanguageModel) -> set[int]:
        """Return the special tokens among the strings; such tokens have no text, and end a completion by themselves.

        Raises:
            ConfigurationError: A string contains a special token and more, and so could never appear.
        """
        for string in self.strings:
            inside = next((s for s in model.special_tokens if s in string and string not in model.special_tokens), None)
            if inside:
                raise ConfigurationError(
                    f"stop string {string!r} contains the special token {inside!r}, which has no text; "
                    f"give {inside!r} by itself"
                )
        return {model.special_tokens[string] for string in self.strings if string in model.special_tokens}

    def cut(self, text: str) -> str | None:
        """Return the text before the first stop string; None where there is no stop string."""
        at = min((text.find(string) for string in self.strings if string in text), default=-1)
        return None if at < 0 else text[:at]

    def settled(self, text: str) -> str:
        """Return the part of an unfinished text that every completion of it begins with.

        The rest is half a character, which the next token may complete, or a possible beginning of a stop string, which
        would be cut off.
        """
        text = text.rstrip(_HALF)
        begun = (n for s in self.strings for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
        return text[: len(text) - max(begun, default=0)]


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
        self._stops = _Finder(stop.strings, model) if stop.strings else None

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


class RegexConstraint(_Equal):
    r"""The whole completion matches a regular expression.

    The library outlines-core compiles it to an automaton over the model's tokens (Willard & Louf 2023). Look-around and
    back-references are not available. Most continuations begin with a space: ``r" ?(yes|no)\\."``. Tokens that are only
    a part of a character are never allowed.
    """

    def __init__(self, pattern: str) -> None:
        """Keep the pattern; :meth:`bind` compiles it.

        Raises:
            ConfigurationError: The pattern is not a non-empty string.
        """
        [self.pattern] = _strings([pattern])

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        return _Automaton(self, model)


class JSONConstraint(RegexConstraint):
    """The whole completion is JSON that follows a schema, which is translated into a :class:`RegexConstraint`."""

    def __init__(self, schema: Mapping[str, Any] | str) -> None:
        """Turn a JSON schema, as a dict or as text, into a regular expression.

        Raises:
            ConfigurationError: outlines-core is not installed, or cannot translate the schema.
        """
        text, outlines = schema if isinstance(schema, str) else json.dumps(schema), _outlines()
        try:
            pattern = outlines.json_schema.build_regex_from_schema(text)
        except Exception as error:  # any error of the library is about the schema
            raise ConfigurationError(
                f"no regular expression can be made of the JSON schema {text[:200]}: {error}"
            ) from error
        super().__init__(pattern)


class _Strings(_Equal):
    def __init__(self, *strings: str) -> None:
        """Take ``strings``.

        Raises:
            ConfigurationError: There is none, or one is empty.
        """
        self.strings = _strings(strings)


class BannedStrings(_Strings):
    """The completion contains none of these strings, in any case (Unicode case folding)."""

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        return _Banned(self.strings, model)


class ForcedStrings(_Strings):
    """The completion contains each of these strings, in any case (Unicode case folding)."""

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        wanted = [_fold(string) for string in self.strings]
        return _Ending(model, lambda text, ids: all(string in _fold(text) for string in wanted))


class MinTokens(_Equal):
    """The completion has at least ``count`` tokens, the end-of-sequence token not counted.

    Likelihood alone favours the empty text.
    """

    def __init__(self, count: int) -> None:
        """Demand ``count`` tokens.

        Raises:
            ConfigurationError: It is not a positive integer.
        """
        self.count = check_integer("count", count)

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        return _Ending(model, lambda text, ids: len(ids) >= self.count)


class _Ending(Rule):
    """A condition on finished texts; any token may follow before the end."""

    def __init__(self, model: LanguageModel, condition: Callable[[str, Sequence[int]], bool]) -> None:
        self._any, self._condition = np.ones(model.vocab_size, dtype=bool), condition

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        return self._any.copy()

    def accepts(self, text: str, token_ids: Sequence[int]) -> bool:
        return self._condition(text, token_ids)


class _Banned(Rule):
    def __init__(self, strings: Sequence[str], model: LanguageModel) -> None:
        self._model, self._finder = model, _Finder(strings, model, _fold)

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        if not self.can_become(self._model.decode_continuation(list(token_ids))):
            return np.zeros(self._model.vocab_size, dtype=bool)
        return ~self._finder.completing(token_ids)

    def can_become(self, text: str) -> bool:
        return not self._finder.contains(text)

    def accepts(self, text: str, token_ids: Sequence[int]) -> bool:
        return self.can_become(text)


class _Automaton(Rule):
    """A regular expression as two automata: over the tokens of one model, and over bytes to judge a text."""

    def __init__(self, constraint: RegexConstraint, model: LanguageModel) -> None:
        self._size = model.vocab_size
        by_text: dict[str, list[int]] = {}
        for token, text in enumerate(token_texts(model)):
            if text and token not in model.eos_token_ids and not {_HALF, _END} & {*text}:
                by_text.setdefault(text, []).append(token)
        try:
            self._index = _compile(constraint.pattern, by_text, self._size)
            self._bytes = _compile(constraint.pattern, {bytes([byte]): [byte] for byte in range(256)}, 256)
        except Exception as error:  # any error of the library is about the pattern
            raise ConfigurationError(
                f"{constraint!r} cannot be followed with the tokens of {model.name!r}: {error}"
            ) from error
        self._state = functools.lru_cache(_REMEMBERED)(self._state_after)
        self._text_state = functools.lru_cache(_REMEMBERED)(self._state_after_text)

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        allowed, state = np.zeros(self._size, dtype=bool), self._state(tuple(token_ids))
        if state is not None:
            tokens = np.array(self._index.get_allowed_tokens(state) or [], dtype=np.int64)
            allowed[tokens[tokens < self._size]] = True
        return allowed

    def can_become(self, text: str) -> bool:
        return self._text_state(text) is not None

    def accepts(self, text: str, token_ids: Sequence[int]) -> bool:
        state = self._text_state(text)
        if state is None:
            return False
        ends = (self._bytes.get_next_state(state, 256 + count) for count in (1, 2))
        return any(end is not None and self._bytes.is_final_state(end) for end in ends)

    def _state_after(self, token_ids: tuple[int, ...]) -> int | None:
        """Return the state after these tokens, None where one was refused."""
        state = self._index.get_initial_state()
        if token_ids:
            before = self._state(token_ids[:-1])
            state = None if before is None else self._index.get_next_state(before, token_ids[-1])
        return None if state is None else int(state)

    def _state_after_text(self, text: str) -> int | None:
        """Return the state after this text's bytes, None where one was refused."""
        state = self._bytes.get_initial_state()
        for byte in text.encode("utf-8", "surrogatepass"):
            if (state := self._bytes.get_next_state(state, byte)) is None:
                return None
        return int(state)


def _compile(pattern: str, tokens: Mapping[Any, list[int]], size: int) -> Any:
    """Return the automaton of a pattern over ``tokens``, whose numbers are below ``size``.

    outlines-core drops every edge from an accepting state to one that does not accept: of ``a(ba)*`` it only knows
    "a". An end mark, which each text is followed by, leaves no accepting state but the last. ``$`` is an end mark too,
    so that a text ends with one mark or with two: the tokens ``size + 1`` and ``size + 2``. Whatever could match any
    character is kept from matching a mark.
    """
    outlines = _outlines()
    dot = "[^%s]" % (_END if re.search(r"\(\?[a-zA-Z]*s", pattern) else f"\n{_END}")

    def mark(found: re.Match[str]) -> str:
        part = found[0]
        if part in ("$", r"\z"):
            return _END
        if part == ".":
            return dot
        takes_most = part.startswith("[^") or re.search(r"\\[DSWP]", part)
        return f"[{part}&&[^{_END}]]" if takes_most else part

    parts = r"\\z|\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])+\]|\$|\."
    marked = re.sub(parts, mark, pattern, flags=re.DOTALL)
    ends = {(_END * count).encode(): [size + count] for count in (1, 2)}
    by_bytes = {text if isinstance(text, bytes) else text.encode(): ids for text, ids in tokens.items()}
    return outlines.Index(f"(?:{marked}){_END}", outlines.Vocabulary(size, {**by_bytes, **ends}))


class _Finder:
    """Finds the tokens that complete one of some strings at the end of a completion.

    A token is compared by its text. Only where that is a part of a character, the whole completion is decoded: its
    bytes may complete a character of a string.
    """

    def __init__(self, strings: Sequence[str], model: LanguageModel, fold: Callable[[str], str] = str) -> None:
        self._strings, self._model, self._fold = [fold(string) for string in strings], model, fold
        self._texts = token_texts(model)
        folded = [fold(text) for text in self._texts]
        order = sorted(range(len(folded)), key=folded.__getitem__)
        ranked = [folded[token] for token in order]

        def beginning_with(start: str) -> list[int]:
            return order[bisect_left(ranked, start) : bisect_left(ranked, start + chr(0x10FFFF))]

        # By a beginning of a string: the tokens that begin with its rest, and those inside it that go on with it.
        self._completing: dict[str, list[int]] = {}
        self._inside: dict[str, list[int]] = {}
        by_text: dict[str, list[int]] = {}
        for token, text in enumerate(folded):
            by_text.setdefault(text, []).append(token)
        for string in self._strings:
            for written in range(1, len(string)):
                before, rest = string[:written], string[written:]
                self._completing.setdefault(before, []).extend(beginning_with(rest))
                parts = (by_text.get(rest[:end], []) for end in range(1, len(rest)))
                self._inside.setdefault(before, []).extend(token for part in parts for token in part)
        begun = tuple(self._completing)
        self._alone = np.array([any(string in text for string in self._strings) for text in folded])
        self._begins = np.array([text.endswith(begun) for text in folded]) if begun else np.zeros_like(self._alone)
        self._halves = np.array([_HALF in text for text in self._texts])
        self._is_ascii = all(string.isascii() for string in self._strings)

    def contains(self, text: str) -> bool:
        """Tell whether a text contains one of the strings."""
        folded = self._fold(text)
        return any(string in folded for string in self._strings)

    def completing(self, token_ids: Sequence[int]) -> BoolArray:
        """Return the tokens after which the completion contains one of the strings, bool [V]."""
        text = self._model.decode_continuation(list(token_ids))
        found = self._alone.copy()
        folded = self._fold(text)
        for before, tokens in self._completing.items():
            if folded.endswith(before):
                found[tokens] = True
        if text.endswith(_HALF):
            for token in np.flatnonzero(self._halves).tolist():
                found[token] = self.contains(self._model.decode_continuation([*token_ids, token]))
        return found

    def extending(self, token_ids: Sequence[int]) -> list[tuple[int, str]]:
        """Return the tokens after which the completion contains a string or ends in a part of one, with its text."""
        text = self._model.decode_continuation(list(token_ids))
        found, folded = self._alone | self._begins, self._fold(text)
        for tables in (self._completing, self._inside):
            for before, tokens in tables.items():
                if folded.endswith(before):
                    found[tokens] = True
        is_half = text.endswith(_HALF)
        if is_half or not self._is_ascii:
            found |= self._halves
        joins = bool(token_ids) and not is_half  # a first token's text, and the rest of a character, depend on context
        return [
            (token, text + self._texts[token] if joins else self._model.decode_continuation([*token_ids, token]))
            for token in np.flatnonzero(found).tolist()
        ]


def _fold(text: str) -> str:
    """Fold the case of each character by itself, so that a part of a text folds as it does within the text."""
    return text.casefold()


@functools.lru_cache(8)
def token_texts(model: LanguageModel) -> list[str]:
    """Return the text that each token adds to a continuation, [V]."""
    return [model.decode_continuation([token]) for token in range(model.vocab_size)]


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
