"""Mistakes in setting up QStar and its heuristics: one line that says what to do, before any work."""

import contextlib
import os
import warnings
from functools import partial

import gymnasium as gym
import pytest
from sb3_contrib import QRDQN, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.atari_wrappers import ClipRewardEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

import qstar_decoding  # noqa: F401  registers the environment
from qstar_decoding.agents import AStarPlanner, MaskableDQN, QHeuristic, QStar, TokenQPolicy, ValueHeuristic
from qstar_decoding.envs import TokenDecodingVecEnv, TokenDecodingVectorEnv
from qstar_decoding.errors import ConfigurationError

KWARGS = {"model": "toy", "prompts": ["ab", "c"], "reward": "pangram", "top_k": 4, "max_new_tokens": 5}
OFF = {"buffer_size": 200, "learning_starts": 10, "gamma": 1.0}
ON = {"n_steps": 8, "gamma": 1.0}


def make(**changes):
    return gym.make("TokenDecoding-v0", **{**KWARGS, **changes})


def refused(make_it, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        make_it()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: {}, "QStar needs TokenDecoding-v0 .*; got none: give env="),
        (lambda: {"env": None}, "got none: give env="),
        (lambda: {"env": make().unwrapped.mdp}, "got a DecodingMDP: give env="),
        (lambda: {"env": TokenDecodingVectorEnv(2, **KWARGS)}, "got a TokenDecodingVectorEnv"),
        (lambda: {"env": 3}, "got a int"),
        (lambda: {"env": gym.make("CartPole-v1")}, "a TokenDecoding environment .* is needed, got CartPoleEnv"),
        (lambda: {"env": "CartPole-v1"}, "needs the observations of TokenDecoding-v0"),
        (lambda: {"policy": "MultiInputPolicy", "env": make()}, "TokenQPolicy or a subclass, got 'MultiInputPolicy'"),
        (lambda: {"policy": "TokenQPolcy", "env": make()}, "TokenQPolicy or a subclass, got 'TokenQPolcy'"),
        (lambda: {"policy": make()}, r"TokenQPolicy or a subclass, got a \w+; write QStar\(env=env"),
        (lambda: {"policy": DQN, "env": make()}, "TokenQPolicy or a subclass, got <class"),
    ],
)
def test_an_agent_that_cannot_be_set_up(arguments, message):
    refused(lambda: QStar(**arguments()), message)


@pytest.fixture
def by_name():
    gym.register("ToyForQStar-v0", entry_point="qstar_decoding.envs:TokenDecodingEnv", kwargs=KWARGS)
    yield "ToyForQStar-v0"
    del gym.registry["ToyForQStar-v0"]


@pytest.mark.parametrize(
    "env",
    [make, lambda: DummyVecEnv([make]), lambda: TokenDecodingVecEnv(2, **KWARGS), lambda: Monitor(make())],
    ids=["single", "DummyVecEnv", "TokenDecodingVecEnv", "Monitor"],
)
def test_an_environment_as_stable_baselines3_takes_it(env):
    agent = QStar("TokenQPolicy", env(), searches_per_round=2, tokens_per_search=10, gradient_steps=1)
    assert agent.learn(10).num_timesteps > 0


def test_an_environment_by_name(by_name):
    agent = QStar(env=by_name, searches_per_round=2, tokens_per_search=10, gradient_steps=1)
    assert agent.learn(10).num_timesteps > 0


CHANGED = [
    lambda env: gym.wrappers.TransformReward(env, lambda reward: 2 * reward),
    lambda env: gym.wrappers.ClipReward(env, -1, 1),
    lambda env: gym.wrappers.NormalizeReward(env),
    lambda env: ClipRewardEnv(env),
    lambda env: gym.wrappers.RecordEpisodeStatistics(gym.wrappers.ClipReward(env, -1, 1)),
]


