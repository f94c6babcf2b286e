"""Rewards: values checked and cached, potentials, copies."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.envs.prompts import as_prompt, columns_of
from qstar_decoding.errors import ConfigurationError, RewardError
from qstar_decoding.rewards import Reward, as_reward, make_reward

from .samples import Picky, Recorder, Returning, call, half_length, inf


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


def test_copies_are_the_reward_itself() -> None:
    reward = Recorder()
    assert copy.copy(reward) is reward
    assert copy.deepcopy({"reward": [reward]})["reward"][0] is reward


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


@pytest.mark.parametrize("name", ["self", "prompts", "completions", "completion_ids", "remaining"])
@pytest.mark.parametrize("spec", ["length", "exact_answer", "0.5 * length + pangram", lambda completions, **_: [1.0]])
def test_a_column_never_replaces_an_argument(name: str, spec: Any) -> None:
    reward = as_reward(spec)
    prompt = as_prompt({"prompt": "p", "answer": "c", name: "x"})
    assert prompt.columns[name] == "x"
    with pytest.warns(UserWarning, match=f"the column '{name}' of the prompts is left out.*rename it"):
        columns = columns_of([prompt])
    assert columns == {"answer": ["c"]}
    expected = reward([prompt.text], ["c"], [[1]], **columns)
    if name in ("self", "remaining"):  # of the others Python itself says that they are given twice
        for method in (reward, lambda *args, **kw: reward.components(*args, **kw), reward.potential):
            with pytest.warns(UserWarning, match=f"the column '{name}'"):
                method([prompt.text], ["c"], [[1]], **columns, **{name: ["x"]})
        assert reward([prompt.text], ["c"], [[1]], **columns) == expected


def test_columns_of_other_names_pass_through() -> None:
    names = ["outputs", "samples", "completion", "state", "answer", "prompt_", "function", "columns", "texts", "args"]
    seen: dict[str, Any] = {}

    def score(completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns)
        return [1.0]

    prompt = as_prompt({"prompt": "p", **{name: f"value of {name}" for name in names}})
    as_reward(score)([prompt.text], ["c"], **columns_of([prompt]))
    assert {name: seen[name] for name in names} == {name: [f"value of {name}"] for name in names}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": None, "completions": ["c"]}, "no list .None. as 'prompts'"),
        ({"prompts": ["p"], "completions": None}, "as 'completions'"),
        ({"prompts": ["p"], "completions": 3}, "no list .3. as 'completions'"),
        ({"prompts": (p for p in "p"), "completions": ["c"]}, "no list .*generator.* as 'prompts'"),
        ({"prompts": ["p"], "completions": np.array("c")}, "no list .* as 'completions'"),
        ({"prompts": ["p"], "completions": {"c": 1}}, "no list .* as 'completions'"),
        ({"prompts": [[{"role": "user", "content": "p"}]], "completions": ["c"]}, "prompts are strings, .*from_trl"),
        ({"prompts": ["p"], "completions": [None]}, "completions are strings, got None"),
        ({"prompts": ["p"], "completions": [b"c"]}, "completions are strings"),
        ({"prompts": ["p"], "completions": ["c"], "completion_ids": [None]}, "completion_ids hold a list of token ids"),
        ({"prompts": ["p"], "completions": ["c"], "completion_ids": [["x"]]}, "completion_ids hold a list"),
        ({"prompts": ["p"], "completions": ["c"], "completion_ids": 3}, "no list .3. as 'completion_ids'"),
        ({"prompts": ["p"], "completions": ["c"], "answer": 4}, "no list .4. as 'answer'"),
    ],
)
def test_arguments_of_wrong_types_are_told_in_one_line(arguments: dict[str, Any], message: str) -> None:
    for method in (Recorder(), Recorder().potential):
        with pytest.raises(ConfigurationError, match=message) as caught:
            method(**arguments)
        assert "\n" not in str(caught.value)


def test_the_bound_needs_as_many_numbers_as_texts() -> None:
    with pytest.raises(ConfigurationError, match=r"2 value.s. as 'remaining'"):
        make_reward("length").upper_bound(["p"], ["c"], [1, 2])
