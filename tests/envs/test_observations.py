"""Observations: inside the space, as described, and owned by the caller."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import qstar_decoding  # noqa: F401  registers the env
from qstar_decoding.envs import TabularLM, TokenDecodingEnv
from qstar_decoding.rewards import as_reward

MakeEnv = Callable[..., TokenDecodingEnv]
MakeLM = Callable[..., TabularLM]
Play = Callable[..., list[Any]]

# The probabilities of the tabular model that the fixture `ranked` makes.
RANKED = [[0.4, 0.3, 0.2, 0.1]] * 4


@given(
    seed=st.integers(0, 50),
    actions=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    bounds=st.sampled_from([(-math.inf, math.inf), (0.1, 0.3), (-math.inf, 0.0), (1e30, 1e38)]),
    potential=st.sampled_from([0.0, 1e9, -1e9, 0.2, 1e300]),
)
@settings(max_examples=40)
def test_every_observation_is_in_the_space(
    run: Play, tabular_env: MakeEnv, seed: int, actions: list[int], bounds: tuple[float, float], potential: float
) -> None:
    rng = np.random.default_rng(seed)
    table = rng.random((5, 5)) * (rng.random((5, 5)) < 0.5)  # with tokens that are impossible
    table[:, 0] += 1e-30
    score = min(max(0.2, bounds[0]), bounds[1])
    reward = as_reward(
        lambda prompt, completion: score,
        lower=bounds[0],
        upper=bounds[1],
        potential=lambda prompt, completion: potential,
    )
    env = tabular_env(model=TabularLM(table), reward=reward, top_k=5, prompts=["ab"])
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space
    for observation, reward_paid, _, _, info in run(env, actions, seed=0):
        assert observation in env.observation_space
        np.testing.assert_array_equal(info["action_mask"], observation["action_mask"])
        assert isinstance(reward_paid, float)
        assert math.isfinite(reward_paid)


def test_what_is_returned_belongs_to_the_caller(assert_equal: Callable[[Any, Any], None], tabular_env: MakeEnv) -> None:
    env, twin = tabular_env(), tabular_env()
    returned: list[np.ndarray[Any, Any]] = []

    def spoil(observation: dict[str, Any], info: dict[str, Any]) -> None:
        arrays = [*observation.values(), *(v for v in info.values() if isinstance(v, np.ndarray))]
        tree = env.mdp.tree
        kept = [getattr(tree, n) for n in ("hidden", "tokens", "logprobs", "children", "path_logprob")]
        for i, array in enumerate(arrays):
            for other in [*returned, *arrays[:i], *kept, env.observer.features]:
                assert not np.shares_memory(array, other)
        returned.extend(arrays)
        for array in arrays:
            array[...] = 1  # the caller may write into what is theirs

    for _ in range(2):
        spoil(*env.reset(seed=0, options={"prompt": "ab"}))
        twin.reset(seed=0, options={"prompt": "ab"})
        for action in (0, 1, 0):
            expected = copy.deepcopy(twin.step(action))
            actual = env.step(action)
            assert_equal(expected, actual)
            spoil(actual[0], actual[4])
            if actual[2]:
                break
    masks = env.action_masks()
    masks[:] = False
    assert env.action_masks().any()


def test_the_observation_shows_the_state(ranked: MakeLM, tabular_env: MakeEnv) -> None:
    def length(prompt: str, completion: str) -> float:
        return float(len(completion))

    reward = as_reward(length, lower=0, upper=4, potential=length)
    env = tabular_env(model=ranked(), top_k=3, max_new_tokens=4, reward=reward, candidate_dims=2)
    env.reset(options={"prompt": "a"})
    observation = env.step(1)[0]
    assert {key: array.shape for key, array in observation.items()} == {
        "hidden": (4,),
        "candidates": (3 * 2,),
        "logprobs": (3,),
        "potential": (1,),
        "remaining": (1,),
        "action_mask": (3,),
    }
    np.testing.assert_allclose(observation["hidden"], [0, 2, 0, 0])  # one-hot, with a root mean square of 1
    np.testing.assert_array_equal(observation["candidates"].reshape(3, 2), env.observer.features[:3])
    np.testing.assert_allclose(observation["logprobs"], np.log(RANKED[0][:3]), rtol=1e-6)
    assert (observation["potential"], observation["remaining"]) == (1, 0.75)
    np.testing.assert_array_equal(observation["action_mask"], [1, 1, 1])
