"""Rewards for guidelines: words to use or avoid, patterns, sentences, lengths."""

from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import regex

from ...checks import check_integer, first_line
from ...errors import ConfigurationError, RewardError
from ..base import Reward
from ..checking import shown
from ..types import Bounds, Column, Counts, RewardOptions, Scores, Texts, TokenIds
from .helpers import column_of, library

__all__ = [
    "AllKeywords",
    "CompleteSentence",
    "ForbiddenWords",
    "Keywords",
    "Length",
    "MatchesJSON",
    "MatchesRegex",
    "Pangram",
    "ShortSentences",
]

_WORD = re.compile(r"[^\W\d_]+")
_SUFFIXES = ("", "s", "es", "d", "ed", "ing")
_SENTENCES = re.compile(r"(?<=[.!?])\s+")
# A pattern that this matches takes one character after another: literals, sets, groups, alternatives, repetition, and
# the flags a, i, m, s and u. Only for these does a partial match prove that a text can still become a match.
# Not among them: looking around, referring back, anchors, possessive and fuzzy parts, reversal, full case folding.
_ESCAPE = r"\\(?:[dDsSwWaftnrv]|[^\w\s]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})"
_PLAIN = re.compile(
    rf"""(?:
        \((?:\?(?:P?<\w+>|[aimsu]+\)|(?:[aimsu]*(?:-[ims]+)?:)))?   # a group, or flags
        |(?:
            {_ESCAPE}
            |\[\^?(?:{_ESCAPE}|[^\[\]\\])+\]                        # a set without a set in it
            |[^\\\[\](){{}}*+?|^$]                                  # a literal, or any character
            |\)
        )(?:(?:[*+?]|\{{\d+(?:,\d*)?\}}|\{{,\d+\}})\??(?![*+?{{]))?   # repetition, greedy or lazy
        |\|
    )*""",
    re.VERBOSE,
)
_SCORING_SECONDS, _BOUNDING_SECONDS = 1.0, 0.1  # for one text; a plain pattern takes microseconds
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")


class Keywords(Reward):
    """The share of the column ``keywords`` that the completion uses, in any inflection, from 0 to 1.

    The coverage of CommonGen (Lin et al., EMNLP Findings 2020): a keyword counts if a word of the text has the same
    lemma, so that "ran" covers "run", or is the keyword with a regular ending. A keyword of several words counts if
    its words follow each other. The potential is the coverage so far.

    Lemmas are looked up with simplemma; the first use in a process reads its English table, about 0.1 s.
    """

    name, lower, upper = "keywords", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, **options: Unpack[RewardOptions]) -> None:
        """Prepare to count; the arguments are those of `Reward`.

        Raises:
            ConfigurationError: The library simplemma is not installed.
        """
        super().__init__(**options)
        lemma_of("words")

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the share of keywords covered, None where the prompt has none.

        Raises:
            ConfigurationError: No prompt has the column ``keywords``, or it is not a list of words.
        """
        example = "{'prompt': 'Write a sentence with dog and park:', 'keywords': ['dog', 'park']}"
        asked = column_of(columns, "keywords", "keywords", example)
        return [_coverage(completion, keywords) for completion, keywords in zip(completions, asked, strict=True)]

    score_prefixes = score


class AllKeywords(Keywords):
    """1 if the completion uses all of the column ``keywords`` and ends as a sentence does, else 0."""

    name = "all_keywords"

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return 1 or 0 for each completion, None where the prompt has no keywords; raises as `Keywords` does."""
        covered = super().score(prompts, completions, completion_ids, **columns)
        return [
            None if share is None else float(share == 1 and bool(_SENTENCE_END.search(text.rstrip())))
            for share, text in zip(covered, completions, strict=True)
        ]

    score_prefixes = score


class CompleteSentence(Reward):
    """1 if the completion ends as a sentence does, in ``.``, ``!`` or ``?`` (and closing quotes), else 0."""

    name, lower, upper = "complete_sentence", 0.0, 1.0
    reads_token_ids = False

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return 1 or 0 for each completion."""
        return [float(bool(_SENTENCE_END.search(completion.rstrip()))) for completion in completions]


class ForbiddenWords(Reward):
    """1 if none of the words occurs in the completion, in any case, else 0.

    As a reward it weighs against others; :class:`~qstar_decoding.envs.BannedStrings` rules strings out altogether.
    A forbidden word with another character after it stays in every continuation: the bound of such a prefix is 0.
    """

    name, lower, upper = "forbidden_words", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, *words: str, **options: Unpack[RewardOptions]) -> None:
        """Forbid ``words``; the other arguments are those of `Reward`.

        Raises:
            ConfigurationError: There is none, or one is not a word of letters.
        """
        super().__init__(**options)
        if not words or not all(map(_is_word, words)):
            raise ConfigurationError(f"words of letters are needed, each as an argument of its own; got {words!r}")
        self._words = {word.casefold() for word in words}

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return 1 or 0 for each completion."""
        return [float(not any(self._forbids(word) for word in _WORD.findall(text))) for text in completions]

    score_prefixes = score

    def bound_prefixes(
        self, prompts: Texts, completions: Texts, remaining: Counts, completion_ids: TokenIds = None, **columns: Column
    ) -> Bounds:
        """Return 0 where a forbidden word is complete, else 1; the last word may still become another."""
        return [
            float(not any(self._forbids(m.group()) and m.end() < len(text) for m in _WORD.finditer(text)))
            for text in completions
        ]

    def _forbids(self, word: str) -> bool:
        # Case folding maps each character alone. lower() looks ahead: its capital sigma depends on what follows.
        return word.casefold() in self._words


