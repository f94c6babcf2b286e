"""Task: one request, checked, with the streams of events that answer it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from ..agents.planning.engine import SearchEngine
from ..envs.constraints import Constraint
from ..envs.prompts import Prompt, as_prompt
from .answers import Answer, ChatAnswer, CompletionAnswer
from .bodies import Body, ChatBody, CompletionBody, as_api_error, invalid
from .catalogue import Catalogue, Entry, Search, constraints_of
from .generation import Begun, End, Event, drawn, prompt_piece, searched
from .guard import Limits
from .sampling import Drawing, Sampler, score

__all__ = ["Task", "Tools", "merged"]

_DEFAULT_COMPLETION = 16  # tokens, as in OpenAI's interface
_SILENCE = 15.0  # seconds after which a stream says that it is still there


@dataclass(frozen=True)
class Tools:
    """What all requests work with.

    Attributes:
        engine: Runs the searches.
        sampler: Draws texts.
        catalogue: The models.
        limits: What a request may take.
    """

    engine: SearchEngine
    sampler: Sampler
    catalogue: Catalogue
    limits: Limits


class Task:
    """One request, checked: its prompts, and what is to be done with each."""

    def __init__(self, tools: Tools, body: Body, is_gone: Callable[[], bool]) -> None:
        """Check a request; this may load a reward or compile a constraint, so it runs in a thread.

        Raises:
            ApiError: A field cannot be met.
        """
        self._tools, self._body, self._is_gone = tools, body, is_gone
        self.entry: Entry = tools.catalogue.find(body.model)
        asked = body.qstar
        response = body.response_format if isinstance(body, ChatBody) else None
        self._constraints: tuple[Constraint, ...] = constraints_of(response, asked.constraint if asked else None)
        most = self._given_most()
        if most == 0 and not (asked is None and self.entry.decoder is None):
            raise invalid("max_tokens", "a search writes at least 1 token")
        self.search: Search | None = tools.catalogue.search(self.entry, body, most, self._constraints)
        if self.search is not None and self.search.improvements and not body.stream:
            raise invalid("qstar.improvements", "it is for streams; set stream to true")
        self.echo = isinstance(body, CompletionBody) and bool(body.echo)
        if most == 0 and not self.echo:
            raise invalid("max_tokens", "0 is for echo, which scores a prompt; at least 1 is needed")
        self.top = self._given_top()
        lm = tools.engine.mdp.model
        make: type[Answer] = ChatAnswer if isinstance(body, ChatBody) else CompletionAnswer
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.answer = make(body.model, lm, with_usage=with_usage)
        self.answer.by_id = isinstance(body, CompletionBody) and bool(body.return_tokens_as_token_ids)
        self.prompts = self._given_prompts()
        self.choices = len(self.prompts) * body.choices
        if self.choices > tools.limits.texts:
            raise invalid("n", f"at most {tools.limits.texts} texts are made for a request, got {self.choices}")
        if unknown := [token for token in body.bias if token >= lm.vocab_size]:
            raise invalid("logit_bias", f"{lm.name!r} has no token {unknown[0]}")
        self._ids = [self._encoded(prompt, most) for prompt in self.prompts]
        self._most = most
        self._seed = secrets.randbits(63) if body.seed is None else body.seed % (1 << 63)

    def streams(self) -> list[AsyncGenerator[Event]]:
        """Return the events of each prompt."""
        return [self._stream(place) for place in range(len(self.prompts))]

    async def _stream(self, place: int) -> AsyncGenerator[Event]:
        tools, body, ids, prompt = self._tools, self._body, self._ids[place], self.prompts[place]
        first, usage, model = place * body.choices, self.answer.usage, tools.engine.mdp.model
        usage.prompt += len(ids)
        text, pieces = "", list[Event]()
        if self.echo:
            text = prompt.content if isinstance(prompt.content, str) else ""
            tokens = []
            if self.top is not None:
                engine = tools.engine.mdp.tree.engine
                tokens = await run_in_threadpool(score, model, engine, ids, 0, self.top, self._is_gone)
            pieces = [prompt_piece(model, text, tokens, first + choice) for choice in range(body.choices)]
        if self.search is not None:
            searched_for = Prompt(prompt.content, self.search.columns, tuple(ids))
            events = searched(
                tools.engine, self.search, searched_for, body.choices, usage,
                top=self.top, streamed=bool(body.stream), first=first, shift=len(text),
            )  # fmt: skip
        elif self._most == 0:
            events = _nothing_more(first, body.choices)
        else:
            events = drawn(tools.sampler, self._drawings(place), usage, first=first, shift=len(text))
        async with contextlib.aclosing(events):
            async for event in events:
                yield event
                if isinstance(event, Begun):
                    for piece in pieces:
                        yield piece

    def _drawings(self, place: int) -> list[Drawing]:
        body, ids, limits = self._body, self._ids[place], self._tools.limits
        most = self._most
        if most is None:
            room = self._tools.engine.mdp.model.context_length - len(ids)
            most = _DEFAULT_COMPLETION if isinstance(body, CompletionBody) else min(limits.max_tokens, room)
        return [
            Drawing(
                prompt=tuple(ids),
                most=most,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=(self._seed, place, choice),
                stop=tuple(body.stop),
                bias=body.bias,
                presence=body.presence_penalty or 0.0,
                frequency=body.frequency_penalty or 0.0,
                constraints=self._constraints,
                top=self.top or 0,
            )
            for choice in range(body.choices)
        ]

    def _given_most(self) -> int | None:
        body, limit = self._body, self._tools.limits.max_tokens
        name, most = "max_tokens", body.max_tokens
        if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
            name, most = "max_completion_tokens", body.max_completion_tokens
        if most is not None and most > limit:
            raise invalid(name, f"at most {limit:,} tokens are written here, got {most:,}")
        return most

    def _given_top(self) -> int | None:
        body = self._body
        if isinstance(body, ChatBody):
            return (body.top_logprobs or 0) if body.logprobs else None
        asked = body.logprobs if isinstance(body, CompletionBody) else None
        return None if asked is None else min(asked, self._tools.engine.mdp.model.vocab_size)

    def _given_prompts(self) -> list[Prompt]:
        body, model = self._body, self._tools.engine.mdp.model
        try:
            if isinstance(body, ChatBody):
                roles = {"developer": "system"}  # its name in the templates of open models
                chat = [{"role": roles.get(m.role, m.role), "content": m.content} for m in body.messages]
                return [as_prompt(chat)]
            assert isinstance(body, CompletionBody)
            prompts = []
            for given in body.prompt:
                if isinstance(given, str):
                    prompts.append(as_prompt(given))
                else:
                    known = [token for token in given if 0 <= token < model.vocab_size]
                    prompts.append(Prompt(model.decode(known), token_ids=tuple(given)))
            return prompts
        except Exception as error:
            raise as_api_error(error, "messages" if isinstance(body, ChatBody) else "prompt") from error

    def _encoded(self, prompt: Prompt, most: int | None) -> list[int]:
        """Return a prompt's tokens.

        Raises:
            ApiError: There are too many, or one is unknown.
        """
        param = "messages" if isinstance(self._body, ChatBody) else "prompt"
        model, limits = self._tools.engine.mdp.model, self._tools.limits
        if prompt.token_ids is None:
            try:
                ids = model.encode(prompt.content, **prompt.template)
            except Exception as error:
                raise as_api_error(error, param) from error
        else:
            ids = list(prompt.token_ids)
            if not all(0 <= token < model.vocab_size for token in ids):
                raise invalid(param, f"token ids of {model.name!r} are from 0 to {model.vocab_size - 1}")
        if not ids:
            raise invalid(param, "it is empty; give some text to continue")
        if self.search is not None:
            most = self.search.decoder.mdp.max_new_tokens
        elif most is None:
            most = _DEFAULT_COMPLETION if isinstance(self._body, CompletionBody) else 1
        room = min(model.context_length - most, limits.prompt_tokens or model.context_length)
        if len(ids) > room:
            message = f"{len(ids):,} tokens; with {most:,} for the text, at most {max(room, 0):,} are taken"
            raise invalid(param, message, code="context_length_exceeded")
        return ids


async def _nothing_more(first: int, count: int) -> AsyncGenerator[Event]:
    yield Begun()
    for choice in range(first, first + count):
        yield End(choice, "length")


async def merged(streams: Sequence[AsyncGenerator[Event]]) -> AsyncGenerator[Event | None]:
    """Yield the events of several streams as they come; None after some time of silence.

    Raises:
        Exception: What the first stream that fails raises; the others are closed.
    """
    events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Event]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for event in stream:
                    events.put_nowait(event)
            events.put_nowait(None)
        except Exception as error:
            events.put_nowait(error)

    tasks, left = [asyncio.ensure_future(pump(stream)) for stream in streams], len(streams)
    try:
        while left:
            try:
                async with asyncio.timeout(_SILENCE):
                    event = await events.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Exception):
                raise event
            if event is None:
                left -= 1
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
