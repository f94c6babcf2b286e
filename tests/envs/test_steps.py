"""Step actions: steps, J, bounds, LM tokens and the environment, against enumeration and a counting model."""

import itertools
import warnings
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import DQN
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from qstar_decoding.agents import (
    DECODERS,
    AStarPlanner,
    BeamSearch,
    Budget,
    QHeuristic,
    QStar,
    Request,
    SearchEngine,
    make_decoder,
)
from qstar_decoding.envs import DecodingMDP, Finish, ForcedStrings, TabularLM, load_prompts
from qstar_decoding.envs.steps import StepMDP, make_process
from qstar_decoding.errors import CheckpointError, ConfigurationError, ConstraintError
from qstar_decoding.rewards import as_reward
from qstar_decoding.tasks.task import load_task

PROPOSALS = ("sample", "beam")
PROMPTS = load_prompts(["ab", "ca"])


def count_a(prompt, completion):
    return min(completion.count("a"), 4) / 4 - 0.1 * completion.count("b")


REWARD = as_reward(count_a, lower=-1.0, upper=1.0)
SETTINGS = {"reward": REWARD, "top_k": 3, "max_new_tokens": 6, "logprob_weight": 0.1}
STEPS = {**SETTINGS, "delimiter": "b", "max_step_tokens": 3}


