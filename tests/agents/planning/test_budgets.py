"""Budgets of every kind: a finished text where one was affordable, stops that say why, and bad values refused."""

import numpy as np
import pytest

from qstar_decoding.agents import DECODERS, AStarPlanner, Budget, ZeroHeuristic
from qstar_decoding.agents.search import loop, state
from qstar_decoding.envs import DecodingMDP, ForcedStrings, TabularLM, load_prompts
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import Reward, as_reward

HORIZON = 12
REWARD = as_reward(lambda prompt, text: len(set(text)) / 8, lower=0, upper=1)


class Clock:
    """A clock that only a forward of the language model advances, so that no test depends on the machine's speed."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    for module in (loop, state):
        monkeypatch.setattr(module, "time", CLOCK)


class SlowLM(TabularLM):
    """A language model that takes 4 ms for every forward, and half a millisecond for every sequence."""

    def forward(self, sequences):
        CLOCK.now += 0.004 + 0.0005 * len(sequences)
        return super().forward(sequences)


def make(lm=None, **options):
    lm = lm or TabularLM.random(8, 2, seed=1, eos_token_ids=[])
    return DecodingMDP(lm, reward=REWARD, **{"top_k": 4, "max_new_tokens": HORIZON, **options})


def slow(**options):
    return make(SlowLM(np.random.default_rng(0).dirichlet(np.ones(8), size=(8,)), eos_token_ids=[]), **options)


NAMES = sorted(set(DECODERS) - {"args"})


@pytest.mark.parametrize("name", NAMES)
def test_a_deadline_returns_a_finished_text(name):
    # One text takes 11 steps of 4.5 ms.
    options = {"heuristic": ZeroHeuristic()} if name in ("ilql", "mcts", "rebase", "blockwise", "smc") else {}
    plan = DECODERS[name](slow(), **options).plan("a", Budget(seconds=0.06))
    assert plan.stop == "length"
    assert len(plan.token_ids) == HORIZON


@pytest.mark.parametrize("search", ["level", "astar", "qstar", "weighted", "anytime", "capped"])
def test_a_deadline_returns_a_finished_text_by_every_search(search):
    plan = AStarPlanner(slow(), search=search).plan("a", Budget(seconds=0.06))
    assert plan.stop == "length"


def test_a_text_that_is_not_finished_in_time_has_as_long_again():
    before = CLOCK.now
    plan = AStarPlanner(slow()).plan("a", Budget(seconds=0.03))  # one text takes 11 steps of 4.5 ms
    assert plan.stop == "length"
    assert plan.stop_reason == "budget"
    assert 0.045 < CLOCK.now - before < 0.06
    plan = AStarPlanner(slow()).plan("a", Budget(seconds=0.02))
    assert plan.stop == "partial"
    assert CLOCK.now - before < 0.06 + 0.05


def test_a_deadline_is_used_to_widen():
    before = CLOCK.now
    plan = AStarPlanner(slow()).plan("a", Budget(seconds=0.6))
    assert plan.usage.lm_tokens > 500  # of the 1,100 that the time pays for
    assert len(plan.completions) > 5
    assert 0.5 < CLOCK.now - before < 0.7
    assert CLOCK.now - before - 0.6 <= np.diff([point.seconds for point in plan.trace]).max()  # by one step at most


def test_a_search_knows_its_largest_step():
    """The running maximum equals the largest step of the trace, also after a resumed search."""
    planner = AStarPlanner(DecodingMDP(SlowLM.random(6, 2, seed=1), reward=REWARD, top_k=4, max_new_tokens=HORIZON))
    [active] = planner.start(load_prompts(["ab"]), Budget(lm_tokens=60))
    assert active.search.largest_step == 1
    loop.drive_to_end([active])
    active.search.resume(Budget(lm_tokens=300))
    loop.drive_to_end([active])
    assert active.search.largest_step == np.diff([point.lm_tokens for point in active.search.trace]).max() > 1


def test_a_deadline_with_a_constraint_goes_back_from_dead_ends():
    mdp = slow(constraint=ForcedStrings("aaaa"))
    plan = AStarPlanner(mdp).plan("a", Budget(seconds=1))
    assert "aaaa" in plan.text


@pytest.mark.parametrize(
    "budget", [Budget(pops=HORIZON), Budget(pops=30), Budget(reward_calls=1), Budget(lm_tokens=11)]
)
def test_other_limits_return_a_finished_text_too(budget):
    plan = AStarPlanner(make()).plan("a", budget)
    assert plan.stop == "length"
    for limit in ("pops", "reward_calls", "lm_tokens"):
        if getattr(budget, limit) is not None:
            assert getattr(plan.usage, limit) <= getattr(budget, limit)


def test_gap_target_and_patience_end_a_search_and_say_so():
    mdp = make(max_new_tokens=5, logprob_weight=0.1)
    best = AStarPlanner(mdp).plan("a")
    assert best.certified
    good = AStarPlanner(mdp).plan("a", Budget(gap=0.3))
    assert good.stop_reason == "gap"
    assert 0 <= good.gap <= 0.3
    assert good.usage.lm_tokens < best.usage.lm_tokens
    assert best.objective - good.objective <= 0.3
    aimed = AStarPlanner(mdp).plan("a", Budget(target=best.objective - 0.2))
    assert aimed.stop_reason == "target"
    assert aimed.objective >= best.objective - 0.2
    assert aimed.usage.lm_tokens < best.usage.lm_tokens
    anything = AStarPlanner(mdp).plan("a", Budget(target=float("-inf")))
    assert anything.stop_reason == "target"
    assert anything.stop == "length"  # a text, and not the prompt alone
    patient = AStarPlanner(mdp, search="anytime").plan("a", Budget(patience=6))
    assert patient.stop_reason in ("patience", "certified")
    assert AStarPlanner(mdp).plan("a", Budget(gap=0)).stop_reason in ("gap", "certified")


def test_a_search_that_stopped_early_can_be_resumed():
    mdp = make(max_new_tokens=5, logprob_weight=0.1)
    planner = AStarPlanner(mdp)
    early = planner.plan("a", Budget(gap=0.5))
    assert early.stop_reason == "gap"
    assert planner.resume(early).certified


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({"gap": -0.1}, "gap=…\\) is a number >= 0"),
        ({"gap": "small"}, "gap=…\\) is a number >= 0"),
        ({"target": "good"}, "target=…\\) is a number"),
        ({"target": float("nan")}, "target=…\\) is a number"),
        ({"patience": 0}, "patience=…\\) is a number > 0"),
        ({"seconds": float("nan")}, "seconds=…\\) is a number > 0"),
        ({"lm_tokens": True}, "lm_tokens=…\\) is a number > 0"),
        ({"pops": -1}, "pops=…\\) is a number > 0"),
    ],
)
def test_bad_limits_are_refused(limits, wanted):
    with pytest.raises(ConfigurationError, match=wanted):
        Budget(**limits)


@pytest.mark.parametrize("calls", [1, 3, 7, 20])
def test_args_counts_the_calls_for_its_candidates(calls):
    class Letters(Reward):
        lower, upper = 0.0, 1.0

        def score(self, prompts, completions, completion_ids=None, **columns):
            return [len(set(text)) / 8 for text in completions]

        score_prefixes = score

    mdp = DecodingMDP(TabularLM.random(8, 2, seed=1), reward=Letters(), top_k=4, max_new_tokens=6)
    decoder = DECODERS["args"](mdp)
    plan = decoder.plan("a", Budget(reward_calls=calls))
    assert plan.usage.reward_calls <= calls
    assert decoder.resume(plan).stop != "partial"
    with pytest.raises(ConfigurationError, match="ARGS asks the reward"):
        DECODERS["args"](mdp, heuristic=ZeroHeuristic(), score="q")


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_budget_far_beyond_the_tree_costs_neither_memory_nor_time(name):
    mdp = DecodingMDP("toy", reward="pangram", top_k=3, max_new_tokens=4)
    for budget in (10**6, 10**30):
        plan = DECODERS[name](mdp).plan("ab", budget)
        assert plan.text
        assert plan.usage.lm_tokens <= sum(3**depth for depth in range(4))
