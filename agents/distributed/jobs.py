"""Jobs, and the interface of the workers that run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["InProcess", "Job", "Workers"]


@dataclass(frozen=True, eq=False)
class Job:
    """One call of a method of the object that each worker holds.

    Attributes:
        method: The method's name.
        args: Its arguments; they are pickled where the worker is another process.
        name: Description for messages.
        group: Jobs of one group share work that a worker caches. They go to one worker as long as the others have
            enough to do.
        parts: Smaller jobs that make up this one. They replace it after a worker has died over it, so that only the
            part at fault fails in the end.
    """

    method: str
    args: tuple[Any, ...]
    name: str
    group: str = ""
    parts: tuple[Job, ...] = ()


class Workers(Protocol):
    """Processes that run jobs, each with an object of its own."""

    def run(
        self, jobs: Iterable[Job], *, keep_going: bool = False, started: Callable[[Job], None] | None = None
    ) -> Iterator[tuple[Job, Any]]:
        """Yield each job, or its parts, with the returned value, as soon as it is done; each exactly once.

        Args:
            jobs: The jobs.
            keep_going: Yield a job's exception in place of its result instead of raising it.
            started: Called when a job is handed to a worker, again if that has to be repeated.

        Raises:
            WorkerError: Every worker that ran a job died, or none could be started.
            Exception: A job raised it.
        """
        ...

    def share(self, value: Any) -> None:
        """Give every worker's object this value, through its method ``receive``, before its next job."""
        ...


class InProcess:
    """One worker: this process."""

    def __init__(self, held: Any) -> None:
        """Do jobs with the object ``held``."""
        self.held = held

    def run(
        self, jobs: Iterable[Job], *, keep_going: bool = False, started: Callable[[Job], None] | None = None
    ) -> Iterator[tuple[Job, Any]]:
        """See :class:`Workers`."""
        for job in jobs:
            if started is not None:
                started(job)
            try:
                result = getattr(self.held, job.method)(*job.args)
            except Exception as error:
                if not keep_going:
                    raise
                result = error
            yield job, result

    def share(self, value: Any) -> None:
        """See :class:`Workers`."""
        self.held.receive(value)