class CountingLM(TabularLM):
    """Notes every sequence that it is asked for, and how often it is asked."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.calls = set(), 0

    def forward(self, sequences):
        self.seen.update(map(tuple, sequences))
        self.calls += 1
        return super().forward(sequences)


def model(seed=0, **kwargs):
    return TabularLM.random(5, 2, seed=seed, concentration=0.5, **kwargs)


def texts_below(mdp, prompt):
    """Return every completion of a process by its tokens, in the tree that its own actions make."""
    found = {}
    states = mdp.roots([prompt])
    while len(states):
        mask, ends = mdp.action_mask(states), mdp.finishes(states) != Finish.NO
        row, action = np.nonzero(mask & ends)
        for completion in mdp.complete([prompt] * len(row), states[row], action):
            found[completion.token_ids] = completion
        row, action = np.nonzero(mask & ~ends)
        states = mdp.grow([], states[row], action)[1]
    return found


def every_text(mdp, prompt):
    """Return the best J of every text over the whole vocabulary."""
    whole = DecodingMDP(mdp.model, **{**SETTINGS, "top_k": mdp.model.vocab_size})
    return max(completion.objective for completion in texts_below(whole, prompt).values())


@pytest.mark.parametrize("proposals", PROPOSALS)
@pytest.mark.parametrize("seed", range(4))
def test_a_text_has_the_objective_that_it_has_over_tokens(proposals, seed):
    lm = model(seed)
    over_steps = StepMDP(lm, **STEPS, step_proposals=proposals)
    over_tokens = texts_below(DecodingMDP(lm, **SETTINGS), PROMPTS[0])
    found = texts_below(over_steps, PROMPTS[0])
    assert found
    for ids, completion in found.items():
        assert completion.objective == pytest.approx(over_tokens[ids].objective, abs=1e-6)
        assert completion.text == over_tokens[ids].text
        assert completion.stop == over_tokens[ids].stop


@pytest.mark.parametrize("proposals", PROPOSALS)
def test_steps_end_at_the_first_delimiter_the_end_of_the_text_or_their_limit(proposals):
    mdp = StepMDP(model(), **{**STEPS, "max_new_tokens": 5}, step_proposals=proposals)
    states = mdp.roots(PROMPTS)
    seen = set()
    while len(states):
        row, action = np.nonzero(mdp.action_mask(states))
        ends, tokens = mdp.finishes(states)[row, action], mdp.edge_tokens(states)[row, action]
        for kind, ids, text in zip(ends, tokens, mdp.edge_texts(states[row], action), strict=True):
            length = int((ids >= 0).sum())
            assert "b" not in text[:-1]
            assert kind != Finish.NO or "b" in text or length == 3
            seen.add((int(kind), "b" in text, length))
        for state, steps in zip(states, mdp.edge_tokens(states), strict=True):
            legal = mdp.action_mask(np.array([state]))[0]
            steps = [tuple(ids[ids >= 0]) for ids in steps[legal]]
            assert len({*steps}) == len(steps)
            assert not any(a == b[: len(a)] for a, b in itertools.permutations(steps, 2))
            order = mdp.logprobs(np.array([state]))[0]
            assert (np.diff(order[legal]) <= 0).all()
        states = mdp.grow([], states[row[ends == 0]], action[ends == 0])[1]
    assert {kind for kind, _, _ in seen} == {Finish.NO, Finish.EOS, Finish.LENGTH}
    assert {length for *_, length in seen} >= {1, 3}


def test_one_step_is_drawn_as_its_tokens_are():
    """With k = 1 the drawing is ancestral sampling; 1,500 seeds, and a deviation of four standard errors at most."""
    lm, counts, draws = model(3), Counter(), 1500
    settings = {**STEPS, "top_k": 1, "token_top_k": 5, "max_new_tokens": 2, "max_step_tokens": 2}
    for seed in range(draws):
        mdp = StepMDP(lm, **settings, step_seed=seed)
        counts[tuple(mdp.edge_tokens(mdp.roots(PROMPTS[:1]))[0, 0].tolist())] += 1
    exhaustive = StepMDP(lm, **{**settings, "top_k": 25}, step_proposals="beam")
    root = exhaustive.roots(PROMPTS[:1])
    legal = exhaustive.action_mask(root)[0]
    assert np.exp(exhaustive.logprobs(root)[0]).sum() == pytest.approx(1, abs=1e-5)
    for ids, logprob in zip(exhaustive.edge_tokens(root)[0][legal], exhaustive.logprobs(root)[0][legal], strict=True):
        p = np.exp(logprob)
        assert abs(counts[tuple(ids.tolist())] / draws - p) <= 4 * np.sqrt(p * (1 - p) / draws) + 1e-9


def test_samples_do_not_depend_on_how_many_are_asked_for_together():
    """The likeliest by noise of four steps are those of two, and states drawn in one batch are those drawn alone."""
    lm = model(1)
    few, many = (StepMDP(lm, **{**STEPS, "top_k": k, "token_top_k": 5}, step_seed=7) for k in (2, 4))
    drawn = [{*map(tuple, mdp.edge_tokens(mdp.roots(PROMPTS[:1]))[0].tolist())} for mdp in (few, many)]
    assert drawn[0] < drawn[1]
    together, alone = StepMDP(lm, **STEPS), StepMDP(lm, **STEPS)
    both = together.edge_tokens(together.roots(PROMPTS))
    one_by_one = [alone.edge_tokens(alone.roots([prompt]))[0] for prompt in PROMPTS]
    np.testing.assert_array_equal(both, one_by_one)


def test_the_seed_decides_what_is_drawn():
    def steps(seed):
        mdp = StepMDP(model(1), **{**STEPS, "token_top_k": 5}, step_seed=seed)
        return mdp.edge_tokens(mdp.roots(PROMPTS)).tolist()

    assert steps(0) == steps(0)
    assert any(steps(0) != steps(seed) for seed in range(1, 5))


@pytest.mark.parametrize("proposals", PROPOSALS)
def test_steps_of_one_token_are_tokens(proposals):
    """With beams the k likeliest; samples of all k tokens are the same set."""
    lm = model(2)
    steps = StepMDP(lm, **{**STEPS, "max_step_tokens": 1}, step_proposals=proposals)
    tokens = DecodingMDP(lm, **SETTINGS)
    plans = [AStarPlanner(mdp, scope="full vocabulary").plan("ab", 30) for mdp in (steps, tokens)]
    assert plans[0].token_ids == plans[1].token_ids
    assert plans[0].usage.lm_tokens == plans[1].usage.lm_tokens
    assert plans[0].trace[-1].lower_bound == pytest.approx(plans[1].trace[-1].lower_bound)


@pytest.mark.parametrize("proposals", PROPOSALS)
@pytest.mark.parametrize(
    "name", ["astar", "beam", "sample", "mcts", "levin", "unique", "smc", "rebase", "diverse-beam"]
)
def test_lm_tokens_are_the_prefixes_that_the_model_saw(name, proposals):
    lm = CountingLM(np.random.default_rng(0).dirichlet(np.full(5, 0.5), size=(5, 5)) + 1e-6)
    mdp = StepMDP(lm, **STEPS, step_proposals=proposals)
    plan = make_decoder(name, mdp).plan("ab", 60)
    prompt = tuple(lm.encode("ab"))
    assert plan.usage.lm_tokens == len(lm.seen - {prompt})
    assert plan.usage.lm_forwards == lm.calls - 1
    assert plan.usage.lm_tokens >= plan.usage.pops - plan.usage.reward_calls


@pytest.mark.parametrize("proposals", PROPOSALS)
@pytest.mark.parametrize("seed", range(5))
def test_certificates_are_true(proposals, seed):
    mdp = StepMDP(model(seed), **STEPS, step_proposals=proposals)
    best = max(completion.objective for completion in texts_below(mdp, PROMPTS[0]).values())
    plan = AStarPlanner(mdp).plan("ab")
    assert plan.certified
    assert plan.objective == pytest.approx(best)
    for budget in (5, 20, 60):
        plan = AStarPlanner(mdp.with_empty_tree()).plan("ab", budget)
        assert plan.upper_bound >= best - 1e-9


@pytest.mark.parametrize("proposals", PROPOSALS)
@pytest.mark.parametrize("seed", range(5))
def test_bounds_of_the_full_vocabulary_hold_for_steps_that_were_not_drawn(proposals, seed):
    mdp = StepMDP(model(seed), **STEPS, step_proposals=proposals)
    best = every_text(mdp, PROMPTS[0])
    for budget in (10, 40, None):
        plan = AStarPlanner(mdp.with_empty_tree(), scope="full vocabulary").plan("ab", budget)
        assert plan.upper_bound >= best - 1e-9
        assert not plan.certified or plan.objective == pytest.approx(best)


@pytest.mark.parametrize("name", ["astar", "beam", "sample", "mcts", "levin", "rebase"])
@pytest.mark.parametrize("budget", [10, 25, 50])
def test_a_budget_is_exceeded_by_less_than_one_drawing(name, budget):
    for seed in range(3):
        mdp = StepMDP(model(seed), **{**STEPS, "max_new_tokens": 12})
        plan = make_decoder(name, mdp).plan("ab", budget)
        assert plan.usage.lm_tokens < budget + mdp.most_lm_tokens
        assert mdp.most_lm_tokens == 1 + 3 * 2


def test_ends_that_cost_nothing_are_followed_when_the_budget_is_used_up():
    """The prompt's drawing takes the whole budget; the texts that it finished are scored all the same."""
    mdp = StepMDP(model(), **STEPS)
    root = mdp.roots(PROMPTS[:1])
    ends = int((mdp.action_mask(root) & (mdp.finishes(root) != Finish.NO)).sum())
    plan = BeamSearch(mdp, width=3).plan("ab", int(mdp.lm_tokens(root)[0]) - 1)
    assert 0 < ends < 3
    assert len(plan.completions) == ends
    assert plan.stop_reason == "budget"


