"""Checks of arguments: what is taken, and what is refused in one line."""

import math
from fractions import Fraction

import numpy as np
import pytest

from qstar_decoding.checks import check_flag, check_integer, check_keywords, check_number, check_texts
from qstar_decoding.errors import ConfigurationError


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1), Fraction(1, 3)])
def test_numbers_are_taken(value):
    found = check_number("share", value, low=0, high=1)
    assert type(found) is float
    assert found == float(value)


@pytest.mark.parametrize(
    "value", [True, "1", None, math.nan, math.inf, -math.inf, 10**400, -(10**400), 2, -1e-9, 1j, [0.5], np.ones(2)]
)
def test_other_values_are_refused_in_one_line(value):
    with pytest.raises(ConfigurationError, match="share is a finite number in") as caught:
        check_number("share", value, low=0, high=1)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("value", [1, np.int32(7), 10**30])
def test_integers_are_taken(value):
    assert check_integer("count", value) == int(value)


@pytest.mark.parametrize("value", [0, -3, True, 1.0, "1", None, math.nan, np.float64(2)])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(ConfigurationError, match="count is an integer >= 1"):
        check_integer("count", value)


@pytest.mark.parametrize(
    ("value", "found"),
    [("a", ("a",)), (["a", "b c"], ("a", "b c")), ([], ()), (iter("ab"), ("a", "b"))],
)
def test_one_text_or_several_are_taken(value, found):
    assert check_texts("stop", value) == found


@pytest.mark.parametrize("value", ["", None, 5, b"a", [""], ["a", None], [["a"]], True])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ConfigurationError, match="stop is a non-empty string or a list of them, got"):
        check_texts("stop", value)


@pytest.mark.parametrize("value", [1, 0, "yes", None, np.bool_(True)])
def test_what_is_no_flag_is_refused(value):
    assert check_flag("shaped", True)
    with pytest.raises(ConfigurationError, match="shaped is true or false"):
        check_flag("shaped", value)


def test_private_arguments_are_not_listed():
    with pytest.raises(ConfigurationError, match="has no argument 'zzz'; it takes a, b"):
        check_keywords("it", ["zzz"], ["b", "_hidden", "a"])
    check_keywords("it", ["_hidden"], ["_hidden"])
