"""The vector environments are N single ones that share their computation."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib import MaskablePPO
from stable_baselines3 import DQN

import qstar_decoding  # noqa: F401  registers the environment
from qstar_decoding.agents import AStarPlanner, QHeuristic, QStar, TokenQPolicy
from qstar_decoding.envs import TabularLM, TokenDecodingVecEnv
from qstar_decoding.errors import ConfigurationError, EpisodeError, IllegalActionError
from qstar_decoding.rewards import as_reward


def arguments(**kwargs):
    reward = as_reward(lambda p, c: c.count("b") / 5, lower=0, upper=1, potential=lambda p, c: c.count("a") / 5)
    prompts = ["a", "b", "ab", "ba", "abc"]
    model = TabularLM.random(4, 2, seed=2)
    return {"model": model, "prompts": prompts, "reward": reward, "top_k": 3, "max_new_tokens": 5, **kwargs}


def make_vec(num_envs, **kwargs):
    return gym.make_vec("TokenDecoding-v0", num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        np.testing.assert_array_equal(value, b[key])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), top_p=st.sampled_from([1.0, 0.7]), shaping=st.booleans())
def test_trajectories_are_those_of_single_environments(seed, top_p, shaping):
    n, kwargs = 3, arguments(top_p=top_p, shaping=shaping)
    vector, native = make_vec(n, **kwargs), TokenDecodingVecEnv(n, **kwargs)
    singles = [gym.make("TokenDecoding-v0", **kwargs) for _ in range(n)]
    observation, info = vector.reset(seed=seed)
    native.seed(seed)
    native_observation = native.reset()
    starts = [env.reset(seed=seed + i) for i, env in enumerate(singles)]
    rng = np.random.default_rng(seed)
    for _ in range(12):
        for i, (single, _) in enumerate(starts):
            assert_same({k: v[i] for k, v in observation.items()}, single)
            assert_same({k: v[i] for k, v in native_observation.items()}, single)
        masks = np.array([env.unwrapped.action_masks() for env in singles])
        np.testing.assert_array_equal(vector.action_masks(), masks)
        np.testing.assert_array_equal(info["action_mask"], masks)
        np.testing.assert_array_equal(native.env_method("action_masks"), masks)
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        observation, rewards, terminated, truncated, info = vector.step(actions)
        native_observation, native_rewards, dones, native_infos = native.step(actions)
        assert not truncated.any()
        for i, env in enumerate(singles):
            single, reward, done, _, single_info = env.step(actions[i])
            assert rewards[i] == reward
            assert native_rewards[i] == np.float32(reward)
            assert terminated[i] == dones[i] == done
            if done:
                assert_same(info["final_obs"][i], single)
                assert_same(native_infos[i]["terminal_observation"], single)
                assert info["final_info"]["completion"][i] == native_infos[i]["completion"] == single_info["completion"]
                assert info["final_info"]["objective"][i] == single_info["objective"]
                single, _ = env.reset()
            starts[i] = single, None


def test_a_step_is_one_forward_and_one_reward_call():
    calls = {"forward": 0, "reward": 0}

    class Counting(TabularLM):
        def forward(self, sequences):
            calls["forward"] += 1
            return super().forward(sequences)

    def reward(prompts, completions):
        calls["reward"] += 1
        return [0.0] * len(completions)

    model = Counting(np.full((4, 4), 0.25), eos_token_ids=[])
    # One prompt, processed at the reset: the episodes begun anew need no forward of their own.
    env = make_vec(8, **arguments(model=model, reward=reward, max_new_tokens=3, prompts=["a"]))
    env.reset(seed=0)
    calls.update(forward=0, reward=0)
    for t in range(3):
        env.step(np.arange(8) % 3)
        assert calls == {"forward": min(t + 1, 2), "reward": int(t == 2)}


def test_stable_baselines3_trains_on_it():
    vec = TokenDecodingVecEnv(4, **arguments())
    agent = DQN(TokenQPolicy, vec, learning_starts=8, buffer_size=200, seed=0).learn(80)
    assert len(agent.ep_info_buffer) > 0
    assert AStarPlanner(vec, heuristic=QHeuristic(agent)).plan("a", 10).completions
    MaskablePPO("MultiInputPolicy", TokenDecodingVecEnv(4, **arguments(top_p=0.7)), n_steps=8, batch_size=16).learn(40)
    QStar(TokenQPolicy, vec, seed=0, searches_per_round=2, tokens_per_search=10, gradient_steps=2).learn(40)


def test_the_autoreset_mode_is_stated():
    assert make_vec(2, **arguments()).metadata["autoreset_mode"] == AutoresetMode.SAME_STEP


def test_mistakes_leave_everything_as_it_was():
    env = make_vec(2, **arguments(top_p=0.5))
    with pytest.raises(EpisodeError, match="before reset"):
        env.step([0, 0])
    before, _ = env.reset(seed=1)
    masked = int(np.flatnonzero(~env.action_masks()[1])[0])
    for actions in ([0, masked], [0], [0, "a"], [0.5, 0], [0, 99]):
        with pytest.raises(IllegalActionError):
            env.step(actions)
    twin = make_vec(2, **arguments(top_p=0.5))
    assert_same(before, twin.reset(seed=1)[0])
    assert_same(env.step([0, 0])[0], twin.step([0, 0])[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_vec(0, **arguments()), "num_envs"),
        (lambda: make_vec(2, max_episode_steps=5, **arguments()), "max_new_tokens"),
        (lambda: make_vec(2, **arguments()).reset(seed=[1]), "2 seeds"),
        (lambda: make_vec(2, **arguments()).reset(options={"promt": "a"}), "promt"),
        (lambda: TokenDecodingVecEnv(2, **arguments()).set_attr("shaping", False), "shared"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ConfigurationError, match=message):
        call()
