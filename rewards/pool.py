"""Workers for slow rewards: several texts at a time in threads or processes, with a time limit per text."""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal, get_args

from ..checks import check_integer, check_number, first_line
from ..errors import ConfigurationError, RewardError, WorkerError
from ..processes import Limited, TimeLimitError
from .base import Reward
from .checking import shown
from .functions import RewardSpec, as_reward
from .types import Bounds, Column, Counts, Scores, Texts, TokenIds

__all__ = ["PooledReward"]

Workers = Literal["threads", "processes"]
_Call = tuple[list[str], list[str], list[Any] | None, dict[str, list[Any]]]  # the arguments of `score` for one text


class PooledReward(Reward):
    """A reward whose texts are scored by workers, each text by itself.

    Threads suit a reward that waits: for a service, a subprocess, a library that releases the interpreter's lock.
    Processes suit Python that computes. A text that takes longer than the limit is an error that names it, or gets the
    value of ``on_error``.

    A process over the limit is killed. A thread cannot be: it is left alone and goes on in the background, and a
    function that keeps the interpreter's lock in C code holds up everything. Only processes end such a function.
    """

    def __init__(
        self, reward: RewardSpec, *, workers: int = 4, kind: Workers = "threads", time_limit: float | None = None
    ) -> None:
        """Score by ``workers`` the texts of ``reward``.

        Args:
            reward: An argument of :func:`as_reward`; bounds, columns, ``on_error`` and the rest are its own.
            workers: The number of texts at a time.
            kind: ``"threads"`` or ``"processes"``. With processes a script needs ``if __name__ == "__main__":``.
            time_limit: Seconds that a text may take; None for any time. The start of a process does not count.

        Raises:
            ConfigurationError: An argument is out of range, or the reward cannot be sent to processes.
        """
        self.inner = inner = as_reward(reward)
        self.workers = check_integer("workers", workers)
        if kind not in get_args(Workers):
            raise ConfigurationError(f"kind is one of {get_args(Workers)}, got {kind!r}")
        self.kind = kind
        self.time_limit = None if time_limit is None else check_number("time_limit", time_limit, low=0, open_low=True)
        if kind == "processes":
            try:
                pickle.dumps(inner)
            except Exception as error:  # an object that cannot be pickled may raise anything
                raise ConfigurationError(
                    f"reward {inner.name!r} cannot be sent to other processes ({type(error).__name__}: {error}); "
                    "define its function in a module instead of as a lambda, or use kind='threads'"
                ) from error
        self.reads_token_ids = inner.reads_token_ids
        penalty = inner.penalty if inner.on_error == "penalty" else None
        super().__init__(
            name=inner.name, lower=inner.lower, upper=inner.upper, on_error=inner.on_error, penalty=penalty
        )
        self._processes: Limited | None = None

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Hand each text to a worker.

        Raises:
            RewardError: One took longer than the limit, or its process died.
        """
        calls = [
            (
                [prompts[i]],
                [completions[i]],
                None if completion_ids is None else [completion_ids[i]],
                {name: [values[i]] for name, values in columns.items()},
            )
            for i in range(len(completions))
        ]
        if self.kind == "processes" and self._processes is None:
            prepare = (_load, pickle.dumps(self.inner))
            self._processes = Limited(_score_loaded, seconds=self.time_limit, prepare=prepare, with_main=True)
        batch = _Batch(calls, self._score_one)
        try:
            limit = self.time_limit if self.kind == "threads" else None  # processes keep to it themselves
            late = batch.run(min(self.workers, len(calls)), limit)
        except BaseException:
            self.close()  # the other texts' scores are not needed any more
            raise
        if late is not None:
            raise self._too_long(calls[late], "Its thread cannot be ended and goes on; kind='processes' ends it.")
        return [batch.scores[i] for i in range(len(calls))]

    def score_prefixes(
        self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column
    ) -> Scores:
        """Ask the reward itself."""
        return self.inner.score_prefixes(prompts, completions, completion_ids, **columns)

    def bound_prefixes(
        self, prompts: Texts, completions: Texts, remaining: Counts, completion_ids: TokenIds = None, **columns: Column
    ) -> Bounds:
        """Ask the reward itself."""
        return self.inner.bound_prefixes(prompts, completions, remaining, completion_ids, **columns)

    @property
    def has_potential(self) -> bool:
        """Whether the reward itself has one."""
        return self.inner.has_potential

    @property
    def has_prefix_bounds(self) -> bool:
        """Whether the reward itself has any."""
        return self.inner.has_prefix_bounds

    def close(self) -> None:
        """Stop the processes; the next call starts new ones."""
        processes, self._processes = self._processes, None
        if processes is not None:
            processes.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything but the caches and the workers."""
        return {**super().__getstate__(), "_processes": None}

    def _score_one(self, call: _Call) -> float | None:
        if self.kind == "threads":
            return _score(self.inner, call)
        processes = self._processes
        if processes is None:
            raise RewardError(f"reward {self.name!r} was closed while it scored a text")
        try:
            score: float | None = processes(call)
        except TimeLimitError:
            raise self._too_long(call, "Its process was killed.") from None
        except WorkerError as error:
            raise RewardError(
                f"a process of reward {self.name!r} died at or before the completion {shown(call[1][0])}. It may have "
                "run out of memory; use fewer workers."
            ) from error
        return score

    def _too_long(self, call: _Call, outcome: str) -> RewardError:
        return RewardError(
            f"reward {self.name!r} took more than {self.time_limit:g} s for the completion {shown(call[1][0])}. "
            f"{outcome} Make it faster, raise time_limit, or let on_error='skip' or 'penalty' deal with such texts."
        )


