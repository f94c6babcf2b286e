"""TokenDecoding-v0: Gymnasium's contract, information, rendering, standard agents."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import qstar_decoding  # noqa: F401  registers the env
from qstar_decoding.envs import TabularLM, TokenDecodingEnv, TransformersLM, mdp
from qstar_decoding.errors import (
    ConfigurationError,
    IllegalActionError,
)

MakeEnv = Callable[..., TokenDecodingEnv]
MakeLM = Callable[..., TabularLM]
Play = Callable[..., list[Any]]

# The probabilities of the tabular model that the fixture `ranked` makes.
RANKED = [[0.4, 0.3, 0.2, 0.1]] * 4
IDS = ["TokenDecoding-v0", "qstar_decoding:TokenDecoding-v0"]


@pytest.mark.parametrize("which", ["embedded", "tabular", "tabular, masked"])
def test_the_checkers_have_nothing_to_say(lm: TransformersLM, tabular_env: MakeEnv, which: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if which == "embedded":
            made = gym.make("TokenDecoding-v0", model=lm, max_new_tokens=4)
            gymnasium_check_env(made.unwrapped)
            sb3_check_env(made.unwrapped)
        else:
            # A checker's random actions know no masks: only one that leaves every action legal can be checked so.
            env = tabular_env(top_p=0.999) if "masked" in which else tabular_env()
            gymnasium_check_env(env, skip_render_check=True)  # no spec to make further ones from
            sb3_check_env(env, skip_render_check=True)


@pytest.mark.parametrize("name", IDS)
def test_it_is_made_by_name(lm: TransformersLM, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(name, model=lm)
        observation, info = env.reset(seed=0, options={"prompt": "The play was"})
        assert isinstance(env.unwrapped, TokenDecodingEnv)
        assert observation in env.observation_space
        assert info["prompt"] == "The play was"
        assert env.action_space == gym.spaces.Discrete(8)
        env.step(0)


def test_everything_has_a_default(run: Play, monkeypatch: pytest.MonkeyPatch, lm: TransformersLM) -> None:
    monkeypatch.setattr(mdp, "load_language_model", lambda *args, **kwargs: lm)  # which is the default, in float32
    env = gym.make("TokenDecoding-v0")
    transitions = run(env, [0], seed=0)
    assert 1 <= len(transitions) <= 24
    assert transitions[-1][4]["objective"] == pytest.approx(
        transitions[-1][4]["reward"] + 0.02 * sum(t[4]["logprob"] for t in transitions)
    )


def test_the_spec_can_be_copied_and_does_not_copy_the_model(
    assert_equal: Callable[[Any, Any], None], ranked: MakeLM, run: Play, lm: TransformersLM
) -> None:
    for model in (lm, ranked()):
        env = gym.make("TokenDecoding-v0", model=model, prompts=["ab"], max_new_tokens=2, top_k=2)
        assert env.spec is not None
        assert copy.deepcopy(env.spec).kwargs["model"] is model
        again = gym.make(copy.deepcopy(env.spec))
        assert again.unwrapped.mdp.model is model  # type: ignore[attr-defined]
        assert copy.copy(model) is model
        assert_equal(run(env, [1, 0], seed=0), run(again, [1, 0], seed=0))


def test_prompts_from_a_generator_and_a_local_function_as_reward(ranked: MakeLM) -> None:
    env = gym.make(
        "TokenDecoding-v0", model=ranked(), prompts=(p for p in ["a", "bc"]), reward=lambda p, c: len(c), top_k=2
    )
    assert [prompt.text for prompt in env.unwrapped.prompts] == ["a", "bc"]  # type: ignore[attr-defined]


@given(actions=st.lists(st.integers(0, 2), min_size=1, max_size=5), seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_two_copies_given_the_same_do_the_same(
    assert_equal: Callable[[Any, Any], None], run: Play, tabular_env: MakeEnv, actions: list[int], seed: int
) -> None:
    one, other = tabular_env(), tabular_env()
    assert_equal(one.reset(seed=seed), other.reset(seed=seed))
    assert_equal(run(one, actions, seed=seed), run(other, actions, seed=seed))
    for _ in range(5):  # and go on doing so
        assert_equal(one.reset(), other.reset())


def test_two_copies_on_the_embedded_model_do_the_same(
    assert_equal: Callable[[Any, Any], None], run: Play, lm: TransformersLM
) -> None:
    one, other = (TokenDecodingEnv(lm, max_new_tokens=4) for _ in range(2))
    other.reset(seed=1)  # what was done before does not matter
    assert_equal(run(one, [3, 0, 1], seed=0), run(other, [3, 0, 1], seed=0))


def test_the_seed_chooses_the_prompts(tabular_env: MakeEnv) -> None:
    env = tabular_env(prompts=["a", "b", "c", "d"])

    def drawn(seed: int) -> list[str]:
        return [env.reset(seed=seed if i == 0 else None)[1]["prompt"] for i in range(20)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert set(drawn(0)) == {"a", "b", "c", "d"}


def test_every_step_and_the_last_one_say_what_happened(ranked: MakeLM, tabular_env: MakeEnv) -> None:
    env = tabular_env(model=ranked(), top_k=4)
    _, info = env.reset(options={"prompt": "ab"})
    assert info.keys() == {"action_mask", "prompt"}
    every = {"action_mask", "token", "token_text", "logprob"}
    for token in (2, 0):
        _, _, terminated, truncated, info = env.step(token)
        assert (terminated, truncated) == (False, False)
        assert info.keys() == every
        assert (info["token"], info["token_text"]) == (token, "abc"[token])
        assert info["logprob"] == pytest.approx(math.log(RANKED[0][token]))
    *_, info = env.step(3)
    assert info.keys() == every | {"completion", "reward", "rewards", "objective", "stop"}
    assert (info["completion"], info["token_text"]) == ("ca", "")
    assert info["reward"] == 0.5


def test_ansi_shows_the_prompt_the_text_and_the_candidates(ranked: MakeLM, tabular_env: MakeEnv) -> None:
    env = tabular_env(model=ranked(), top_k=4, top_p=0.8, render_mode="ansi", max_new_tokens=3)
    assert isinstance(env.render(), str)  # before reset
    env.reset(options={"prompt": "bcb"})
    env.step(2)
    screen = str(env.render())
    assert "'bcb'" in screen
    assert "completion  'c'" in screen
    assert "2 of 3 tokens" in screen
    lines = [line.split() for line in screen.splitlines()[-4:]]
    assert lines == [
        ["0", "40.0%", "'a'"],
        ["1", "30.0%", "'b'"],
        ["2", "20.0%", "'c'"],
        ["3", "10.0%", "''", "masked"],
    ]
    env.step(0)
    *_, info = env.step(0)
    screen = str(env.render())
    assert "'caa'" in screen
    assert f"reward {info['reward']:.3f}" in screen
    assert f"J {info['objective']:.3f}" in screen


def test_human_prints_at_every_step(ranked: MakeLM, tabular_env: MakeEnv, capsys: pytest.CaptureFixture[str]) -> None:
    env = tabular_env(model=ranked(), render_mode="human")
    env.reset(options={"prompt": "bcb"})
    first = capsys.readouterr().out
    assert "'bcb'" in first
    assert "40.0%  'a'" in first
    env.step(2)
    assert "completion  'c'" in capsys.readouterr().out
    assert env.render() is None
    assert "completion  'c'" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{1: "a", "x": 2}, {"promt": "a"}, 5, "a"])
def test_bad_options_of_reset_are_one_line(tabular_env: MakeEnv, options: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^reset's options [^\n]*$"):
        tabular_env().reset(options=options)


def test_render_without_a_mode_warns(tabular_env: MakeEnv) -> None:
    env = tabular_env()
    env.reset()
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None


def test_stable_baselines_agents_just_work(tabular_env: MakeEnv) -> None:
    off_policy = {"learning_starts": 8, "buffer_size": 100, "batch_size": 8, "train_freq": 4}
    on_policy = {"n_steps": 16, "batch_size": 8, "n_epochs": 1}
    agents: list[tuple[Any, dict[str, Any]]] = [
        (stable_baselines3.DQN, off_policy),
        (stable_baselines3.PPO, on_policy),
        (sb3_contrib.QRDQN, off_policy),
        (sb3_contrib.MaskablePPO, on_policy),
    ]
    for algorithm, arguments in agents:
        # Only one of them knows masks; it would be an error if it took another action.
        masked = algorithm is sb3_contrib.MaskablePPO
        env = tabular_env(candidate_dims=4, top_p=0.6 if masked else 1.0)
        policy_kwargs = {"net_arch": [8]}
        agent = algorithm("MultiInputPolicy", env, seed=0, policy_kwargs=policy_kwargs, device="cpu", **arguments)
        before = [p.detach().clone() for p in agent.policy.parameters()]
        agent.learn(48)
        assert agent.num_timesteps == 48
        after = list(agent.policy.parameters())
        assert any(not a.equal(b) for a, b in zip(before, after, strict=True)), algorithm.__name__
        observation, _ = env.reset(seed=0)
        masks = {"action_masks": env.action_masks()} if masked else {}
        action, _ = agent.predict(observation, deterministic=True, **masks)
        env.step(action)


def test_masks_would_be_missed(tabular_env: MakeEnv) -> None:
    # So that the test above means something: an agent that knows no masks fails on the same env.
    env = tabular_env(candidate_dims=4, top_p=0.6)
    agent = stable_baselines3.PPO("MultiInputPolicy", env, seed=0, device="cpu", n_steps=16, batch_size=8, n_epochs=1)
    with pytest.raises(IllegalActionError, match=r"is masked.*MaskableDQN"):
        agent.learn(48)


def test_an_env_on_a_model_by_name_can_be_pickled(lm: TransformersLM) -> None:
    # What Gymnasium's and SB3's vector envs in other processes do with what makes their envs.
    spec = gym.make("TokenDecoding-v0", model=lm, max_new_tokens=2).spec
    again = pickle.loads(pickle.dumps(spec))
    assert again.kwargs["model"] is lm


def test_the_docstring_follows_the_template_and_has_every_observation_and_argument(tabular_env: MakeEnv) -> None:
    doc = inspect.getdoc(TokenDecodingEnv) or ""
    template = ["Description", "Action Space", "Observation Space", "Starting State", "Rewards", "Episode End"]
    template += ["Information", "Arguments", "Version History"]
    assert re.findall(r"^## (.*)$", doc, re.M) == template
    space = tabular_env(top_k=3, candidate_dims=4, context_tokens=2, components=True).observation_space
    d, k, e = space["hidden"].shape[0], 3, 4
    sizes = {"d": d, "k": k, "k·e": k * e, "w·e": 2 * e, "r": 1, "1+r": 2, "1": 1}
    rows = re.findall(r"^\| `(\w+)` +\| \((.*),\) +\| (\w+) +\|", doc, re.M)
    described = {name: ((sizes[shape],), np.dtype(dtype)) for name, shape, dtype in rows}
    assert described == {name: (part.shape, part.dtype) for name, part in space.spaces.items()}
    arguments = re.findall(r"^ {4}(\w+)=", doc[doc.index("gym.make(") :], re.M)
    own = [name for name in inspect.signature(TokenDecodingEnv).parameters if name not in ("mdp_kwargs", "render_mode")]
    assert arguments == own