class MatchesRegex(Reward):
    """1 if the whole completion, surrounding white space aside, matches a regular expression, else 0.

    The library regex reads the expression: Python's own syntax, and more. It also recognises the beginning of a match.
    :class:`~qstar_decoding.envs.RegexConstraint` allows nothing else to be written.

    A text that no continuation can make match has the bound 0, if the pattern is plain: literals, sets, groups,
    alternatives, repetition and the flags a, i, m, s, u. Any other pattern has no bounds below 1.
    """

    name, lower, upper = "matches_regex", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, pattern: str, **options: Unpack[RewardOptions]) -> None:
        """Compile ``pattern``; the other arguments are those of `Reward`.

        Raises:
            ConfigurationError: It is no regular expression.
        """
        super().__init__(**options)
        try:
            self._pattern = regex.compile(pattern)
        except (regex.error, TypeError, ValueError, RecursionError, OverflowError, MemoryError) as error:
            raise ConfigurationError(f"{shown(pattern)} is no regular expression: {first_line(error)}") from error
        if not isinstance(pattern, str):
            raise ConfigurationError(f"pattern is a string, got {shown(pattern)}")
        self._is_plain = bool(_PLAIN.fullmatch(pattern))

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return 1 or 0 for each completion.

        Raises:
            RewardError: The pattern backtracks for more than a second over one text.
        """
        return [float(self._matches(text.strip())) for text in completions]

    def bound_prefixes(
        self, prompts: Texts, completions: Texts, remaining: Counts, completion_ids: TokenIds = None, **columns: Column
    ) -> Bounds:
        """Return 0 where no text with this beginning matches, else 1."""
        if not self._is_plain:
            return [1.0] * len(completions)
        return [float(self._may_match(text)) for text in completions]

    @property
    def has_prefix_bounds(self) -> bool:
        """Whether the pattern is plain enough for them."""
        return self._is_plain

    def _matches(self, text: str) -> bool:
        try:
            return bool(self._pattern.fullmatch(text, timeout=_SCORING_SECONDS))
        except TimeoutError:
            raise RewardError(
                f"reward {self.name!r} took more than {_SCORING_SECONDS:g} s to match {shown(self._pattern.pattern)} "
                f"with {shown(text)}: it backtracks. Simplify the pattern (no repetition within a repetition), or let "
                "on_error='skip' or 'penalty' deal with such texts."
            ) from None

    def _may_match(self, text: str) -> bool:
        matches = functools.partial(self._pattern.fullmatch, timeout=_BOUNDING_SECONDS)
        try:
            return bool(matches(text.lstrip(), partial=True) or matches(text.strip()))
        except TimeoutError:
            return True  # not refuted


class MatchesJSON(Reward):
    """1 if the completion, surrounding white space aside, is JSON that keeps to a schema, else 0.

    To write nothing else there is :class:`~qstar_decoding.envs.JSONConstraint`.
    """

    name, lower, upper = "matches_json", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, schema: dict[str, Any] | str, **options: Unpack[RewardOptions]) -> None:
        """Read ``schema``, a JSON Schema as a dict or as text; ``{}`` for any JSON. The others are those of `Reward`.

        Raises:
            ConfigurationError: It is no JSON Schema, or the library jsonschema is not installed.
        """
        super().__init__(**options)
        try:
            self._schema = schema if isinstance(schema, str) else json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigurationError(f"this is no JSON Schema: {first_line(error)}; got {shown(schema)}") from error
        _validator(self._schema)

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return 1 or 0 for each completion."""
        return [float(self._accepts(text)) for text in completions]

    def _accepts(self, text: str) -> bool:
        try:
            return bool(_validator(self._schema).is_valid(json.loads(text, parse_constant=_no_json)))
        except TimeoutError:
            raise RewardError(
                f"reward {self.name!r} took more than {_SCORING_SECONDS:g} s over a pattern of its schema with "
                f"{shown(text)}: it backtracks. Simplify the pattern (no repetition within a repetition), or let "
                "on_error='skip' or 'penalty' deal with such texts."
            ) from None
        except (ValueError, RecursionError, ArithmeticError):  # 20,000 opening brackets; 1e999 as a multiple of 0.1
            return False


