"""The search engine: one thread that owns a language model and advances many searches with it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np

from ...checks import check_integer, check_keywords
from ...envs.mdp import Completion, DecodingMDP, mdp_of
from ...errors import ConfigurationError, DeadlineError, EngineClosedError, InternalError, QueueFullError
from ...models.base import Engine, IntArray, LanguageModel
from ..search.budget import Budget
from ..search.loop import ActiveSearch, Progress, begin, step_each, turn
from ..search.plan import Plan
from ..search.request import Changes, Request, as_request
from ..search.state import Search
from .astar import AStarPlanner
from .decoder import Decoder, plan_of
from .registry import make_decoder

__all__ = ["SearchEngine", "SearchHandle"]

_MOST_PREFIXES = 1 << 14  # of all requests together, beside those of the live searches
_RECENT = 128  # requests whose prompts stay in memory
_HASTE = 8  # by which ticks are smaller while a search with a deadline has no text


@dataclass(eq=False)
class _Job:
    """A request on its way.

    Attributes:
        request: Of a prompt and a budget only; the decoder has its other settings.
        decoder: The decoder with these settings.
        submitted: When, by ``time.perf_counter()``.
        progress: Called after every step.
        future: The plan to be. A cancelled future ends the search.
        found: Ever better completions.
        changed: Notified when there is a better one, or the plan.
        listeners: Event loops that wait for these.
        is_abandoned: Whether nobody has the handle any more.
        is_stopped: Whether the search is to end with what it has.
        active: The search, while it runs.
    """

    request: Request
    decoder: Decoder
    submitted: float
    progress: Progress | None
    future: Future[Plan] = field(default_factory=Future)
    found: list[Completion] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    listeners: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=set)
    is_abandoned: bool = False
    is_stopped: bool = False
    active: ActiveSearch | None = None

    @property
    def is_unwanted(self) -> bool:
        return self.is_abandoned or self.future.cancelled()

    @property
    def is_late(self) -> bool:
        seconds = Budget.of(self.request.budget).seconds
        return seconds is not None and time.perf_counter() - self.submitted >= seconds

    @property
    def is_urgent(self) -> bool:
        """Whether it has a deadline and no text yet."""
        return self.active is not None and self.active.search.budget.seconds is not None and not self.found

    def begin(self) -> ActiveSearch:
        """Return a new search; a second call forgets the first one."""
        self.active = self.decoder.new_search(self.request, started=self.submitted)
        return self.active

    def tell(self, completion: Completion | None = None) -> None:
        """Wake all that wait, after entering a completion if there is one."""
        with self.changed:
            if completion is not None:
                self.found.append(completion)
            self.changed.notify_all()
            for loop, event in self.listeners:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(event.set)

    def finish(self, outcome: Plan | Exception) -> None:
        """Enter the plan or the error; a cancelled future stays cancelled."""
        self.active = None
        if self.future.set_running_or_notify_cancel():
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        self.tell()


class _RecentTexts:
    """Keeps the prompts and the best texts of the last searches in a language model's memory; see :class:`Engine`.

    Attributes:
        handle: int64 [n], their last prefixes.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._pairs = engine, deque[IntArray](maxlen=_RECENT)
        self.handle: IntArray = np.empty(0, dtype=np.int64)
        engine.register(self)

    def add(self, search: Search) -> None:
        """Enter a search in place of the oldest one."""
        tree = search.mdp.tree
        if tree.engine is not self._engine or not search.size:
            return
        with turn([search]):
            best = [row for (row, _), completion in search.completions.items() if completion is search.best]
            self._pairs.append(tree.handle[search.node[[0, *best]]])
            self.handle = np.unique(np.concatenate(self._pairs))


