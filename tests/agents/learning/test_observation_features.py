"""Observation features are declared once: space, experience, policies and the documented table derive from them."""

import re

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from qstar_decoding.agents import QStar, TokenQPolicy
from qstar_decoding.agents.learning.experience import SearchExperience
from qstar_decoding.envs import Observer, TokenDecodingEnv, observations
from qstar_decoding.envs.observations import FEATURES, Feature, observation_table
from qstar_decoding.errors import ConfigurationError

SMALL = {
    "searches_per_round": 2,
    "tokens_per_search": 20,
    "gradient_steps": 4,
    "batch_size": 16,
    "policy_kwargs": {"width": 8},
}


OPTIONAL = {"context": {"context_tokens": 3}, "term_potentials": {"components": True}, "weights": {"components": True}}


@pytest.mark.parametrize("further", [{}, {"context_tokens": 3}, {"components": True}])
def test_every_feature_is_in_space_table_and_experience_with_its_dtype(tabular_env, further):
    env = tabular_env(candidate_dims=4, **further)
    observation, _ = env.reset(seed=0)
    assert {feature.name for feature in FEATURES if feature.is_optional} == set(OPTIONAL)
    declared = [feature for feature in FEATURES if OPTIONAL.get(feature.name, further) == further]
    assert set(observation) == {feature.name for feature in declared} == set(env.observation_space.spaces)
    stored = SearchExperience(env.mdp, env.observer, 10**6).state()
    for feature in declared:
        assert observation[feature.name].dtype == env.observation_space[feature.name].dtype == feature.dtype
        assert observation[feature.name].shape == env.observer.shape(feature)
        row = f"| ``{feature.name}`` | {np.dtype(feature.dtype).name} [{feature.axes}] | {feature.meaning} |"
        assert row in observation_table()
        assert row in Observer.__doc__
        assert (feature.name in stored) == (feature.stored is not None)
        if feature.stored is not None:
            assert stored[feature.name].dtype == feature.stored
    assert "tokens" in stored  # which the features that are not stored are made from


def test_the_environments_docstring_lists_every_feature():
    rows = re.findall(r"\| `(\w+)` +\| \(([^,]+),\) +\| (\w+) ", TokenDecodingEnv.__doc__)
    assert rows == [(feature.name, feature.axes, np.dtype(feature.dtype).name) for feature in FEATURES]


def test_the_experience_gives_back_what_was_observed(tabular_env):
    env = tabular_env(candidate_dims=4)
    agent = QStar(TokenQPolicy, env, seed=0, **SMALL).learn(60)
    batch = agent.experience.sample(64, np.random.default_rng(0))
    assert set(batch.observation) == set(env.observation_space.spaces)
    for row in range(64):
        observation = {
            name: values[row].astype(env.observation_space[name].dtype) for name, values in batch.observation.items()
        }
        assert env.observation_space.contains(observation)


def share_of_first(states):
    return (states.tokens == states.tokens[:, :1]).mean(axis=1)[:, None]


@pytest.fixture
def more_features(monkeypatch):
    """Two features more: one that is stored, one that is made again from the token ids."""
    more = (
        Feature("left", "1", "tokens left", lambda s: s.observer.mdp.remaining(s.nodes)[:, None], lambda _: (0, 99),
                stored=np.float16),
        Feature("first", "1", "share of the first token", share_of_first, lambda _: (0, 1), stored=None),
    )  # fmt: skip
    monkeypatch.setattr(observations, "FEATURES", (*FEATURES, *more))
    return more


def test_a_new_feature_touches_its_declaration_only(tabular_env, more_features):
    env = tabular_env(candidate_dims=4)
    assert {"left", "first"} <= set(env.observation_space.spaces)
    check_env(env, skip_render_check=True)
    agent = QStar(TokenQPolicy, env, seed=0, **SMALL).learn(60)
    assert agent.experience.state()["left"].dtype == np.float16
    batch = agent.experience.sample(32, np.random.default_rng(0))
    np.testing.assert_allclose(
        batch.observation["left"].astype(np.float64) / env.mdp.max_new_tokens, batch.observation["remaining"], atol=1e-3
    )
    assert (batch.observation["first"] == 1 / 3).all() or np.allclose(batch.observation["first"], 1 / 3)
    assert "| ``left`` | float32 [1] | tokens left |" in observation_table()


def test_an_environment_that_lacks_a_feature_is_refused(tabular_env):
    class Without(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space = gym.spaces.Dict(
                {key: space for key, space in env.observation_space.spaces.items() if key != "remaining"}
            )

        def observation(self, observation):
            return {key: value for key, value in observation.items() if key != "remaining"}

    with pytest.raises(ConfigurationError, match=r"\['remaining'\] are not in them"):
        QStar(TokenQPolicy, Without(tabular_env()), **SMALL)


def test_a_damaged_experience_is_refused(tabular_env):
    env = tabular_env(candidate_dims=4)
    agent = QStar(TokenQPolicy, env, seed=0, **SMALL).learn(60)
    good = agent.experience.state()
    size = agent.experience.size
    bad = [
        ({**good, "hidden": good["hidden"][:, :-1]}, 0),
        ({**good, "target": good["target"][:-1]}, 0),
        (good, size + 1),
        (good, -1),
        ({**good, "tokens": good["tokens"] + 1000}, 0),
        ({**good, "tokens": good["tokens"] - 1000}, 0),
    ]
    for arrays, position in bad:
        with pytest.raises(ValueError, match="experience"):
            SearchExperience(env.mdp, env.observer, 10**6).restore(arrays, position)
    again = SearchExperience(env.mdp, env.observer, 10**6)
    again.restore(good, agent.experience.position)
    for name, column in again.state().items():
        np.testing.assert_array_equal(column, good[name])
