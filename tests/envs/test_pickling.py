"""Copies of environments and planners: pickled, as multiprocessing and Ray do, and deep-copied, as tree searches do."""

import copy
import multiprocessing
import operator
import pickle
from concurrent.futures import ProcessPoolExecutor

import gymnasium as gym
import numpy as np
import pytest

from qstar_decoding.agents import AStarPlanner, QHeuristic, QStar, SearchEngine
from qstar_decoding.agents.planning.registry import DECODERS, decoder_options, make_decoder
from qstar_decoding.envs import TabularLM, TokenDecodingVecEnv
from qstar_decoding.envs.constraints import RegexConstraint
from qstar_decoding.errors import ConfigurationError, EpisodeError

ARGUMENTS = {
    "model": TabularLM.random(5, 2, seed=0),
    "prompts": ["ab", {"prompt": "c", "keywords": ["d"]}],
    "reward": "0.5*length + distinct",
    "top_k": 3,
    "max_new_tokens": 5,
    "logprob_weight": 0.1,
}
VARIANTS = {
    "tokens": {},
    "steps": {"action": "step", "delimiter": ["a", "b"], "max_step_tokens": 3, "step_seed": 7},
    "components": {"components": True, "context_tokens": 2, "candidate_dims": 4, "shaping": False},
    "constraint": {"constraint": RegexConstraint("[abc]*"), "stop": "bb", "top_p": 0.9},
}


def make(**changes):
    return gym.make("TokenDecoding-v0", **{**ARGUMENTS, **changes})


def played(env, seed):
    """Return the first legal actions' observations and rewards in one episode."""
    observation, info = env.reset(seed=seed)
    seen, ended = [observation], False
    while not ended:
        observation, reward, ended, _, info = env.step(int(np.flatnonzero(info["action_mask"])[-1]))
        seen.append({**observation, "reward": reward})
    return seen


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pickled_environment_plays_the_same_episodes(variant):
    env = make(**VARIANTS[variant])
    again = pickle.loads(pickle.dumps(env))
    assert again.unwrapped.mdp.settings().keys() == env.unwrapped.mdp.settings().keys()
    assert again.unwrapped.mdp.model is not env.unwrapped.mdp.model  # it has no name, so it travels by value
    for seed in range(3):
        assert_same(played(again, seed), played(env, seed))


def test_an_episode_does_not_travel_but_the_generator_of_prompts_does():
    env = make()
    env.reset(seed=3)
    again = pickle.loads(pickle.dumps(env))
    with pytest.raises(EpisodeError, match="call reset"):
        again.step(0)
    assert [again.reset()[1]["prompt"] for _ in range(8)] == [env.reset()[1]["prompt"] for _ in range(8)]


def test_another_process_can_be_given_an_environment():
    env = make()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        observation, info = pool.submit(operator.methodcaller("reset", seed=0), env).result()
    expected, expected_info = env.reset(seed=0)
    assert_same([observation], [expected])
    assert info["prompt"] == expected_info["prompt"]


@pytest.mark.parametrize(
    "kind", [TokenDecodingVecEnv, lambda n, **kwargs: gym.make_vec("TokenDecoding-v0", n, **kwargs)]
)
def test_vector_environments_can_be_pickled(kind):
    env = kind(2, **ARGUMENTS)
    for again in (pickle.loads(pickle.dumps(env)), copy.deepcopy(env)):
        again.reset()
        assert len(again.step(np.zeros(2, dtype=int))[1]) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_deep_copy_goes_on_by_itself_from_the_same_state(variant):
    env = make(**VARIANTS[variant], max_prefixes=4)
    _, info = env.reset(seed=0)
    env.step(int(np.flatnonzero(info["action_mask"])[0]))
    other, state = copy.deepcopy(env), copy.deepcopy(env.unwrapped.get_state())
    assert other.unwrapped.mdp is env.unwrapped.mdp  # the tree is a cache, which is shared
    mask = env.unwrapped.action_masks()
    for seed in range(4):
        played(env, seed)  # evicts what nobody has pinned
    np.testing.assert_array_equal(other.unwrapped.action_masks(), mask)
    env.unwrapped.set_state(state)
    action = int(np.flatnonzero(mask)[-1])
    one, two = env.step(action), other.step(action)
    assert_same([{**one[0], "reward": one[1]}], [{**two[0], "reward": two[1]}])


def test_the_state_of_another_environment_is_refused():
    env = make()
    env.reset(seed=0)
    state = pickle.loads(pickle.dumps(env.unwrapped.get_state()))
    with pytest.raises(ConfigurationError, match="set_state"):
        env.unwrapped.set_state(state)


@pytest.mark.parametrize("name", DECODERS)
def test_every_planner_can_be_pickled_and_copied(name):
    planner = make_decoder(name, make(), **decoder_options(name, {}, None, 1))
    expected = planner.plan("ab", 40)
    for again in (pickle.loads(pickle.dumps(planner)), copy.deepcopy(planner)):
        plan = again.plan("ab", 40)
        assert (plan.text, plan.objective) == (expected.text, expected.objective)
        assert np.isfinite(again.plan("ab", 40, reward="length", max_new_tokens=3).objective)


def test_a_planner_takes_its_q_along():
    agent = QStar(env=make(), seed=0, tokens_per_search=20, gradient_steps=4, policy_kwargs={"width": 8}).learn(40)
    planner = AStarPlanner(make(), heuristic=QHeuristic(agent))
    again = pickle.loads(pickle.dumps(planner))
    assert again.plan("ab", 12).objective == planner.plan("ab", 12).objective
    assert again.heuristic.q.fingerprint() == planner.heuristic.q.fingerprint()


@pytest.mark.parametrize(
    ("thing", "advice"),
    [
        (lambda: SearchEngine(make()), "make one in each process"),
        (lambda: AStarPlanner(make()).stream("ab", 10), "pickle the planner"),
        (lambda: AStarPlanner(env := make(), learn=QStar(env=env, seed=0)), "make the planner there"),
    ],
)
@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy])
def test_what_belongs_to_one_process_says_what_to_do(thing, advice, copied):
    with pytest.raises(ConfigurationError, match=advice) as raised:
        copied(thing())
    assert "\n" not in str(raised.value)
