"""Handles of searches that an engine runs: their plans, their improvements, their end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ...envs.mdp import Completion
from .budget import Budget
from .loop import ActiveSearch, Progress
from .plan import Plan
from .request import Request
from .state import Search

__all__ = ["Job", "SearchHandle"]


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        start: Makes the search.
        budget: Of the search.
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

    start: Callable[[], ActiveSearch]
    budget: Budget
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
        """Whether nobody waits for the plan."""
        return self.is_abandoned or self.future.cancelled()

    @property
    def is_late(self) -> bool:
        """Whether its deadline has passed."""
        seconds = self.budget.seconds
        return seconds is not None and time.perf_counter() - self.submitted >= seconds

    @property
    def is_urgent(self) -> bool:
        """Whether it has a deadline and no text yet."""
        return self.active is not None and self.budget.seconds is not None and not self.found

    def tell(self, completion: Completion | None = None) -> None:
        """Wake all that wait, after entering a completion if there is one."""
        with self.changed:
            if completion is not None:
                self.found.append(completion)
            self.changed.notify_all()
            for loop, event in self.listeners:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(event.set)

    def tell_better(self, search: Search) -> None:
        """Enter the best completion if it is a new one."""
        if search.best is not None and (not self.found or search.best is not self.found[-1]):
            self.tell(search.best)

    def report(self, active: ActiveSearch) -> None:
        """Enter what a step has found, and call ``progress`` at its end."""
        self.tell_better(active.search)
        if active.is_between_steps:
            active.search.record()
            if self.progress is not None:
                self.progress(active.search)

    def finish(self, outcome: Plan | Exception) -> None:
        """Enter the plan or the error; a cancelled future stays cancelled."""
        self.active = None
        if self.future.set_running_or_notify_cancel():
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        self.tell()


class SearchHandle:
    """A search that an engine runs.

    ``await handle`` and :meth:`result` give the plan. ``async for`` and ``for`` give ever better completions. The
    search ends before its next forward when it is cancelled, when a task that waits for it is cancelled, and when
    nobody has the handle any more.

    Attributes:
        request: The request.
    """

    def __init__(self, request: Request, job: Job) -> None:
        """Watch a job of an engine."""
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
