"""TokenDecoding-v0: Gymnasium's contract, the objective, errors that leave the state as it was, standard agents."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
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
    EpisodeError,
    IllegalActionError,
    PromptError,
    RewardError,
    UnknownNameError,
)
from qstar_decoding.rewards import Reward, as_reward

MakeEnv = Callable[..., TokenDecodingEnv]
Transition = tuple[dict[str, Any], float, bool, bool, dict[str, Any]]

# The same four probabilities everywhere: an action's rank is its token.
RANKED = [[0.4, 0.3, 0.2, 0.1]] * 4
IDS = ["TokenDecoding-v0", "qstar_decoding:TokenDecoding-v0"]


def ranked(**kwargs: Any) -> TabularLM:
    """Tokens 0 to 3 are "a", "b", "c" and the end, likely in this order whatever went before."""
    return TabularLM(RANKED, **kwargs)


def run(env: gym.Env[Any, Any], actions: Sequence[int], **reset: Any) -> list[Transition]:
    """Play an episode; the actions are taken modulo the legal ones, and from the start again if they do not suffice."""
    env.reset(**reset)
    transitions: list[Transition] = []
    while not transitions or not transitions[-1][2]:
        legal = np.flatnonzero(env.unwrapped.action_masks())  # type: ignore[attr-defined]
        action = legal[actions[len(transitions) % len(actions)] % len(legal)]
        transitions.append(env.step(action))  # type: ignore[arg-type]
    return transitions


def assert_equal(one: Any, other: Any) -> None:
    """Compare observations, infos and transitions, with everything in them."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------------------------------------- Gymnasium's contract


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


def test_everything_has_a_default(monkeypatch: pytest.MonkeyPatch, lm: TransformersLM) -> None:
    monkeypatch.setattr(mdp, "load_language_model", lambda *args, **kwargs: lm)  # which is the default, in float32
    env = gym.make("TokenDecoding-v0")
    transitions = run(env, [0], seed=0)
    assert 1 <= len(transitions) <= 24
    assert transitions[-1][4]["objective"] == pytest.approx(
        transitions[-1][4]["reward"] + 0.02 * sum(t[4]["logprob"] for t in transitions)
    )


def test_the_spec_can_be_copied_and_does_not_copy_the_model(lm: TransformersLM) -> None:
    for model in (lm, ranked()):
        env = gym.make("TokenDecoding-v0", model=model, prompts=["ab"], max_new_tokens=2, top_k=2)
        assert env.spec is not None
        assert copy.deepcopy(env.spec).kwargs["model"] is model
        again = gym.make(copy.deepcopy(env.spec))
        assert again.unwrapped.mdp.model is model  # type: ignore[attr-defined]
        assert copy.copy(model) is model
        assert_equal(run(env, [1, 0], seed=0), run(again, [1, 0], seed=0))


def test_prompts_from_a_generator_and_a_local_function_as_reward() -> None:
    env = gym.make(
        "TokenDecoding-v0", model=ranked(), prompts=(p for p in ["a", "bc"]), reward=lambda p, c: len(c), top_k=2
    )
    assert [prompt.text for prompt in env.unwrapped.prompts] == ["a", "bc"]  # type: ignore[attr-defined]


