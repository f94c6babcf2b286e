"""Rewards: checked, cached, composed, parsed from specs, made from functions, found by name."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.errors import ConfigurationError, RewardCheckError, RewardError, UnknownNameError
from qstar_decoding.rewards import (
    FunctionReward,
    Reward,
    WeightedSum,
    as_reward,
    clip,
    make_reward,
    minimum,
    normalise,
    parse_spec,
    register_reward,
    registry,
    reward_names,
)
from qstar_decoding.rewards.library import sentiment
from qstar_decoding.rewards.library.creativity import Distinct, Novelty, Repetition, self_bleu
from qstar_decoding.rewards.library.guidelines import ForbiddenWords, MatchesJSON, MatchesRegex, ShortSentences
from qstar_decoding.rewards.library.language import Coherence, Pair, Preference, read_pairs, train_preference
from qstar_decoding.rewards.specs import Call, Made
from qstar_decoding.rewards.testing import check_reward

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


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rewards, `one` and `ten`, registered for one test, in a registry of its own."""
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    register_reward("one")(lambda: constant(1.0, "one", 0, 2))
    register_reward("ten")(lambda: constant(10.0, "ten", 0, 20))


# ---------------------------------------------------------------------------------------- what is done with broken ones


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        ([math.nan], "returned nan, which is not finite"),
        ([inf], "returned inf, which is not finite"),
        ([-inf], "returned -inf, which is not finite"),
        ([10**400], "which is not finite"),
        ([np.float32("nan")], "which is not finite"),
        (["0.5"], "returned '0.5', which is not a number but a str"),
        ([np.str_("0.5")], "which is not a number but a str_"),
        ([[0.5]], "returned [0.5], which is not a number but a list"),
        ([0.5j], "returned 0.5j, which is not a number but a complex"),
        ([{}], "returned {}, which is not a number but a dict"),
        ([np.zeros(2)], "which is not a number but a ndarray"),
        ([1.00001], "returned 1.00001, which is outside the stated bounds [-1, 1]"),
        ([-2], "returned -2, which is outside the stated bounds [-1, 1]"),
    ],
)
def test_a_bad_value_is_an_error_that_shows_the_reward_the_value_and_the_text(returned: Any, complaint: str) -> None:
    with pytest.raises(RewardError) as caught:
        call(Returning(returned), "the text")
    assert str(caught.value).startswith("reward 'told' returned ")
    assert complaint in str(caught.value)
    assert "for the completion 'the text' of the prompt 'p'" in str(caught.value)
    assert "Return one finite number within [-1, 1], or None" in str(caught.value)


@pytest.mark.parametrize("on_error", ["raise", "skip", "penalty"])
@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        ([], "returned 0 value(s) for 2 completion(s): []. Return one value per completion"),
        ([0.5], "returned 1 value(s) for 2 completion(s): [0.5]"),
        ([0.5, 0.5, 0.5], "returned 3 value(s) for 2 completion(s)"),
        (np.zeros((1, 2)), "returned 1 value(s) for 2 completion(s)"),
        (None, "returned None (NoneType) where a list was expected. Return a list of 2 value(s)"),
        (0.5, "returned 0.5 (float) where a list was expected"),
        (np.float64(0.5), "(float64) where a list was expected"),
        (np.array(0.5), "(ndarray) where a list was expected"),
        ("ab", "returned 'ab' (str) where a list was expected"),
        (b"ab", "(bytes) where a list was expected"),
        ({"a": 1.0, "b": 2.0}, "(dict) where a list was expected"),
        ({0.1, 0.2}, "(set) where a list was expected"),
        ((x for x in (0.1, 0.2)), "(generator) where a list was expected"),
    ],
)
def test_a_wrong_number_of_values_always_raises(returned: Any, complaint: str, on_error: Any) -> None:
    with pytest.raises(RewardError, match="reward 'told' returned") as caught:
        call(Returning(returned, on_error=on_error), "a", "b")
    assert complaint in str(caught.value)


def test_an_exception_is_chained_and_names_the_guilty_text_of_the_batch() -> None:
    with pytest.raises(RewardError, match="reward 'picky' raised ZeroDivisionError: division by zero") as caught:
        call(Picky(), "good", "very bad", "fine")
    assert "for the completion 'very bad' of the prompt 'p'" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_of_the_batch_alone_is_not_swallowed() -> None:
    def score(completions: list[str], **columns: Any) -> list[float]:
        (_only,) = completions
        return [1.0]

    with pytest.raises(RewardError, match="for 2 texts at once, though for none of them alone") as caught:
        call(as_reward(score), "a", "b")
    assert isinstance(caught.value.__cause__, ValueError)
    assert call(as_reward(score, on_error="skip"), "a", "b") == [1.0, 1.0]


def test_long_texts_are_shortened() -> None:
    with pytest.raises(RewardError) as caught:
        Returning([2.0])(["q" * 5000], ["x" * 5000])
    message = str(caught.value)
    assert f"'{'x' * 200}'… (5000 characters)" in message
    assert f"'{'q' * 200}'… (5000 characters)" in message
    assert len(message) < 800


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (True, 1.0), (False, 0.0), (np.float32(0.5), 0.5), (np.bool_(True), 1.0), (np.array(0.25), 0.25)],
)
def test_scalars_of_many_kinds_are_numbers(value: Any, expected: float) -> None:
    assert call(Returning([value]), "text") == [expected]


def test_torch_scalars_and_tensors_are_numbers() -> None:
    import torch

    assert call(Returning([torch.tensor(0.5, requires_grad=True), torch.tensor([1])]), "a", "b") == [0.5, 1.0]
    assert call(Returning(torch.tensor([0.5, 0.25])), "a", "b") == [0.5, 0.25]
    assert call(Returning(np.array([0.5, 0.25])), "a", "b") == [0.5, 0.25]
    with pytest.raises(RewardError, match=r"\(Tensor\) where a list was expected"):
        call(Returning(torch.tensor(0.5)), "a")
    with pytest.raises(RewardError, match="which is not a number but a Tensor"):
        call(Returning([torch.zeros(2)]), "a")


def test_rounding_past_a_bound_is_clipped() -> None:
    assert call(Returning([1 + 9e-7, -1 - 9e-7]), "a", "b") == [1.0, -1.0]


def test_none_means_cannot_be_scored_and_is_no_error() -> None:
    values = call(Returning([None, 0.5]), "a", "b")
    assert math.isnan(values[0])
    assert values[1] == 0.5


def test_skip_makes_just_the_guilty_texts_nan_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    reward = Picky(on_error="skip")
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(call(reward, "good", "bad", "fine", "bad too"), [1, math.nan, 1, math.nan])
        call(reward, "bad again")
    (record,) = caplog.records
    assert "reward 'picky' raised ZeroDivisionError" in record.getMessage()
    assert "'bad'" in record.getMessage()


