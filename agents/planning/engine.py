"""The search engine: one thread that owns a language model and advances many searches with it."""

from __future__ import annotations

import functools
import os
import threading
import time
import warnings
from collections import deque
from types import TracebackType
from typing import Any, NoReturn, Self, Unpack

import numpy as np

from ...checks import check_integer, check_keywords
from ...envs.mdp import mdp_of
from ...envs.steps import make_process, process_arguments
from ...errors import ConfigurationError, DeadlineError, EngineClosedError, InternalError, QueueFullError
from ...models.base import Engine, IntArray, LanguageModel
from ..search.budget import Budget
from ..search.handle import Job, SearchHandle
from ..search.loop import Progress, step_each, turn
from ..search.plan import Plan
from ..search.problem import Learner, keep_few_scores
from ..search.request import Changes, Request, as_request
from ..search.slow_rewards import SlowRewards
from ..search.state import NO_EDGES, Search
from .astar import AStarPlanner
from .decoder import Decoder, plan_of, take_lessons
from .registry import make_decoder

__all__ = ["SearchEngine", "SearchHandle"]

_MOST_PREFIXES = 1 << 14  # of all requests together, beside those of the live searches
_RECENT = 128  # requests whose prompts stay in memory
_HASTE = 8  # by which ticks are smaller while a search with a deadline has no text
_LEARNING_SECONDS = 0.02  # of a Q that learns while no search runs, before new requests are looked for


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


class SearchEngine:
    """Many searches on one language model, from any number of threads and event loops.

    One thread advances all live searches together. Each of its ticks asks the language model, the heuristics and the
    rewards once for all of them. A new request joins at the next tick. Each result equals that of the same request
    made alone, unless its budget has a deadline.

    A reward whose last call took 10 ms or more is asked in a thread of its own, while the other searches go on; a
    search waits for its own reward only. One thread at a time asks a reward.

    If a decoder has a learner, its Q learns between ticks, for no longer than the tick took, and while nothing runs.
    Results then depend on the order of the requests.

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
            check_keywords("SearchEngine", settings, {*process_arguments()} - {"model"})
            settings.setdefault("max_prefixes", _MOST_PREFIXES)
        elif settings:
            raise ConfigurationError(
                f"{', '.join(sorted(settings))}: a {type(source).__name__} has its settings; "
                "give them with a language model, or with the requests"
            )
        if isinstance(source, Decoder):
            self.decoder = source
        else:
            self.decoder = AStarPlanner(make_process(source, **settings) if is_model else mdp_of(source))
        if is_model and isinstance(settings.get("reward", ""), str):
            keep_few_scores(self.decoder.mdp.reward)
        self.mdp, self.ticks = self.decoder.mdp, 0
        self._recent, self._woken = _RecentTexts(self.mdp.tree.engine), threading.Event()
        self._rewards = SlowRewards(self._woken.set)
        self._named: dict[str, Decoder] = {}
        self._waiting: deque[Job] = deque()
        self._live: list[Job] = []
        self._learners: set[Learner] = set()  # those that have something to learn
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def __reduce__(self) -> NoReturn:
        """Say what to do instead: an engine is a thread of its process.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "a SearchEngine runs in a thread of its process and cannot be copied or pickled; make one in each process, "
            "as by SearchEngine(name, …), or pickle a planner, which can be"
        )

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
        budget = Budget.of(request.budget)
        start = functools.partial(decoder.new_search, Request(request.prompt, budget), started=submitted)
        job = Job(start, budget, submitted, progress)
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
            self._woken.set()
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
            is_idle = not self._live and (self._is_closed or not self._learners)
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
                    f"the {job.budget.seconds:g} seconds of the request passed while it waited, "
                    f"with {others} other requests there; give it more seconds, or the engine a larger max_live"
                )
            )
        for job in new:
            try:
                job.active = job.start()
            except Exception as error:
                self._end(job, error)
        return not is_idle

    def _tick(self) -> None:
        """Let every live search take a step, or as much of it as its share of the tick allows."""
        self._woken.clear()
        start = time.perf_counter()
        self._enter_rewards()
        jobs = [(job, job.active) for job in self._live if job.active is not None and job.active.awaited is None]
        if not jobs:  # all wait for slow rewards
            if not self._learn(_LEARNING_SECONDS):
                self._woken.wait(0.01)  # no longer, for a cancel wakes nobody
            return
        self.ticks += 1
        for job, active in jobs:
            if job.is_stopped:
                active.search.stop_reason = active.search.stop_reason or "interrupted"
        most = self._tick_edges // (_HASTE if any(job.is_urgent for job, _ in jobs) else 1)
        asked = step_each([active for _, active in jobs], max(most // len(jobs), 1), self._rewards)
        for (job, active), edges in zip(jobs, asked, strict=True):
            try:
                if isinstance(edges, Exception):
                    raise edges
                if edges is None:
                    job.tell_better(active.search)
                    self._recent.add(active.search)
                    self._end(job, plan_of(active))
                    if (learner := take_lessons([active])) is not None:
                        self._learners.add(learner)
                elif edges is NO_EDGES:  # it has begun
                    active.search.record()
                else:
                    job.report(active)
            except Exception as error:
                self._end(job, error)

        if not any(job.is_urgent for job, _ in jobs):
            self._learn(time.perf_counter() - start)

    def _learn(self, seconds: float) -> bool:
        """Let each Q learn for about so long, within its own share of the time; return whether any has learned."""
        learners = [*self._learners]
        for learner in learners:
            try:
                has_more = learner.learn(seconds)
            except Exception as error:
                warnings.warn(f"a Q stopped learning and stays as it is: {error}", RuntimeWarning, stacklevel=2)
                has_more = False
            if not has_more:
                self._learners.discard(learner)
        return bool(learners)

    def _enter_rewards(self) -> None:
        """Let the searches go on whose slow rewards have answered."""
        for job in self._live:
            active = job.active
            if active is not None and active.awaited is not None and active.awaited.rewards.done():
                try:
                    with turn([active.search]):
                        active.enter_rewards()
                    job.report(active)
                except Exception as error:
                    self._end(job, error)

    def _end(self, job: Job, outcome: Plan | Exception) -> None:
        with self._lock:
            self._live = [other for other in self._live if other is not job]
        job.finish(outcome)
