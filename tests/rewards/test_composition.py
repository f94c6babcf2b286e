"""Weighted sums, products, minima, clipping and normalising."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.errors import ConfigurationError, RewardError
from qstar_decoding.rewards import Reward, WeightedSum, as_reward, clip, minimum, normalise

from .samples import Picky, Recorder, call, constant, inf


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
