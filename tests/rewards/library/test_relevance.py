"""Relevance and repetition by embeddings."""

from __future__ import annotations

import pytest

from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import make_reward


def test_relevance_knows_what_a_text_is_about():
    for name in ("relevance", "keyword_overlap"):
        reward = make_reward(name)
        prompt = "Tell me about the sea and its ships."
        near, far = reward([prompt] * 2, [" Ships sail on the sea.", " My taxes are due in April."])
        assert near > far + 0.2
    assert make_reward("relevance")(["The sea"], [""])[0] == 0
    with pytest.raises(ConfigurationError, match="no embedding model can be loaded from"):
        make_reward("relevance", model="/nowhere/at/all")


def test_what_is_said_twice_in_other_words():
    reward = make_reward("semantic_repetition")
    again, new = " I love dogs. I like dogs a lot.", " I love dogs. The tax law changed in May."
    assert reward([""] * 2, [again, new])[0] > 0.5 > reward([""], [new])[0]
    assert reward([""] * 2, ["One sentence.", ""]).tolist() == [0, 0]


def test_static_relevance_agrees_with_the_other_on_what_is_far():
    reward, prompt = make_reward("static_relevance"), "Tell me about the sea."
    near, far, empty = reward([prompt] * 3, [" Sailors cross the water in ships.", " My computer is broken.", ""])
    assert near > far
    assert empty == 0
