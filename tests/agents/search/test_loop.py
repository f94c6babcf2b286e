"""The loop: searches of different problems in one call, threads that take turns, and the account of time."""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from qstar_decoding.agents import MCTS, AStarPlanner, BeamSearch, Budget, SamplingDecoder, ZeroHeuristic
from qstar_decoding.agents.search.loop import drive, drive_to_end
from qstar_decoding.agents.search.plan import make_plan
from qstar_decoding.envs import DecodingMDP, TabularLM, TokenDecodingEnv, load_prompts
from qstar_decoding.rewards import as_reward

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

LM = TabularLM.random(6, 2, seed=3)


spread = as_reward(lambda prompt, text: len(set(text)) / 6, lower=0, upper=1)
vowels = as_reward(lambda prompt, text: sum(letter in "ae" for letter in text) / 20, lower=0, upper=1)


def make(reward=spread, lm=LM, **options):
    return DecodingMDP(lm, reward=reward, **{"top_k": 4, "max_new_tokens": 5, **options})


def different_decoders(lm=LM):
    """Return decoders that differ in all that a problem and a strategy may differ in."""
    return [
        AStarPlanner(make(lm=lm)),
        AStarPlanner(make(vowels, lm, top_k=6, max_new_tokens=7, logprob_weight=0.5), search="anytime", n=3),
        BeamSearch(make(stop="b", lm=lm), width=3),
        MCTS(make(top_k=2, lm=lm), heuristic=ZeroHeuristic()),
        SamplingDecoder(make(vowels, lm, top_p=0.8), n=5, seed=7),
        AStarPlanner(make(lm=lm), heuristic=ZeroHeuristic(), score="q", scope="full vocabulary"),
    ]


def facts(plan):
    usage = (plan.usage.lm_tokens, plan.usage.reward_calls, plan.usage.pops)
    bounds = (plan.lower_bound, plan.upper_bound, plan.certified, plan.stop_reason)
    return plan.token_ids, plan.objective, *bounds, *usage, [c.token_ids for c in plan.completions]


def test_searches_of_different_problems_in_one_drive_equal_those_made_alone():
    prompts, budget = load_prompts(["a", "bc"]), Budget(30)
    alone = [facts(decoder.plan(prompt, budget)) for decoder in different_decoders() for prompt in prompts]
    decoders = different_decoders()
    active = [(decoder, one) for decoder in decoders for one in decoder.start(prompts, budget)]
    drive_to_end([one for _, one in active])
    assert [facts(make_plan(one, decoder.choose)) for decoder, one in active] == alone


def test_one_heuristic_and_one_reward_are_called_once_a_step_for_all_searches():
    calls = []

    def heuristic(mdp, prompts, nodes):
        calls.append(len(nodes))
        return mdp.edge_returns(nodes)

    mdp = make()
    planners = [AStarPlanner(mdp, heuristic=heuristic, width=width) for width in (1, 2)]
    active = [one for planner in planners for one in planner.start(load_prompts("a"), Budget(20))]
    calls.clear()
    steps = 0
    for searches in drive(active):
        steps += 1
        assert {id(search) for search in searches} <= {id(one.search) for one in active}
    assert 0 < len(calls) <= steps
    assert max(calls) > 2  # of both searches together


def test_a_reward_is_called_once_a_step_for_all_processes_that_have_it():
    calls = []

    def reward(prompts, completions, **_):
        calls.append(len(completions))
        return [len(set(text)) / 6 for text in completions]

    shared = as_reward(reward, lower=0, upper=1)
    mdps = [make(shared, max_new_tokens=2, logprob_weight=w, top_k=k) for w, k in ((0.0, 3), (0.1, 4), (0.5, 6))]
    planners = [AStarPlanner(mdp, width=10) for mdp in mdps]
    alone = [
        facts(AStarPlanner(make(max_new_tokens=2, logprob_weight=w, top_k=k), width=10).plan("a"))
        for w, k in ((0.0, 3), (0.1, 4), (0.5, 6))
    ]
    active = [(planner, one) for planner in planners for one in planner.start(load_prompts("a"), Budget())]
    steps = sum(1 for _ in drive([one for _, one in active]))
    assert 0 < len(calls) <= steps + 1
    assert [facts(make_plan(one, planner.choose)) for planner, one in active] == alone