class SearchHandle:
    """A search that an engine runs.

    ``await handle`` and :meth:`result` give the plan. ``async for`` and ``for`` give ever better completions. The
    search ends before its next forward when it is cancelled, when a task that waits for it is cancelled, and when
    nobody has the handle any more.

    Attributes:
        request: The request.
    """

    def __init__(self, request: Request, job: _Job) -> None:
        """Watch a job."""
        self.request, self._job = request, job

    def result(self, timeout: float | None = None) -> Plan:
        """Wait for the plan.

        Args:
            timeout: In seconds; the search goes on after it. :class:`Budget` sets a deadline for the search itself.

        Raises:
            TimeoutError: The plan is not there in time.
            concurrent.futures.CancelledError: The search was cancelled.
            QStarError: The request failed.
        """
        try:
            return self._job.future.result(timeout)
        except KeyboardInterrupt:
            self.cancel()
            raise

    def cancel(self) -> bool:
        """End the search before its next forward; return False if the plan was there already."""
        cancelled = self._job.future.cancel()
        self._job.tell()
        return cancelled

    def stop(self) -> None:
        """End the search before its next forward, with a plan of what it has and ``stop_reason="interrupted"``."""
        self._job.is_stopped = True

    def done(self) -> bool:
        """Return whether there is a plan or an error, or the search was cancelled."""
        return self._job.future.done()

    def cancelled(self) -> bool:
        """Return whether the search was cancelled."""
        return self._job.future.cancelled()

    @property
    def best(self) -> Completion | None:
        """The best completion so far; it stays where a search is cancelled."""
        found = self._job.found
        return found[-1] if found else None

    def __await__(self) -> Generator[Any, None, Plan]:
        """Wait for the plan in an event loop; cancelling the task cancels the search."""
        return (yield from asyncio.wrap_future(self._job.future).__await__())  # a generator, which keeps the handle

    def __iter__(self) -> Iterator[Completion]:
        """Yield each completion that is better than all before it, as soon as it is found."""
        job, index = self._job, 0
        while True:
            with job.changed:
                while index == len(job.found) and not job.future.done():
                    job.changed.wait()
            while index < len(job.found):
                yield job.found[index]
                index += 1
            if job.future.done() and index == len(job.found):
                break
        if not job.future.cancelled():
            job.future.result()

    async def __aiter__(self) -> AsyncIterator[Completion]:
        """Yield each completion that is better than all before it; no thread waits."""
        job, index, event = self._job, 0, asyncio.Event()
        listener = asyncio.get_running_loop(), event
        with job.changed:
            job.listeners.add(listener)
        try:
            while True:
                event.clear()
                is_done = job.future.done()  # before the last look at what was found
                while index < len(job.found):
                    yield job.found[index]
                    index += 1
                if is_done:
                    break
                await event.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            with job.changed:
                job.listeners.discard(listener)
        if not job.future.cancelled():
            job.future.result()

    def __del__(self) -> None:
        """Let the engine drop the search."""
        self._job.is_abandoned = True


