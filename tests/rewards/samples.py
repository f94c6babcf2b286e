"""Small rewards and data that several tests of rewards share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qstar_decoding.rewards import Reward, as_reward
from qstar_decoding.rewards.library.language import Pair

inf = math.inf


class Recorder(Reward):
    """Scores a text by its length, a prefix by half of that, and records what it was asked."""

    name, lower, upper = "recorder", 0.0, 1000.0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[list[str]] = []

    def score(self, prompts, completions, completion_ids=None, **columns):  # type: ignore[no-untyped-def]
        self.asked.append(list(completions))
        return [len(text) for text in completions]

    def score_prefixes(self, prompts, completions, completion_ids=None, **columns):  # type: ignore[no-untyped-def]
        self.asked.append(list(completions))
        return [len(text) / 2 for text in completions]


class Returning(Reward):
    """Returns what it is told to, whatever the texts."""

    name, lower, upper = "told", -1.0, 1.0

    def __init__(self, returned: Any, **options: Any) -> None:
        super().__init__(**options)
        self.returned = returned

    def score(self, prompts, completions, completion_ids=None, **columns):  # type: ignore[no-untyped-def]
        return self.returned

    score_prefixes = score


class Picky(Reward):
    """Scores 1, and raises ZeroDivisionError on a batch with a text that says "bad"."""

    name, lower, upper = "picky", 0.0, 1.0

    def score(self, prompts, completions, completion_ids=None, **columns):  # type: ignore[no-untyped-def]
        return [1 / ("bad" not in text) for text in completions]

    score_prefixes = score


def constant(value: float | None, name: str = "constant", lower: float = -inf, upper: float = inf) -> Reward:
    def score(completions: Sequence[str], **columns: Any) -> list[float | None]:
        return [value] * len(completions)

    score.__name__ = name
    return as_reward(score, lower=lower, upper=upper)


def call(reward: Reward, *completions: str, **columns: Any) -> list[float]:
    values = reward(["p"] * len(completions), completions, **columns)
    assert values.dtype == np.float64
    assert values.shape == (len(completions),)
    return values.tolist()  # type: ignore[no-any-return]


def half_length(prompt: str, completion: str) -> float:
    return len(completion) / 2


def gym_entries():
    import reasoning_gym

    data = {name: reasoning_gym.create_dataset(name, size=1, seed=0) for name in ("chain_sum", "gcd")}
    return {name: entries[0] for name, entries in data.items()}


GOOD, BAD = ["w3", "w4", "w5", "w6", "w7"], ["w13", "w14", "w15", "w16", "w17"]


PAIRS = [Pair(f"w{i} w2", f" {good}", f" {bad}") for i in (20, 21, 22) for good, bad in zip(GOOD, BAD, strict=True)]