class _Batch:
    """Texts that threads take up one after another; a thread that hangs is not waited for."""

    def __init__(self, calls: list[_Call], score: Any) -> None:
        self.scores: dict[int, float | None] = {}
        self._calls, self._score = calls, score
        self._next: Iterator[int] = itertools.count()
        self._begun: dict[int, float] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def run(self, workers: int, limit: float | None) -> int | None:
        """Score all texts; raise the first error, or return the number of the first text that takes too long."""
        for _ in range(workers):
            threading.Thread(target=self._work, daemon=True).start()
        with self._changed:
            try:
                while len(self.scores) < len(self._calls):
                    if self._error is not None:
                        raise self._error
                    now, left = time.perf_counter(), None
                    if limit is not None and self._begun:
                        first = min(self._begun, key=lambda i: self._begun[i])
                        left = self._begun[first] + limit - now
                        if left <= 0:
                            return first
                    self._changed.wait(left)
            finally:
                self._next = itertools.repeat(len(self._calls))  # nothing more is taken up
        return None

    def _work(self) -> None:
        while (i := next(self._next)) < len(self._calls):
            with self._changed:
                self._begun[i] = time.perf_counter()
                self._changed.notify()
            try:
                score = self._score(self._calls[i])
            except BaseException as error:
                with self._changed:
                    self._error = error if self._error is None else self._error
                    self._changed.notify()
                return
            with self._changed:
                del self._begun[i]
                self.scores[i] = score
                self._changed.notify()


def _score(reward: Reward, call: _Call) -> float | None:
    prompts, completions, completion_ids, columns = call
    values = reward.score(prompts, completions, completion_ids, **columns)
    if len(values) != 1:
        raise RewardError(f"reward {reward.name!r} returned {len(values)} value(s) for 1 completion")
    return values[0]


# ------------------------------------------------------------------------------------------------ in another process

_loaded: list[Reward] = []


def _load(reward: bytes) -> None:
    try:
        _loaded[:] = [pickle.loads(reward)]
    except Exception as error:
        raise ConfigurationError(
            f"the reward cannot be loaded in another process ({type(error).__name__}: {first_line(error)}); define it "
            "in a module that can be imported there, or use kind='threads'"
        ) from error


def _score_loaded(call: _Call) -> float | None:
    return _score(_loaded[0], call)