class SearchEngine:
    """Many searches on one language model, from any number of threads and event loops.

    One thread advances all live searches together. Each of its ticks asks the language model, the heuristics and the
    rewards once for all of them. A new request joins at the next tick. Each result equals that of the same request
    made alone, unless its budget has a deadline.

    Attributes:
        decoder: Serves the requests that name none.
        mdp: The process that requests differ from.
        ticks: Ticks so far.
    """

    def __init__(
        self,
        source: Any = "smollm2-135m-instruct",
        *,
        max_live: int = 32,
        max_waiting: int = 1024,
        tick_edges: int = 256,
        **settings: Any,
    ) -> None:
        """Make an engine; its thread runs only while there are requests.

        Args:
            source: A language model or its name (see :func:`~qstar_decoding.envs.load_language_model`), an environment,
                a :class:`DecodingMDP`, or the :class:`Decoder` that serves requests, by default an A* planner.
            max_live: The most searches that advance together; further requests wait.
            max_waiting: The most requests that wait.
            tick_edges: The most edges that all searches together follow in a tick. Each may follow an equal share, and
                at least one; a larger step takes several ticks. So a long search does not hold up a short one.
            settings: Of the process where ``source`` is a language model; see :class:`DecodingMDP`. ``max_prefixes``
                is 16,384 by default, for all requests together. The prompts and texts of the last 128 requests are
                kept beyond it, so that the next turn of a chat computes its new tokens only, as far as ``kv_budget``
                goes.

        Raises:
            ConfigurationError: An argument is out of range, or there are settings for an existing process.
        """
        self._max_live = check_integer("max_live", max_live)
        self._max_waiting = check_integer("max_waiting", max_waiting)
        self._tick_edges = check_integer("tick_edges", tick_edges)
        is_model = isinstance(source, (str, os.PathLike, LanguageModel))
        if is_model:
            check_keywords("SearchEngine", settings, inspect.signature(DecodingMDP).parameters.keys() - {"model"})
            settings.setdefault("max_prefixes", _MOST_PREFIXES)
        elif settings:
            raise ConfigurationError(
                f"{', '.join(sorted(settings))}: a {type(source).__name__} has its settings; "
                "give them with a language model, or with the requests"
            )
        if isinstance(source, Decoder):
            self.decoder = source
        else:
            self.decoder = AStarPlanner(DecodingMDP(source, **settings) if is_model else mdp_of(source))
        self.mdp, self.ticks = self.decoder.mdp, 0
        self._recent = _RecentTexts(self.mdp.tree.engine)
        self._named: dict[str, Decoder] = {}
        self._waiting: deque[_Job] = deque()
        self._live: list[_Job] = []
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def submit(
        self,
        request: Any,
        budget: Budget | int | None = None,
        *,
        progress: Progress | None = None,
        **changes: Unpack[Changes],
    ) -> SearchHandle:
        """Take a request and return at once.

        Seconds of its budget count from now, the time that it waits included. A request whose deadline passes while
        it waits fails with a :class:`DeadlineError`, and nothing is computed for it.

        This returns without waiting for a forward. A reward that is named for the first time is loaded, and a
        constraint prepared, before it returns; in an event loop, ``asyncio.to_thread`` keeps that from blocking it.

        Args:
            request: A :class:`Request`, or its prompt; see :meth:`Decoder.plan`.
            budget: Of a request that has none.
            progress: Called by the engine's thread after every step; an error there fails the request.
            changes: What the request leaves open.

        Raises:
            QueueFullError: ``max_waiting`` requests wait already.
            EngineClosedError: The engine was closed.
            ConfigurationError: A setting is unknown or out of range, or the decoder has another language model.
            PromptError: The prompt is empty or too long.
        """
        submitted, request = time.perf_counter(), as_request(request, budget, changes)
        decoder = self._decoder_of(request).with_changes(**request.changes)
        decoder.mdp.encode(request.prompt)  # too long a prompt is reported now
        job = _Job(Request(request.prompt, request.budget), decoder, submitted, progress)
        with self._lock:
            if self._is_closed:
                raise EngineClosedError("the search engine was closed; make a new one")
            if len(self._waiting) >= self._max_waiting:
                self._waiting = deque(waiting for waiting in self._waiting if not waiting.is_unwanted)
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(
                    f"{len(self._live)} searches run and {len(self._waiting)} requests wait, which is all that "
                    f"max_live={self._max_live} and max_waiting={self._max_waiting} allow; ask again later"
                )
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="qstar search engine", daemon=True)
                self._thread.start()
        return SearchHandle(request, job)

    @property
    def live(self) -> int:
        """Searches that run now."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Requests that wait now."""
        return len(self._waiting)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and return when those taken are done.

        Args:
            cancel: Whether they are cancelled first.
        """
        with self._lock:
            self._is_closed = True
            if cancel:
                for job in (*self._waiting, *self._live):
                    job.future.cancel()
            self._lock.wait_for(lambda: self._thread is None)

    def __enter__(self) -> Self:
        """Return the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; after an error, cancel what is not done."""
        self.close(cancel=error is not None)

    # -----------------------------------------------------------------------------------------------------------------

    def _decoder_of(self, request: Request) -> Decoder:
        asked = request.decoder
        if asked is None:
            return self.decoder
        if isinstance(asked, str):
            if asked not in self._named:
                decoder = make_decoder(asked, self.mdp)
                decoder.processes = self.decoder.processes  # so that all decoders share the trees of equal settings
                self._named[asked] = decoder
            return self._named[asked]
        if not isinstance(asked, Decoder):
            raise ConfigurationError(f"decoder is a name or a Decoder, got {asked!r}")
        if asked.mdp.model is not self.mdp.model:
            raise ConfigurationError(
                f"the engine searches with its own {self.mdp.model.name!r}, and the request's decoder has a model of "
                f"its own, {asked.mdp.model.name!r}; make the decoder with engine.mdp"
            )
        return asked

    def _run(self) -> None:
        """Tick until nothing is left to do."""
        try:
            while self._admit():
                self._tick()
        except BaseException as error:  # a fault of this package: nobody must wait for ever
            with self._lock:
                jobs, self._live, self._thread = [*self._live, *self._waiting], [], None
                self._waiting.clear()
                self._lock.notify_all()
            for job in jobs:
                job.finish(error if isinstance(error, Exception) else InternalError(repr(error)))
            raise

    def _admit(self) -> bool:
        """Begin the requests that there is room for; return False, and end the thread, if nothing is left to do."""
        with self._lock:
            unwanted = {job for job in (*self._live, *self._waiting) if job.is_unwanted}
            if unwanted:
                self._live = [job for job in self._live if job not in unwanted]
                self._waiting = deque(job for job in self._waiting if job not in unwanted)
            late = [job for job in self._waiting if job.is_late]
            if late:
                self._waiting = deque(job for job in self._waiting if job not in late)
            others = len(self._live) + len(self._waiting)
            room = self._max_live - len(self._live)
            new = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            self._live += new
            is_idle = not self._live
            if is_idle:
                self._thread = None
                self._lock.notify_all()
        for job in unwanted:
            job.future.cancel()
            job.active = None
            job.tell()
        for job in late:
            job.finish(
                DeadlineError(
                    f"the {Budget.of(job.request.budget).seconds:g} seconds of the request passed while it waited, "
                    f"with {others} other requests there; give it more seconds, or the engine a larger max_live"
                )
            )
        self._begin(new)
        return not is_idle

    def _begin(self, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        try:
            begin([job.begin().search for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                self._end(jobs[0], error)
            else:  # one of them is at fault
                for job in jobs:
                    self._begin([job])

    def _tick(self) -> None:
        """Let every live search take a step, or as much of it as its share of the tick allows."""
        jobs = [(job, job.active) for job in self._live if job.active is not None]
        if not jobs:
            return
        self.ticks += 1
        for job, active in jobs:
            if job.is_stopped:
                active.search.stop_reason = active.search.stop_reason or "interrupted"
        most = self._tick_edges // (_HASTE if any(job.is_urgent for job, _ in jobs) else 1)
        asked = step_each([active for _, active in jobs], max(most // len(jobs), 1))
        for (job, active), edges in zip(jobs, asked, strict=True):
            try:
                if isinstance(edges, Exception):
                    raise edges
                search = active.search
                if search.best is not None and (not job.found or search.best is not job.found[-1]):
                    job.tell(search.best)
                if edges is None:
                    self._recent.add(search)
                    self._end(job, plan_of(active))
                elif active.is_between_steps:
                    search.record()
                    if job.progress is not None:
                        job.progress(search)
            except Exception as error:
                self._end(job, error)

    def _end(self, job: _Job, outcome: Plan | Exception) -> None:
        with self._lock:
            self._live = [other for other in self._live if other is not job]
        job.finish(outcome)