@pytest.mark.parametrize("wrap", CHANGED)
@pytest.mark.parametrize(
    ("algorithm", "heuristic", "options"),
    [
        (DQN, QHeuristic, OFF),
        (QRDQN, QHeuristic, OFF),
        (MaskableDQN, QHeuristic, OFF),
        (PPO, ValueHeuristic, {**ON, "batch_size": 8}),
        (A2C, ValueHeuristic, ON),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_agent_behind_a_wrapper_that_changes_rewards_is_no_heuristic(wrap, algorithm, heuristic, options):
    agent = algorithm("MultiInputPolicy", wrap(make()), **options)
    refused(lambda: heuristic(agent), "changes the rewards|change the reward")


@pytest.mark.parametrize("wrap", CHANGED)
def test_qstar_refuses_it_too(wrap):
    refused(lambda: QStar(env=wrap(make())), "changes the rewards")


def clipped():
    return gym.wrappers.ClipReward(make(), -1, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the other process knows this module by being forked")
def test_in_another_process_it_is_found_too():
    vec = SubprocVecEnv([clipped], start_method="fork")
    try:
        refused(lambda: QHeuristic(DQN("MultiInputPolicy", vec, **OFF)), "a wrapper changes the rewards")
        refused(lambda: QStar(env=vec), "QStar searches in this process")
    finally:
        vec.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the other process knows this module by being forked")
@pytest.mark.parametrize("shaping", [True, False])
def test_an_agent_of_environments_in_other_processes_is_a_heuristic(shaping):
    vec = SubprocVecEnv([partial(make, shaping=shaping)], start_method="fork")
    try:
        heuristic = QHeuristic(DQN("MultiInputPolicy", vec, **OFF))
        assert heuristic.q.shaped == shaping
        assert AStarPlanner(make(), heuristic=heuristic).plan("ab", 10).completions
    finally:
        vec.close()


@pytest.mark.parametrize("envs", [1, 2])
@pytest.mark.parametrize("keys", [None, ["hidden"], ["logprobs", "hidden", "remaining", "potential"]])
def test_an_agent_reloaded_without_its_vecnormalize_is_refused(tmp_path, envs, keys):
    seen = 0
    for steps in range(40, 60):
        vec = VecNormalize(DummyVecEnv([make] * envs), norm_obs=keys is not None, norm_obs_keys=keys)
        DQN("MultiInputPolicy", vec, policy_kwargs={"net_arch": [8]}, **OFF).learn(steps).save(tmp_path / "dqn.zip")
        loaded = DQN.load(tmp_path / "dqn.zip")
        with warnings.catch_warnings(record=True) as told, contextlib.suppress(ConfigurationError):
            warnings.simplefilter("always")
            seen += 1
            QHeuristic(loaded)
            seen -= 1
            # The file may not show it where the last episode was a single token; then that is said.
            assert keys or [w for w in told if "behind VecNormalize" in str(w.message)]
    assert seen >= 8


@pytest.mark.parametrize("envs", [1, 2])
def test_an_agent_reloaded_without_its_plain_environment_is_taken(tmp_path, envs):
    for steps in range(40, 60):
        agent = DQN("MultiInputPolicy", DummyVecEnv([make] * envs), policy_kwargs={"net_arch": [8]}, **OFF)
        agent.learn(steps).save(tmp_path / "dqn.zip")
        assert QHeuristic(DQN.load(tmp_path / "dqn.zip")).q.spec.model is None


@pytest.mark.parametrize("algorithm", [PPO, A2C, MaskablePPO])
def test_so_it_is_with_actor_critics(tmp_path, algorithm):
    options = ON if algorithm is A2C else {**ON, "batch_size": 8}
    for vec, good in ((DummyVecEnv([make]), True), (VecNormalize(DummyVecEnv([make]), norm_obs=False), False)):
        algorithm("MultiInputPolicy", vec, **options).learn(16).save(tmp_path / "agent.zip")
        loaded = algorithm.load(tmp_path / "agent.zip")
        if good:
            ValueHeuristic(loaded)
        else:
            refused(lambda loaded=loaded: ValueHeuristic(loaded), "behind VecNormalize")


@pytest.mark.parametrize(
    ("agent", "heuristic", "message"),
    [
        (lambda: "x.zip", QHeuristic, r"'x\.zip' is a file, a checkpoint is a folder.*QHeuristic\(DQN\.load\(path"),
        (lambda: __file__, QHeuristic, "is a file, a checkpoint is a folder"),
        (lambda: PPO("MultiInputPolicy", make(), batch_size=8, **ON), QHeuristic, "got PPO.*ValueHeuristic"),
        (lambda: DQN("MlpPolicy", "CartPole-v1"), QHeuristic, "got DQN, trained on another environment"),
        (lambda: DQN, QHeuristic, "a Q-heuristic needs an agent"),
        (make, QHeuristic, "a Q-heuristic needs an agent"),
        (lambda: None, QHeuristic, "got NoneType"),
        (lambda: DQN("MultiInputPolicy", make(), **OFF), ValueHeuristic, r"got DQN, which QHeuristic\(agent\) takes"),
        (lambda: "sentiment", ValueHeuristic, "got str"),
    ],
)
def test_a_heuristic_of_the_wrong_thing(agent, heuristic, message):
    refused(lambda: heuristic(agent()), message)


@pytest.mark.parametrize(
    ("algorithm", "heuristic", "options"),
    [(DQN, QHeuristic, OFF), (QRDQN, QHeuristic, OFF), (A2C, ValueHeuristic, ON)],
)
def test_a_discount_is_warned_of_where_it_makes_q_and_j_differ(algorithm, heuristic, options):
    discounted = {**options, "gamma": 0.9}
    with pytest.warns(UserWarning, match=r"gamma=0\.9 and J does not.*gamma=1\.0"):
        heuristic(algorithm("MultiInputPolicy", make(), **discounted))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heuristic(algorithm("MultiInputPolicy", make(), **options))
        heuristic(algorithm("MultiInputPolicy", make(max_new_tokens=1), **discounted))
        QHeuristic(QStar(TokenQPolicy, make()))
