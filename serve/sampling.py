"""Sampler: one thread that draws tokens for any number of requests, from the distribution over the whole vocabulary.

One file because drawing, scoring and the loop around them share the shapes of their outputs.

Searches look at the k likeliest tokens only. Plain sampling, as OpenAI defines it, draws from all of them. So it has a
loop of its own, which takes turns with the searches on the same language model and the same memory of prefixes.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..envs.constraints import Constraint, Rules, StopStrings
from ..errors import ConstraintError, EngineClosedError, InternalError
from ..models.base import BoolArray, Engine, IntArray, LanguageModel

__all__ = ["Drawing", "Drawn", "Sampler", "Step", "Token", "score"]

Logprobs = npt.NDArray[np.float64]

_SCORED = 64  # positions of a text that are scored in one forward
_COMPILED = 32  # sets of rules that are kept
_LOOKED_AT = 512  # of the likeliest tokens, before all others are sorted: 5 ms a text for a vocabulary of 49,152
_ROUNDING = 1e-5  # by which a sum of probabilities in float32 may be wrong
_RECENT = 128  # texts that stay in memory, so that the next turn of a chat computes its new tokens only


class Token(NamedTuple):
    """One token of a text.

    Attributes:
        id: The token.
        logprob: log π of it given all before, nats, over the whole vocabulary; None for the first of a text.
        top: The likeliest tokens at its place and their log π, the likeliest first; None for the first of a text.
    """

    id: int
    logprob: float | None
    top: list[tuple[int, float]] | None


class Step(NamedTuple):
    """One token drawn for one choice.

    Attributes:
        choice: The number of the choice.
        token: The token.
        text: The text so far, as far as no later token can change it; at the end all of it.
        finish: ``"stop"`` or ``"length"``; empty while the text goes on.
    """

    choice: int
    token: Token
    text: str
    finish: str


@dataclass(frozen=True)
class Drawing:
    """The settings of one text to draw.

    Attributes:
        prompt: Token ids.
        most: The most tokens.
        temperature: Of the softmax; 0 takes the likeliest token.
        top_p: The share of the smallest set of tokens that is drawn from.
        seed: Of the draws.
        stop: Strings that end the text.
        bias: By token, what is added to its logit.
        presence: What a token loses once it stands in the text.
        frequency: What a token loses for every time that it stands in the text.
        constraints: Conditions on the text.
        top: How many of the likeliest tokens are reported for each token.
    """

    prompt: tuple[int, ...]
    most: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: tuple[int, ...] = (0,)
    stop: tuple[str, ...] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    constraints: tuple[Constraint, ...] = ()
    top: int = 0

    @property
    def looks_at(self) -> int | None:
        """How many of the likeliest tokens are looked at first; None for all.

        The likeliest alone is enough at temperature 0. Up to temperature 1 the others are bounded by what is left of
        the probability, and hardly ever decide.
        """
        if self.bias or self.presence or self.frequency:
            return None
        if self.temperature == 0:
            return max(self.top, 1)
        return _LOOKED_AT if self.temperature <= 1 and not self.constraints else None


class Drawn:
    """Texts that a sampler draws: ``async for`` gives their tokens as they come.

    Closing the iterator, or cancelling the task that reads it, ends them before the next forward.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        """Wait for the tokens of ``count`` texts in an event loop."""
        self.is_cancelled = False
        self._loop, self._left = loop, count
        self._queue: asyncio.Queue[Step | Exception] = asyncio.Queue()

    def cancel(self) -> None:
        """End the texts."""
        self.is_cancelled = True

    def put(self, event: Step | Exception) -> None:
        """Hand over a token or an error; called by the sampler's thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:  # the loop is closed
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Step]:
        """Yield the tokens of all texts, each text's in order.

        Raises:
            QStarError: A text could not be drawn.
        """
        try:
            while self._left:
                event = await self._queue.get()
                if isinstance(event, Exception):
                    raise event
                self._left -= bool(event.finish)
                yield event
        finally:
            self.cancel()


@dataclass(eq=False)
class _Job:
    choice: int
    drawing: Drawing
    out: Drawn
    rules: Rules | None
    stop: StopStrings
    ends: frozenset[int]
    rng: np.random.Generator
    ids: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    handle: int = -1


class Sampler:
    """Draws texts of one language model, all that are asked for in one forward a token.

    Attributes:
        handle: The prefixes that its texts, and the last ones before them, have reached, int64 [texts]; the engine
            keeps these.
    """

    def __init__(self, model: LanguageModel, engine: Engine, *, max_live: int = 32) -> None:
        """Draw on a language model.

        Args:
            model: The model.
            engine: Its engine, shared with the searches.
            max_live: The most texts that advance together; others wait.
        """
        self.model, self._engine, self._max_live = model, engine, max_live
        self._live: list[_Job] = []
        self._recent = deque[int](maxlen=_RECENT)
        self._is_closed = False
        self._waiting: deque[_Job] = deque()
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._compiled: OrderedDict[object, Rules] = OrderedDict()
        self._compiling = threading.Lock()
        self._every = np.ones(model.vocab_size, dtype=bool)
        with model.lock:
            engine.register(self)

    @property
    def handle(self) -> IntArray:
        """See the class."""
        live = [job.handle for job in self._live if job.handle >= 0]
        return np.array([*live, *self._recent], dtype=np.int64)

    @property
    def live(self) -> int:
        """Texts that are drawn now."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Texts that wait now."""
        return len(self._waiting)

    def compile(self, drawings: Sequence[Drawing]) -> None:
        """Bind the constraints to the model's tokens, which takes time, so that :meth:`submit` takes none.

        Raises:
            ConfigurationError: The model's tokens cannot satisfy one.
        """
        for drawing in drawings:
            self._rules(drawing, StopStrings(drawing.stop))

    def submit(self, drawings: Sequence[Drawing], loop: asyncio.AbstractEventLoop) -> Drawn:
        """Begin to draw texts, and return at once.

        Raises:
            ConfigurationError: See :meth:`compile`.
            EngineClosedError: The sampler was closed.
        """
        out, jobs = Drawn(loop, len(drawings)), []
        for choice, drawing in enumerate(drawings):
            stop = StopStrings(drawing.stop)
            rules = self._rules(drawing, stop)
            ends = frozenset({*self.model.eos_token_ids, *stop.token_ids(self.model)})
            jobs.append(_Job(choice, drawing, out, rules, stop, ends, np.random.default_rng(drawing.seed)))
        with self._lock:
            if self._is_closed:
                raise EngineClosedError("the sampler was closed")
            self._waiting.extend(jobs)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="qstar sampler", daemon=True)
                self._thread.start()
        return out

    def _rules(self, drawing: Drawing, stop: StopStrings) -> Rules | None:
        if not drawing.constraints:
            return None
        key = drawing.constraints, drawing.stop
        with self._compiling:
            rules = self._compiled.pop(key, None) or Rules(list(drawing.constraints), self.model, stop)
            self._compiled[key] = rules
            while len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        return rules

    def _run(self) -> None:
        try:
            while self._admit():
                self._advance(self._live)
        except BaseException as error:  # a fault of this package: nobody must wait for ever
            with self._lock:
                jobs, self._live, self._thread = [*self._live, *self._waiting], [], None
                self._waiting.clear()
                self._lock.notify_all()
            for job in jobs:
                job.out.put(error if isinstance(error, Exception) else InternalError(repr(error)))
            raise

    def _admit(self) -> bool:
        """Begin the texts that there is room for; return False, and end the thread, if nothing is left to do."""
        with self._lock:
            self._live = [job for job in self._live if not job.out.is_cancelled]
            while self._waiting and len(self._live) < self._max_live:
                job = self._waiting.popleft()
                if not job.out.is_cancelled:
                    self._live.append(job)
            if not self._live:
                self._thread = None
                self._lock.notify_all()
            return bool(self._live)

    def close(self) -> None:
        """End all texts, take no more, and return when the thread has ended."""
        with self._lock:
            self._is_closed = True
            for job in (*self._live, *self._waiting):
                job.out.cancel()
            self._lock.wait_for(lambda: self._thread is None)

    def _advance(self, jobs: Sequence[_Job]) -> None:
        """Draw the next token of each text; an error is told to the one text that it is about."""
        try:
            self._step(jobs)
        except Exception as error:
            if len(jobs) == 1:
                self._end(jobs[0])
                jobs[0].out.put(error)
            else:
                for job in jobs:
                    self._advance([job])

    def _step(self, jobs: Sequence[_Job]) -> None:
        jobs = sorted(jobs, key=lambda job: job.handle >= 0)  # prompts come first
        vocabulary = self.model.vocab_size
        uniform = [job.rng.random() for job in jobs]
        with self.model.lock:
            sizes = [min(job.drawing.looks_at or vocabulary, vocabulary) for job in jobs]
            handles, outputs = self._compute(jobs, sizes)
            places = [
                _draw(job.drawing, number, job.counts, tokens, logprobs, is_all=len(tokens) == vocabulary)
                for job, number, (tokens, logprobs) in zip(jobs, uniform, outputs, strict=True)
            ]
            undecided = [i for i, place in enumerate(places) if place is None]
            if undecided:
                _, again = self._compute([jobs[i] for i in undecided], [vocabulary] * len(undecided))
                for i, (tokens, logprobs) in zip(undecided, again, strict=True):
                    job, outputs[i] = jobs[i], (tokens, logprobs)
                    places[i] = _draw(job.drawing, uniform[i], job.counts, tokens, logprobs, is_all=True)
            for job, handle in zip(jobs, handles, strict=True):
                job.handle = handle
        for job, place, (tokens, logprobs) in zip(jobs, places, outputs, strict=True):
            try:
                self._take(job, place, tokens, logprobs)
            except Exception as error:  # it has not spoiled the others
                self._end(job)
                job.out.put(error)

    def _compute(self, jobs: Sequence[_Job], sizes: Sequence[int]) -> tuple[list[int], list[tuple[IntArray, Logprobs]]]:
        """Return the prefixes that texts have reached, and as many of the likeliest next tokens as are asked for."""
        going = [job for job in jobs if job.handle >= 0]
        # A mask that allows everything keeps the engine from remembering outputs as wide as the vocabulary.
        allowed: list[BoolArray | None] = [job.rules.allowed(job.ids) if job.rules else self._every for job in jobs]
        handles, (_, tokens, logprobs) = self._engine.compute(
            [job.drawing.prompt for job in jobs if job.handle < 0],
            np.array([job.handle for job in going], dtype=np.int64),
            np.array([job.ids[-1] for job in going], dtype=np.int64),
            max(sizes),
            allowed,
        )
        rows = zip(tokens, logprobs.astype(np.float64), sizes, strict=True)
        return handles.tolist(), [(some[:size], logprob[:size]) for some, logprob, size in rows]

    def _take(self, job: _Job, place: int | None, tokens: IntArray, logprobs: Logprobs) -> None:
        drawing = job.drawing
        if place is None:
            text = self.model.decode_continuation(job.ids)
            raise ConstraintError(f"the constraint leaves nothing to write after {text!r}; allow more")
        token = int(tokens[place])
        # What the rules forbid has no place among the alternatives.
        seen = [(int(t), _finite(p)) for t, p in zip(tokens[: drawing.top], logprobs, strict=False) if p > -np.inf]
        job.ids.append(token)
        job.counts[token] += 1
        text, finish = self.model.decode_continuation(job.ids), ""
        if token in job.ends:
            text, finish = self.model.decode_continuation(job.ids[:-1]), "stop"
        elif (cut := job.stop.cut(text)) is not None:
            text, finish = cut, "stop"
        elif len(job.ids) >= drawing.most:
            finish = "length"
        if finish:
            self._end(job)
        else:
            text = job.stop.settled(text)
        job.out.put(Step(job.choice, Token(token, _finite(logprobs[place]), seen), text, finish))

    def _end(self, job: _Job) -> None:
        with self._lock:
            self._live = [other for other in self._live if other is not job]
            if job.handle >= 0:
                self._recent.append(job.handle)


