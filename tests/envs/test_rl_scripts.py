"""RL scripts: environments made by name in every way that Gymnasium and stable-baselines3 have, pictures, wrappers."""

import itertools
import os
import warnings
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.atari_wrappers import ClipRewardEnv
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

import qstar_decoding  # noqa: F401  registers the environment
from qstar_decoding.agents import AStarPlanner, BeamSearch, GreedyDecoder, train_task
from qstar_decoding.envs import DecodingMDP, TokenDecodingEnv, TokenDecodingVecEnv, TransformersLM, load_prompts
from qstar_decoding.envs.mdp import mdp_of
from qstar_decoding.envs.rendering import Candidate, Screen
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.tasks import load_task

TOY = {"model": "toy", "prompts": ["ab", "c"], "reward": "pangram", "top_k": 4, "max_new_tokens": 5}
TINY_POLICY = {"net_arch": [8]}


@pytest.fixture
def by_name():
    gym.register("ToyText-v0", entry_point="qstar_decoding.envs:TokenDecodingEnv", kwargs=TOY)
    yield "ToyText-v0"
    del gym.registry["ToyText-v0"]


def make(**changes):
    return gym.make("TokenDecoding-v0", **{**TOY, **changes})


# ------------------------------------------------------------------------------------------------------ made by name


def test_stable_baselines_makes_and_trains_it_by_name(by_name):
    for algorithm, options in (
        (DQN, {"buffer_size": 100, "learning_starts": 4}),
        (PPO, {"n_steps": 8, "batch_size": 8}),
    ):
        agent = algorithm("MultiInputPolicy", by_name, policy_kwargs=TINY_POLICY, device="cpu", **options).learn(16)
        assert agent.num_timesteps >= 16
        assert isinstance(mdp_of(agent.get_env()), DecodingMDP)


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_vector_environments_of_stable_baselines_make_it_by_name(vec_env_cls):
    # A process of its own knows the name by the package that it is given with.
    env = make_vec_env("qstar_decoding:TokenDecoding-v0", 2, seed=0, env_kwargs=TOY, vec_env_cls=vec_env_cls)
    try:
        observation = env.reset()
        assert observation["logprobs"].shape == (2, 4)
        for _ in range(6):
            _, rewards, _, _ = env.step(np.zeros(2, dtype=np.int64))
        assert np.isfinite(rewards).all()
        one, other = env.get_images()
        assert one.dtype == np.uint8
        assert one.shape == other.shape
        assert env.render().ndim == 3  # both, as tiles
    finally:
        env.close()


def test_a_process_of_its_own_follows_the_same_episodes():
    ours, theirs = (
        make_vec_env("qstar_decoding:TokenDecoding-v0", 2, seed=3, env_kwargs=TOY, vec_env_cls=cls)
        for cls in (DummyVecEnv, SubprocVecEnv)
    )
    try:
        one, other = ours.reset(), theirs.reset()
        for key, array in one.items():
            np.testing.assert_array_equal(array, other[key])
        for _ in range(4):
            (_, one, _, _), (_, other, _, _) = (env.step(np.zeros(2, dtype=np.int64)) for env in (ours, theirs))
            np.testing.assert_allclose(one, other, rtol=1e-6)
    finally:
        theirs.close()