def test_a_q_of_tokens_is_refused_for_steps():
    env = gym.make("TokenDecoding-v0", **SETTINGS, model=model(), prompts=PROMPTS)
    q = QHeuristic(DQN("MultiInputPolicy", env, buffer_size=10, gamma=1.0))
    with pytest.raises(CheckpointError, match="action 'token'"):
        AStarPlanner(StepMDP(env.unwrapped.mdp.model, **STEPS), heuristic=q).plan("ab", 20)


def test_a_shared_budget_pays_for_drawings():
    mdp = StepMDP(model(), **{**STEPS, "max_new_tokens": 12})
    plans = AStarPlanner(mdp).plan_many(["ab", "ca", "aa"], 90, shared=True)
    used = sum(plan.usage.lm_tokens for plan in plans)
    assert 45 < used < 90 + 3 * mdp.most_lm_tokens


def test_a_search_is_resumed():
    mdp = StepMDP(model(), **{**STEPS, "max_new_tokens": 12})
    planner = AStarPlanner(mdp, search="anytime")
    first = planner.plan("ab", 20)
    further = planner.resume(first, 60)
    assert further.usage.lm_tokens > first.usage.lm_tokens
    assert further.objective >= first.objective
    assert "".join(further.tree.token_text[edge] for edge in further.tree.best) == further.text


