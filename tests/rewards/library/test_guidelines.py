"""Keywords, patterns, forbidden words, sentences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import make_reward
from qstar_decoding.rewards.library.guidelines import MatchesRegex


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


def test_sentences_are_complete_when_they_end_as_such() -> None:
    texts = ["Yes.", "He said: 'No!'", "and then", "What?\n", "Wait...", "a.b", ""]
    values = make_reward("complete_sentence")(["x"] * len(texts), texts)
    assert values.tolist() == [1, 1, 0, 1, 1, 0, 0]


def test_pangrams_count_letters() -> None:
    reward = make_reward("pangram")
    assert reward(["x"], ["The quick brown fox jumps over the lazy dog"])[0] == 1.0
    assert reward(["x"], ["Aab, é!"])[0] == pytest.approx(2 / 26)


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
