"""Plain functions as rewards."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qstar_decoding.errors import ConfigurationError, RewardError
from qstar_decoding.rewards import FunctionReward, Reward, as_reward
from qstar_decoding.rewards.adapters import from_trl

from .samples import Picky, Recorder, call, half_length, inf


def test_a_functions_potential_may_have_either_shape() -> None:
    one = as_reward(lambda p, c: 1.0, potential=lambda p, c: len(c))
    all_at_once = as_reward(lambda p, c: 1.0, potential=lambda completions: [len(c) for c in completions])
    for reward in (one, all_at_once):
        assert reward.has_potential
        assert reward.potential(["p", "p"], ["a", "bb"]).tolist() == [1.0, 2.0]
    with pytest.raises(ConfigurationError, match="one of two shapes"):
        as_reward(lambda p, c: 1.0, potential=lambda c: 1.0)


class Rewarder:
    lower, upper = 0, 9

    def __call__(self, prompt: str, completion: str) -> float:
        return len(completion)

    def batched(self, completions: list[str], **columns: Any) -> list[int]:
        return [len(c) for c in completions]

    def per_text(self, prompt: str, completion: str, scale: float = 1.0) -> float:
        return scale * len(completion)


def scaled(scale: float, prompt: str, completion: str) -> float:
    return scale * len(completion)


def trl(prompts: list[str], completions: list[str], completion_ids: Any = None, **columns: Any) -> list[float | None]:
    return [float(len(c)) for c in completions]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (trl, "trl"),
        (half_length, "half_length"),
        (functools.partial(scaled, 0.5), "scaled"),
        (lambda p, c: len(c), "lambda"),
        (lambda p, c, *rest: len(c), "lambda"),
        (lambda p, c, /, scale=2: len(c), "lambda"),
        (Rewarder(), "Rewarder"),
        (Rewarder().batched, "batched"),
        (Rewarder().per_text, "per_text"),
        (functools.partial(Rewarder().per_text, scale=3.0), "per_text"),
        (lambda completions: [len(c) for c in completions], "lambda"),
        (lambda *, completions: [len(c) for c in completions], "lambda"),
        (lambda prompts, completions: [len(c) for c in completions], "lambda"),
        (lambda completion_ids: [len(ids) for ids in completion_ids], "lambda"),
        (lambda **everything: [len(c) for c in everything["completions"]], "lambda"),
        (lambda completions, length: [int(n) for n in length], "lambda"),
    ],
)
def test_callables_in_either_shape(function: Callable[..., Any], name: str) -> None:
    reward = as_reward(function)
    assert isinstance(reward, FunctionReward)
    assert reward.name == name
    values = reward(["p", "p"], ["a", "bbb"], [[1], [2, 3, 4]], length=["1", "3"])
    assert values[1] == 3 * values[0] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: 1.0,
        lambda completion: 1.0,
        lambda p, c, answer: 1.0,
        lambda p, c, *, scale: 1.0,
        lambda *texts: 1.0,
        lambda prompts, completions, /: [1.0],
        functools.partial(scaled, scale=0.5),  # what follows scale can only be given by name now
        len,
        max,
        3.0,
        None,
        ["sentiment"],
        Picky,
    ],
)
def test_anything_else_is_told_the_two_shapes(wrong: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        as_reward(wrong)
    if wrong is Picky:
        assert "Picky()" in str(caught.value)
    else:
        assert "def reward(prompts, completions, completion_ids=None, **columns) -> list" in str(caught.value)
        assert "def reward(prompt: str, completion: str) -> float" in str(caught.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda prompt, completion: (prompt, completion) == ("p", "c"),
        lambda completion, prompt: (prompt, completion) == ("p", "c"),
        lambda answer, prompt: (prompt, answer) == ("p", "c"),
        lambda completion, question: (question, completion) == ("p", "c"),
        lambda question, answer: (question, answer) == ("p", "c"),
        functools.partial(lambda weight, completion, prompt: weight * ((prompt, completion) == ("p", "c")), 1),
    ],
)
def test_a_per_text_function_may_name_the_completion_first(function: Callable[..., Any]) -> None:
    assert as_reward(function, potential=function).potential(["p"], ["c"]).tolist() == [1.0]
    assert as_reward(function)(["p"], ["c"]).tolist() == [1.0]


def test_a_batched_function_gets_by_name_what_it_takes() -> None:
    seen: dict[str, Any] = {}

    def score(completions: list[str], answer: list[str], strict: bool = True) -> list[float]:
        seen.update(completions=completions, answer=answer, strict=strict)
        return [1.0] * len(completions)

    as_reward(score)(["p"], ["c"], [[1]], answer=["4"], topic=["sums"])
    assert seen == {"completions": ["c"], "answer": ["4"], "strict": True}

    seen.clear()

    def score_anything(**columns: Any) -> list[float]:
        seen.update(columns)
        return [1.0]

    as_reward(score_anything)(["p"], ["c"], answer=["4"])
    assert seen == {"prompts": ["p"], "completions": ["c"], "completion_ids": None, "answer": ["4"]}


def test_a_missing_column_is_an_error_whatever_on_error_is() -> None:
    reward = as_reward(lambda completions, answer: [1.0], on_error="skip")
    with pytest.raises(ConfigurationError, match=r"needs 'answer', and there are just 'prompts', .*, 'topic'"):
        call(reward, "c", topic=["sums"])


@pytest.mark.parametrize("returned", [0.5, "0.5"])
def test_a_batched_function_that_returns_one_value_is_told_that_a_list_was_expected(returned: Any) -> None:
    with pytest.raises(RewardError, match=r"reward 'lambda' returned .* where a list was expected"):
        call(as_reward(lambda completions: returned), "abc")


@pytest.mark.parametrize("returned", ["good", [0.5], math.nan])
def test_a_per_text_function_is_checked_like_any_other(returned: Any) -> None:
    with pytest.raises(RewardError, match=r"reward 'lambda' returned .*, which is not"):
        call(as_reward(lambda p, c: returned), "abc")


def test_bounds_of_functions() -> None:
    unknown, stated, own = as_reward(half_length), as_reward(half_length, lower=0, upper=3), as_reward(Rewarder())
    assert (unknown.lower, unknown.upper) == (-inf, inf)
    assert (stated.lower, stated.upper) == (0.0, 3.0)
    assert (own.lower, own.upper) == (0.0, 9.0)
    assert as_reward(Rewarder(), upper=4).upper == 4.0
    with pytest.raises(RewardError, match=r"outside the stated bounds \[0, 3\]"):
        call(stated, "12345678")


def test_a_reward_is_returned_as_it_is() -> None:
    reward = Recorder()
    assert as_reward(reward) is reward


@pytest.mark.parametrize("spec", ["sentiment", {"sentiment": 1.0}, Picky()])
@pytest.mark.parametrize(
    "option", [{"lower": 0}, {"upper": 1}, {"potential": half_length}, {"on_error": "skip"}, {"penalty": 0}]
)
def test_what_describes_a_function_goes_with_nothing_else(spec: Any, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="describe a function"):
        as_reward(spec, **option)


async def slow_length(prompt: str, completion: str) -> float:
    await asyncio.sleep(0)
    return float(len(completion))


async def slow_lengths(completions: list[str], **columns: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return [float(len(text)) if text else None for text in completions]


def of_awaitables(completions: list[str]) -> list[Any]:
    return [slow_length("", text) if text else None for text in completions]


class SlowRewarder:
    async def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]


async def slow_sum(completions: list[str]) -> list[float]:
    """Asks for the score of another async function, from within the loop."""
    return [2 * value for value in as_reward(slow_length)([""] * len(completions), completions)]


ASYNC: list[Callable[..., Any]] = [slow_length, slow_lengths, of_awaitables, SlowRewarder(), from_trl(slow_lengths)]


@pytest.mark.parametrize("function", ASYNC, ids=lambda function: getattr(function, "__name__", type(function).__name__))
@pytest.mark.parametrize("in_a_loop", [False, True])
def test_async_functions_are_awaited_with_and_without_a_running_loop(function: Any, in_a_loop: bool) -> None:
    reward = as_reward(function, potential=None if isinstance(function, Reward) else slow_length)

    async def jupyter() -> list[float]:
        return call(reward, "a", "bbb")

    assert (asyncio.run(jupyter()) if in_a_loop else call(reward, "a", "bbb")) == [1.0, 3.0]
    if reward.has_potential:
        assert reward.potential(["p"], ["cc"]).tolist() == [2.0]


def test_an_async_function_may_ask_another_one() -> None:
    assert call(as_reward(slow_sum), "a", "bbb") == [2.0, 6.0]


def test_all_texts_of_a_batch_are_awaited_at_the_same_time_and_in_one_loop() -> None:
    loops, waiting = set(), []

    async def meet(prompt: str, completion: str) -> float:
        loops.add(asyncio.get_running_loop())
        waiting.append(completion)
        while len(waiting) < 3:  # nobody goes on before all three are here
            await asyncio.sleep(0)
        return 1.0

    assert call(as_reward(meet), "a", "b", "c") == [1.0, 1.0, 1.0]
    assert call(as_reward(meet), "d") == [1.0]
    assert len(loops) == 1  # a client that the function keeps works in the second call too


def test_an_async_function_that_fails_is_an_error_of_its_text() -> None:
    async def picky(prompt: str, completion: str) -> float:
        return 1.0 / ("bad" not in completion)

    with pytest.raises(RewardError, match=r"raised ZeroDivisionError: .*, for the completion 'bad'"):
        call(as_reward(picky), "good", "bad")
    assert np.isnan(call(as_reward(picky, on_error="skip"), "good", "bad")).tolist() == [False, True]