def _draw(
    drawing: Drawing,
    uniform: float,
    counts: Mapping[int, int],
    tokens: IntArray,
    logprobs: Logprobs,
    *,
    is_all: bool,
) -> int | None:
    """Return the place of the token that is drawn among the likeliest; None where that depends on the others.

    Args:
        drawing: The settings.
        uniform: A random number from 0 to 1.
        counts: How often each token stands in the text.
        tokens: int64 [k], the likeliest tokens, the likeliest first.
        logprobs: float64 [k], nats, of the softmax over the vocabulary.
        is_all: Whether there are no others.
    """
    if logprobs[0] == -np.inf:
        return None  # nothing may follow
    logits = logprobs.copy()
    changes = Counter(drawing.bias)
    for token, count in counts.items() if drawing.presence or drawing.frequency else ():
        changes[token] -= drawing.presence + count * drawing.frequency  # type: ignore[assignment]
    if changes:
        place = np.empty(len(tokens), dtype=np.int64)
        place[tokens] = np.arange(len(tokens))
        logits[place[list(changes)]] += np.array(list(changes.values()))
    if drawing.temperature == 0:
        return int(logits.argmax())
    power, first = 1 / drawing.temperature, logits.max()
    order = np.argsort(-logits, kind="stable")
    mass = np.exp((logits[order] - first) * power).cumsum()
    least = most = 0.0  # what all other tokens together weigh
    if not is_all:
        # A token of probability p ≤ p_k weighs p^(1/T) ≤ p · p_k^(1/T - 1) for T ≤ 1, and just that for T = 1.
        left, unit = 1 - float(np.exp(logprobs).sum()), float(np.exp(logprobs[-1] * (power - 1) - first * power))
        least = max(left - _ROUNDING, 0.0) * unit * (power == 1)
        most = max(left + _ROUNDING, 0.0) * unit
    found = {_pick(mass, float(mass[-1]) + more, drawing.top_p, uniform) for more in (least, most)}
    decided = found.pop()
    return None if found or decided is None else int(order[decided])


