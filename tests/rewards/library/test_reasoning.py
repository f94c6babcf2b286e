"""Right answers and formats."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import make_reward
from qstar_decoding.rewards.library.guidelines import MatchesJSON

from ..samples import gym_entries


def test_exact_answers_are_compared_without_surrounding_space() -> None:
    reward = make_reward("exact_answer")
    assert reward(["x"] * 3, [" 41\n", "14", "41."], answer=["41", "41", 41]).tolist() == [1.0, 0.0, 0.0]
    assert not reward.has_potential
    with pytest.raises(ConfigurationError, match="needs prompts with the column 'answer'"):
        reward(["x"], ["41"])


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
