"""Answers in OpenAI's shapes: whole ones, and the chunks of a stream, of chats and of completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

from .. import __version__
from ..models.base import LanguageModel
from .generation import End, Event, Improvement, Piece, Usage
from .sampling import Token

__all__ = ["Answer", "ChatAnswer", "CompletionAnswer"]


class Answer:
    """The answer to one request: whole, or as chunks. Both are made of the same events.

    Attributes:
        usage: What the request uses.
        by_id: Whether the tokens of log-probabilities are named ``token_id:17``, as vLLM does on request.
    """

    by_id = False
    kind = chunk_kind = prefix = ""
    role: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: str, lm: LanguageModel, *, with_usage: bool) -> None:
        """Begin an answer.

        Args:
            model: The name by which the request asked.
            lm: The language model, which knows the texts of tokens.
            with_usage: Whether a stream ends with what was used.
        """
        self._lm, self._with_usage, self.usage = lm, with_usage, Usage()
        fingerprint = f"qstar-decoding-{__version__}-{lm.name}"
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._tail = {"system_fingerprint": fingerprint}
        self._special = {token: text for text, token in lm.special_tokens.items()}
        self._texts: dict[int, list[str]] = {}
        self._tokens: dict[int, list[tuple[Token, int]]] = {}
        self._ends: dict[int, End] = {}
        self._opened: set[int] = set()

    def take(self, event: Event) -> None:
        """Note an event for the whole answer."""
        if isinstance(event, Piece):
            self._texts.setdefault(event.choice, []).append(event.text)
            self._tokens.setdefault(event.choice, []).extend(event.tokens)
        elif isinstance(event, End):
            self._ends[event.choice] = event

    def whole(self, *, logprobs: bool) -> dict[str, Any]:
        """Return the whole answer."""
        choices = []
        for choice in sorted(self._ends):
            end, tokens = self._ends[choice], self._tokens.get(choice, [])
            shown = self.logprobs(tokens) if logprobs else None
            content = self.content("".join(self._texts.get(choice, [])))
            choices.append(self._choice(choice, content, shown, end))
        return {"object": self.kind, **self._head, "choices": choices, "usage": self._used(), **self._tail}

    def chunks(self, event: Event, *, logprobs: bool) -> list[dict[str, Any]]:
        """Return the chunks of one event."""
        if isinstance(event, Improvement):
            return [self._chunk([], {"qstar": {"improvement": event.report}})]
        if isinstance(event, Piece):
            shown = self.logprobs(event.tokens) if logprobs else None
            return [*self._opening(event.choice), self._part(event.choice, self.delta(event.text), shown)]
        if isinstance(event, End):
            return [*self._opening(event.choice), self._part(event.choice, self.delta(""), None, event)]
        return []

    def _opening(self, choice: int) -> list[dict[str, Any]]:
        """Return what stands before a choice's first piece."""
        is_new = choice not in self._opened
        self._opened.add(choice)
        return [self._part(choice, self.role, None)] if is_new and self.role else []

    def closing(self) -> list[dict[str, Any]]:
        """Return the chunks that a stream ends with."""
        if not self._with_usage:
            return []
        return [{"object": self.chunk_kind, **self._head, "choices": [], "usage": self._used(), **self._tail}]

    def content(self, text: str) -> dict[str, Any]:
        """Return the field of a choice that has the whole text."""
        raise NotImplementedError

    def delta(self, text: str) -> dict[str, Any]:
        """Return the field of a chunk's choice that has a piece of the text."""
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[tuple[Token, int]]) -> dict[str, Any]:
        """Return tokens with their log-probabilities."""
        raise NotImplementedError

    def token_text(self, token: int) -> str:
        """Return a token's text; of a special token, which has none, its name."""
        if self.by_id:
            return f"token_id:{token}"
        return self._special.get(token) or self._lm.decode_continuation([token])

    def _choice(
        self, choice: int, content: dict[str, Any], logprobs: dict[str, Any] | None, end: End | None
    ) -> dict[str, Any]:
        made = {"index": choice, **content, "logprobs": logprobs, "finish_reason": end.finish if end else None}
        return {**made, "qstar": end.report} if end is not None and end.report is not None else made

    def _part(
        self, choice: int, content: dict[str, Any], logprobs: dict[str, Any] | None, end: End | None = None
    ) -> dict[str, Any]:
        return self._chunk([self._choice(choice, content, logprobs, end)])

    def _chunk(self, choices: list[dict[str, Any]], further: dict[str, Any] | None = None) -> dict[str, Any]:
        usage: dict[str, Any] = {"usage": None} if self._with_usage else {}
        return {"object": self.chunk_kind, **self._head, "choices": choices, **usage, **self._tail, **(further or {})}

    def _used(self) -> dict[str, Any]:
        usage = self.usage
        total = usage.prompt + usage.completion
        used = {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion, "total_tokens": total}
        return used if usage.search is None else {**used, "search": usage.search}


class ChatAnswer(Answer):
    """The answer of ``/v1/chat/completions``."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    role: ClassVar = {"delta": {"role": "assistant", "content": "", "refusal": None}}

    def content(self, text: str) -> dict[str, Any]:
        """See :meth:`Answer.content`."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        """See :meth:`Answer.delta`."""
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, tokens: Sequence[tuple[Token, int]]) -> dict[str, Any]:
        """See :meth:`Answer.logprobs`."""
        content = [
            {**self._entry(token.id, token.logprob), "top_logprobs": [self._entry(*other) for other in token.top or ()]}
            for token, _ in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token_text(token)
        # A part of a character has no text, but a language model may know its bytes.
        raw = text.encode() if "\ufffd" not in text else self._lm.token_bytes(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw) if raw or not text else None}


class CompletionAnswer(Answer):
    """The answer of ``/v1/completions``."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def content(self, text: str) -> dict[str, Any]:
        """See :meth:`Answer.content`."""
        return {"text": text}

    delta = content

    def logprobs(self, tokens: Sequence[tuple[Token, int]]) -> dict[str, Any]:
        """See :meth:`Answer.logprobs`."""
        return {
            "tokens": [self.token_text(token.id) for token, _ in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": [None if token.top is None else self._likeliest(token) for token, _ in tokens],
            "text_offset": [place for _, place in tokens],
        }

    def _likeliest(self, token: Token) -> dict[str, float]:
        likeliest: dict[str, float] = {}
        for other, logprob in token.top or ():
            likeliest.setdefault(self.token_text(other), logprob)  # of parts of characters, the likeliest stands
        if token.logprob is not None:  # OpenAI lists the token itself too
            likeliest.setdefault(self.token_text(token.id), token.logprob)
        return likeliest
