"""Constraints that a grammar states: regular expressions, JSON schemas and context-free grammars."""

from __future__ import annotations

import functools
import json
import re
import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import ConfigurationError, ConstraintError
from ...models.base import LanguageModel
from .base import BoolArray, EqualByValue, Rule
from .strings import HALF, check_strings, token_texts

__all__ = ["GrammarConstraint", "JSONConstraint", "RegexConstraint"]

_RECENT = 256  # matchers that are kept
_END = "\x03"  # follows every text that a regular expression reads
# Without this, a mask holds one token where the next bytes are certain: only the tokenizer's own way to write them.
_EVERY_TOKENIZATION = '\n%llguidance {"no_forcing": true}\n'
# A part of a regular expression that is no class: flags or the beginning of a group, an escaped character, a character.
_PART = re.compile(r"\((?:\?[a-zA-Z]*(?:-[a-zA-Z]+)?[:)])?|\\[pP](?:\{[^}]*\}|.)|\\?.", re.DOTALL)
# Keywords of JSON schema whose values are schemas by name, and those whose values are no schemas.
_BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_VALUES = {"enum", "const", "default", "examples", "required"}
# Where one of these stands beside "properties", other properties than those may be meant.
_OPENING = {"additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}


class _Guided(EqualByValue):
    """A constraint that the library llguidance follows, as a grammar in its dialect of Lark."""

    @property
    def ends(self) -> tuple[str, ...]:
        """What may follow a text that the grammar accepts as a whole."""
        return ("",)

    @abstractmethod
    def lark(self) -> str:
        """Return the grammar."""

    def bind(self, model: LanguageModel) -> Rule:
        """See :class:`Constraint`."""
        return _Guide(self, model)

    def check(self) -> None:
        """Check that the library can read the grammar.

        Raises:
            ConfigurationError: It cannot, or it is not installed.
        """
        error = _llguidance().LLMatcher.validate_grammar(self.lark())
        if error and not error.startswith("WARNING"):
            raise ConfigurationError(f"{self!r:.200} cannot be followed: {' '.join(error.split())[:300]}")


class RegexConstraint(_Guided):
    r"""The whole completion matches a regular expression.

    Look-around, word boundaries and back-references are not available. Most continuations begin with a space:
    ``r" ?(yes|no)\\."``. Tokens that are a part of a character are allowed where the character is.
    """

    def __init__(self, pattern: str) -> None:
        """Keep the pattern.

        Raises:
            ConfigurationError: The pattern is no regular expression, or llguidance is not installed.
        """
        [self.pattern] = check_strings([pattern])
        self.check()

    @property
    def ends(self) -> tuple[str, ...]:
        """One end mark, and one for each ``$`` that may stand before it."""
        return tuple(_END * count for count in range(1, self._marked()[1] + 2))

    def lark(self) -> str:
        """Return the pattern with an end mark behind it, which no other part of it can match.

        llguidance knows ``$`` at the very end of a pattern only.
        """
        marked = f"(?:{self._marked()[0]}){_END}"
        return f"start: /{_llguidance().regex_to_lark(marked)}/{_EVERY_TOKENIZATION}"

    def _marked(self) -> tuple[str, int]:
        """Return the pattern with ``$`` as an end mark that nothing else in it can match, and the number of ``$``."""
        parts: list[str] = []
        count, place = 0, 0
        dot_takes_all = [False]  # whether "." takes a line break, of each group that is open
        while place < len(self.pattern):
            part = self.pattern[place : _part_end(self.pattern, place)]
            place += len(part)
            if part in ("$", r"\z"):
                part, count = _END, count + 1
            elif part == ".":
                part = "[^%s]" % (_END if dot_takes_all[-1] else f"\n{_END}")
            elif part[0] == "[" or re.match(r"\\[DSWP]", part):
                part = f"[{part}&&[^{_END}]]"
            elif part == ")":
                dot_takes_all = dot_takes_all[:-1] or [False]
            elif part[0] == "(":
                on, _, off = part.strip("(?:)").partition("-")
                takes_all = "s" not in off and ("s" in on or dot_takes_all[-1])
                if part.endswith(")"):  # flags of the rest of the group that is open
                    dot_takes_all[-1] = takes_all
                else:
                    dot_takes_all.append(takes_all)
            parts.append(part)
        return "".join(parts), count


class JSONConstraint(_Guided):
    """The whole completion is JSON that follows a schema.

    An object with ``properties`` has no others, unless the schema says ``additionalProperties``. Properties come in the
    order of the schema. At most one space separates two tokens of JSON.
    """

    def __init__(self, schema: Mapping[str, Any] | str) -> None:
        """Take a JSON schema, as a dict or as text.

        Raises:
            ConfigurationError: It is no JSON schema, llguidance does not know a keyword of it, or is not installed.
        """
        try:
            self.schema = json.dumps(json.loads(schema) if isinstance(schema, str) else schema)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"a JSON schema is a dict or its text, got {schema!r:.200}: {error}") from error
        self.check()

    def lark(self) -> str:
        """Return a grammar that holds the schema."""
        closed = _closed(json.loads(self.schema))
        if isinstance(closed, dict):
            closed = {"x-guidance": {"whitespace_pattern": " ?"}, **closed}
        return f"start: %json {json.dumps(closed)}{_EVERY_TOKENIZATION}"