class ShortSentences(Reward):
    """The share of the completion's sentences that have at most ``most`` words, 0 to 1; a text without any has 1."""

    name, lower, upper = "short_sentences", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, most: int = 20, **options: Unpack[RewardOptions]) -> None:
        """Allow ``most`` words; the other arguments are those of `Reward`.

        Raises:
            ConfigurationError: ``most`` is not a positive integer.
        """
        super().__init__(**options)
        self.most = check_integer("most", most)

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the share for each completion."""
        counts = [[len(part.split()) for part in _SENTENCES.split(text) if part.strip()] for text in completions]
        return [sum(count <= self.most for count in of) / len(of) if of else 1.0 for of in counts]

    score_prefixes = score


class Length(Reward):
    """The share of ``most`` tokens that the completion has, at most 1: a length bonus, or with a minus a malus.

    Likelihood alone favours short texts, down to the empty one (Stahlberg & Byrne 2019). Without token ids words count.
    The potential is the length so far, and what remains bounds what it can become.
    """

    name, lower, upper = "length", 0.0, 1.0

    def __init__(self, most: int = 32, **options: Unpack[RewardOptions]) -> None:
        """Count up to ``most``; the other arguments are those of `Reward`.

        Raises:
            ConfigurationError: ``most`` is not a positive integer.
        """
        super().__init__(**options)
        self.most = check_integer("most", most)

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the share for each completion."""
        return [min(count, self.most) / self.most for count in _lengths(completions, completion_ids)]

    score_prefixes = score

    def bound_prefixes(
        self, prompts: Texts, completions: Texts, remaining: Counts, completion_ids: TokenIds = None, **columns: Column
    ) -> Bounds:
        """Return the share with all remaining tokens; without token ids `upper`, as a token may hold many words."""
        if completion_ids is None:
            return [self.upper] * len(completions)
        counts = _lengths(completions, completion_ids)
        return [min(count + left, self.most) / self.most for count, left in zip(counts, remaining, strict=True)]


class Pangram(Reward):
    """The share of the 26 letters a to z that the completion uses; the potential is the share so far."""

    name, lower, upper = "pangram", 0.0, 1.0
    reads_token_ids = False

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the share for each completion."""
        return [len(set(string.ascii_lowercase) & set(completion.lower())) / 26 for completion in completions]

    score_prefixes = score


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


@functools.lru_cache(64)
def _validator(schema: str) -> Any:
    """Return the process's validator of a schema; it is not kept in the reward, so that this pickles."""
    jsonschema = library("jsonschema", "jsonschema", "matches_json")
    try:
        content = json.loads(schema)
        cls = jsonschema.validators.validator_for(content)
        cls.check_schema(content)
        # Patterns of a schema are matched by regex, which has a time limit.
        limited = {"pattern": _pattern, "patternProperties": _pattern_properties}
        return jsonschema.validators.extend(cls, limited)(content)
    except (ValueError, TypeError, AttributeError, RecursionError, jsonschema.SchemaError) as error:
        raise ConfigurationError(f"this is no JSON Schema: {first_line(error)}; got {shown(schema)}") from error


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    if validator.is_type(instance, "string") and not _found(pattern, instance):
        yield library("jsonschema", "jsonschema", "matches_json").ValidationError("no match")


def _pattern_properties(validator: Any, patterns: dict[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
    if validator.is_type(instance, "object"):
        for pattern, subschema in patterns.items():
            for name, value in instance.items():
                if _found(pattern, name):
                    yield from validator.descend(value, subschema, path=name, schema_path=pattern)


def _found(pattern: str, text: str) -> bool:
    return bool(regex.search(pattern, text, timeout=_SCORING_SECONDS))


def _no_json(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _coverage(text: str, keywords: Any) -> float | None:
    if keywords is None:
        return None
    if (
        isinstance(keywords, str)
        or not isinstance(keywords, Sequence)
        or not keywords
        or not all(map(_is_text, keywords))
    ):
        raise ConfigurationError(f"the column 'keywords' holds a list of words for each prompt, got {keywords!r}")
    words = [_bases(word) for word in _words(text)]
    return sum(_covers(words, [lemma_of(word) for word in _words(keyword)]) for keyword in keywords) / len(keywords)


def _covers(words: list[frozenset[str]], keyword: list[str]) -> bool:
    return any(
        all(part in bases for part, bases in zip(keyword, words[start:], strict=False))
        for start in range(len(words) - len(keyword) + 1)
    )


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


@functools.lru_cache(maxsize=1 << 16)
def _bases(word: str) -> frozenset[str]:
    """Return the lemmas that ``word`` may be a form of."""
    return frozenset(lemma_of(stem) for suffix in _SUFFIXES if (stem := word.removesuffix(suffix)))


@functools.lru_cache(maxsize=1 << 16)
def lemma_of(word: str) -> str:
    """Return a word's dictionary form, in lower case."""
    lemma: str = library("simplemma", "simplemma", "keywords").lemmatize(word, lang="en")
    return lemma.lower()


def _lengths(completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None) -> list[int]:
    return [len(ids) for ids in completion_ids] if completion_ids is not None else [len(c.split()) for c in completions]
