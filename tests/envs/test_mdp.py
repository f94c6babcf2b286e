"""DecodingMDP: the objective, ends, legal actions, potentials, and arguments that cannot work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qstar_decoding  # noqa: F401  registers the env
from qstar_decoding.envs import TabularLM, TokenDecodingEnv, TransformersLM, mdp
from qstar_decoding.errors import (
    ConfigurationError,
    IllegalActionError,
    PromptError,
    UnknownNameError,
)
from qstar_decoding.rewards import Reward, as_reward

MakeEnv = Callable[..., TokenDecodingEnv]
MakeLM = Callable[..., TabularLM]
Play = Callable[..., list[Any]]


@given(
    prompt=st.text("abcd", min_size=1, max_size=4),
    actions=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    alpha=st.sampled_from([0.0, 0.02, 1.0]),
    gamma=st.sampled_from([1.0, 0.9]),
    stop=st.sampled_from([None, "ba", ["c", "aa"]]),
    shaping=st.booleans(),
)
@settings(max_examples=60)
def test_the_return_is_the_objective_less_the_potential_of_the_empty_prefix(
    run: Play,
    tabular_env: MakeEnv,
    prompt: str,
    actions: list[int],
    alpha: float,
    gamma: float,
    stop: str | list[str] | None,
    shaping: bool,
) -> None:
    def score(prompt: str, completion: str) -> float:
        return math.sin(7 * len(completion) + completion.count("a")) + len(prompt)

    def potential(prompt: str, completion: str) -> float:
        return math.cos(3 * len(completion)) - len(prompt)

    env = tabular_env(
        reward=as_reward(score, potential=potential),
        top_k=5,
        logprob_weight=alpha,
        gamma=gamma,
        shaping=shaping,
        stop=stop,
    )
    transitions = run(env, actions, options={"prompt": prompt})
    last = transitions[-1][4]

    # J as the design defines it, from the model's table.
    model = env.mdp.model
    assert isinstance(model, TabularLM)
    prefix, logprobs = model.encode(prompt), []
    for *_, info in transitions:
        logprobs.append(float(model.forward([prefix])[1][0, info["token"]]))
        assert info["logprob"] == pytest.approx(logprobs[-1])
        assert info["token_text"] == model.decode([info["token"]])
        prefix = [*prefix, info["token"]]
    reward = score(prompt, last["completion"])
    assert last["reward"] == pytest.approx(reward)
    assert last["objective"] == pytest.approx(alpha * sum(logprobs) + reward, abs=1e-6)

    # What every step pays, and what that comes to.
    generated = [model.decode(prefix[len(model.encode(prompt)) :][:t]) for t in range(len(transitions))]
    potentials = [*(potential(prompt, text) for text in generated), 0.0]
    for t, (_, paid, terminated, _, _) in enumerate(transitions):
        shaped = gamma * potentials[t + 1] - potentials[t] if shaping else 0.0
        assert paid == pytest.approx(alpha * logprobs[t] + terminated * reward + shaped, abs=1e-5)
    discounted = sum(gamma**t * transition[1] for t, transition in enumerate(transitions))
    expected = sum(gamma**t * alpha * logprob for t, logprob in enumerate(logprobs))
    expected += gamma ** (len(transitions) - 1) * reward
    assert discounted == pytest.approx(expected - shaping * potential(prompt, ""), abs=1e-5)
    if gamma == 1:
        assert discounted == pytest.approx(last["objective"] - shaping * potential(prompt, ""), abs=1e-5)


def test_the_return_on_the_embedded_model(run: Play, lm: TransformersLM) -> None:
    env = TokenDecodingEnv(lm, prompts="The movie was", max_new_tokens=5, reward="sentiment")
    for actions in ([0], [3, 1, 0, 7, 2]):
        transitions = run(env, actions)
        # VADER's polarity of an empty text is 0.
        assert sum(t[1] for t in transitions) == pytest.approx(transitions[-1][4]["objective"])


@pytest.mark.parametrize(
    ("stop", "tokens", "completion", "why"),
    [
        (None, [0, 1, 3], "ab", "eos"),
        (None, [3], "", "eos"),
        (None, [0, 1, 2, 0], "abca", "length"),
        ("c", [0, 2], "a", "stop"),
        ("bc", [1, 0, 1, 2], "ba", "stop"),  # over two tokens, and at the horizon
        (["xyz", "ca", "b"], [0, 2, 0], "a", "stop"),
        (("bc", "abc"), [2, 0, 1, 2], "c", "stop"),  # where the first of them begins
        ("bc", [0, 1, 3], "ab", "eos"),  # half a stop string is none
        (None, [0, 1, 2, 3], "abc", "eos"),  # an end of text at the horizon
        ("ab", [0, 0, 2, 1], "aacb", "length"),
    ],
)
def test_every_end_terminates_and_none_truncates(
    ranked: MakeLM, tabular_env: MakeEnv, stop: Any, tokens: list[int], completion: str, why: str
) -> None:
    env = tabular_env(model=ranked(), top_k=4, max_new_tokens=4, stop=stop)
    env.reset(options={"prompt": "bca"})  # a stop string in the prompt is none
    for position, token in enumerate(tokens):
        observation, _, terminated, truncated, info = env.step(token)
        assert not truncated
        assert terminated == (position == len(tokens) - 1)
    assert (info["completion"], info["stop"]) == (completion, why)
    assert observation["action_mask"].all()
    assert not any(observation[key].any() for key in observation if key != "action_mask")


def test_columns_of_the_prompt_reach_the_reward(ranked: MakeLM, tabular_env: MakeEnv) -> None:
    def matches(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    env = tabular_env(model=ranked(), reward=matches, max_new_tokens=2, prompts={"prompt": "a", "answer": "cb"})
    env.reset()
    env.step(2)
    assert env.step(1)[4]["reward"] == 1
    env.reset(options={"prompt": {"prompt": "a", "answer": "cc"}})
    env.step(2)
    assert env.step(1)[4]["reward"] == 0


@pytest.mark.parametrize(("top_p", "legal"), [(1.0, 4), (0.95, 4), (0.9, 3), (0.7, 2), (0.51, 2), (0.49, 1), (1e-9, 1)])
def test_top_p_masks_what_is_outside_the_smallest_set(tabular_env: MakeEnv, top_p: float, legal: int) -> None:
    env = tabular_env(model=TabularLM([[0.5, 0.25, 0.1875, 0.0625]] * 4), top_k=4, top_p=top_p)
    observation, info = env.reset(options={"prompt": "a"})
    expected = np.arange(4) < legal
    np.testing.assert_array_equal(env.action_masks(), expected)
    np.testing.assert_array_equal(observation["action_mask"], expected)
    np.testing.assert_array_equal(info["action_mask"], expected)
    assert env.action_masks().dtype == bool
    for action in range(4):
        env.reset(options={"prompt": "a"})
        if expected[action]:
            env.step(action)
        else:
            with pytest.raises(IllegalActionError, match=f"action {action} is masked; legal now"):
                env.step(action)


def test_impossible_tokens_are_masked(tabular_env: MakeEnv) -> None:
    env = tabular_env(model=TabularLM([[0.0, 1.0, 0.0]] * 3), prompts="a")
    env.reset()
    np.testing.assert_array_equal(env.action_masks(), [True, False, False])
    assert env.step(0)[4]["token_text"] == "b"
    # Whatever rounding makes of the sum of the possible ones, which may fall short of 1.
    for seed in range(20):
        possible = np.random.default_rng(seed).random(4)
        env = tabular_env(model=TabularLM([[*possible, 0.0, 0.0]] * 6), top_k=6, prompts="a")
        env.reset()
        np.testing.assert_array_equal(env.action_masks(), np.arange(6) < 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k is an integer >= 1"),
        ({"top_k": -3}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_k": None}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens is an integer >= 1"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_p": "0.9"}, "top_p"),
        ({"logprob_weight": -1}, "logprob_weight"),
        ({"logprob_weight": math.inf}, "logprob_weight"),
        ({"logprob_weight": math.nan}, "logprob_weight"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 1.01}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"gamma": None}, "gamma"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"render_mode": "rgb"}, "render_mode is None or one of 'ansi', 'human', 'rgb_array'; got 'rgb'"),
        ({"reward": "sentimant"}, "known, nearest first: 'sentiment'"),
        ({"reward": 3}, "reward"),
        ({"model_kwargs": 3}, "model_kwargs is a dict of arguments of the model's loader, got 3"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(mdp, "load_language_model", load)
    with pytest.raises(ConfigurationError, match=message):
        TokenDecodingEnv("smollm2-135m-instruct", **arguments)


def test_what_depends_on_the_model_is_said_when_it_is_there(ranked: MakeLM, tabular_env: MakeEnv) -> None:
    with pytest.raises(ConfigurationError, match=r"top_k is an integer from 1 to 5 .*, got 6"):
        tabular_env(top_k=6)
    tabular_env(top_k=5)
    with pytest.raises(ConfigurationError, match="candidate_dims"):
        tabular_env(candidate_dims=0)
    with pytest.raises(PromptError, match=r"'abc'.* has 3 tokens; 'tabular' takes 7, less 5 .* at most 2"):
        tabular_env(model=ranked(context_length=7), prompts=["a", "abc"])
    with pytest.raises(UnknownNameError, match="model"):
        TokenDecodingEnv("no-such-model")
    with pytest.raises(PromptError, match="prompts is empty"):
        tabular_env(prompts=[])
    with pytest.raises(ConfigurationError, match="max_tokens"):
        tabular_env(max_tokens=5)


@pytest.mark.parametrize("kv_budget", [0, -1, "1GB", [1]])
def test_a_kv_budget_is_checked_whether_the_model_uses_it_or_not(tabular_env: MakeEnv, kv_budget: Any) -> None:
    with pytest.raises(ConfigurationError, match="kv_budget is a number of bytes > 0"):
        tabular_env(kv_budget=kv_budget)


@pytest.mark.parametrize("max_prefixes", [0, -3, 1.5, "many"])
def test_max_prefixes_is_a_positive_integer(tabular_env: Callable[..., TokenDecodingEnv], max_prefixes: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_prefixes"):
        tabular_env(max_prefixes=max_prefixes)


def test_potentials_are_those_of_the_prompt_that_asks(tabular_env: Callable[..., TokenDecodingEnv]) -> None:
    class Matches(Reward):
        name, lower, upper = "matches", 0.0, 1.0

        def score(self, prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float]:
            return self.score_prefixes(prompts, completions, completion_ids, **columns)

        def score_prefixes(self, prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> Any:
            return [float(wanted == 1) for wanted in columns["wanted"]]

    env = tabular_env(reward=Matches(), prompts=[{"prompt": "ab", "wanted": 0}, {"prompt": "ab", "wanted": 1}])
    mdp, (no, yes) = env.mdp, env.prompts
    node = mdp.roots([no])
    assert [mdp.potential([p], node)[0] for p in (no, yes, no, yes)] == [0, 1, 0, 1]
    np.testing.assert_array_equal(mdp.potential([yes, no, yes], node.repeat(3)), [1, 0, 1])