def test_skip_and_penalty_apply_to_bad_values_too() -> None:
    returned = [0.5, math.nan, "x", 7]
    texts = ["a", "b", "c", "d"]
    skip = Returning(returned, on_error="skip")
    np.testing.assert_array_equal(call(skip, *texts), [0.5, math.nan, math.nan, math.nan])
    assert call(Returning(returned, on_error="penalty"), *texts) == [0.5, -1, -1, -1]
    assert call(Returning(returned, on_error="penalty", penalty=-0.25), *texts) == [0.5, -0.25, -0.25, -0.25]
    assert call(Picky(on_error="penalty", penalty=0.5), "good", "bad") == [1.0, 0.5]


def test_penalty_does_not_touch_texts_that_cannot_be_scored() -> None:
    assert math.isnan(call(Returning([None], on_error="penalty"), "a")[0])


def test_interrupting_the_user_code_is_not_an_error_of_the_reward() -> None:
    def score(prompt: str, completion: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(as_reward(score, on_error="skip"), "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower": 1, "upper": 0}, r"has the bounds \[1, 0\]; expected lower <= upper"),
        ({"lower": math.nan}, "has lower=nan; expected a number"),
        ({"upper": "1"}, "has upper='1'; expected a number"),
        ({"lower": inf}, "has the bounds"),
        ({"upper": -inf}, "has the bounds"),
        ({"on_error": "ignore"}, "has on_error='ignore'; expected one of 'raise', 'skip', 'penalty'"),
        ({"on_error": "penalty"}, "neither a penalty nor a lower bound"),
        ({"penalty": 0.0}, "add on_error='penalty'"),
        ({"on_error": "penalty", "penalty": -2, "lower": -1}, "expected a finite number within the bounds"),
        ({"on_error": "penalty", "penalty": -inf}, "expected a finite number"),
        ({"on_error": "penalty", "penalty": "low"}, "expected a finite number"),
    ],
)
def test_contradictory_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        as_reward(lambda p, c: 0.0, **options)


def test_the_default_penalty_is_the_lower_bound() -> None:
    assert Picky().penalty == 0.0
    assert as_reward(lambda p, c: 0.0).penalty is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompts": "p", "completions": ["c"]},
        {"prompts": ["p"], "completions": "c"},
        {"prompts": ["p", "q"], "completions": ["c"]},
        {"prompts": ["p"], "completions": ["c"], "completion_ids": []},
        {"prompts": ["p"], "completions": ["c"], "answer": ["1", "2"]},
        {"prompts": ["p"], "completions": ["c"], "answer": "4"},
    ],
)
def test_arguments_of_unequal_length(arguments: dict[str, Any]) -> None:
    for method in (Recorder(), Recorder().potential):
        with pytest.raises(ConfigurationError, match="a list as long as 'completions' was expected"):
            method(**arguments)


def test_no_texts_no_call() -> None:
    reward = Recorder()
    assert reward([], []).shape == reward.potential([], []).shape == (0,)
    assert reward.asked == []


# ------------------------------------------------------------------------------------------------------------- caching


def test_equal_texts_are_scored_once_within_and_across_calls() -> None:
    reward = Recorder()
    assert call(reward, "aa", "b", "aa", "aa") == [2, 1, 2, 2]
    assert call(reward, "b", "ccc", "aa") == [1, 3, 2]
    assert reward.asked == [["aa", "b"], ["ccc"]]


def test_what_was_asked_and_what_was_remembered_is_counted() -> None:
    reward = Recorder()
    call(reward, "a", "b", "a")
    call(reward, "b", "c")
    assert (reward.counters.asked, reward.counters.scored) == (5, 3)
    assert reward.counters.seconds > 0
    assert pickle.loads(pickle.dumps(Picky())).counters.asked == 0


def test_texts_differ_by_prompt_columns_and_token_ids() -> None:
    reward = Recorder()
    for arguments in (
        {"prompts": ["p"]},
        {"prompts": ["q"]},
        {"prompts": ["p"], "answer": [1]},
        {"prompts": ["p"], "answer": [True]},
        {"prompts": ["p"], "answer": [["1", {"unit": "m"}]]},
        {"prompts": ["p"], "answer": [["1", {"unit": "s"}]]},
        {"prompts": ["p"], "other": [1]},
        {"prompts": ["p"], "completion_ids": [[1, 2]]},
        {"prompts": ["p"], "completion_ids": [[3]]},
    ):
        count = len(reward.asked)
        reward(completions=["c"], **copy.deepcopy(arguments))
        reward(completions=["c"], **copy.deepcopy(arguments))
        assert len(reward.asked) == count + 1, arguments


def test_columns_that_cannot_be_a_key_are_never_taken_for_equal() -> None:
    reward = Recorder()
    unpicklable = [lambda: None]
    call(reward, "c", answer=[unpicklable])
    call(reward, "c", answer=[unpicklable])
    assert len(reward.asked) == 2


def test_a_reward_that_reads_no_token_ids_shares_scores_between_tokenisations() -> None:
    asked = []

    def score(prompt: str, completion: str) -> float:
        asked.append(completion)
        return 0.0

    reward = as_reward(score)
    reward(["p", "p"], ["c", "c"], [[1, 2], [3]])
    assert asked == ["c"]
    assert not as_reward(lambda completions, answer: []).reads_token_ids
    assert as_reward(lambda completions, **columns: []).reads_token_ids
    assert as_reward(lambda completion_ids: []).reads_token_ids
    assert (reward + Recorder()).reads_token_ids
    assert not (reward - make_reward("sentiment")).reads_token_ids


def test_the_least_recently_used_text_is_forgotten() -> None:
    reward = Recorder()
    reward.cache_size = 2
    call(reward, "a", "b")
    call(reward, "a")  # now b is the least recent
    call(reward, "c")
    call(reward, "a")
    assert reward.asked == [["a", "b"], ["c"]]
    call(reward, "b")
    assert reward.asked[-1] == ["b"]
    assert call(reward, "a", "b", "cc", "dd") == [1, 1, 2, 2]  # more than the cache holds


def test_nothing_is_cached_by_a_call_that_raises() -> None:
    asked = []

    def score(completions: list[str], **columns: Any) -> list[float]:
        asked.append(completions)
        return [math.nan if text == "bad" else 1.0 for text in completions]

    reward = as_reward(score)
    with pytest.raises(RewardError):
        call(reward, "good", "bad")
    assert call(reward, "good") == [1.0]
    assert asked == [["good", "bad"], ["good"]]


def test_what_on_error_gave_is_remembered() -> None:
    asked = []

    def score(prompt: str, completion: str) -> float:
        asked.append(completion)
        raise ValueError

    reward = as_reward(score, on_error="skip")
    call(reward, "a")
    assert math.isnan(call(reward, "a")[0])
    assert asked == ["a"]


def test_returned_arrays_are_the_callers_own() -> None:
    reward = Recorder()
    reward(["p"], ["abc"])[:] = 7
    reward.potential(["p"], ["abc"])[:] = 7
    assert reward(["p"], ["abc"]) == [3]
    assert reward.potential(["p"], ["abc"]) == [1.5]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pq"), st.text("ab", max_size=3))))
