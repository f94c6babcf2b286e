"""Specs of rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import FunctionReward, WeightedSum, as_reward, parse_spec
from qstar_decoding.rewards.specs import Call, Made

from .samples import call, constant


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