def _pick(mass: Logprobs, total: float, top_p: float, uniform: float) -> int | None:
    """Return the place that a random number falls at, given the cumulative mass and its total; None beyond the end."""
    weight = total
    if top_p < 1:  # the smallest set with this share, and at least one token
        last = int(np.searchsorted(mass, top_p * total))
        if last == len(mass):
            return None
        weight = float(mass[last])
    found = int(np.searchsorted(mass, uniform * weight, side="right"))
    # Several tokens may weigh nothing at the end; the first of them is the last that can be drawn.
    return min(found, int(np.searchsorted(mass, weight))) if found < len(mass) or weight <= mass[-1] else None


def score(
    model: LanguageModel,
    engine: Engine,
    ids: Sequence[int],
    start: int,
    top: int,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> list[Token]:
    """Return the tokens of a text from ``start`` on, with their log-probabilities given all before them.

    Args:
        model: The language model.
        engine: Its engine.
        ids: The text, prompt included.
        start: The first token that is asked for.
        top: How many of the likeliest tokens are reported at each place.
        is_cancelled: Asked before every forward; True ends it with what there is.
    """
    found = [Token(int(ids[0]), None, None)] if start == 0 and ids else []
    every = np.ones(model.vocab_size, dtype=bool)
    nothing = np.empty(0, dtype=np.int64)
    for first in range(max(start, 1), len(ids), _SCORED):
        if is_cancelled():
            break
        places = range(min(first + _SCORED, len(ids)) - 1, first - 1, -1)  # the longest first: the others are parts
        prefixes = [tuple(ids[:place]) for place in places]
        alone = []
        for place in places:
            alone.append(mask := np.zeros(model.vocab_size, dtype=bool))
            mask[ids[place]] = True
        # Every prefix is asked for twice: which tokens are likeliest there, and how likely its own next token is.
        asked = [*prefixes, *prefixes] if top else prefixes
        masks: list[BoolArray | None] = [*alone, *([every] * len(prefixes) if top else [])]
        with model.lock:
            _, outputs = engine.compute(asked, nothing, nothing, max(top, 1), masks)
        rows = []
        for row, place in enumerate(places):
            likeliest = []
            if top:
                other = row + len(prefixes)
                pairs = zip(outputs.tokens[other].tolist(), outputs.logprobs[other].tolist(), strict=True)
                likeliest = [(token, _finite(logprob)) for token, logprob in pairs]
            rows.append(Token(int(ids[place]), _finite(outputs.logprobs[row, 0]), likeliest))
        found += reversed(rows)
    return found


def _finite(logprob: float) -> float:
    """Return a log-probability as OpenAI writes that of what is impossible: a number."""
    return max(float(logprob), -9999.0)