def test_batch_equals_single(texts: list[tuple[str, str]]) -> None:
    def score(prompt: str, completion: str) -> float | None:
        return None if completion == "b" else len(completion) + (prompt == "q") / 2

    def make() -> list[Reward]:
        function = as_reward(score, potential=score)
        return [function, Recorder() - 2 * function, make_reward("sentiment")]

    for batched, single in zip(make(), make(), strict=True):
        for together, alone in ((batched, single), (batched.potential, single.potential)):
            expected = [alone([p], [c]).item() for p, c in texts]
            np.testing.assert_array_equal(together([p for p, _ in texts], [c for _, c in texts]), expected)


# ----------------------------------------------------------------------------------------------------------- potential


def test_the_potential_is_zero_by_default() -> None:
    reward = as_reward(lambda p, c: 1.0)
    assert not reward.has_potential
    assert reward.potential(["p", "p"], ["a", "b"]).tolist() == [0.0, 0.0]


def test_the_potential_is_cached_apart_from_the_score() -> None:
    reward = Recorder()
    assert reward.has_potential
    assert reward.potential(["p"] * 3, ["aa", "b", "aa"]).tolist() == [1.0, 0.5, 1.0]
    assert reward.potential(["p"], ["b"]).tolist() == [0.5]
    assert call(reward, "b") == [1.0]
    assert reward.asked == [["aa", "b"], ["b"]]


def test_a_potential_is_checked_but_not_bound() -> None:
    assert Returning([5.0]).potential(["p"], ["c"]).tolist() == [5.0]
    for broken in (math.nan, inf, "x"):
        with pytest.raises(RewardError, match="the potential of reward 'told' returned"):
            Returning([broken]).potential(["p"], ["c"])
    with pytest.raises(RewardError, match="the potential of reward 'told' returned 0 value"):
        Returning([], on_error="skip").potential(["p"], ["c"])
    with pytest.raises(RewardError, match="the potential of reward 'picky' raised"):
        Picky().potential(["p"], ["bad"])


def test_a_prefix_that_cannot_be_scored_has_potential_zero() -> None:
    assert Returning([None, 3]).potential(["p", "p"], ["a", "b"]).tolist() == [0.0, 3.0]
    for on_error in ("skip", "penalty"):
        assert Picky(on_error=on_error).potential(["p", "p"], ["bad", "good"]).tolist() == [0.0, 1.0]
        assert Returning([inf], on_error=on_error).potential(["p"], ["a"]).tolist() == [0.0]


def test_overriding_potential_itself_counts() -> None:
    class Own(Reward):
        def score(self, prompts, completions, completion_ids=None, **columns):  # type: ignore[no-untyped-def]
            return [0.0] * len(completions)

        def potential(self, prompts, completions, completion_ids=None, **columns):  # type: ignore[no-untyped-def]
            return np.full(len(completions), 4.0)

    assert Own().has_potential
    assert (0.5 * Own()).potential(["p"], ["c"]).tolist() == [2.0]


def test_a_functions_potential_may_have_either_shape() -> None:
    one = as_reward(lambda p, c: 1.0, potential=lambda p, c: len(c))
    all_at_once = as_reward(lambda p, c: 1.0, potential=lambda completions: [len(c) for c in completions])
    for reward in (one, all_at_once):
        assert reward.has_potential
        assert reward.potential(["p", "p"], ["a", "bb"]).tolist() == [1.0, 2.0]
    with pytest.raises(ConfigurationError, match="one of two shapes"):
        as_reward(lambda p, c: 1.0, potential=lambda c: 1.0)


# --------------------------------------------------------------------------------------------------------- composition


@st.composite
def compositions(draw: st.DrawFn) -> tuple[Reward, float]:
    """A random sum of constant rewards, and its value as plain arithmetic gives it."""
    number = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, -1.0])

    def leaf() -> tuple[Reward, float]:
        lower, value, upper = sorted(draw(st.tuples(number, number, number)))
        lower, upper = draw(st.sampled_from([lower, -inf])), draw(st.sampled_from([upper, inf]))
        return constant(value, lower=lower, upper=upper), value

    reward, value = leaf()
    operations = ["add", "subtract", "weigh", "negate", "multiply", "min", "clip", "normalise"]
    for operation in draw(st.lists(st.sampled_from(operations), max_size=5)):
        if operation == "add":
            other, its_value = leaf()
            reward, value = reward + other, value + its_value
        elif operation == "subtract":
            other, its_value = leaf()
            reward, value = other - reward, its_value - value
        elif operation == "weigh":
            weight = draw(number)
            reward, value = weight * reward, weight * value
        elif operation == "multiply":
            other, its_value = leaf()
            reward, value = reward * other, value * its_value
        elif operation == "min":
            other, its_value = leaf()
            reward, value = minimum(reward, other), min(value, its_value)
        elif operation in ("clip", "normalise"):
            low = draw(st.floats(-100, 100))
            high = low + draw(st.floats(0.1, 100))
            reward = clip(reward, low, high) if operation == "clip" else normalise(reward, low, high)
            value = min(max(value, low), high) if operation == "clip" else (value - low) / (high - low)
        else:
            reward, value = -reward, -value
    return reward, value


@settings(max_examples=200, deadline=None)
@given(compositions())
def test_the_bounds_of_any_composition_are_sound(case: tuple[Reward, float]) -> None:
    reward, expected = case
    (value,) = call(reward, "text")  # raises if it is out of bounds
    assert reward.lower <= value <= reward.upper
    magnitude = 1.0
    if isinstance(reward, WeightedSum):
        magnitude += sum(abs(weight * call(term, "text")[0]) for weight, term in reward.terms)
    assert value == pytest.approx(expected, rel=0, abs=1e-9 * magnitude)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10), st.floats(0, 10)), min_size=1, max_size=4))
def test_the_bounds_of_a_sum_are_reached_where_its_terms_reach_theirs(terms: list[tuple[float, float, float]]) -> None:
    def corner(best: bool) -> WeightedSum:
        return WeightedSum(
            (weight, constant(low + width if (weight > 0) == best else low, lower=low, upper=low + width))
            for weight, low, width in terms
        )

    assert call(corner(best=True), "text") == [corner(best=True).upper]
    assert call(corner(best=False), "text") == [corner(best=False).lower]


def test_a_weight_of_zero_bounds_even_the_unbounded() -> None:
    reward = 0 * constant(5.0)
    assert (reward.lower, reward.upper) == (0.0, 0.0)
    assert call(reward, "text") == [0.0]
    half = -2 * constant(5.0, lower=1)
    assert (half.lower, half.upper) == (-inf, -2.0)


def test_arithmetic_and_names() -> None:
    a, b, c = (constant(value, name) for name, value in (("a", 1.0), ("b", 10.0), ("c", 100.0)))
    for reward, value, name in (
        (0.7 * a + 0.3 * b, 3.7, "0.7 * a + 0.3 * b"),
        (a * 2, 2.0, "2 * a"),
        (np.float64(0.5) * a, 0.5, "0.5 * a"),
        (np.array([2])[0] * a, 2.0, "2 * a"),
        (a - b, -9.0, "a - b"),
        (-a, -1.0, "-a"),
        (-0.5 * a - -2 * b, 19.5, "-0.5 * a + 2 * b"),
        (2 * (a - 0.5 * (b + c)), -108.0, "2 * a - b - c"),
        (sum([a, b, c]), 111.0, "a + b + c"),
        (WeightedSum([(1, a)]), 1.0, "a"),
    ):
        assert isinstance(reward, WeightedSum)
        assert reward.name == name
        assert call(reward, "text") == pytest.approx([value], rel=1e-12)
        assert not any(isinstance(term, WeightedSum) for _, term in reward.terms)