class GrammarConstraint(_Guided):
    """The whole completion is a sentence of a context-free grammar, in Lark's notation or in GBNF of llama.cpp.

    The rules of a Lark grammar are ``start: …``; those of GBNF are ``root ::= …``. llguidance reads its dialect of
    Lark: terminals are matched as long as possible, and ``%ignore``, ``%json`` and ``%regex`` are known.
    """

    def __init__(self, grammar: str) -> None:
        """Take the text of a grammar.

        Raises:
            ConfigurationError: It is no grammar, or llguidance is not installed.
        """
        [self.grammar] = check_strings([grammar])
        self.check()

    def lark(self) -> str:
        """Return the grammar; one in GBNF is translated."""
        _llguidance()
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return str(any_to_lark(self.grammar)) + _EVERY_TOKENIZATION
        except Exception as error:  # any error of the library is about the grammar
            raise ConfigurationError(
                f"the grammar has no rule 'start:' of Lark, and is no GBNF: {' '.join(str(error).split())[:300]}"
            ) from error


class _Guide(Rule):
    """A grammar bound to a model's tokens; the 256 bytes follow these as further tokens, to judge a text."""

    def __init__(self, constraint: _Guided, model: LanguageModel) -> None:
        self._constraint, self._size, self._ends = constraint, model.vocab_size, constraint.ends
        self._marked = any(self._ends)
        self._usable = np.array([bool(text) for text in token_bytes(model)])
        if self._marked:
            self._usable &= np.array([_END not in text for text in token_texts(model)])
        self._usable[[token for token in model.eos_token_ids if 0 <= token < model.vocab_size]] = False
        # Copied for every question: a matcher that was reset forgets some of the tokens that may follow.
        self._start = _llguidance().LLMatcher(_tokenizer(model), constraint.lark(), log_level=0)
        # By the tokens that they have read. A copy of a matcher knows what that one has worked out for its mask.
        self._recent: dict[tuple[int, ...], Any] = {}
        self._lock = threading.Lock()
        if error := self._start.get_error():
            raise ConfigurationError(f"{constraint!r:.200} cannot be followed: {' '.join(error.split())[:300]}")
        if not self.allowed([]).any() and not self.accepts("", []):
            raise ConfigurationError(f"{constraint!r:.200} cannot be followed with the tokens of {model.name!r}")

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        nothing, ids = np.zeros(self._size, dtype=bool), tuple(int(token) for token in token_ids)
        with self._lock:
            before = self._recent.get(ids[:-1]) if ids else None
            matcher = self._after(ids) if before is None else self._after(ids[-1:], before)
            if matcher is None:
                return nothing
            bits, error = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), matcher.get_error()
            self._recent[ids] = matcher
            if len(self._recent) > _RECENT:
                del self._recent[next(iter(self._recent))]
        if error:
            if error.startswith("NoExtension"):  # a rule without a sentence was all that could follow
                return nothing
            raise ConstraintError(f"{self._constraint!r:.200} cannot be followed: {error.splitlines()[0]}")
        allowed: BoolArray = np.unpackbits(bits, count=self._size, bitorder="little").astype(bool) & self._usable
        return allowed

    def can_become(self, text: str) -> bool:
        return self._after(self._bytes(text)) is not None and not (self._marked and _END in text)

    def accepts(self, text: str, token_ids: Sequence[int]) -> bool:
        if self._marked and _END in text:
            return False
        read = [self._after(self._bytes(text + end)) for end in self._ends]
        return any(matcher is not None and matcher.is_accepting() for matcher in read)

    def _bytes(self, text: str) -> list[int]:
        return [self._size + byte for byte in text.encode("utf-8", "surrogatepass")]

    def _after(self, tokens: Sequence[int], before: Any = None) -> Any:
        """Return a matcher that has read these tokens after those of ``before``; None where one was refused."""
        matcher = (self._start if before is None else before).deep_copy()
        return matcher if matcher.try_consume_tokens(tokens) == len(tokens) else None


def _part_end(pattern: str, start: int) -> int:
    """Return where the part of a regular expression ends that begins at ``start``; classes may hold classes."""
    if pattern[start] != "[":
        found = _PART.match(pattern, start)
        return found.end() if found else start + 1
    depth, place = 0, start
    while place < len(pattern):
        character = pattern[place]
        place += 2 if character == "\\" else 1
        if character == "[":
            depth += 1
            place += pattern.startswith("^", place)
            place += pattern.startswith("]", place)  # the first one is a character of the class
        elif character == "]":
            depth -= 1
            if not depth:
                break
    return place


def _closed(schema: Any) -> Any:
    """Return a JSON schema whose objects have the named properties only, unless it says otherwise."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: {name: _closed(one) for name, one in value.items()}
        if key in _BY_NAME and isinstance(value, dict)
        else value
        if key in _VALUES
        else _closed(value)
        for key, value in schema.items()
    }
    if "properties" in closed and not _OPENING & closed.keys():
        closed["additionalProperties"] = False
    return closed


class _Vocabulary:
    """A vocabulary as llguidance reads it; an end-of-sequence token of its own follows the others."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens, self.eos_token_id = [*tokens, b"<end>"], len(tokens)
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("no text is tokenized")


@functools.lru_cache(8)
def token_bytes(model: LanguageModel) -> list[bytes]:
    """Return the bytes of each token, [V]; none where the token has no text, or a part of a character unknown to us."""
    texts = token_texts(model)
    return [text.encode() if HALF not in text else model.token_bytes(token) for token, text in enumerate(texts)]


@functools.lru_cache(8)
def _tokenizer(model: LanguageModel) -> Any:
    # Without slices: they speed up the mean of masks by microseconds, and cost 10 ms where they are first used.
    tokens = [*token_bytes(model), *(bytes([byte]) for byte in range(256))]
    return _llguidance().LLTokenizer(_Vocabulary(tokens), slices=[])


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigurationError(
            "regular expressions, JSON schemas and grammars need llguidance, which is not installed: "
            "pip install llguidance"
        ) from error
    return llguidance
