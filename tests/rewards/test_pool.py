"""Slow rewards in workers: the same values, a limit on time, and errors that name the text."""

import math
import os
import subprocess
import sys
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
    assert len(reward._processes.pids) >= 1
    assert os.getpid() not in reward._processes.pids
    reward.close()


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_text_that_takes_too_long_is_named(kind):
    reward = PooledReward("pangram" if kind == "processes" else Sleepy(), kind=kind, workers=2, time_limit=0.5)
    if kind == "processes":
        reward.time_limit = 1e-6  # a question and its answer take longer than that
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


MODULE = """
import time
from qstar_decoding.rewards import Reward

class Slow(Reward):
    "Takes a while to be loaded in another process, none to score; hangs and fails if it is asked to."
    lower, upper = 0.0, 1.0

    def __setstate__(self, state):
        time.sleep(1.5)
        vars(self).update(state)

    def score(self, prompts, completions, completion_ids=None, **columns):
        print("what is printed disturbs nobody")
        if "hang" in completions[0]:
            while True: pass
        if "timeout" in completions[0]:
            raise TimeoutError("a service did not answer")
        if "die" in completions[0]:
            import os; os._exit(1)
        return [lambda: 0] if "lambda" in completions[0] else [0.5]
"""


@pytest.fixture
def slow(tmp_path, monkeypatch):
    (tmp_path / "slow_reward.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import slow_reward

    yield slow_reward.Slow
    del sys.modules["slow_reward"]


def test_the_start_of_a_process_is_no_part_of_a_text_s_time(slow):
    reward = PooledReward(slow(), kind="processes", workers=2, time_limit=1.0)  # less than loading takes
    assert ask(reward, "a", "b", "c").tolist() == [0.5] * 3
    reward.close()


def test_a_process_that_hangs_is_killed_and_replaced(slow):
    reward = PooledReward(slow(on_error="penalty", penalty=0.25), kind="processes", workers=1, time_limit=0.5)
    assert ask(reward, "a", "hang", "b").tolist() == [0.5, 0.25, 0.5]
    reward.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timeout", "raised TimeoutError: a service did not answer"),
        ("die", "a process of reward 'Slow' died at or before the completion 'die'"),
        ("lambda", "pickle.*lambda|lambda.*pickle"),
    ],
)
def test_the_errors_of_a_process_say_what_happened(slow, text, message):
    reward = PooledReward(slow(), kind="processes", workers=1, time_limit=20.0)
    with pytest.raises(RewardError, match=message):
        ask(reward, text)
    assert ask(reward, "after it") == [0.5]
    reward.close()


def test_a_thread_that_hangs_is_named_as_such_and_holds_up_nobody():
    code = (
        "import threading; from qstar_decoding.rewards import as_reward; from qstar_decoding.rewards.pool import *\n"
        "def wait(prompt, completion):\n"
        "    if 'hang' in completion: threading.Event().wait()\n"
        "    return 1.0\n"
        "reward = PooledReward(as_reward(wait), time_limit=0.3)\n"
        "try: reward([''] * 3, ['a', 'hang', 'b'])\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert "took more than 0.3 s for the completion 'hang'" in done.stdout
    assert "Its thread cannot be ended and goes on; kind='processes' ends it." in done.stdout


@pytest.mark.parametrize("guard", [True, False])
def test_a_script_s_own_function_in_processes_needs_a_main_guard(tmp_path, guard):
    script = tmp_path / "script.py"
    body = "print(PooledReward(as_reward(half), kind='processes', workers=1)([''], ['abc']))"
    script.write_text(
        "from qstar_decoding.rewards import as_reward\n"
        "from qstar_decoding.rewards.pool import PooledReward\n"
        "def half(prompt, completion): return len(completion) / 2\n"
        + (f"if __name__ == '__main__':\n    {body}\n" if guard else f"{body}\n")
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False)
    if guard:
        assert done.stdout == "[1.5]\n"
    else:
        assert "put what it runs under if __name__ == '__main__':" in done.stderr.splitlines()[-1]


def test_the_first_error_of_a_batch_ends_it():
    asked = []

    def reward(prompt, completion):
        asked.append(completion)
        raise ValueError("no " + completion)

    with pytest.raises(RewardError, match="raised ValueError: no text 0"):
        ask(PooledReward(reward, workers=1), *TEXTS)
    assert asked == ["text 0", "text 0"]  # once in the batch, once alone