@pytest.mark.parametrize(
    "operation",
    [
        lambda a: a + 1.0,
        lambda a: 1 + a,
        lambda a: a - 1,
        lambda a: a * "x",
        lambda a: a + "x",
        lambda a: np.array([1.0, 2.0]) * a,
    ],
)
def test_what_cannot_be_composed(operation: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
        operation(constant(1.0))


def test_sums_that_make_no_sense() -> None:
    with pytest.raises(ConfigurationError, match="at least one term"):
        WeightedSum([])
    for weight in (inf, math.nan):
        with pytest.raises(ConfigurationError, match="reward 'constant' has the weight"):
            weight * constant(1.0)


def test_what_a_term_cannot_score_neither_can_the_sum() -> None:
    assert math.isnan(call(constant(1.0) + 0 * constant(None), "text")[0])
    values = call(Picky(on_error="skip") + constant(1.0), "good", "bad")
    np.testing.assert_array_equal(values, [2.0, math.nan])


def test_the_error_of_a_term_names_the_term_and_runs_it_no_oftener() -> None:
    counted = Recorder()
    with pytest.raises(RewardError, match=r"^reward 'picky' raised ZeroDivisionError"):
        call(counted + Picky(), "good", "bad")
    assert counted.asked == [["good", "bad"]]


def test_a_reward_within_a_reward_may_be_skipped() -> None:
    inner = Picky()
    outer = as_reward(lambda prompts, completions: inner(prompts, completions), on_error="skip")
    np.testing.assert_array_equal(call(outer, "good", "bad"), [1.0, math.nan])


def test_the_potential_of_a_sum_is_the_sum_of_the_potentials() -> None:
    assert not (constant(1.0) + constant(2.0)).has_potential
    reward = 2 * Recorder() - constant(1.0)
    assert reward.has_potential
    assert reward.potential(["p"], ["abc"]).tolist() == [3.0]


# ------------------------------------------------------------------------------------------------------------- copying


def test_copies_are_the_reward_itself() -> None:
    reward = Recorder()
    assert copy.copy(reward) is reward
    assert copy.deepcopy({"reward": [reward]})["reward"][0] is reward


def half_length(prompt: str, completion: str) -> float:
    return len(completion) / 2


def test_pickling_drops_what_was_remembered() -> None:
    for reward in (Recorder(), make_reward("sentiment"), as_reward(half_length, lower=0), 2 * Recorder()):
        reward.cache_size = 7
        before = call(reward, "a good text"), reward.potential(["p"], ["a good text"]).tolist()
        again = pickle.loads(pickle.dumps(reward))
        assert "_scores" not in vars(again)
        assert "_potentials" not in vars(again)
        assert (again.name, again.lower, again.upper, again.cache_size) == (reward.name, reward.lower, reward.upper, 7)
        assert (call(again, "a good text"), again.potential(["p"], ["a good text"]).tolist()) == before


def test_a_lambda_fails_to_pickle_as_lambdas_do() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(as_reward(lambda p, c: 1.0))


def test_a_reward_is_named_after_its_class_unless_it_says_otherwise() -> None:
    class Sub(Recorder):
        pass

    assert Recorder().name == "recorder"
    assert Sub().name == "Sub"
    assert repr(Sub()) == "<Sub 'Sub' in [0, 1000]>"


def test_a_subclass_that_forgets_super_init_works_with_what_its_class_states() -> None:
    class Forgetful(Picky):
        def __init__(self) -> None:
            pass

    assert call(Forgetful(), "good", "good") == [1.0, 1.0]


# ----------------------------------------------------------------------------------------------------------- functions


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


# --------------------------------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("a", [(1.0, "a")]),
        ("  a ", [(1.0, "a")]),
        ("-a", [(-1.0, "a")]),
        ("0.6*a + 0.3*b - 0.1*c", [(0.6, "a"), (0.3, "b"), (-0.1, "c")]),
        ("a*2 + +b", [(2.0, "a"), (1.0, "b")]),
        ("-0.5 * a * 2", [(-1.0, "a")]),
        ("a * -3", [(-3.0, "a")]),
        ("1e-3*a\n  + b", [(0.001, "a"), (1.0, "b")]),
        ("a - (b - 2*(c + a))", [(1.0, "a"), (-1.0, "b"), (2.0, "c"), (2.0, "a")]),
        ("0*a", [(0.0, "a")]),
        ("2*a*b", [(1.0, Call("product", ([(2.0, "a")], [(1.0, "b")])))]),
        ("a - 2*min(b, 0.5*c)", [(1.0, "a"), (-2.0, Call("min", ([(1.0, "b")], [(0.5, "c")])))]),
        ("clip(a + b, -1, 1)", [(1.0, Call("clip", ([(1.0, "a"), (1.0, "b")],), (-1.0, 1.0)))]),
        ("normalise(a)", [(1.0, Call("normalise", ([(1.0, "a")],)))]),
        ("2*a('x', -1) - b(n=[1])", [(2.0, Made("a", ("x", -1))), (-1.0, Made("b", (), (("n", [1]),)))]),
        ("min(a(), b)", [(1.0, Call("min", ([(1.0, Made("a", ()))], [(1.0, "b")])))]),
    ],
)
def test_specs(spec: str, terms: list[tuple[float, str]]) -> None:
    assert parse_spec(spec, known="abc") == terms


@pytest.mark.parametrize(
    ("spec", "column", "reason"),
    [
        ("", 1, "no expression"),
        ("0.6*a +", 8, "no expression"),
        ("0.6 a", 5, None),
        ("a + 1", 5, "a number alone is no reward"),
        ("3", 1, "a number alone is no reward"),
        ("a + min(b)", 5, "min is written min(a, b, …)"),
        ("a + clip(b, 1)", 5, "clip is written clip(a, low, high)"),
        ("a + clip(0, b, 1)", 5, "clip is written"),
        ("normalise(a, 0, b)", 1, "normalise is written"),
        ("min(a, 3)", 1, "min is written"),
        ("a / 2", 1, "only reward names"),
        ("a + b(c)", 7, "a reward's arguments are strings, numbers"),
        ("a + b(1)(2)", 5, "only reward names"),
        ("a + b.c", 5, "only reward names"),
        ("a + True*b", 5, "only reward names"),
        ("a + 2j*b", 5, "only reward names"),
        ("a + 1e999*b", 5, "too large"),
        ("a + '0.5'", 5, "only reward names"),
        ("a if b else c", 1, "only reward names"),
        ("a\0", 1, None),
    ],
)
def test_errors_of_specs_point_at_the_place(spec: str, column: int, reason: str | None) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_spec(spec, known="abc")
    lines = str(caught.value).splitlines()
    if reason is not None:  # where Python's parser finds a syntax error is Python's affair
        assert lines[0].startswith(f"cannot read the reward spec at column {column}: ")
        assert lines[2] == " " * (4 + column - 1) + "^"
        assert reason in lines[0]
    assert lines[1] == f"    {spec}"


