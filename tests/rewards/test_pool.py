"""Slow rewards in workers: the same values, a limit on time, and errors that name the text."""

import math
import os
import threading
import time

import numpy as np
import pytest

from qstar_decoding.errors import ConfigurationError, RewardError
from qstar_decoding.rewards import Reward, as_reward
from qstar_decoding.rewards.pool import PooledReward
from qstar_decoding.rewards.testing import check_reward

TEXTS = [f"text {i}" for i in range(7)]


class Sleepy(Reward):
    """Takes its time; for ever if it is asked to."""

    lower, upper = 0.0, 1.0

    def score(self, prompts, completions, completion_ids=None, **columns):
        time.sleep(0.05)
        if "hang" in completions[0]:
            time.sleep(3)
        return [len(completions[0]) / 100]


def ask(reward, *texts):
    return reward([""] * len(texts), list(texts))


def test_workers_give_what_the_reward_gives_all_at_the_same_time():
    meeting = threading.Barrier(7, timeout=30)

    def reward(prompt, completion):
        meeting.wait()  # nobody goes on before all seven are here
        return float(completion[-1])

    assert ask(PooledReward(reward, workers=7), *TEXTS).tolist() == [float(i) for i in range(7)]


def test_processes_do_the_work():
    reward = PooledReward("sentiment", kind="processes", workers=2)
    expected = ask(as_reward("sentiment"), "I love it!", "I hate it!")
    np.testing.assert_array_equal(ask(reward, "I love it!", "I hate it!"), expected)
    assert all(process.pid != os.getpid() for process in reward._executor._processes.values())
    reward.close()


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_text_that_takes_too_long_is_named(kind):
    reward = PooledReward("pangram" if kind == "processes" else Sleepy(), kind=kind, workers=2, time_limit=0.5)
    if kind == "processes":
        reward.time_limit = 1e-6  # starting a process takes longer than that
    with pytest.raises(RewardError, match=r"took more than .* s for the completion 'hang on'"):
        ask(reward, "hang on")


def test_on_error_deals_with_what_takes_too_long():
    reward = PooledReward(Sleepy(on_error="skip"), workers=3, time_limit=0.5)
    values = ask(reward, "quick", "hang on", "quick too")
    assert [math.isnan(value) for value in values] == [False, True, False]


def test_it_keeps_the_laws_and_the_reward_s_own_parts():
    check_reward(PooledReward("0.5 * length + 0.5 * pangram", workers=3))
    reward = PooledReward("length")
    assert (reward.name, reward.upper, reward.has_potential, reward.has_prefix_bounds) == ("length", 1.0, True, True)
    assert reward.upper_bound([""], ["a"], [3], [[1]])[0] == 4 / 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PooledReward("sentiment", workers=0), "workers"),
        (lambda: PooledReward("sentiment", time_limit=0), "time_limit"),
        (lambda: PooledReward("sentiment", kind="fibres"), "kind is one of"),
        (lambda: PooledReward(lambda prompt, completion: 0.0, kind="processes"), "define its function in a module"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
