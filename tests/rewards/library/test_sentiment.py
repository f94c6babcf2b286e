"""Sentiment."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import make_reward
from qstar_decoding.rewards.library import sentiment

from ..samples import call


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