def test_columns_count_characters_not_bytes() -> None:
    with pytest.raises(ConfigurationError, match="at column 6:"):
        parse_spec("é1 + 7", known=["é1"])


def test_specs_are_not_evaluated(tmp_path: Any) -> None:
    spec = f"a + __import__('pathlib').Path({str(tmp_path / 'made')!r}).touch()"
    with pytest.raises(ConfigurationError, match="only reward names"):
        as_reward(spec.replace("a +", "sentiment +"))
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-99, 99).map(lambda n: n / 8), st.sampled_from("abc")), min_size=1))
def test_the_name_of_a_sum_is_its_spec(terms: list[tuple[float, str]]) -> None:
    reward = WeightedSum((weight, constant(1.0, name)) for weight, name in terms)
    assert parse_spec(reward.name, known="abc") == terms


@pytest.mark.usefixtures("registered")
def test_specs_as_text_and_as_mappings_are_the_same() -> None:
    same: list[Any] = ["0.5 * one - 2*ten", {"one": 0.5, "ten": -2}, {"one": np.float32(0.5), "ten": -2}]
    for spec in same:
        reward = as_reward(spec)
        assert reward.name == "0.5 * one - 2 * ten"
        assert (reward.lower, reward.upper) == (-40.0, 1.0)
        assert call(reward, "text") == [-19.5]
    alone: list[Any] = ["one", "1*one", {"one": 1}]
    for spec in alone:
        assert isinstance(as_reward(spec), FunctionReward)


@pytest.mark.parametrize("spec", [{"sentiment": "0.5"}, {"sentiment": None}, {1: 1.0}])
def test_mappings_that_are_none(spec: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected registered names with numbers as weights"):
        as_reward(spec)


def test_an_empty_mapping() -> None:
    with pytest.raises(ConfigurationError, match="at least one term"):
        as_reward({})


# ------------------------------------------------------------------------------------------------------------ registry


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("ask", "hint"),
    [
        (lambda: make_reward("sentimnt"), "register_reward"),
        (lambda: as_reward("sentimnt"), "column 1 of 'sentimnt'"),
        (lambda: as_reward("0.5*one + sentimnt"), r"column 11 of '0.5\*one \+ sentimnt'"),
        (lambda: as_reward({"sentimnt": 1.0}), "register_reward"),
        (lambda: as_reward("one + sentimnt(3)"), "column 7 of"),
    ],
)
def test_an_unknown_name_gets_the_nearest_first(ask: Callable[[], Reward], hint: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown reward 'sentimnt'.*{hint}") as caught:
        ask()
    assert caught.value.kind == "reward"
    assert caught.value.known[0] == "sentiment"
    assert (
        set(caught.value.known) == set(reward_names()) == {"one", "ten", *registry._factories, *registry.WITH_ARGUMENTS}
    )


@pytest.mark.usefixtures("registered")
def test_registering_classes_and_factories() -> None:
    assert register_reward("class_of_rewards")(Recorder) is Recorder
    assert isinstance(make_reward("class_of_rewards", on_error="skip"), Recorder)
    assert make_reward("class_of_rewards", on_error="skip").on_error == "skip"
    assert "class_of_rewards" in reward_names()
    assert reward_names() == sorted(reward_names())
    assert make_reward("one") is not make_reward("one")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["one", "sentiment"])
def test_a_name_is_given_once(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"there is a reward named '{name}' already"):
        register_reward(name)


@pytest.mark.parametrize("name", ["my reward", "my-reward", "", "2", "lambda"])
def test_names_are_identifiers(name: str) -> None:
    with pytest.raises(ConfigurationError, match="expected an identifier"):
        register_reward(name)


@pytest.mark.usefixtures("registered")
def test_what_is_registered_must_make_rewards() -> None:
    with pytest.raises(ConfigurationError, match=r"write register_reward\('mine'\)\(lambda: as_reward\(f\)\)"):
        register_reward("mine")(half_length)  # type: ignore[type-var]
    assert "mine" not in reward_names()
    register_reward("mine")(lambda: 1.0)  # type: ignore[type-var]
    with pytest.raises(ConfigurationError, match=r"returned 1\.0; expected a Reward"):
        make_reward("mine")


def test_importing_the_rewards_imports_none_of_their_libraries() -> None:
    code = (
        "import sys, qstar_decoding.rewards as r; assert 'sentiment' in r.reward_names();"
        "heavy = {'torch', 'transformers', 'stable_baselines3', 'vaderSentiment'} & set(sys.modules);"
        "assert not heavy, heavy; r.make_reward('sentiment'); assert 'vaderSentiment' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ----------------------------------------------------------------------------------------------------------- sentiment


def test_sentiment_is_vaders_compound_polarity_of_the_completion() -> None:
    reward = make_reward("sentiment")
    assert (reward.name, reward.lower, reward.upper) == ("sentiment", -1.0, 1.0)
    # The README of vaderSentiment gives these four.
    examples = {
        "VADER is smart, handsome, and funny.": 0.8316,
        "VADER is VERY SMART, handsome, and FUNNY!!!": 0.9342,
        "At least it isn't a horrible book.": 0.4310,
        "Today only kinda sux! But I'll get by, lol": 0.5249,
    }
    assert call(reward, *examples) == list(examples.values())
    assert call(reward, "", "the") == [0.0, 0.0]
    assert reward(["a horrible prompt"], ["good"]) == reward(["a lovely prompt"], ["good"]) > 0
    assert reward.has_potential
    assert reward.potential(["p"] * 3, ["", "so good", "so bad"]).tolist() == call(reward, "", "so good", "so bad")


@settings(max_examples=100, deadline=None)
@given(st.text() | st.lists(st.sampled_from(["love", "WAR", "not", "least", "but", "!", "\n", "😀"])).map(" ".join))
def test_sentiment_scores_any_text(text: str) -> None:
    reward = make_reward("sentiment")
    assert -1 <= call(reward, text)[0] <= 1


@pytest.fixture
def no_analyzer_yet() -> Iterator[None]:
    sentiment._analyzer.cache_clear()
    yield
    sentiment._analyzer.cache_clear()


@pytest.mark.usefixtures("no_analyzer_yet")
def test_sentiment_without_its_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigurationError, match="pip install vaderSentiment") as caught:
        make_reward("sentiment")
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.usefixtures("no_analyzer_yet")
def test_the_analyzer_is_shared_and_the_lexicon_not_pickled() -> None:
    rewards = [make_reward("sentiment") for _ in range(3)]
    assert sentiment._analyzer.cache_info().misses == 1
    assert len(pickle.dumps(rewards[0])) < 500