def test_evicted_steps_are_drawn_again():
    lm = model()
    large, small = (StepMDP(lm, **{**STEPS, "max_new_tokens": 12}, max_prefixes=most) for most in (None, 4))
    for prompt in ("ab", "ca", "ab", "bb"):
        plans = [BeamSearch(mdp).plan(prompt, 40) for mdp in (large, small)]
        assert plans[0].token_ids == plans[1].token_ids
        assert plans[0].usage.lm_tokens == plans[1].usage.lm_tokens
    assert len(small.tree) < len(large.tree)


def make_env(**changes):
    arguments = {**STEPS, "model": model(), "prompts": PROMPTS, "action": "step"}
    return gym.make("TokenDecoding-v0", **{**arguments, **changes})


@pytest.mark.parametrize("proposals", PROPOSALS)
def test_the_checkers_are_silent(proposals):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_env(step_proposals=proposals)
        check_env(env.unwrapped, skip_render_check=True)
        check_env_sb3(env.unwrapped)


def test_an_episode_returns_the_objective_and_survives_eviction():
    """Two copies of an episode, one with a tree that evicts at every step; its rewards sum to J less φ, which is 0."""
    env, small = make_env(), make_env(max_prefixes=2)
    for one in (env, small):
        one.reset(seed=1)
    done, total, info, text = False, 0.0, {}, ""
    while not done:
        action = int(np.flatnonzero(env.unwrapped.action_masks())[-1])
        observation, reward, done, _, info = env.step(action)
        other, same, *_ = small.step(action)
        np.testing.assert_array_equal(observation["candidates"], other["candidates"])
        assert reward == same
        total, text = total + reward, text + info["token_text"]
    assert total == pytest.approx(info["objective"])
    assert text == info["completion"]


def test_candidates_are_the_means_of_their_tokens():
    env = make_env()
    observation, _ = env.reset(seed=0)
    observer, mdp = env.unwrapped.observer, env.unwrapped.mdp
    [tokens] = mdp.edge_tokens(env.unwrapped._episodes.node)
    rows = observation["candidates"].reshape(3, -1)
    for ids, row in zip(tokens, rows, strict=True):
        expected = observer.features[ids[ids >= 0]].mean(axis=0) if (ids >= 0).any() else 0 * row
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_vector_environments_step_as_single_ones():
    arguments = {**STEPS, "model": model(), "prompts": PROMPTS, "action": "step"}
    several = gym.make_vec("TokenDecoding-v0", num_envs=3, **arguments)
    observations, infos = several.reset(seed=0)
    singles = [make_env() for _ in range(3)]
    starts = [env.reset(options={"prompt": text})[0] for env, text in zip(singles, infos["prompt"], strict=True)]
    np.testing.assert_array_equal(observations["candidates"], [start["candidates"] for start in starts])
    _, rewards, *_, infos = several.step(np.zeros(3, dtype=np.int64))
    outcomes = [env.step(0) for env in singles]
    np.testing.assert_allclose(rewards, [reward for _, reward, *_ in outcomes])
    texts = [info["token_text"] for *_, info in outcomes]
    assert infos.get("final_info", infos)["token_text"].tolist() == texts


