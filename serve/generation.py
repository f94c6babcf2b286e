"""Generation: the texts of one prompt as a stream of events, whether they are drawn or searched for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from ..agents.planning.engine import SearchEngine, SearchHandle
from ..agents.search.plan import Plan
from ..agents.search.request import Request
from ..agents.search.state import Search as SearchState
from ..envs.mdp import Completion
from ..envs.prompts import Prompt
from ..errors import InternalError
from ..files import to_jsonable
from ..models.base import LanguageModel
from .bodies import as_api_error, invalid
from .catalogue import Search
from .sampling import Drawing, Sampler, Token, score
from .settling import settled_text

__all__ = ["Begun", "End", "Event", "Improvement", "Piece", "Usage", "drawn", "prompt_piece", "searched"]

_HALF = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """A further piece of a choice's text, with the tokens that begin in it, as far as they are asked for."""

    choice: int
    text: str
    tokens: list[tuple[Token, int]] = field(default_factory=list)  # each with the place in the text where it begins


@dataclass(frozen=True)
class End:
    """The end of a choice: ``"stop"`` or ``"length"``, and what is known of the text where it was searched for."""

    choice: int
    finish: str
    report: dict[str, Any] | None = None


@dataclass(frozen=True)
class Improvement:
    """A better text that a search has found on its way."""

    report: dict[str, Any]


@dataclass
class Usage:
    """What a request has used so far.

    Attributes:
        prompt: Tokens of the prompts.
        completion: Tokens of the texts.
        search: What the searches used; None without any.
    """

    prompt: int = 0
    completion: int = 0
    search: dict[str, float] | None = None


@dataclass(frozen=True)
class Begun:
    """The first event: nothing is wrong with the request."""


Event = Begun | Piece | End | Improvement


class _Text:
    """The text of one choice as it grows: which part was sent, and where each token begins."""

    def __init__(self, model: LanguageModel, choice: int, shift: int = 0) -> None:
        self._model, self._choice, self._shift, self.sent = model, choice, shift, ""
        self.tokens: list[tuple[Token, int]] = []
        self._told = 0
        self._end = self._base = 0
        self._buffer: list[int] = []  # the tokens of a character that is not complete

    def add(self, token: Token) -> None:
        """Note a token, which begins where the text so far ends."""
        self.tokens.append((token, self._end))
        self._buffer.append(token.id)
        text = self._model.decode_continuation(self._buffer)
        whole = text.rstrip(_HALF)
        self._end = self._base + len(whole)
        if whole == text:
            self._base, self._buffer = self._end, []

    def piece(self, text: str) -> Piece | None:
        """Return what is new in a longer text; None where nothing is.

        Raises:
            InternalError: The text does not begin with what was sent.
        """
        if not text.startswith(self.sent):
            if self.sent.startswith(text):
                return None
            raise InternalError(f"the text {text[:80]!r} does not begin with {self.sent[:80]!r}, which was sent")
        new, self.sent = text[len(self.sent) :], text
        first = self._told
        while self._told < len(self.tokens) and self.tokens[self._told][1] < len(text):
            self._told += 1
        tokens = [(token, place + self._shift) for token, place in self.tokens[first : self._told]]
        return Piece(self._choice, new, tokens) if new or tokens else None


async def drawn(
    sampler: Sampler, drawings: Sequence[Drawing], usage: Usage, *, first: int = 0, shift: int = 0
) -> AsyncGenerator[Event]:
    """Yield the events of texts that are drawn; each token goes out as soon as no later one can change its text.

    Args:
        sampler: Draws them.
        drawings: The settings of each text.
        usage: Counts what is used.
        first: Number of the first choice.
        shift: Length of the text before them.
    """
    texts = [_Text(sampler.model, first + choice, shift) for choice in range(len(drawings))]
    await run_in_threadpool(sampler.compile, drawings)
    steps = sampler.submit(drawings, asyncio.get_running_loop())
    try:
        yield Begun()
        async for step in steps:
            usage.completion += 1
            texts[step.choice].add(step.token)
            if piece := texts[step.choice].piece(step.text):
                yield piece
            if step.finish:
                yield End(first + step.choice, step.finish)
    finally:
        steps.cancel()


