"""Constraints that allow legal moves only: every completion is a path through a graph that the prompt describes."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ...errors import ConfigurationError
from ...models.base import LanguageModel
from ..prompts import Prompt
from .base import EqualByValue, Rule
from .strings import token_texts

__all__ = ["MovesConstraint"]

_Places = frozenset[tuple[str, Hashable]]  # the rest of the move that is being written, and the state that it leads to


class MovesConstraint(EqualByValue):
    """A completion is a sequence of moves, from the prompt's first state to a final one.

    Subclasses say which moves a state has. The rule for a language model's tokens follows: a token is allowed where its
    text continues a sequence of moves, whatever the tokenizer joins or splits.
    """

    @abstractmethod
    def start(self, prompt: Prompt) -> Hashable:
        """Return the first state of a prompt.

        Raises:
            ConfigurationError: The prompt lacks the columns that describe it.
        """

    @abstractmethod
    def moves(self, state: Hashable) -> Iterable[tuple[str, Hashable]]:
        """Return the moves of a state: the text of each, not empty, and the state that it leads to."""

    @abstractmethod
    def is_final(self, state: Hashable) -> bool:
        """Tell whether a completion may end in a state."""

    def bind(self, model: LanguageModel, prompt: Prompt | None = None) -> Rule:
        """See :class:`~qstar_decoding.envs.Constraint`."""
        if prompt is None:
            raise ConfigurationError(f"{self!r} reads the prompt; bind it to one")
        return _Moves(self, self.start(prompt), model)


class _Moves(Rule):
    """The moves from one first state, for one language model's tokens."""

    def __init__(self, constraint: MovesConstraint, state: Hashable, model: LanguageModel) -> None:
        self._constraint, self._model = constraint, model
        self._texts = token_texts(model)
        self._places: dict[str, _Places] = {"": frozenset({("", state)})}
        self._moves: dict[Hashable, list[tuple[str, Hashable]]] = {}

    def allowed(self, token_ids: Sequence[int]) -> npt.NDArray[np.bool_]:
        text = self._model.decode_continuation(list(token_ids))
        here, found = self._after(text), np.zeros(self._model.vocab_size, dtype=bool)
        begun = {move[0] for rest, state in here for move in ([rest] if rest else [m for m, _ in self._of(state)])}
        for first in begun:
            for token in self._beginning_with(first):
                found[token] = bool(self._follow(here, self._texts[token]))
        return found

    def accepts(self, text: str, token_ids: Sequence[int]) -> bool:
        return any(not rest and self._constraint.is_final(state) for rest, state in self._after(text))

    def can_become(self, text: str) -> bool:
        return bool(self._after(text))

    def _of(self, state: Hashable) -> list[tuple[str, Hashable]]:
        if state not in self._moves:
            self._moves[state] = list(self._constraint.moves(state))
        return self._moves[state]

    def _after(self, text: str) -> _Places:
        """Return where a text may have led; nowhere if it is not made of moves."""
        known = len(text)
        while text[:known] not in self._places:
            known -= 1
        for end in range(known + 1, len(text) + 1):
            self._places[text[:end]] = self._follow(self._places[text[: end - 1]], text[end - 1])
        return self._places[text]

    def _follow(self, places: _Places, text: str) -> _Places:
        for char in text:
            going_on = {(rest[1:], state) for rest, state in places if rest and rest[0] == char}
            begun = {
                (move[1:], after)
                for rest, state in places
                if not rest
                for move, after in self._of(state)
                if move[0] == char
            }
            places = frozenset(going_on | begun)
            if not places:
                break
        return places

    def _beginning_with(self, first: str) -> list[int]:
        return _tokens_by_first(self._model).get(first, [])


@functools.lru_cache(8)
def _tokens_by_first(model: LanguageModel) -> dict[str, list[int]]:
    """Return the tokens by the first character of their text; special tokens have none."""
    tokens: dict[str, list[int]] = {}
    for token, text in enumerate(token_texts(model)):
        if text:
            tokens.setdefault(text[0], []).append(token)
    return tokens
