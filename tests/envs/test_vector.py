"""The vector environments are N single ones that share their computation."""

import contextlib
import itertools

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
    for actions in ([0, masked], [0], [0, "a"], [0.5, 0], [0, 99], 0, None, np.int64(0), np.array(0)):
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
        (lambda: make_vec(2, **arguments()).reset(seed=1.5), "seed is an integer, a list .* got 1.5"),
        (lambda: make_vec(2, **arguments()).reset(options={"promt": "a"}), "promt"),
        (lambda: make_vec(2, **arguments()).reset(options={1: "a", "promt": "a"}), "not .*1, 'promt'"),
        (lambda: make_vec(2, **arguments()).reset(options=5), "options are a dict, .* got 5"),
        (lambda: reset_with({"promt": "a"}), "promt"),
        (lambda: reset_with([{"prompt": "a"}]), "2 options are needed, .* got 1"),
        (lambda: TokenDecodingVecEnv(2, **arguments()).set_attr("shaping", False), "shared"),
        (
            lambda: TokenDecodingVecEnv(2, **arguments()).env_method("get_state"),
            "call get_state on TokenDecodingVecEnv",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ConfigurationError, match=message):
        call()


def reset_with(options):
    env = TokenDecodingVecEnv(2, **arguments())
    env.set_options(options)
    env.reset()
    return [info["prompt"] for info in env.reset_infos]


def test_options_of_stable_baselines3_choose_the_prompts():
    assert reset_with({"prompt": "ab"}) == ["ab", "ab"]
    assert reset_with([{"prompt": "ab"}, {"prompt": "b"}]) == ["ab", "b"]


def test_seeds_may_be_an_array():
    env = make_vec(3, **arguments())
    first = env.reset(seed=[3, 4, 5])[1]["prompt"].tolist()
    for seeds in (3, np.int64(3), np.array([3, 4, 5])):
        assert env.reset(seed=seeds)[1]["prompt"].tolist() == first


def test_render_shows_each_environment_of_stable_baselines3(capsys):
    env = TokenDecodingVecEnv(2, render_mode="human", **arguments())
    reset_to = [{"prompt": "ab"}, {"prompt": "b"}]
    env.set_options(reset_to)
    env.reset()
    env.render()
    printed = capsys.readouterr().out
    assert "prompt      'ab'" in printed
    assert "prompt      'b'" in printed
    texts = TokenDecodingVecEnv(2, render_mode="ansi", **arguments())
    texts.set_options(reset_to)
    texts.reset()
    texts.step([0, 1])
    assert "'ab'" in texts.env_method("render", indices=0)[0]
    assert "4 of 5 tokens" in texts.env_method("render", indices=1)[0]


class CountingLM(TabularLM):
    """Counts its forwards; fails at the next one if told so."""

    forwards = 0
    fails = False

    def forward(self, sequences):
        if self.fails:
            raise RuntimeError("no power")
        self.forwards += 1
        return super().forward(sequences)


def test_a_reset_to_a_prompt_never_seen_is_part_of_the_same_forward():
    model = CountingLM(np.full((4, 4), 0.25), eos_token_ids=[])
    prompts = ["".join(letters) for letters in itertools.product("abc", repeat=4)]
    env = make_vec(4, **arguments(model=model, max_new_tokens=2, prompts=prompts))
    env.reset(seed=0)
    for _ in range(8):
        before, size = model.forwards, len(env.mdp.tree)
        terminated = env.step(np.arange(4) % 3)[2]
        assert model.forwards == before + (len(env.mdp.tree) > size)
        if terminated.any():
            assert len(env.mdp.tree) > size  # of the 81 prompts


@pytest.mark.parametrize("make", [make_vec, lambda n, **kwargs: TokenDecodingVecEnv(n, **kwargs)])
def test_a_step_that_fails_has_not_happened(make):
    prompts = ["a", "b", "c", "ab", "bc", "ca", "aa", "bb"]

    def play(failing_steps):
        model = CountingLM(np.full((4, 4), 0.25), eos_token_ids=[])
        env = make(3, **arguments(model=model, max_new_tokens=2, prompts=prompts))
        env.reset(seed=3) if isinstance(env, gym.vector.VectorEnv) else (env.seed(3), env.reset())
        seen, failures = [], 0
        for step in range(6):
            model.fails, size = step in failing_steps, len(env.mdp.tree)
            with contextlib.suppress(RuntimeError):
                seen.append(env.step(np.zeros(3, dtype=int))[0]["hidden"])
            if len(seen) == step:  # it failed
                failures, model.fails = failures + 1, False
                assert len(env.mdp.tree) == size
                seen.append(env.step(np.zeros(3, dtype=int))[0]["hidden"])
        return seen, failures

    (with_failures, failures), (without, none) = play([0, 1, 3]), play([])
    assert failures > 1
    assert none == 0
    np.testing.assert_array_equal(with_failures, without)


