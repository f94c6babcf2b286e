"""Episodes: errors that leave the state as it was, and states to return to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qstar_decoding  # noqa: F401  registers the env
from qstar_decoding.envs import TabularLM, TokenDecodingEnv
from qstar_decoding.errors import (
    ConfigurationError,
    EpisodeError,
    IllegalActionError,
    PromptError,
    RewardError,
)
from qstar_decoding.rewards import as_reward

MakeEnv = Callable[..., TokenDecodingEnv]
MakeLM = Callable[..., TabularLM]
Play = Callable[..., list[Any]]


@pytest.mark.parametrize(
    "action",
    [
        1.0,
        0.5,
        math.nan,
        "1",
        None,
        True,
        [0, 1],
        np.array([0, 1]),
        np.array([]),
        np.float32(1),
        np.array([[0], [1]]),
        [[0], [0, 1]],
        {},
        pytest.param(object(), id="object"),
        -1,
        3,
        2,  # masked
        10**30,
        -(2**63),
        np.uint64(2**64 - 1),
    ],
    ids=repr,
)
def test_an_illegal_action_is_an_error_and_nothing_has_happened(
    assert_equal: Callable[[Any, Any], None], ranked: MakeLM, tabular_env: MakeEnv, action: Any
) -> None:
    env, twin = (tabular_env(model=ranked(), top_p=0.6) for _ in range(2))
    for each in (env, twin):
        each.reset(seed=0)
        each.step(0)
    with pytest.raises(IllegalActionError, match=r"legal now: \[0, 1\]"):
        env.step(action)
    np.testing.assert_array_equal(env.action_masks(), [True, True, False])
    assert len(env.mdp.tree) == len(twin.mdp.tree)
    assert_equal(env.step(1), twin.step(1))
    assert_equal(env.reset(), twin.reset())


@pytest.mark.parametrize("action", [1, np.int64(1), np.uint8(1), np.array(1), np.array([1]), [1]], ids=repr)
def test_an_action_is_any_one_integer(ranked: MakeLM, tabular_env: MakeEnv, action: Any) -> None:
    env = tabular_env(model=ranked())
    env.reset()
    assert env.step(action)[4]["token_text"] == "b"


def test_a_step_needs_an_episode(ranked: MakeLM, tabular_env: MakeEnv) -> None:
    env = tabular_env(model=ranked(), top_k=4)
    with pytest.raises(EpisodeError, match=r"before reset; call reset\(\) first"):
        env.step(0)
    env.reset()
    env.step(3)
    for action in (0, "nonsense"):
        with pytest.raises(EpisodeError, match=r"after the end of the episode; call reset\(\) first"):
            env.step(action)
    env.reset()
    env.step(0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": ""}, PromptError, "empty"),
        ({"prompt": "  \n"}, PromptError, "empty"),
        ({"prompt": None}, PromptError, "NoneType"),
        ({"prompt": 3}, PromptError, "int"),
        ({"prompt": ["a", "b"]}, PromptError, "a prompt is a string"),
        ({"prompt": [{"role": "user", "content": "a"}]}, PromptError, "no chat template"),
        ({"prompt": {"answer": "a"}}, PromptError, "a dict with the key 'prompt'"),
        ({"prompt": "axb"}, PromptError, "'x' in prompt 'axb' is not in the vocabulary"),
        (
            {"prompt": "a" * 7},
            PromptError,
            "has 7 tokens; .* takes 11, less 5 .* at most 6",
        ),
        ({"promt": "a"}, ConfigurationError, r"may hold 'prompt', not \['promt'\]"),
        ({"prompt": "a", "seed": 1, "n": 2}, ConfigurationError, r"not \['n', 'seed'\]"),
    ],
)
def test_a_reset_that_fails_leaves_the_episode_as_it_was(
    assert_equal: Callable[[Any, Any], None],
    ranked: MakeLM,
    tabular_env: MakeEnv,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    env, twin = (tabular_env(model=ranked(context_length=11), prompts="a") for _ in range(2))
    for each in (env, twin):
        each.reset(seed=0)
        each.step(0)
    with pytest.raises(error, match=message):
        env.reset(options=options)
    assert_equal(env.step(1), twin.step(1))
    env.reset(options={"prompt": "a" * 6})  # just fits


def test_reset_without_options_draws_a_prompt(tabular_env: MakeEnv) -> None:
    env = tabular_env(prompts=["ab"])
    for options in (None, {}):
        assert env.reset(options=options)[1]["prompt"] == "ab"
    assert env.reset(options={"prompt": "cd"})[1]["prompt"] == "cd"


@pytest.mark.parametrize(
    ("when", "bad"),
    [
        *itertools.product(["reset", "step", "end"], [math.nan, math.inf, "1", ZeroDivisionError("no reward today")]),
        ("end", 2.0),  # outside the bounds, to which potentials need not keep
    ],
    ids=str,
)
def test_a_reward_that_fails_leaves_the_state_as_it_was(
    assert_equal: Callable[[Any, Any], None], ranked: MakeLM, tabular_env: MakeEnv, when: str, bad: Any
) -> None:
    broken = False

    def score(prompt: str, completion: str) -> float:
        if not broken:
            return len(completion) / 10
        if isinstance(bad, Exception):
            raise bad
        return bad  # type: ignore[no-any-return]

    def make() -> TokenDecodingEnv:
        return tabular_env(model=ranked(), max_new_tokens=3, reward=as_reward(score, lower=0, upper=1, potential=score))

    env, twin = make(), make()
    for each in (env, twin):
        each.reset(seed=0, options={"prompt": "a"})
        each.step(1)
        if when == "end":
            each.step(1)
    broken = True
    with pytest.raises(RewardError):
        env.reset(options={"prompt": "b"}) if when == "reset" else env.step(0)
    broken = False
    assert_equal(env.step(2), twin.step(2))
    assert_equal(env.reset(options={"prompt": "b"}), twin.reset(options={"prompt": "b"}))


def test_a_completion_that_cannot_be_scored_earns_its_fluency(ranked: MakeLM, tabular_env: MakeEnv) -> None:
    env = tabular_env(model=ranked(), reward=lambda prompt, completion: None, max_new_tokens=2, render_mode="ansi")
    env.reset()
    env.step(0)
    observation, reward, terminated, _, info = env.step(1)
    assert terminated
    assert info["reward"] is None
    assert info["objective"] is None
    assert reward == pytest.approx(0.1 * math.log(0.3))
    assert observation in env.observation_space
    assert "length" in str(env.render())


def test_a_state_can_be_gone_back_to_as_often_as_needed(tabular_env: Callable[..., TokenDecodingEnv]) -> None:
    env = tabular_env()
    env.reset(seed=0, options={"prompt": "ab"})
    state = env.get_state()

    def rest(actions: list[int]) -> list[tuple[float, bool, str | None]]:
        env.set_state(state)
        seen = []
        for action in actions:
            _, reward, terminated, _, info = env.step(action)
            seen.append((reward, terminated, info.get("completion")))
            if terminated:
                break
        return seen

    first, second = rest([0, 0, 0, 0]), rest([1, 0, 1, 0])
    assert first != second
    assert (rest([0, 0, 0, 0]), rest([1, 0, 1, 0])) == (first, second)


def test_exhaustive_search_by_states_finds_what_the_mdp_says(tabular_env: Callable[..., TokenDecodingEnv]) -> None:
    env = tabular_env(max_new_tokens=3, shaping=False)
    env.reset(options={"prompt": "c"})
    completions: dict[str, float] = {}

    def search() -> float:
        state, best = env.get_state(), -np.inf
        for action in np.flatnonzero(env.action_masks()):
            env.set_state(state)
            _, reward, terminated, _, info = env.step(int(action))
            if terminated:
                completions[info["completion"]] = info["objective"]
            best = max(best, reward + (0.0 if terminated else search()))
        return best

    assert search() == pytest.approx(max(completions.values()))


def test_a_state_outlives_the_end_and_the_forgetting(tabular_env: Callable[..., TokenDecodingEnv]) -> None:
    prompts = ["".join(letters) for letters in itertools.product("abcd", repeat=3)]
    env = tabular_env(max_prefixes=10, prompts=prompts)
    env.reset(seed=0)
    state = env.get_state()
    for _ in range(40):
        env.reset()
        while not env.step(0)[2]:
            pass
    assert len(env.mdp.tree) < 40
    env.set_state(state)
    after = env.step(0)[0]
    env.reset(seed=0)
    for key, value in env.step(0)[0].items():
        np.testing.assert_array_equal(after[key], value)


def test_a_state_after_the_end_is_an_end(tabular_env: Callable[..., TokenDecodingEnv]) -> None:
    env = tabular_env(max_new_tokens=1)
    env.reset(seed=0)
    env.step(0)
    state = env.get_state()
    env.reset()
    env.set_state(state)
    with pytest.raises(EpisodeError, match="after the end"):
        env.step(0)


def test_a_state_of_another_environment_is_refused(tabular_env: Callable[..., TokenDecodingEnv]) -> None:
    env, other = tabular_env(), tabular_env()
    for each in (env, other):
        each.reset(seed=0)
    with pytest.raises(ConfigurationError, match="one of another environment"):
        env.set_state(other.get_state())
    with pytest.raises(ConfigurationError, match="takes what get_state returned, got int"):
        env.set_state(3)  # type: ignore[arg-type]
    env.step(0)  # and goes on from where it was