@given(actions=st.lists(st.integers(0, 2), min_size=1, max_size=5), seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_two_copies_given_the_same_do_the_same(tabular_env: MakeEnv, actions: list[int], seed: int) -> None:
    one, other = tabular_env(), tabular_env()
    assert_equal(one.reset(seed=seed), other.reset(seed=seed))
    assert_equal(run(one, actions, seed=seed), run(other, actions, seed=seed))
    for _ in range(5):  # and go on doing so
        assert_equal(one.reset(), other.reset())


def test_two_copies_on_the_embedded_model_do_the_same(lm: TransformersLM) -> None:
    one, other = (TokenDecodingEnv(lm, max_new_tokens=4) for _ in range(2))
    other.reset(seed=1)  # what was done before does not matter
    assert_equal(run(one, [3, 0, 1], seed=0), run(other, [3, 0, 1], seed=0))


def test_the_seed_chooses_the_prompts(tabular_env: MakeEnv) -> None:
    env = tabular_env(prompts=["a", "b", "c", "d"])

    def drawn(seed: int) -> list[str]:
        return [env.reset(seed=seed if i == 0 else None)[1]["prompt"] for i in range(20)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert set(drawn(0)) == {"a", "b", "c", "d"}


@given(
    seed=st.integers(0, 50),
    actions=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    bounds=st.sampled_from([(-math.inf, math.inf), (0.1, 0.3), (-math.inf, 0.0), (1e30, 1e38)]),
    potential=st.sampled_from([0.0, 1e9, -1e9, 0.2, 1e300]),
)
@settings(max_examples=40)
def test_every_observation_is_in_the_space(
    tabular_env: MakeEnv, seed: int, actions: list[int], bounds: tuple[float, float], potential: float
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


def test_what_is_returned_belongs_to_the_caller(tabular_env: MakeEnv) -> None:
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


# ------------------------------------------------------------------------------------------------- the objective


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


def test_the_return_on_the_embedded_model(lm: TransformersLM) -> None:
    env = TokenDecodingEnv(lm, prompts="The movie was", max_new_tokens=5, reward="sentiment")
    for actions in ([0], [3, 1, 0, 7, 2]):
        transitions = run(env, actions)
        # VADER's polarity of an empty text is 0.
        assert sum(t[1] for t in transitions) == pytest.approx(transitions[-1][4]["objective"])


def test_every_step_and_the_last_one_say_what_happened(tabular_env: MakeEnv) -> None:
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
    tabular_env: MakeEnv, stop: Any, tokens: list[int], completion: str, why: str
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


def test_the_observation_shows_the_state(tabular_env: MakeEnv) -> None:
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


def test_columns_of_the_prompt_reach_the_reward(tabular_env: MakeEnv) -> None:
    def matches(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    env = tabular_env(model=ranked(), reward=matches, max_new_tokens=2, prompts={"prompt": "a", "answer": "cb"})
    env.reset()
    env.step(2)
    assert env.step(1)[4]["reward"] == 1
    env.reset(options={"prompt": {"prompt": "a", "answer": "cc"}})
    env.step(2)
    assert env.step(1)[4]["reward"] == 0


# ------------------------------------------------------------------------- mistakes, which leave the state as it was


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
def test_an_illegal_action_is_an_error_and_nothing_has_happened(tabular_env: MakeEnv, action: Any) -> None:
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
def test_an_action_is_any_one_integer(tabular_env: MakeEnv, action: Any) -> None:
    env = tabular_env(model=ranked())
    env.reset()
    assert env.step(action)[4]["token_text"] == "b"


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


def test_a_step_needs_an_episode(tabular_env: MakeEnv) -> None:
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
    tabular_env: MakeEnv, options: dict[str, Any], error: type[Exception], message: str
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
def test_a_reward_that_fails_leaves_the_state_as_it_was(tabular_env: MakeEnv, when: str, bad: Any) -> None:
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


def test_a_completion_that_cannot_be_scored_earns_its_fluency(tabular_env: MakeEnv) -> None:
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
        ({"render_mode": "rgb_array"}, "render_mode is None, 'ansi' or 'human', got 'rgb_array'"),
        ({"reward": "sentimant"}, "known, nearest first: 'sentiment'"),
        ({"reward": 3}, "reward"),
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


def test_what_depends_on_the_model_is_said_when_it_is_there(tabular_env: MakeEnv) -> None:
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
    with pytest.raises(TypeError, match="max_tokens"):
        tabular_env(max_tokens=5)


# ------------------------------------------------------------------------------------------------------ rendering


def test_ansi_shows_the_prompt_the_text_and_the_candidates(tabular_env: MakeEnv) -> None:
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


def test_human_prints_at_every_step(tabular_env: MakeEnv, capsys: pytest.CaptureFixture[str]) -> None:
    env = tabular_env(model=ranked(), render_mode="human")
    env.reset(options={"prompt": "bcb"})
    first = capsys.readouterr().out
    assert "'bcb'" in first
    assert "40.0%  'a'" in first
    env.step(2)
    assert "completion  'c'" in capsys.readouterr().out
    assert env.render() is None
    assert "completion  'c'" in capsys.readouterr().out


def test_render_without_a_mode_warns(tabular_env: MakeEnv) -> None:
    env = tabular_env()
    env.reset()
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None


# -------------------------------------------------------------------------------------------------- standard agents


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
    with pytest.raises(IllegalActionError, match="is masked"):
        agent.learn(48)


def test_an_env_on_a_model_by_name_can_be_pickled(lm: TransformersLM) -> None:
    # What Gymnasium's and SB3's vector envs in other processes do with what makes their envs.
    spec = gym.make("TokenDecoding-v0", model=lm, max_new_tokens=2).spec
    again = pickle.loads(pickle.dumps(spec))
    assert again.kwargs["model"] is lm


# ---------------------------------------------------------------------------------------------- states to come back to


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
