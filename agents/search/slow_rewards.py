"""Slow rewards, asked in threads beside the next forwards of the language model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from ...envs.mdp import Completion, DecodingMDP, Values
from ...envs.prompts import Prompt
from ...rewards import Reward

__all__ = ["SlowRewards"]

SLOW = 0.01  # seconds of a call from which on the next one runs in a thread


@dataclass(frozen=True)
class _Question:
    mdp: DecodingMDP
    prompts: list[Prompt]
    completions: list[Completion]
    future: Future[Values]


class SlowRewards:
    """Asks rewards, the slow ones in threads: one call at a time for each, with all texts that wait for it.

    A reward is slow if its last call took 10 ms or more.

    Attributes:
        on_answer: Called, in a thread of a reward, after every answer.
    """

    def __init__(self, on_answer: Callable[[], None]) -> None:
        """Ask nothing yet."""
        self.on_answer = on_answer
        self._seconds: WeakKeyDictionary[Reward, float] = WeakKeyDictionary()
        self._waiting: dict[Reward, list[_Question]] = {}  # a key for each reward that a thread is asking
        self._lock = threading.Lock()

    def are_slow(self, reward: Reward) -> bool:
        """Return whether a reward is to be asked in a thread."""
        return self._seconds.get(reward, 0.0) >= SLOW or reward in self._waiting

    def ask(self, mdp: DecodingMDP, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Values:
        """Return the rewards of ``n`` completions, float64 [n], and note how long that took."""
        start, scored = time.perf_counter(), mdp.reward.counters.scored
        values = mdp.rewards(prompts, [c.text for c in completions], [c.token_ids for c in completions])
        if mdp.reward.counters.scored > scored:  # an answer from the cache says nothing about the next one
            self._seconds[mdp.reward] = time.perf_counter() - start
        return values

    def ask_later(
        self, mdp: DecodingMDP, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> Future[Values]:
        """Ask in a thread; the future has what :meth:`ask` returns or raises."""
        question = _Question(mdp, [*prompts], [*completions], Future())
        with self._lock:
            is_asked = mdp.reward in self._waiting
            self._waiting.setdefault(mdp.reward, []).append(question)
        if not is_asked:
            threading.Thread(target=self._work, args=(mdp.reward,), name="qstar reward", daemon=True).start()
        return question.future

    def _work(self, reward: Reward) -> None:
        """Ask one reward until nothing waits for it."""
        while True:
            with self._lock:
                questions = self._waiting[reward]
                if not questions:
                    del self._waiting[reward]
                    return
                self._waiting[reward] = []
            try:
                self._answer(questions)
            except Exception:  # one of them is at fault
                for question in questions:
                    try:
                        self._answer([question])
                    except Exception as error:
                        question.future.set_exception(error)
            self.on_answer()

    def _answer(self, questions: Sequence[_Question]) -> None:
        prompts = [prompt for question in questions for prompt in question.prompts]
        completions = [completion for question in questions for completion in question.completions]
        values = self.ask(questions[0].mdp, prompts, completions)
        for question in questions:
            question.future.set_result(values[: len(question.prompts)])
            values = values[len(question.prompts) :]