# ---------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_shows_the_state_and_keeps_its_size():
    env = make(render_mode="rgb_array", max_new_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.reset(seed=0, options={"prompt": "ab"})
        frames = [env.render()]
        for action in (1, 0, 0):
            ended = env.step(action)[2]
            frames.append(env.render())
            if ended:
                break
    assert {frame.shape for frame in frames} == {frames[0].shape}
    assert all(frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 for frame in frames)
    assert all((a != b).any() for a, b in itertools.pairwise(frames))  # each step shows
    assert len(np.unique(frames[0].reshape(-1, 3), axis=0)) > 3  # ink, paper, bars
    env.close()


def test_a_bar_is_as_long_as_its_probability():
    def blue_pixels(probability, legal=True):
        image = Screen("a", "b", "", [Candidate("x", probability, legal)], 1).as_image().astype(int)
        return int((image[..., 2] - image[..., 0] > 60).sum())

    assert blue_pixels(0.0) < blue_pixels(0.25) < blue_pixels(0.5) < blue_pixels(1.0)
    assert blue_pixels(0.5) / blue_pixels(1.0) == pytest.approx(0.5, abs=0.02)
    assert blue_pixels(0.5, legal=False) == 0


@pytest.mark.parametrize("text", ["", "\n\n", "word " * 400, "日本語 😀", "a\x00b\x07", "x" * 5000, "\ud800"])
def test_any_text_can_be_drawn(text):
    candidates = [Candidate(text, 0.5, True)] * 30
    assert Screen(text, text, "remaining 1 of 2", candidates, 30).as_image().shape == (
        Screen(None, "", "before reset", [], 30).as_image().shape
    )


def test_both_checkers_are_silent_about_every_render_mode():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in (None, "ansi", "human", "rgb_array"):
            check_env(make(render_mode=mode).unwrapped)
            sb3_check_env(make(render_mode=mode))
    env = make().unwrapped
    assert set(env.metadata["render_modes"]) == {"ansi", "human", "rgb_array"}
    assert env.metadata["render_fps"] > 0


def test_vector_environments_draw_pictures_too():
    vector = gym.make_vec("TokenDecoding-v0", num_envs=2, render_mode="rgb_array", **TOY)
    vector.reset(seed=0)
    one, other = vector.render()
    assert one.shape == other.shape
    native = TokenDecodingVecEnv(2, render_mode="rgb_array", **TOY)
    native.reset()
    assert native.render().ndim == 3
    plain = TokenDecodingVecEnv(2, **TOY)
    plain.reset()
    assert plain.get_images() == [None, None]


def test_a_window_shows_the_pictures(monkeypatch):
    monkeypatch.setitem(os.environ, "SDL_VIDEODRIVER", "dummy")
    pytest.importorskip("pygame")
    env = gym.wrappers.HumanRendering(make(render_mode="rgb_array"))
    env.reset(seed=0)
    env.step(0)
    env.close()


def test_a_video_is_recorded(tmp_path):
    pytest.importorskip("moviepy")
    env = gym.wrappers.RecordVideo(make(render_mode="rgb_array"), str(tmp_path), episode_trigger=lambda _: True)
    env.reset(seed=0)
    while not env.step(0)[2]:
        pass
    env.close()
    assert list(tmp_path.glob("*.mp4"))


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 5}, "TokenDecoding-v0 has no argument 'max_tokens'; did you mean 'max_new_tokens'?"),
        ({"topk": 5}, "no argument 'topk'; did you mean 'top_k'?"),
        ({"rewards": "length"}, "no argument 'rewards'; did you mean 'reward'?"),
        ({"constraints": None}, "no argument 'constraints'; did you mean 'constraint'?"),
        ({"model_args": {}}, "no argument 'model_args'; did you mean 'model_kwargs'?"),
        ({"qqq": 1}, "no argument 'qqq'; it takes action, candidate_dims, .*top_p"),
        ({"model": 3}, "model is a name, a hub id, a local folder or a LanguageModel; got int"),
        ({"model": None}, "LanguageModel; got NoneType"),
        ({"stop": 3}, "stop is a non-empty string or a list of them, got 3"),
        ({"stop": 0}, "stop is a non-empty string or a list of them, got 0"),
        ({"max_new_tokens": 1024}, "max_new_tokens is 1024, which leaves no room for a prompt: 'toy' takes 1024"),
        ({"render_mode": "rgb"}, "render_mode is None or one of 'ansi', 'human', 'rgb_array'; got 'rgb'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [make, partial(gym.make_vec, "TokenDecoding-v0", num_envs=2), TokenDecodingVecEnv])
def test_wrong_arguments_are_named_in_one_line(how, arguments, message):
    given = {**TOY, **arguments}
    with pytest.raises(ConfigurationError, match=message) as caught:
        how(**given)
    assert "\n" not in str(caught.value)


def test_a_bare_model_is_told_how_to_be_wrapped(tiny_lm):
    lm = tiny_lm("Llama")
    with pytest.raises(ConfigurationError, match=r"got LlamaForCausalLM: wrap it in TransformersLM\(model, tok"):
        make(model=lm.model)
    env = gym.make("TokenDecoding-v0", model=TransformersLM(lm.model, lm.tokenizer), prompts=["w3"], reward="length")
    env.reset(seed=0)


def test_a_model_may_be_a_path(tmp_path, tiny_lm):
    lm = tiny_lm("Llama")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    by_path, by_text = (DecodingMDP(m, reward="length", dtype="float32") for m in (tmp_path, str(tmp_path)))
    assert by_path.model is by_text.model


def test_a_folder_without_a_tokenizer_or_a_model_says_what_is_missing(tmp_path, tiny_lm):
    lm = tiny_lm("Llama")
    (tmp_path / "empty").mkdir()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, message in (
        ("empty", "empty' could not be loaded"),
        ("model", "model' has no tokenizer; write it there with tokenizer.save_pretrained"),
        ("tokenizer", "tokenizer' could not be loaded"),
    ):
        for given in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(ConfigurationError, match=message) as caught:
                make(model=given)
            assert "\n" not in str(caught.value)


def test_task_files_with_a_misspelt_argument_name_the_likeliest(tmp_path):
    head = "description: x\nprompts: {train: [a], dev: [b], test: [c]}\nsteps: 3\n"
    path = Path(tmp_path, "mine.yaml")
    path.write_text(head + "env: {topk: 3}\n")
    with pytest.raises(ConfigurationError, match="no argument 'topk'; did you mean 'top_k'"):
        load_task(path)
    env = "env: {model: toy, reward: pangram, top_k: 4}\n"
    for wrong, message in (
        ("training: {lerning_rate: 1}\n", "'lerning_rate'; did you mean 'learning_rate'"),
        ("planner: {heuristics: 1}\n", "'heuristics'; did you mean 'heuristic'"),
    ):
        path.write_text(head + env + wrong)
        with pytest.raises(ConfigurationError, match=message):
            train_task(path, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- wrappers


CHANGED = [
    lambda env: gym.wrappers.TransformReward(env, lambda reward: 2 * reward),
    lambda env: gym.wrappers.ClipReward(env, -1, 1),
    lambda env: gym.wrappers.NormalizeReward(env),
    lambda env: ClipRewardEnv(env),
    lambda env: gym.wrappers.RecordEpisodeStatistics(gym.wrappers.ClipReward(env, -1, 1)),
    lambda env: VecNormalize(DummyVecEnv([lambda: env]), norm_obs=False),
    lambda env: DummyVecEnv([lambda: Monitor(gym.wrappers.ClipReward(env, -1, 1))]),
    lambda env: gym.vector.SyncVectorEnv([lambda: gym.wrappers.ClipReward(env, -1, 1)]),
    lambda env: gym.wrappers.vector.NormalizeReward(gym.make_vec("TokenDecoding-v0", num_envs=2, **TOY)),
    lambda env: gym.wrappers.vector.ClipReward(gym.make_vec("TokenDecoding-v0", num_envs=2, **TOY), -1, 1),
]


@pytest.mark.parametrize("wrap", CHANGED)
@pytest.mark.parametrize("planner", [AStarPlanner, BeamSearch, GreedyDecoder])
def test_a_planner_refuses_an_environment_whose_rewards_are_changed(wrap, planner):
    env = wrap(make())
    with pytest.raises(ConfigurationError, match="changes the rewards, so that their sum is no longer J") as caught:
        planner(env)
    assert "\n" not in str(caught.value)


def test_a_planner_takes_an_environment_whose_rewards_are_not_changed():
    env = make()
    mdp = env.unwrapped.mdp
    for kept in (
        Monitor(env),
        gym.wrappers.TransformObservation(env, lambda x: x, env.observation_space),
        gym.wrappers.RecordEpisodeStatistics(env),
        DummyVecEnv([lambda: Monitor(env)]),
        VecNormalize(DummyVecEnv([lambda: env]), norm_obs=False, norm_reward=False),
        gym.vector.SyncVectorEnv([lambda: env]),
    ):
        assert AStarPlanner(kept).mdp is mdp


def test_a_time_limit_below_the_horizon_is_refused():
    env = make(max_new_tokens=5)
    with pytest.raises(ConfigurationError, match=r"cuts episodes off after 3 of 5 tokens; give .*max_new_tokens=3"):
        AStarPlanner(gym.wrappers.TimeLimit(env, 3))
    with pytest.raises(ConfigurationError, match="cuts episodes off after 3 of 5 tokens"):
        AStarPlanner(gym.make("TokenDecoding-v0", max_episode_steps=3, **TOY))
    for limit in (5, 9):
        assert AStarPlanner(gym.wrappers.TimeLimit(env, limit)).mdp is env.unwrapped.mdp


@pytest.mark.parametrize(
    "make_env",
    [
        lambda: gym.make("CartPole-v1"),
        lambda: gym.make_vec("CartPole-v1", num_envs=2),
        lambda: gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync"),
        lambda: make_vec_env("CartPole-v1", 2),
        lambda: 3,
        lambda: "TokenDecoding-v0",
        lambda: None,
    ],
)
def test_a_planner_on_something_else_is_told_so(make_env):
    with pytest.raises(ConfigurationError, match="a TokenDecoding environment or a DecodingMDP is needed, got"):
        AStarPlanner(make_env())


@pytest.mark.parametrize("kind", [TokenDecodingEnv, TokenDecodingVecEnv, DecodingMDP])
def test_a_planner_on_a_class_is_told_so(kind):
    with pytest.raises(ConfigurationError, match=f"is needed, got the class {kind.__name__}"):
        AStarPlanner(kind)


@pytest.mark.parametrize("make_env", [SubprocVecEnv, gym.vector.AsyncVectorEnv])
def test_a_planner_cannot_search_in_other_processes(make_env):
    env = make_env([partial(gym.make, "qstar_decoding:TokenDecoding-v0", **TOY)])
    try:
        with pytest.raises(ConfigurationError, match=r"live in other processes.*use TokenDecodingVecEnv"):
            AStarPlanner(env)
    finally:
        env.close()


def test_a_discount_in_the_shaping_is_warned_of():
    with pytest.warns(UserWarning, match="gamma=0.9: the shaped rewards of an episode no longer sum to J"):
        env = make(gamma=0.9)
    assert AStarPlanner(env).mdp.encode(load_prompts("ab")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(gamma=1.0)
        make(gamma=0.9, shaping=False)