# ---------------------------------------------------------------------------------------- guidelines and reasoning


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("The dogs ran in the parks.", 1.0),
        ("Running!", 1 / 3),
        ("A dog's park", 2 / 3),
        ("dogma, parking lots, a runway", 1 / 3),  # "parking" is a form of "park"; the others are other words
        ("", 0.0),
        ("🐕 runs", 1 / 3),
    ],
)
def test_keywords_count_in_any_inflection_and_only_as_words(text: str, share: float) -> None:
    reward = make_reward("keywords")
    found = reward(["x"], [text], keywords=[["dog", "run", "park"]])
    assert found[0] == pytest.approx(share)
    assert reward.potential(["x"], [text], keywords=[["dog", "run", "park"]])[0] == pytest.approx(share)


def test_keywords_of_several_words_follow_each_other() -> None:
    values = make_reward("keywords")(
        ["x"] * 2, ["Two ice creams melt.", "The cream is ice cold."], keywords=[["ice cream"]] * 2
    )
    assert values.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("keywords", ["dog", [], 3])
def test_a_wrong_keywords_column_is_named(keywords: Any) -> None:
    with pytest.raises(ConfigurationError, match="a list of words for each prompt"):
        make_reward("keywords")(["x"], ["y"], keywords=[keywords])
    with pytest.raises(ConfigurationError, match="needs prompts with the column 'keywords'"):
        make_reward("keywords")(["x"], ["y"])
    assert np.isnan(make_reward("keywords")(["x", "x"], ["y", "dog"], keywords=[None, ["dog"]])[0])


def test_exact_answers_are_compared_without_surrounding_space() -> None:
    reward = make_reward("exact_answer")
    assert reward(["x"] * 3, [" 41\n", "14", "41."], answer=["41", "41", 41]).tolist() == [1.0, 0.0, 0.0]
    assert not reward.has_potential
    with pytest.raises(ConfigurationError, match="needs prompts with the column 'answer'"):
        reward(["x"], ["41"])


def test_sentences_are_complete_when_they_end_as_such() -> None:
    texts = ["Yes.", "He said: 'No!'", "and then", "What?\n", "Wait...", "a.b", ""]
    values = make_reward("complete_sentence")(["x"] * len(texts), texts)
    assert values.tolist() == [1, 1, 0, 1, 1, 0, 0]


def test_pangrams_count_letters() -> None:
    reward = make_reward("pangram")
    assert reward(["x"], ["The quick brown fox jumps over the lazy dog"])[0] == 1.0
    assert reward(["x"], ["Aab, é!"])[0] == pytest.approx(2 / 26)


# --------------------------------------------------------------------------------------------------- the library's laws


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted({*reward_names()} - {*registry.WITH_ARGUMENTS, "coherence"}))
def test_every_registered_reward_keeps_the_laws(name):
    entry = next(iter(gym_entries().values()))
    check_reward(name, completions=[" " + entry["answer"]], columns={"entry": entry})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "spec",
    [
        "forbidden_words('dog', 'hate')",
        "matches_json({'type': 'object', 'required': ['a']})",
        "matches_regex('[0-9]+')",
        "novelty(['The dog caught a ball'], n=2)",
    ],
)
def test_so_does_every_reward_with_arguments(spec):
    check_reward(spec, completions=['{"a": 1}'])


def test_so_do_those_that_ask_a_language_model(tiny_lm, tmp_path):
    lm = tiny_lm("Llama")
    train_preference(PAIRS, tmp_path, model=lm)
    for reward in (Coherence(lm), Preference(tmp_path, model=lm)):
        check_reward(reward, completions=[" w3 w4", " w5 w6 w7"])


def gym_entries():
    import reasoning_gym

    data = {name: reasoning_gym.create_dataset(name, size=1, seed=0) for name in ("chain_sum", "gcd")}
    return {name: entries[0] for name, entries in data.items()}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spec", ["0.5 * sentiment - 0.25 * length", "keywords + complete_sentence - afinn"])
def test_sums_keep_them_too(spec):
    check_reward(spec)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "reward",
    [
        Novelty(["The dog caught a ball"]),
        Distinct(1),
        ShortSentences(3),
        0.5 * ForbiddenWords("ball") * as_reward("length"),
        minimum(as_reward("sentiment"), as_reward("pangram")) - clip(as_reward("afinn"), 0, 0.5),
    ],
    ids=lambda reward: reward.name,
)
def test_so_do_those_with_arguments_and_compositions(reward):
    check_reward(reward)


def test_what_the_rewards_of_texts_say():
    def score(reward, *texts):
        return reward([""] * len(texts), list(texts)).tolist()

    assert score(Distinct(2), "a b a b", "a b c", "a", "") == [pytest.approx(2 / 3), 1.0, 0.0, 0.0]
    assert score(Repetition(2), "a b a b", "a b c", "") == [pytest.approx(1 / 3), 0.0, 0.0]
    assert score(Novelty(["the cat sat"], 2), "the cat ran", "the cat sat", "dogs") == [0.5, 0.0, 0.0]
    assert score(ForbiddenWords("cat"), "A CAT.", "a catalogue", "") == [0.0, 1.0, 1.0]
    assert score(MatchesRegex(r"\d+ (cats|dogs)"), " 3 cats ", "three cats") == [1.0, 0.0]
    assert score(ShortSentences(2), "One two. One two three! Yes", "") == [pytest.approx(2 / 3), 1.0]
    forbidden = ForbiddenWords("cat")
    assert forbidden.upper_bound([""] * 3, ["cat", "cat.", "a"], [5] * 3).tolist() == [1.0, 0.0, 1.0]
    assert self_bleu(["a b c d", "a b c d"]) == 1.0
    assert self_bleu(["a b c d", "e f g h"]) == self_bleu(["alone"]) == 0.0
    assert 0 < self_bleu(["a b c d e", "a b c x y"]) < 1