async def searched(
    engine: SearchEngine,
    search: Search,
    prompt: Prompt,
    count: int,
    usage: Usage,
    *,
    top: int | None,
    streamed: bool,
    first: int = 0,
    shift: int = 0,
) -> AsyncGenerator[Event]:
    """Yield the events of texts that are searched for.

    Args:
        engine: Runs the search.
        search: The search.
        prompt: The prompt.
        count: How many texts; fewer come where the search has found fewer.
        usage: Counts what is used.
        top: How many alternatives of each token are reported; None for no tokens.
        streamed: Whether text is wanted as soon as it is settled.
        first: Number of the first choice.
        shift: Length of the text before them.
    """
    mdp, loop = search.decoder.mdp, asyncio.get_running_loop()
    news: asyncio.Queue[str | Completion | None] = asyncio.Queue()
    told = best = ""

    def progress(state: SearchState) -> None:
        nonlocal told, best
        if search.improvements and state.best is not None and state.best.text != best:
            best = state.best.text
            loop.call_soon_threadsafe(news.put_nowait, state.best)
        if streamed and len(text := settled_text(state, search.decoder)) > len(told):
            told = text
            loop.call_soon_threadsafe(news.put_nowait, text)

    watched = progress if streamed or search.improvements else None
    request = Request(prompt, search.budget, decoder=search.decoder)
    handle = await run_in_threadpool(engine.submit, request, progress=watched)
    waiting = asyncio.ensure_future(_result(handle))
    waiting.add_done_callback(lambda _: news.put_nowait(None))
    texts = [_Text(mdp.model, first + choice, shift) for choice in range(count)]
    try:
        yield Begun()
        while (new := await news.get()) is not None:
            if isinstance(new, Completion):
                yield Improvement(to_jsonable({name: getattr(new, name) for name in ("text", "objective", "reward")}))
                continue
            if piece := texts[0].piece(new):  # of the others nothing is settled before the end
                yield piece
        try:
            plan = await waiting
        except Exception as error:
            raise as_api_error(error, "qstar") from error
        if plan.usage.reward_calls and not plan.completions:
            message = f"the reward {mdp.reward.name!r} scores no text here; it may read a field of the prompt"
            raise invalid("qstar.columns", f"{message}, such as qstar.columns.keywords")
        completions = _proposed(plan, count)
        used = plan.usage
        spent = {"lm_tokens": used.lm_tokens, "lm_forwards": used.lm_forwards, "reward_calls": used.reward_calls}
        before = usage.search or {}
        usage.search = {n: before.get(n, 0) + v for n, v in {**spent, "seconds": round(used.seconds, 6)}.items()}
        parts = await run_in_threadpool(_parts, search, prompt, completions)
        for choice, completion in enumerate(completions):
            usage.completion += len(completion.token_ids)
            if top is not None:
                ids = [*mdp.encode(prompt), *completion.token_ids]
                start = len(ids) - len(completion.token_ids)
                scored = await run_in_threadpool(score, mdp.model, mdp.tree.engine, ids, start, top)
                for token in scored:
                    texts[choice].add(token)
            if piece := texts[choice].piece(completion.text):
                yield piece
            report = _report(search, plan, completion, parts[choice], choice)
            yield End(first + choice, "length" if completion.stop in ("length", "partial") else "stop", report)
    finally:
        handle.cancel()
        waiting.cancel()


async def _result(handle: SearchHandle) -> Plan:
    return await handle


def _proposed(plan: Plan, count: int) -> list[Completion]:
    """Return the text that the decoder proposes, then the best of the others."""
    first = Completion(plan.text, plan.token_ids, plan.logprob, plan.reward, plan.objective, plan.stop)
    others = [c for c in plan.best(count) if c.text.strip() != first.text.strip()] if count > 1 else []
    return [first, *others[: count - 1]]


def _parts(search: Search, prompt: Prompt, completions: Sequence[Completion]) -> list[dict[str, float]]:
    """Return the parts of each text's reward by name; none where the reward was not asked."""
    mdp = search.decoder.mdp
    scored = [completion for completion in completions if completion.reward == completion.reward]
    if not scored:
        return [{} for _ in completions]
    columns = mdp.components([prompt] * len(scored), scored)
    values = iter([{name: float(column[i]) for name, column in columns.items()} for i in range(len(scored))])
    return [next(values) if completion.reward == completion.reward else {} for completion in completions]


def _report(search: Search, plan: Plan, completion: Completion, parts: dict[str, float], choice: int) -> dict[str, Any]:
    mdp = search.decoder.mdp
    report = {
        "objective": completion.objective,
        "reward": completion.reward,
        "parts": parts,
        "logprob": completion.logprob,
        "lower_bound": plan.lower_bound,
        "upper_bound": plan.upper_bound,
        "gap": plan.gap,
        "certified": plan.certified and choice == 0,
        "scope": plan.scope,
        "stop": completion.stop,
        "stop_reason": plan.stop_reason,
        "decoder": search.name,
        "reward_spec": mdp.reward.name,
        "logprob_weight": mdp.logprob_weight,
        "lm_tokens": plan.usage.lm_tokens,
    }
    result: dict[str, Any] = to_jsonable(report)
    return result


def prompt_piece(model: LanguageModel, text: str, tokens: Sequence[Token], choice: int) -> Piece:
    """Return a prompt as the first piece of an echo, with its scored tokens."""
    places = _Text(model, choice)
    for token in tokens:
        places.add(token)
    return Piece(choice, text, places.tokens)
