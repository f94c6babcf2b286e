"""The laws of rewards, broken one by one."""

from __future__ import annotations

import itertools
import math

import pytest

from qstar_decoding.errors import ConfigurationError, RewardCheckError
from qstar_decoding.rewards import Reward, as_reward
from qstar_decoding.rewards.testing import check_reward


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
