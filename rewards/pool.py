"""Workers for slow rewards: several texts at a time in threads or processes, with a time limit per text."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Literal, get_args

from ..checks import check_integer, check_number
from ..errors import ConfigurationError, RewardError
from .base import Reward
from .checking import shown
from .functions import RewardSpec, as_reward
from .types import Bounds, Column, Counts, Scores, Texts, TokenIds

__all__ = ["PooledReward"]

Workers = Literal["threads", "processes"]


class PooledReward(Reward):
    """A reward whose texts are scored by workers, each text by itself.

    Threads suit a reward that waits (for a service, a subprocess, a library that releases the interpreter's lock);
    processes suit Python that computes. A text that takes longer than the limit is an error that names it, or what
    ``on_error`` makes of it. A process that hangs is killed; a thread cannot be, and goes on in the background.
    """

    def __init__(
        self,
        reward: RewardSpec,
        *,
        workers: int = 4,
        kind: Workers = "threads",
        time_limit: float | None = None,
    ) -> None:
        """Score by ``workers`` what ``reward`` scores.

        Args:
            reward: What :func:`as_reward` takes; bounds, columns, ``on_error`` and the rest are its own.
            workers: How many at a time.
            kind: ``"threads"`` or ``"processes"``.
            time_limit: Seconds that a text may take; None for as long as it likes.

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
            except Exception as error:  # whatever cannot be pickled raises whatever it likes
                raise ConfigurationError(
                    f"reward {inner.name!r} cannot be sent to other processes ({type(error).__name__}: {error}); "
                    "define its function in a module instead of as a lambda, or use kind='threads'"
                ) from error
        self.reads_token_ids = inner.reads_token_ids
        penalty = inner.penalty if inner.on_error == "penalty" else None
        super().__init__(
            name=inner.name, lower=inner.lower, upper=inner.upper, on_error=inner.on_error, penalty=penalty
        )
        self._executor: Executor | None = None

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
        # As many at a time as there are workers, so that a text's time begins when somebody takes it up.
        scores: list[float | None] = []
        for start in range(0, len(calls), self.workers):
            part = calls[start : start + self.workers]
            begun = time.perf_counter()
            futures = [self._pool().submit(_score, self.inner, call) for call in part]
            for call, future in zip(part, futures, strict=True):
                scores.append(self._result(future, call[1][0], begun))
        return scores

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
        """Stop the workers; the next call starts new ones."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        processes = list((getattr(executor, "_processes", None) or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything but what has been remembered and the workers."""
        return {**super().__getstate__(), "_executor": None}

    def _pool(self) -> Executor:
        if self._executor is None:
            # Spawned, not forked: a fork of a process with threads, as PyTorch's are, may hang.
            self._executor = (
                ThreadPoolExecutor(self.workers)
                if self.kind == "threads"
                else ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
            )
        return self._executor

    def _result(self, future: Future[float | None], completion: str, begun: float) -> float | None:
        left = None if self.time_limit is None else max(self.time_limit - (time.perf_counter() - begun), 0.0)
        try:
            return future.result(left)
        except FutureTimeoutError:
            self.close()
            raise RewardError(
                f"reward {self.name!r} took more than {self.time_limit:g} s for the completion {shown(completion)}. "
                "Make it faster, raise time_limit, or let on_error='skip' or 'penalty' deal with such texts."
            ) from None
        except BrokenProcessPool as error:
            self.close()
            raise RewardError(
                f"a process of reward {self.name!r} died at or before the completion {shown(completion)}. It may have "
                "run out of memory; use fewer workers."
            ) from error
        except BaseException:
            self.close()  # what others are doing is of no use any more
            raise


def _score(reward: Reward, call: tuple[Any, Any, Any, dict[str, Any]]) -> float | None:
    prompts, completions, completion_ids, columns = call
    values = reward.score(prompts, completions, completion_ids, **columns)
    if len(values) != 1:
        raise RewardError(f"reward {reward.name!r} returned {len(values)} value(s) for 1 completion")
    return values[0]