def test_dqn_and_qstar_learn_on_steps():
    env = make_env(max_new_tokens=8)
    agent = DQN("MultiInputPolicy", env, gamma=1.0, buffer_size=100, learning_starts=10, seed=0).learn(40)
    plan = AStarPlanner(env, heuristic=QHeuristic(agent)).plan("ab", 40)
    assert plan.completions
    vec = gym.make("TokenDecoding-v0", **{**STEPS, "model": model(), "prompts": PROMPTS, "action": "step"})
    qstar = QStar("TokenQPolicy", vec, tokens_per_search=20, searches_per_round=2, seed=0).learn(100)
    assert AStarPlanner(vec, heuristic=QHeuristic(qstar)).plan("ab", 40).completions


def test_constraints_and_stop_strings_hold_within_steps():
    from qstar_decoding.envs import RegexConstraint

    constraint = RegexConstraint("(a|b|c)(a|b|c|d)*d")
    for proposals in PROPOSALS:
        mdp = StepMDP(model(), **{**STEPS, "max_new_tokens": 6}, constraint=constraint, step_proposals=proposals)
        found = texts_below(mdp, PROMPTS[0])
        assert found
        assert all(completion.text.endswith("d") and completion.text[0] != "d" for completion in found.values())
        stopped = texts_below(StepMDP(model(), **STEPS, stop="cc", step_proposals=proposals), PROMPTS[0])
        assert all("cc" not in completion.text for completion in stopped.values())


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_state_without_steps_is_a_dead_end_for_every_decoder(name):
    # The returned text ends before the stop string, so it never has it.
    changed = {**SETTINGS, "reward": "length", "delimiter": "zz", "stop": "c", "constraint": ForcedStrings("c")}
    mdp = StepMDP(model(), **changed)
    assert not mdp.action_mask(mdp.roots(PROMPTS)).any()
    with pytest.raises(ConstraintError, match="no token is left at position 0"):
        make_decoder(name, mdp).plan("ab", 20)


def test_changes_keep_the_steps():
    mdp = StepMDP(model(), **STEPS, step_seed=3)
    changed = mdp.with_changes(max_new_tokens=8)
    assert isinstance(changed, StepMDP)
    assert (changed.delimiter, changed.step_seed, changed.max_step_tokens) == (("b",), 3, 3)
    assert mdp.with_changes(max_step_tokens=2).most_lm_tokens == 4
    plan = AStarPlanner(mdp).plan("ab", Budget(lm_tokens=60), max_new_tokens=8)
    assert len(plan.token_ids) <= 8


def test_a_search_engine_has_steps():
    with SearchEngine(model(), action="step", **STEPS) as engine:
        plan = engine.submit(Request("ab", 40)).result()
    assert plan.objective == AStarPlanner(StepMDP(model(), **STEPS)).plan("ab", 40).objective


def test_a_task_has_steps(tmp_path):
    file = tmp_path / "steps.yaml"
    file.write_text(
        "description: d\nenv: {model: toy, reward: length, action: step, delimiter: a, top_k: 3, max_new_tokens: 6}\n"
        "prompts: {train: [a], dev: [b], test: [c]}\nsteps: 10\n",
        encoding="utf-8",
    )
    mdp = load_task(file).mdp()
    assert isinstance(mdp, StepMDP)
    assert AStarPlanner(mdp).plan("c", 40).completions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "steps"}, "action"),
        ({"action": "step", "delimiter": ""}, "delimiter"),
        ({"action": "step", "delimiter": []}, "delimiter"),
        ({"action": "step", "delimiter": None}, "delimiter"),
        ({"action": "step", "delimiter": 5}, "delimiter"),
        ({"action": "step", "max_step_tokens": 0}, "max_step_tokens"),
        ({"action": "step", "token_top_k": 0}, "token_top_k"),
        ({"action": "step", "token_top_k": 9}, "^token_top_k is an integer from 1 to 5"),
        ({"action": "step", "step_proposals": "greedy"}, "step_proposals"),
        ({"action": "step", "step_seed": -1}, "step_seed"),
        ({"delimiter": "\n"}, 'delimiter: for steps only; add action="step"'),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make_process(model(), **SETTINGS, **settings)