def test_there_may_be_more_environments_than_prompts():
    env = make_vec(6, **arguments(prompts=["a", "b"]))
    _, info = env.reset(seed=0)
    assert set(info["prompt"]) == {"a", "b"}
    assert len(env.mdp.tree) == 2  # those of one prompt share everything
    _, _, terminated, _, _ = env.step(np.zeros(6, dtype=int))
    assert len(env.mdp.tree) == 2 + len(set(info["prompt"][~terminated]))


def test_infos_are_laid_out_as_gymnasium_does():
    vector = make_vec(3, **arguments())
    single = gym.vector.SyncVectorEnv(
        [lambda: gym.make("TokenDecoding-v0", **arguments())] * 3, autoreset_mode=AutoresetMode.SAME_STEP
    )

    def same(ours, theirs, where=""):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            if isinstance(value, dict):
                same(ours[key], value, f"{where}{key}.")
            elif key == "final_obs":
                for a, b in zip(ours[key], value, strict=True):
                    assert (a is None) == (b is None)
                    if a is not None:
                        assert_same(a, b)
            elif f"_{key}" in theirs:
                filled = theirs[f"_{key}"]
                assert np.shape(ours[key]) == np.shape(value), f"{where}{key}"
                np.testing.assert_array_equal(ours[key][filled], value[filled], err_msg=f"{where}{key}")
            else:
                np.testing.assert_array_equal(ours[key], value, err_msg=f"{where}{key}")

    same(vector.reset(seed=4)[1], single.reset(seed=4)[1])
    rng = np.random.default_rng(0)
    for _ in range(12):
        actions = rng.integers(3, size=3)
        same(vector.step(actions)[-1], single.step(actions)[-1])


def test_a_completion_that_cannot_be_scored_is_nan_beside_those_that_can():
    def reward(prompts, completions):
        return [None if "a" in completion else 1.0 for completion in completions]

    model = TabularLM(np.full((4, 4), 0.25), eos_token_ids=[])
    env = make_vec(6, **arguments(model=model, reward=reward, max_new_tokens=2))
    env.reset(seed=0)
    env.step(np.arange(6) % 3)
    info = env.step(np.arange(6) % 3)[-1]["final_info"]
    unscored = np.array(["a" in text for text in info["completion"]])
    assert unscored.any()
    assert not unscored.all()
    np.testing.assert_array_equal(np.isnan(info["reward"]), unscored)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), most=st.integers(1, 12))
def test_forgetting_changes_nothing_that_is_seen(seed, most):
    free, bounded = make_vec(3, **arguments()), make_vec(3, **arguments(max_prefixes=most))
    rng = np.random.default_rng(seed)
    assert_same(free.reset(seed=seed)[0], bounded.reset(seed=seed)[0])
    for _ in range(25):
        actions = rng.integers(3, size=3)
        (a, *rest), (b, *others) = free.step(actions), bounded.step(actions)
        assert_same(a, b)
        np.testing.assert_array_equal(rest[0], others[0])
        # Beside what was asked for lately: where the three stand, the way there, and one step more.
        assert len(bounded.mdp.tree) <= most + 3 * 6


@pytest.mark.parametrize("make", [make_vec, lambda n, **kwargs: TokenDecodingVecEnv(n, **kwargs)])
def test_states_of_many_environments(make):
    env = make(3, **arguments(model=TabularLM(np.full((4, 4), 0.25), eos_token_ids=[])))
    env.reset()
    state = env.get_state()
    there = [env.step([0, 1, 2]) for _ in range(2)][-1]
    env.set_state(state)
    again = [env.step([0, 1, 2]) for _ in range(2)][-1]
    assert_same(there[0], again[0])
    with pytest.raises(ConfigurationError, match="another environment"):
        make_vec(2, **arguments()).set_state(state)
