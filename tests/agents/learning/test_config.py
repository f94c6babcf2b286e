"""QStarConfig: one declaration of the settings, their checks, and the regression's loss."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch

from qstar_decoding.agents import QStar, QStarConfig, TokenQPolicy
from qstar_decoding.agents.learning.config import CollectConfig
from qstar_decoding.agents.learning.experience import asymmetric_loss
from qstar_decoding.errors import ConfigurationError


def test_a_keyword_and_a_field_of_the_config_are_the_same(tabular_env):
    by_keyword = QStar(env=tabular_env(), optimism=0.7, gradient_steps=5, seed=3)
    by_config = QStar(env=tabular_env(), config=QStarConfig(optimism=0.7, gradient_steps=5, seed=3))
    both = QStar(env=tabular_env(), config=QStarConfig(optimism=0.9, gradient_steps=5), optimism=0.7, seed=3)
    assert by_keyword.config == by_config.config == both.config
    assert by_keyword.config.as_json() == by_config.config.as_json()
    assert set(by_keyword.config.as_json()) == {field.name for field in dataclasses.fields(QStarConfig)}
    assert by_keyword.optimism == 0.7
    assert by_keyword.tokens_per_search == 96
    assert by_keyword.gradient_steps == 5


def test_every_setting_is_documented_once_and_has_a_default():
    for config in (CollectConfig, QStarConfig):
        own = vars(config)["__annotations__"]
        for name in own:
            assert config.__doc__.count(f"        {name}: ") == 1, name
    assert QStarConfig() == QStarConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        QStarConfig().optimism = 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizm": 0.7}, r"QStar has no argument 'optimizm'; did you mean 'optimism'\?"),
        ({"token_per_search": 7}, r"did you mean 'tokens_per_search'\?"),
        ({"worker": None}, r"did you mean 'workers'\?"),
        ({"learning_starts": 7}, r"QStar has no argument 'learning_starts'"),
        ({"zzz": 1}, r"QStar has no argument 'zzz'; it takes .*batch_size, .*width"),
        ({"policy_kwargs": {"widht": 8}}, r"policy_kwargs has no argument 'widht'; did you mean 'width'\?"),
        ({"policy_kwargs": 8}, "policy_kwargs is a dict, got 8"),
        ({"score": "rewards"}, "score is 'reward' or 'q', got 'rewards'"),
        ({"regression": []}, r"regression is 'expectile' or 'quantile', got \[\]"),
        ({"width": 0}, "width is an integer from 1 to .*, got 0"),
        ({"margin": -1.0}, "margin is a finite number"),
        ({"margin": float("nan")}, "margin is a finite number"),
        ({"learning_rate": "fast"}, "learning_rate is a finite number"),
        ({"learning_rate": (1e-3, 1e-4, 1e-5)}, "learning_rate is a number, a pair"),
        ({"batch_size": 2.5}, "batch_size is an integer from 1 to .*, got 2.5"),
        ({"seed": -1}, "seed is an integer from 0"),
        ({"optimism": 0}, "optimism is above 0 and below 1"),
        ({"buffer_bytes": "1G"}, "buffer_bytes is an integer"),
    ],
)
def test_a_bad_setting_is_one_line_before_any_work(settings, message, tabular_env):
    with pytest.raises(ConfigurationError, match=message) as error:
        QStar(TokenQPolicy, tabular_env(), **settings)
    assert "\n" not in str(error.value)


def test_a_policy_of_ones_own_may_have_arguments_of_its_own(tabular_env):
    class Own(TokenQPolicy):
        def __init__(self, *args, bonus=0.0, **kwargs):
            self.bonus = bonus
            super().__init__(*args, **kwargs)

    agent = QStar(Own, tabular_env(), policy_kwargs={"bonus": 2.0, "width": 8})
    assert agent.policy.bonus == 2.0


@pytest.mark.parametrize("regression", ["expectile", "quantile"])
def test_the_loss_is_that_of_the_papers(regression):
    rng = np.random.default_rng(0)
    errors, found = rng.normal(size=(6, 3, 2)).astype(np.float32), rng.random((6, 3, 1)) < 0.5
    tau, weight = 0.8, 0.3
    expected = np.zeros_like(errors)
    for index in np.ndindex(errors.shape):
        u, is_found = errors[index], found[index[0], index[1], 0]
        size = u**2 if regression == "expectile" else abs(u)
        expected[index] = abs(tau - (u < 0)) * size if is_found else weight * (u < 0) * size
    loss = asymmetric_loss(
        torch.from_numpy(errors), torch.from_numpy(found), optimism=tau, estimate_weight=weight, regression=regression
    )
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("regression", "expected"), [("expectile", "expectile"), ("quantile", "quantile")])
def test_its_minimum_is_the_expectile_or_the_quantile_of_what_was_found(regression, expected):
    sample, tau = torch.tensor(np.random.default_rng(0).normal(size=2001)), 0.8
    q = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([q], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        found = torch.ones(2001, dtype=torch.bool)
        loss = asymmetric_loss(sample - q, found, optimism=tau, estimate_weight=0.2, regression=regression).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    value = q.item()
    if expected == "quantile":
        assert value == pytest.approx(np.quantile(sample.numpy(), tau), abs=0.02)
    else:  # the expectile's own equation: τ · E[(X - q)+] = (1 - τ) · E[(q - X)+]
        above, below = ((sample - value).clamp(min=0).mean().item(), (value - sample).clamp(min=0).mean().item())
        assert tau * above == pytest.approx((1 - tau) * below, rel=1e-3)


def test_a_setting_may_change_while_the_agent_exists():
    env = gym.make("TokenDecoding-v0", model="toy", prompts=["ab"], reward="length", top_k=3, max_new_tokens=4)
    agent = QStar(env=env, noise=0.1, gradient_steps=2)
    agent.noise, agent.gradient_steps = 0.0, 3
    assert (agent.noise, agent.config.noise) == (0.0, 0.0)
    assert (agent.gradient_steps, agent.config.gradient_steps) == (3, 3)
    with pytest.raises(ConfigurationError, match="noise"):
        agent.noise = -1
    assert agent.config.noise == 0.0
    agent.verbose = 1  # what is no setting is an attribute as ever
    assert agent.verbose == 1