PATTERNS = [
    r"[a-c]+",
    r"(ab|cd)*e?",
    r" ?[A-Z][^.]*\.",
    r"(?i)a{2,3}b",
    r"\d+([.,]\d\d)?",
    r"(?:x|yy)+\s[^x]",
    r"(?s).*z",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@given(data=st.data())
def test_what_may_still_match_has_the_bound_one(pattern, data):
    reward = MatchesRegex(pattern)
    assert reward.upper_bound([""], ["\x00"], [9])[0] == 0 or pattern == PATTERNS[-1]  # it has bounds at all
    whole = data.draw(st.from_regex(pattern, fullmatch=True).map(str.strip))
    if reward([""], [whole])[0]:
        begun = [whole[:n] for n in range(len(whole) + 1)] + [" " + whole[: len(whole) // 2], whole + " "]
        assert reward.upper_bound([""] * len(begun), begun, [9] * len(begun)).min() == 1


def test_what_can_no_longer_match_has_the_bound_zero():
    bounds = MatchesRegex(r"\d+ (cats|dogs)").upper_bound([""] * 5, ["", "12", " 3 ca", "3 cows", "x"], [9] * 5)
    assert bounds.tolist() == [1, 1, 1, 0, 0]
    for pattern in (r"a(?!b).*", r"(a)\1", r"a\b.*", r"^a$", r"a{e}", r"a++b"):  # not told from a beginning
        assert MatchesRegex(pattern).upper_bound([""], ["zzz"], [9])[0] == 1
        assert not MatchesRegex(pattern).has_prefix_bounds  # so nobody decodes texts to ask
    assert MatchesRegex(r"\d+").has_prefix_bounds
    answer = make_reward("exact_answer")
    begun = ["", " 4", "42 ", "42\n", "43", "4 2", "420"]
    assert answer.upper_bound([""] * 7, begun, [9] * 7, answer=["42"] * 7).tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert answer.upper_bound([""], ["x"], [9], answer=[None])[0] == 1


def test_engagement_is_the_mean_of_its_calibrated_parts():
    reward = make_reward("engagement")
    text = " Do you love your dog? It is a good dog."
    parts = reward.components([""], [text])
    usual = {"readability": (0.5, 1), "concreteness": (0.3, 0.43), "address": (0, 1), "distinct": (0.75, 0.95)}
    usual["intensity"] = 0, 0.83
    assert set(parts) == set(usual)
    calibrated = [np.clip((parts[name][0] - low) / (high - low), 0, 1) for name, (low, high) in usual.items()]
    assert reward([""], [text])[0] == pytest.approx(np.mean(calibrated))
    assert parts["address"][0] == 1.0
    dull = " Notwithstanding jurisprudential considerations, institutional heterogeneity predominates."
    assert reward([""], [dull])[0] < reward([""], [text])[0]
    ease = make_reward("readability")
    # 12 words, 2 sentences; 14 syllables by hand: cat, warm, … one each, "very" and "sunny" two.
    easy = "The cat sat on a mat. It was a very sunny day."
    assert ease([""], [easy])[0] == pytest.approx(min((206.835 - 1.015 * 6 - 84.6 * 14 / 12) / 100, 1.0))


def test_things_are_more_concrete_than_ideas():
    reward = make_reward("concreteness")
    things, ideas, none = reward([""] * 3, [" Two dogs eat apples.", " Her belief justifies hope.", " Zzyzx!"])
    assert things > 0.7 > 0.3 > ideas
    assert none == 0
    # A published rating, and an inflected form that has none of its own: apple 5.00, banana 5.00.
    assert reward([""] * 2, ["apple", "bananas"]).tolist() == [1, 1]


def test_relevance_knows_what_a_text_is_about():
    for name in ("relevance", "keyword_overlap"):
        reward = make_reward(name)
        prompt = "Tell me about the sea and its ships."
        near, far = reward([prompt] * 2, [" Ships sail on the sea.", " My taxes are due in April."])
        assert near > far + 0.2
    assert make_reward("relevance")(["The sea"], [""])[0] == 0
    with pytest.raises(ConfigurationError, match="no embedding model can be loaded from"):
        make_reward("relevance", model="/nowhere/at/all")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Novelty("one text"), "several texts"),
        (lambda: Distinct(0), "n is"),
        (lambda: ForbiddenWords(), "words of letters"),
        (lambda: ForbiddenWords("two words"), "words of letters"),
        (lambda: MatchesRegex("(a"), "is no regular expression"),
        (lambda: MatchesJSON({"type": "objekt"}), "no JSON Schema"),
        (lambda: MatchesJSON("{"), "no JSON Schema"),
        (lambda: Coherence(floor=1.0), "floor is a finite number"),
        (lambda: Coherence(model=3), "a causal language model of transformers"),
        (lambda: Preference("/nowhere"), "no trained preference .* qstar train-reward"),
        (
            lambda: make_reward("novelty"),
            r"missing a required argument: 'references'; it is made as novelty\(references",
        ),
        (lambda: as_reward("classifier"), r"it is made as classifier\(model"),
        (lambda: ShortSentences(0), "most"),
        (lambda: clip(as_reward("sentiment"), 1, 0), "low < high"),
        (lambda: normalise(as_reward(lambda p, c: 0.0)), "say what is to become 0 and 1"),
        (lambda: minimum(), "minimum needs rewards"),
        (lambda: minimum(as_reward("sentiment"), 3), "minimum needs rewards"),
    ],
)
def test_arguments_that_make_no_reward(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


class Wrong(Reward):
    """A fair reward, to be spoilt."""

    name, lower, upper = "wrong", 0.0, 1.0

    def score(self, prompts, completions, completion_ids=None, **columns):
        return [min(len(text) / 100, 1.0) for text in completions]


class Counting(Wrong):
    def __init__(self):
        super().__init__()
        self.calls = itertools.count()

    def score(self, prompts, completions, completion_ids=None, **columns):
        return [(next(self.calls) % 11) / 11 for _ in completions]


class Relative(Wrong):
    def score(self, prompts, completions, completion_ids=None, **columns):
        longest = max(len(text) for text in completions) or 1
        return [len(text) / longest for text in completions]


class Ranked(Wrong):
    def score(self, prompts, completions, completion_ids=None, **columns):
        return [i / len(completions) for i, _ in enumerate(completions)]


class Altering(Wrong):
    def score(self, prompts, completions, completion_ids=None, **columns):
        completions.sort()
        return super().score(prompts, completions)


class Hasty(Wrong):
    """Its bound forgets that there is more to come."""

    def bound_prefixes(self, prompts, completions, remaining, completion_ids=None, **columns):
        return self.score(prompts, completions)


class Unbounded(Wrong):
    def bound_prefixes(self, prompts, completions, remaining, completion_ids=None, **columns):
        return [math.nan] * len(completions)


class Wild(Wrong):
    """Its potential is infinite where nothing is written."""

    def score_prefixes(self, prompts, completions, completion_ids=None, **columns):
        return [1.0 if text else math.inf for text in completions]


class OnlyBatches(Wrong):
    def score(self, prompts, completions, completion_ids=None, **columns):
        if len(completions) > 20:
            raise MemoryError("too many")
        return super().score(prompts, completions)


class Unlimited(Wrong):
    """Right, but for nobody who wants a certificate."""

    upper = math.inf


def spoilt(function):
    """A batched function as a reward in [0, 1]."""
    return as_reward(function, lower=0.0, upper=1.0)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Counting(), "another value the second time: .* depend on its arguments alone"),
        (Relative(), "alone than in a batch: .* do not normalise over the batch"),
        (Ranked(), "depends on the order of the batch: .* in the order of the completions"),
        (Altering(), "changed its argument 'completions'; work on a copy"),
        (Hasty(), "scores at most .*, but .* scores .*; bound_prefixes must never be below"),
        (Unbounded(), "is nan for the unfinished text .*; correct bound_prefixes"),
        (Wild(), "returned inf as the potential of ''; return a finite number"),
        (OnlyBatches(), "raised MemoryError for 42 texts at once, for none alone: too many; let it score any batch"),
        (spoilt(lambda completions: [len(c) / 100 for c in completions]), r"outside its bounds \[0, 1\]; widen lower"),
        (spoilt(lambda completions: [math.nan for _ in completions]), "returned nan .*; return a finite number"),
        (spoilt(lambda completions: ["good" for _ in completions]), "returned 'good' .*; return a number, or None"),
        (spoilt(lambda completions: 0.5), "returned a float as score; return a list of 42 values"),
        (spoilt(lambda completions: [0.5]), "returned 1 values for 42 completions; return one per completion"),
        (
            spoilt(lambda prompt, completion: 1 / len(completion.split())),
            "raised ZeroDivisionError for the completion '': .*; return None for a text that cannot be scored",
        ),
        (
            spoilt(lambda prompt, completion: float(len(completion.encode()) > 3)),
            r"raised UnicodeEncodeError for the completion ' broken \\ud83d",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Reward) else "",
)
def test_each_way_of_being_wrong_is_told(reward, message):
    with pytest.raises(RewardCheckError, match=message):
        check_reward(reward)


