"""Right answers and formats."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), torch.tensor(float("nan"))])
def test_a_missing_answer_is_no_answer(missing: Any) -> None:
    for name in ("exact_answer", "numeric_answer"):
        assert np.isnan(make_reward(name)(["x", "x"], ["4", "nan"], answer=["4", missing])[1])


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda values: np.array(values, dtype=object)])
def test_columns_may_be_arrays_and_tensors(kind: Callable[[list[int]], Any]) -> None:
    for target in (4, np.int64(4), torch.tensor(4)):
        assert make_reward("countdown")([""], ["25-3*7"], numbers=[kind([3, 7, 25])], target=[target])[0] == 1
        assert make_reward("exact_answer")([""], ["4"], answer=[target])[0] == 1
    assert make_reward("exact_answer")([""], ["(1, 2)"], answer=[(1, 2)])[0] == 1
    keywords = np.array(["dog", "park"], dtype=object)
    assert make_reward("keywords")([""], ["A dog."], keywords=[keywords])[0] == 0.5


def test_countdown_takes_expressions_and_steps_and_nothing_illegal() -> None:
    reward = make_reward("countdown")

    def judge(*texts: str, numbers: tuple[int, ...] = (3, 7, 25), target: int = 4) -> list[float]:
        count = len(texts)
        return reward([""] * count, texts, numbers=[list(numbers)] * count, target=[target] * count).tolist()

    right = ["25-3*7", " 25 - (7*3)\n", "3*7=21, 25-21=4", "7*3=21 (21 25), 25-21=4", "3 * 7 = 21 (25 21), 25 - 21 = 4"]
    assert judge(*right) == [1.0] * len(right)
    wrong = [
        "", "4", "25-21", "25-3*7=4", "25-3*7+0", "3*7=21", "3*7=22, 25-21=4", "3*7=21 (21 24), 25-21=4", "25-3*(7",
        "-3*7+25", "+25-3*7", "25-3**7", "25-3//7", "025-3*7", "25-3*7#", "25-3*7;1", "__import__('os')", "٢٥-٣*٧",
        "3*7=21, 25-21=4, 4*1=4", "25/(7-7)*3", "(" * 300 + "25-3*7" + ")" * 300, "9" * 5000, "25-37", "(25)(3)(7)",
    ]  # fmt: skip
    assert judge(*wrong) == [0.0] * len(wrong)
    assert judge("8/(3-8/3)", numbers=(3, 3, 8, 8), target=24) == [1.0]  # exact, by fractions
    assert judge("8/(3-8/3)", numbers=(3, 3, 8), target=24) == [0.0]
    assert judge("0*7+4", "00*7+4", "0*7=0, 0+4=4", "0*7=0, 0+4=04", "0*07=0, 0+4=4", numbers=(0, 4, 7)) == [
        1,
        0,
        1,
        0,
        0,
    ]
    assert judge("1/3*3*24", "6/(1-3/4)", numbers=(1, 3, 4, 6), target=24) == [0.0, 1.0]
    assert np.isnan(reward([""], ["4"], numbers=[None], target=[4])[0])
    for columns in (
        {"numbers": ["3"], "target": [4]},
        {"numbers": [[3, 7]], "target": [4.5]},
        {"numbers": [[-3, 7]], "target": [4]},
    ):
        with pytest.raises(ConfigurationError, match="a list of integers from 0 on and an integer"):
            reward([""], ["4"], **columns)
    with pytest.raises(ConfigurationError, match="column 'target'"):
        reward([""], ["4"], numbers=[[4]])


def test_countdown_agrees_with_reasoning_gym() -> None:
    gym = pytest.importorskip("reasoning_gym")
    dataset = gym.create_dataset("countdown", seed=1, size=20, min_numbers=3, max_numbers=4, max_value=12, min_target=1)
    mine = make_reward("countdown")
    answers = [entry["answer"].replace(" ", "") for entry in dataset]
    for entry in dataset:
        facts = entry["metadata"]
        columns = {"numbers": [facts["numbers"]] * len(answers), "target": [facts["target"]] * len(answers)}
        theirs = [dataset.score_answer(answer, entry) == 1.0 for answer in answers]
        assert mine([""] * len(answers), answers, **columns).astype(bool).tolist() == theirs
        assert any(theirs)


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


ANSWERS = [("gcd", "4"), ("gcd", "45"), ("gcd", "4 4"), ("chain_sum", "-4"), ("chain_sum", "40"), ("chain_sum", "0")]


@pytest.mark.parametrize(("source", "answer"), [*ANSWERS, ("products", "45"), ("products", "4,0")])
def test_the_bound_of_a_begun_answer_is_the_most_that_any_continuation_scores(source: str, answer: str) -> None:
    gym = pytest.importorskip("reasoning_gym")
    entry = {"answer": answer, "metadata": {"source_dataset": source}}
    score = gym.get_score_answer_fn(source)
    best: dict[str, float] = {}
    for length in range(6):
        for letters in itertools.product("045-, ", repeat=length):
            text = "".join(letters)
            reached = score(text.strip(), entry)
            for n in range(length + 1):
                best[text[:n]] = max(best.get(text[:n], 0.0), reached)
    begun = [text for text in best if len(text) <= 2]
    bounds = make_reward("reasoning_gym").upper_bound(
        [""] * len(begun), begun, [3] * len(begun), entry=[entry] * len(begun)
    )
    assert all(bound >= best[text] for text, bound in zip(begun, bounds.tolist(), strict=True))
    if source == "gcd":  # three more letters are enough for the best continuation
        assert bounds.tolist() == [best[text] for text in begun]


@pytest.mark.parametrize(
    ("source", "answer", "begun", "bound"),
    [
        ("chain_sum", "40", "+04", 1),
        ("chain_sum", "40", "4e", 1),
        ("chain_sum", "40", "4,", 1),
        ("chain_sum", "40", "5", 2 / 3),
        ("chain_sum", "40", "-", 2 / 3),
        ("chain_sum", "40", "It is", 2 / 7),
        ("chain_sum", "-4", "4", 2 / 3),
        ("chain_sum", "Infinity", "inf", 1),
        ("gcd", "é", "\ufffd", 1),
        ("gcd", None, "4", 1),
        ("countdown", "4", "5", 1),
    ],
)
def test_bounds_of_begun_answers(source: str, answer: str | None, begun: str, bound: float) -> None:
    entry = {"answer": answer, "metadata": {"source_dataset": source}}
    assert make_reward("reasoning_gym").upper_bound([""], [begun], [3], entry=[entry]).tolist() == [bound]


def test_a_half_written_character_says_nothing_about_the_answer() -> None:
    bound = make_reward("exact_answer").upper_bound(
        [""] * 3, ["\ufffd", "a\ufffd", "b\ufffd"], [3] * 3, answer=["aé"] * 3
    )
    assert bound.tolist() == [1, 1, 0]


def test_formats():
    score = make_reward("answer_format").score
    good = "<think>2 and 2</think>\n<answer>4</answer>"
    assert score([""] * 4, [good, f" {good} ", good + "!", f"{good}{good}"]) == [1, 1, 0, 0]
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    for reward in (MatchesJSON(schema), MatchesJSON(json.dumps(schema))):
        assert reward([""] * 4, [' {"age": 3}', '{"age": "3"}', "{}", '{"age": 3']).tolist() == [1, 0, 0, 0]
    assert MatchesJSON({})([""] * 2, ["[1]", "[" * 20_000]).tolist() == [1, 0]