def test_threads_on_one_planner_get_what_they_get_alone():
    prompts = ["a", "b", "cd", "dc"]
    kinds = different_decoders()
    wanted = [[facts(kind.plan(prompt, 25)) for prompt in prompts] for kind in different_decoders()]
    found, failures = {}, []

    def run(worker):
        try:
            rng = np.random.default_rng(worker)
            for number in range(25):
                kind, prompt = int(rng.integers(len(kinds))), int(rng.integers(len(prompts)))
                plan = facts(kinds[kind].plan(prompts[prompt], 25))
                found[worker, number] = plan == wanted[kind][prompt]
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    assert len(found) == 200
    assert all(found.values())
    assert [[facts(kind.plan(prompt, 25)) for prompt in prompts] for kind in kinds] == wanted  # and afterwards


def test_threads_share_a_planner_with_an_environment_and_a_tree_that_evicts():
    mdp = make(max_prefixes=20)
    planner, env = (
        AStarPlanner(mdp),
        TokenDecodingEnv(prompts=["a", "bd"], model=LM, reward=spread, top_k=4, max_prefixes=20),
    )
    wanted = facts(AStarPlanner(make()).plan("c", 40))
    failures, steps = [], []

    def plan():
        for _ in range(20):
            found = facts(planner.plan("c", 40))
            failures.extend([found] if found != wanted else [])

    def play():
        for seed in range(40):
            env.reset(seed=seed)
            ended = False
            while not ended:
                _, _, ended, _, _ = env.step(0)
                steps.append(1)

    threads = [threading.Thread(target=target) for target in (plan, plan, play)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    assert len(steps) >= 40


def test_streams_of_one_event_loop_equal_plans():
    prompts = ["a", "b", "cd", "dc"] * 4
    planner = AStarPlanner(make())
    wanted = [AStarPlanner(make()).plan(prompt, 25).objective for prompt in prompts]

    async def last(prompt):
        found = None
        async for better in planner.stream(prompt, 25):
            found = better
        return found.objective

    async def together():
        return await asyncio.gather(*(last(prompt) for prompt in prompts))

    assert asyncio.run(together()) == wanted


def test_seconds_of_a_batch_are_divided_among_its_plans():
    import time

    def slow(prompts, completions, **_):
        time.sleep(0.01)
        return [0.0] * len(completions)

    start = time.perf_counter()
    plans = AStarPlanner(make(slow)).plan_many(["a", "b", "c", "d"], 20)
    elapsed = time.perf_counter() - start
    assert 0.01 <= sum(plan.usage.seconds for plan in plans) <= elapsed


@pytest.mark.parametrize("n", [2, 3])
def test_the_n_best_are_n_texts_not_n_tokenisations_of_one(n):
    # "ab" can be written as one token or as two, and everything else is worth less.
    lm = TabularLM([0.3, 0.25, 0.2, 0.15, 0.1], vocabulary=["a", "b", "ab", "c", ""])
    values = {"ab": 1.0, "aab": 0.9, "abab": 0.8, "c": 0.7}

    def reward(prompts, completions, **_):
        return [values.get(text, 0.0) for text in completions]

    mdp = DecodingMDP(lm, reward=reward, top_k=5, max_new_tokens=5, logprob_weight=0.0)
    plan = AStarPlanner(mdp, n=n).plan("a")
    assert [c.text for c in plan.best(n)] == ["ab", "aab", "abab"][:n]


def test_diversity_sees_through_punctuation_and_single_words():
    texts = {
        " a huge success. I'm so proud of what we've accomplished.": 0.42,
        " a success, and I'm proud of what we've accomplished.\"": 0.40,
        " a waste of a fine evening": 0.30,
        " A HUGE SUCCESS! I'm so proud of what we've accomplished!": 0.41,
    }
    plan = AStarPlanner(make()).plan("a", 20)
    found = [plan.completions[0]._replace(text=text, objective=value) for text, value in texts.items()]
    plan = dataclasses.replace(plan, completions=found)
    assert [c.objective for c in plan.best(2)] == [0.42, 0.41]
    assert [c.objective for c in plan.best(2, diversity=0.3)] == [0.42, 0.30]