def test_what_is_merely_unwise_is_a_warning():
    with pytest.warns(UserWarning, match="has no upper bound"):
        check_reward(-1.0 * as_reward("length") + Unlimited())
    with pytest.warns(UserWarning, match="cannot be pickled"):
        check_reward(as_reward(lambda prompt, completion: 0.0, lower=0, upper=1))


def test_columns_and_texts_of_ones_own_are_tried_as_well():
    def score(completions, target):
        return [float(c == t) for c, t in zip(completions, target, strict=True)]

    with pytest.raises(ConfigurationError, match="needs 'target'"):
        check_reward(as_reward(score, lower=0, upper=1))
    with pytest.warns(UserWarning, match="pickled"):
        check_reward(as_reward(score, lower=0, upper=1), columns={"target": "x"})
    with pytest.raises(RewardCheckError, match="raised KeyError for the completion 'q'"):
        check_reward(spoilt(lambda prompt, completion: {"q": {}}.get(completion, {"z": 0.0})["z"]), completions=["q"])


# ------------------------------------------------------------------------------------------------- models and checkers


GOOD, BAD = ["w3", "w4", "w5", "w6", "w7"], ["w13", "w14", "w15", "w16", "w17"]
PAIRS = [Pair(f"w{i} w2", f" {good}", f" {bad}") for i in (20, 21, 22) for good, bad in zip(GOOD, BAD, strict=True)]


def test_coherence_is_the_mean_logprob_of_the_completions_tokens(tiny_lm):
    lm = tiny_lm("Llama")
    prompts, completions = ["w2 w3", "w9"], [" w4 w5 w6", " w7"]
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        before, after = lm.encode(prompt), lm.encode(completion)
        _, logprobs = lm.forward([before + after[:i] for i in range(len(after))])
        expected.append(np.mean([row[token] for row, token in zip(logprobs, after, strict=True)]))
    reward = Coherence(lm, floor=-50.0)
    assert reward(prompts, completions) == pytest.approx(expected, abs=1e-4)
    assert reward(["w2"], [""])[0] == -50.0
    assert Coherence(lm, floor=-0.5)(prompts, completions).tolist() == [-0.5, -0.5]


def test_a_preference_is_learned_from_pairs(tiny_lm, tmp_path):
    lm = tiny_lm("Llama")
    found = train_preference(PAIRS, tmp_path, model=lm, seed=1)
    assert found["held_out_pairs"] == 3
    assert -5 < found["held_out_log_likelihood"] <= 0
    reward = Preference(tmp_path, model=lm)
    scores = reward([pair.prompt for pair in PAIRS] * 2, [p.chosen for p in PAIRS] + [p.rejected for p in PAIRS])
    assert (scores[: len(PAIRS)] > scores[len(PAIRS) :]).mean() > 0.8
    with pytest.raises(ConfigurationError, match="trained on 'tiny-Llama'; it says nothing about 'tiny-GPT2'"):
        Preference(tmp_path, model=tiny_lm("GPT2"))
    with pytest.raises(ConfigurationError, match="at least 10 pairs, got 2"):
        train_preference(PAIRS[:2], tmp_path, model=lm)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}',
            "line 2: .*'rejected' .*missing",
        ),
        ('\n{"prompt": "a", "chosen": 1, "rejected": "c"}', "line 2: .*'chosen' is a string, but it is 1"),
        ("{", "line 1 is no JSON"),
        ("[]", "line 1 is no JSON object with prompt, chosen, rejected"),
        ("\n", "holds no pairs"),
    ],
)
def test_a_wrong_file_of_pairs_names_the_line(tmp_path, text, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_pairs(path)


def test_a_file_of_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({**pair._asdict(), "by": "us"}) for pair in PAIRS))
    assert read_pairs(path) == PAIRS
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_pairs(tmp_path / "absent.jsonl")


def test_numbers_are_compared_as_mathematics():
    reward, texts = make_reward("numeric_answer"), [r"so it is \(\frac{1}{2}\)", "0.50", "1/2", "2", "", "no idea"]
    assert reward([""] * 6, texts, answer=["0.5"] * 6).tolist() == [1, 1, 1, 0, 0, 0]
    assert np.isnan(reward([""], ["1"], answer=[None])[0])
    with pytest.raises(ConfigurationError, match="in which math-verify finds no mathematics"):
        reward([""], ["1"], answer=["none at all"])
    with pytest.raises(ConfigurationError, match="the column 'answer'"):
        reward([""], ["1"])


def test_data_sets_of_reasoning_gym_are_scored_by_themselves():
    reward, entries = make_reward("reasoning_gym"), gym_entries()
    for entry in entries.values():
        assert reward([entry["question"]] * 2, [f" {entry['answer']}\n", "x"], entry=[entry] * 2).tolist() == [1, 0]
    assert np.isnan(reward([""], ["1"], entry=[None])[0])
    for entry, message in (
        ({"answer": "1"}, "with metadata.source_dataset; got"),
        ({"metadata": {"source_dataset": "chainsum"}}, "reasoning-gym has no data set 'chainsum'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            reward([""], ["1"], entry=[entry])


def test_formats():
    score = make_reward("answer_format").score
    good = "<think>2 and 2</think>\n<answer>4</answer>"
    assert score([""] * 4, [good, f" {good} ", good + "!", f"{good}{good}"]) == [1, 1, 0, 0]
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    for reward in (MatchesJSON(schema), MatchesJSON(json.dumps(schema))):
        assert reward([""] * 4, [' {"age": 3}', '{"age": "3"}', "{}", '{"age": 3']).tolist() == [1, 0, 0, 0]
    assert MatchesJSON({})([""] * 2, ["[1]", "[" * 20_000]).tolist() == [1, 0]


def test_what_is_said_twice_in_other_words():
    reward = make_reward("semantic_repetition")
    again, new = " I love dogs. I like dogs a lot.", " I love dogs. The tax law changed in May."
    assert reward([""] * 2, [again, new])[0] > 0.5 > reward([""], [new])[0]
    assert reward([""] * 2, ["One sentence.", ""]).tolist() == [0, 0]


def test_profanity_knows_rude_words():
    rude, polite = make_reward("profanity")([""] * 2, ["you stupid asshole", "what a nice day"])
    assert rude > 0.9
    assert polite < 0.2


def test_static_relevance_agrees_with_the_other_on_what_is_far():
    reward, prompt = make_reward("static_relevance"), "Tell me about the sea."
    near, far, empty = reward([prompt] * 3, [" Sailors cross the water in ships.", " My computer is broken.", ""])
    assert near > far
    assert empty == 0
