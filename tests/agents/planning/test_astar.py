"""The planner against exhaustive enumeration: the optimum is the optimum, and a certificate is never wrong."""

import asyncio
import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.agents import (
    DECODERS,
    SEARCHES,
    AStarPlanner,
    BeamSearch,
    BoundHeuristic,
    Budget,
    GreedyDecoder,
    LookAheadHeuristic,
    OracleHeuristic,
    SamplingDecoder,
    SoftValueHeuristic,
    ZeroHeuristic,
    make_decoder,
    maximum,
    mean,
)
from qstar_decoding.agents.search.backup import backup, best_found
from qstar_decoding.agents.search.loop import score_completions
from qstar_decoding.envs import DecodingMDP, TabularLM, load_prompts
from qstar_decoding.errors import ConfigurationError, HeuristicError, PromptError, RewardError, UnknownNameError
from qstar_decoding.rewards import Reward, as_reward


class PseudoRandom(Reward):
    """A reward in [-1, 1] with no structure that a search could exploit; its potential has none either."""

    lower, upper = -1.0, 1.0

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def score(self, prompts, completions, completion_ids=None, **columns):
        return [
            math.sin(sum((i + 1) * ord(c) for i, c in enumerate(text)) * (self.seed + 1.37)) for text in completions
        ]

    score_prefixes = score


def pseudo_random_reward(seed):
    return PseudoRandom(seed)


@st.composite
def processes(draw):
    vocab = draw(st.integers(2, 5))
    order = draw(st.integers(0, 2))
    top_k = draw(st.integers(1, vocab))
    longest = {2: 10, 3: 7, 4: 5, 5: 4}[vocab]  # the full vocabulary is enumerated too
    return DecodingMDP(
        TabularLM.random(
            vocab,
            order,
            seed=draw(st.integers(0, 1000)),
            concentration=draw(st.sampled_from([0.1, 1.0, 10.0])),
        ),
        reward=pseudo_random_reward(draw(st.integers(0, 1000))),
        top_k=top_k,
        top_p=draw(st.sampled_from([1.0, 0.7])),
        max_new_tokens=draw(st.integers(1, longest)),
        stop=draw(st.sampled_from([None, "ab"])),
        logprob_weight=draw(st.sampled_from([0.0, 0.02, 0.5])),
    )


def enumerate_objectives(mdp, *, full_vocabulary=False):
    """J of every completion, straight from the definition: no tree, no node, no batch."""
    table, eos = mdp.model, mdp.model.eos_token_ids
    objectives = {}

    def visit(ids, logprob):
        logprobs = table.forward([[0, *ids]])[1][0].astype(float)
        order = np.argsort(-logprobs, kind="stable")
        allowed, mass = [], 0.0
        for rank, token in enumerate(order):
            likely = mdp.top_p == 1 or mass < mdp.top_p  # a sum of probabilities may round to 1 too early
            inside = rank < mdp.top_k and (rank == 0 or (likely and logprobs[token] > -np.inf))
            if inside or full_vocabulary:
                allowed.append(int(token))
            mass += math.exp(logprobs[token])
        for token in allowed:
            after, total = (*ids, token), logprob + logprobs[token]
            text = table.decode([t for t in after if t not in eos])
            stopped = "ab" in text and bool(mdp.stop)
            if token in eos or stopped or len(after) == mdp.max_new_tokens:
                text = text[: text.index("ab")] if stopped else text
                reward = mdp.reward(["a"], [text])[0]
                objectives[after] = mdp.logprob_weight * total + reward
            else:
                visit(after, total)

    visit((), 0.0)
    return objectives


class WildHeuristic:
    """Anything at all, now and then absurdly high or low."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, mdp, prompts, nodes):
        values = self.rng.standard_cauchy((len(nodes), mdp.top_k))
        return np.where(self.rng.random(values.shape) < 0.1, values * 1e6, values)


EXACT = sorted(set(SEARCHES) - {"weighted"})  # those that return the optimum, given an admissible heuristic
TO_THE_END = ["level", "anytime", "capped"]  # those that go on until nothing can be better, whatever the heuristic


@settings(max_examples=200, deadline=None)
@given(
    mdp=processes(),
    search=st.sampled_from(EXACT),
    width=st.integers(1, 5),
    growth=st.sampled_from([1.1, 2.0, 5.0]),
    taper=st.sampled_from([None, 2.0]),
    batch_size=st.integers(1, 4),
)
def test_the_bound_finds_and_certifies_the_enumerated_optimum(mdp, search, width, growth, taper, batch_size):
    objectives = enumerate_objectives(mdp)
    planner = AStarPlanner(mdp, search=search, width=width, growth=growth, taper=taper, batch_size=batch_size)
    plan = planner.plan("a")
    assert plan.objective == pytest.approx(max(objectives.values()), abs=1e-5)
    assert plan.objective == pytest.approx(objectives[plan.token_ids], abs=1e-5)
    assert plan.certified
    assert plan.gap <= 1e-9
    assert plan.stop_reason == "certified"


@settings(max_examples=200, deadline=None)
@given(
    mdp=processes(),
    seed=st.integers(0, 10_000),
    budget=st.one_of(st.none(), st.integers(1, 60)),
    margin=st.sampled_from([0.0, 0.05, 1.0, math.inf]),
    weight=st.sampled_from([0.0, 1.0, 3.0]),
    width=st.integers(1, 6),
    scope=st.sampled_from(["top-k tree", "full vocabulary"]),
    search=st.sampled_from(sorted(SEARCHES)),
    pathmax=st.booleans(),
    prior=st.sampled_from([0.0, 0.05, 10.0]),
    bonus=st.sampled_from([0.0, 0.2, 10.0]),
)
def test_bounds_and_certificates_hold_under_any_heuristic(
    mdp, seed, budget, margin, weight, width, scope, search, pathmax, prior, bonus
):
    objectives = enumerate_objectives(mdp, full_vocabulary=scope == "full vocabulary")
    options = {"search": search, "weight": weight, "margin": margin, "width": width, "pathmax": pathmax}
    if search in TO_THE_END:
        options["prior"] = prior
    if search in ("anytime", "capped"):
        options["depth_bonus"] = bonus
    planner = AStarPlanner(mdp, heuristic=WildHeuristic(seed), scope=scope, **options)
    plan = planner.plan("a", budget)
    best = max(objectives.values())
    assert plan.upper_bound >= best - 1e-5
    if plan.completions:
        assert plan.lower_bound == plan.objective == pytest.approx(objectives[plan.token_ids], abs=1e-5)
    if plan.certified:
        assert plan.objective == pytest.approx(best, abs=1e-5)
    if budget is None and scope == "top-k tree" and search in TO_THE_END:  # complete in the limit, however misled
        assert plan.certified
    lower, upper = zip(*((p.lower_bound, p.upper_bound) for p in plan.trace), strict=True)
    assert all(a <= b for a, b in itertools.pairwise(lower))
    assert all(a >= b for a, b in itertools.pairwise(upper))


@settings(max_examples=60, deadline=None)
@given(mdp=processes(), budget=st.integers(1, 40), name=st.sampled_from(sorted(DECODERS)), seed=st.integers(0, 9))
def test_every_decoder_keeps_its_budget_and_reports_what_it_found(mdp, budget, name, seed):
    options = {"seed": seed} if name == "sample" else {}
    decoder = make_decoder(name, mdp, **options)
    plan = decoder.plan("a", budget)
    objectives = enumerate_objectives(mdp)
    assert plan.usage.lm_tokens <= budget
    assert plan.upper_bound >= max(objectives.values()) - 1e-5
    for completion in plan.completions if decoder.score == "reward" else ():  # a vote asks no reward
        assert completion.objective == pytest.approx(objectives[completion.token_ids], abs=1e-5)
    assert [c.objective for c in plan.completions] == sorted((c.objective for c in plan.completions), reverse=True)
    assert len({c.token_ids for c in plan.completions}) == len(plan.completions)


@settings(max_examples=40, deadline=None)
@given(mdp=processes(), budget=st.one_of(st.none(), st.integers(5, 40)), name=st.sampled_from(sorted(DECODERS)))
def test_planning_many_prompts_equals_planning_one_by_one(mdp, budget, name):
    prompts = ["a", "aa", "aaa"]
    together = make_decoder(name, mdp).plan_many(prompts, budget)
    alone = [make_decoder(name, mdp.with_empty_tree()).plan(prompt, budget) for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.lower_bound == pytest.approx(other.lower_bound, nan_ok=True)
        assert one.upper_bound == pytest.approx(other.upper_bound)
        assert one.usage.lm_tokens == other.usage.lm_tokens


# -- the named searches


@settings(max_examples=150, deadline=None)
@given(mdp=processes(), search=st.sampled_from(EXACT), soft=st.booleans(), batch_size=st.integers(1, 3))
def test_every_search_with_an_admissible_heuristic_returns_the_optimum(mdp, search, soft, batch_size):
    heuristic = SoftValueHeuristic() if soft else OracleHeuristic()
    plan = AStarPlanner(mdp, search=search, heuristic=heuristic, batch_size=batch_size).plan("a")
    assert plan.objective == pytest.approx(max(enumerate_objectives(mdp).values()), abs=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    mdp=processes(),
    weight=st.sampled_from([1.0, 1.5, 3.0, 10.0]),
    heuristic=st.sampled_from([BoundHeuristic(), SoftValueHeuristic(), OracleHeuristic()]),
    search=st.sampled_from(["weighted", "astar", "qstar"]),
)
def test_weighted_a_star_stays_within_its_weight(mdp, weight, heuristic, search):
    plan = AStarPlanner(mdp, search=search, weight=weight, heuristic=heuristic).plan("a")
    least_cost = mdp.reward.upper - max(enumerate_objectives(mdp).values())
    assert mdp.reward.upper - plan.objective <= weight * least_cost + 1e-5


@settings(max_examples=150, deadline=None)
@given(
    mdp=processes(),
    search=st.sampled_from(sorted(SEARCHES)),
    seed=st.integers(0, 1000),
    parts=st.lists(st.integers(1, 15), min_size=2, max_size=4),
    width=st.integers(1, 4),
    batch_size=st.integers(1, 3),
)
def test_resuming_equals_one_long_run(mdp, search, seed, parts, width, batch_size):
    def h(mdp, prompts, nodes):  # wild, but a function of the state
        ids = mdp.tree.completions(nodes)
        return np.stack([np.random.default_rng([seed, *row]).normal(size=mdp.top_k) for row in ids])

    def planner(mdp):
        return AStarPlanner(mdp, search=search, heuristic=h, width=width, batch_size=batch_size, taper=None)

    resuming = planner(mdp)
    plan = resuming.plan("a", parts[0])
    for part in parts[1:]:
        spent = plan.usage.lm_tokens
        plan = resuming.resume(plan, part)
        assert plan.usage.lm_tokens >= spent
    long = planner(mdp.with_empty_tree()).plan("a", sum(parts))
    assert plan.token_ids == long.token_ids
    assert plan.usage.lm_tokens == long.usage.lm_tokens
    assert plan.usage.pops == long.usage.pops
    assert plan.stop_reason == long.stop_reason
    assert plan.lower_bound == pytest.approx(long.lower_bound, nan_ok=True)
    assert plan.upper_bound == pytest.approx(long.upper_bound)
    for bounds in zip(*((p.lower_bound, -p.upper_bound, p.lm_tokens, p.seconds) for p in plan.trace), strict=True):
        assert all(a <= b for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_every_decoder_can_be_resumed(mdp, name):
    decoder = make_decoder(name, mdp)
    plan = decoder.plan("a", 6)
    first = plan.objective, plan.usage.lm_tokens
    further = decoder.resume(plan, 30)
    assert further.usage.lm_tokens <= 36
    assert not further.objective < first[0]
    assert (plan.objective, plan.usage.lm_tokens) == pytest.approx(first, nan_ok=True)  # the old plan stays as it was
    with pytest.raises(ConfigurationError, match="was resumed already"):
        decoder.resume(plan, 5)
    with pytest.raises(ConfigurationError, match="another decoder's"):
        make_decoder(name, mdp).resume(further, 5)


def test_a_search_can_be_resumed_after_the_tree_has_forgotten_it(mdp):
    planner = AStarPlanner(mdp, taper=None, width=2)
    plan = planner.plan("a", 10)
    mdp.max_prefixes = 2
    mdp.evict_if_full()
    planner.plan("b", 20)
    resumed, long = planner.resume(plan, 10), AStarPlanner(mdp.with_empty_tree(), taper=None, width=2).plan("a", 20)
    assert resumed.token_ids == long.token_ids
    assert resumed.upper_bound == pytest.approx(long.upper_bound)


def test_a_plan_survives_pickling_but_cannot_be_resumed_then(mdp):
    planner = AStarPlanner(mdp)
    plan = pickle.loads(pickle.dumps(planner.plan("a", 10)))
    assert plan.completions
    with pytest.raises(ConfigurationError, match="copied from another process"):
        planner.resume(plan, 10)


def test_with_the_oracle_only_the_optimal_path_is_expanded(mdp):
    for search in ("qstar", "level"):
        plan = AStarPlanner(mdp, search=search, heuristic=OracleHeuristic(), width=1, margin=0, taper=None).plan("a")
        best = max(enumerate_objectives(mdp).values())
        assert plan.objective == pytest.approx(best, abs=1e-5)
        if search == "qstar":
            assert plan.usage.lm_tokens == len(plan.token_ids) - 1
            assert plan.usage.reward_calls == 1


def test_the_soft_value_expands_no_more_than_the_tilted_model_allows(mdp):
    """At most T / p*(y*) expansions, p* being the tilted language model."""
    objectives = enumerate_objectives(mdp)
    alpha = mdp.logprob_weight
    plan = AStarPlanner(mdp, search="qstar", heuristic=SoftValueHeuristic()).plan("a")
    weights = np.exp(np.array(list(objectives.values())) / alpha - max(objectives.values()) / alpha)
    p_best = 1 / weights.sum()
    assert plan.objective == pytest.approx(max(objectives.values()), abs=1e-5)
    assert plan.usage.lm_tokens + 1 <= mdp.max_new_tokens / p_best + 1e-6


def test_a_heuristic_that_sees_too_large_a_tree_says_so(mdp):
    with pytest.raises(ConfigurationError, match="more than 5 prefixes"):
        AStarPlanner(mdp, heuristic=OracleHeuristic(limit=5)).plan("a")


def test_heuristics_compose(mdp):
    prompts, node = load_prompts(["a"]), mdp.roots(load_prompts(["a"]))
    zero, bound, oracle = (h(mdp, prompts, node) for h in (ZeroHeuristic(), BoundHeuristic(), OracleHeuristic()))
    for heuristic, expected, description in [
        (maximum(ZeroHeuristic(), BoundHeuristic()), np.maximum(zero, bound), "maximum(ZeroHeuristic(), Bound"),
        (mean(ZeroHeuristic(), BoundHeuristic(), optimism=2), (zero + bound) / 2 + abs(bound - zero), "optimism=2"),
        (ZeroHeuristic() + 0.25, zero + 0.25, "(ZeroHeuristic() + 0.25)"),
        (0.5 * BoundHeuristic() + OracleHeuristic(), 0.5 * bound + oracle, "(0.5 * BoundHeuristic() + Oracle"),
    ]:
        np.testing.assert_allclose(heuristic(mdp, prompts, node), expected)
        assert description in repr(heuristic)


def test_looking_ahead_is_worth_its_name_and_is_paid_for(mdp):
    heuristic = LookAheadHeuristic(3, width=2)
    prompts, root = load_prompts(["a"]), mdp.roots(load_prompts(["a"]))
    [values] = heuristic(mdp, prompts, root)
    for action in range(2):
        node, steps = int(mdp.tree.expand(root, np.array([action]))[0]), 1
        while steps < 3 and mdp.finishes(np.array([node]))[0, 0] == 0:
            node, steps = int(mdp.tree.expand(np.array([node]), np.array([0]))[0]), steps + 1
        expected = mdp.path_return(np.array([node]))[0] + mdp.potential(prompts, np.array([node]))[0]
        assert values[action] == pytest.approx(expected)
    plan = AStarPlanner(mdp, heuristic=heuristic, width=1, taper=None).plan("a", 40)
    assert plan.usage.lm_tokens > (len(plan.tree) // mdp.top_k - 1)  # more than was expanded
    assert plan.usage.pops == len(plan.tree) // mdp.top_k - 1 + plan.usage.reward_calls
    twice = AStarPlanner(mdp.with_empty_tree(), heuristic=maximum(heuristic, heuristic), width=1, taper=None).plan(
        "a", 40
    )
    assert twice.usage.lm_tokens >= plan.usage.lm_tokens or twice.stop_reason == "certified"
    assert plan.usage.lm_tokens < 40 + 2 * 3 * mdp.top_k  # the last call may overshoot, by no more than itself


def test_unknown_searches_and_weights_without_a_bound_are_named(mdp):
    with pytest.raises(UnknownNameError, match="unknown search 'a-star'; known, nearest first: 'astar'"):
        AStarPlanner(mdp, search="a-star")
    endless = DecodingMDP(TabularLM.random(3, 1), reward=lambda p, c: float(len(c)), top_k=3, max_new_tokens=4)
    with pytest.raises(ConfigurationError, match="has no upper bound"):
        AStarPlanner(endless, search="weighted")


def test_a_top_p_of_1_masks_nothing_even_beside_a_token_of_all_but_all_probability():
    mdp = DecodingMDP(TabularLM([1 - 1e-9, 1e-9]), reward=pseudo_random_reward(0), top_k=2, max_new_tokens=2)
    assert mdp.action_mask(mdp.roots(load_prompts(["a"]))).all()


# -- budgets, streams, interrupts


def test_pops_and_kv_bytes_are_budgets_too(mdp):
    plan = AStarPlanner(mdp).plan("a", Budget(pops=7))
    assert plan.usage.pops == 7 == plan.usage.lm_tokens + plan.usage.reward_calls
    mdp.model.kv_token_bytes = 100
    plan = AStarPlanner(mdp.with_empty_tree()).plan("aa", Budget(kv_bytes=1000))
    assert plan.usage.kv_bytes == 1000
    assert plan.usage.lm_tokens == 8  # and two of the prompt
    assert plan.stop_reason == "budget"


def test_a_shared_budget_goes_where_it_is_needed():
    """One prompt's best text is certain at once, the other's takes search: the first leaves its share."""
    reward = as_reward(
        lambda p, c: 1.0 if p == "a" else math.sin(sum((i + 1) * ord(x) for i, x in enumerate(c))), lower=-1, upper=1
    )
    mdp = DecodingMDP(TabularLM.random(5, 1, seed=2), reward=reward, top_k=5, max_new_tokens=6, logprob_weight=0.0)
    easy, hard = AStarPlanner(mdp).plan_many(["a", "b"], 60, shared=True)
    assert easy.certified
    assert easy.usage.lm_tokens < 10
    assert 30 < hard.usage.lm_tokens <= 60 - easy.usage.lm_tokens
    assert hard.objective >= AStarPlanner(mdp.with_empty_tree()).plan("b", 30).objective
    with pytest.raises(ConfigurationError, match="shared its budget"):
        AStarPlanner(mdp).resume(hard, 5)
    with pytest.raises(ConfigurationError, match="needs a number of LM tokens"):
        AStarPlanner(mdp).plan_many(["a"], shared=True)


@settings(max_examples=50, deadline=None)
@given(mdp=processes(), budget=st.integers(1, 80), name=st.sampled_from(sorted(DECODERS)))
def test_a_shared_budget_is_kept_by_every_decoder(mdp, budget, name):
    plans = make_decoder(name, mdp).plan_many(["a", "aa", "aaa"], budget, shared=True)
    assert sum(plan.usage.lm_tokens for plan in plans) <= budget


def test_a_stream_yields_ever_better_completions(mdp):
    stream = AStarPlanner(mdp, width=1).stream("a", 40)
    with pytest.raises(ConfigurationError, match="has not begun"):
        _ = stream.plan
    found = [c.objective for c in stream]
    assert len(found) > 1
    assert found == sorted(set(found))
    assert stream.plan.objective == found[-1] == AStarPlanner(mdp.with_empty_tree(), width=1).plan("a", 40).objective


def test_a_stream_can_be_awaited(mdp):
    async def collect():
        return [completion async for completion in AStarPlanner(mdp, width=1).stream("a", 40)]

    assert asyncio.run(collect()) == list(AStarPlanner(mdp.with_empty_tree(), width=1).stream("a", 40))


@pytest.mark.parametrize("where", ["reward", "heuristic", "progress"])
def test_an_interrupt_returns_the_incumbent(where):
    calls = dict.fromkeys(["reward", "heuristic", "progress"], 0)

    def count(name):
        calls[name] += 1
        if name == where and calls[name] == 9:
            raise KeyboardInterrupt

    def reward(prompt, completion):
        count("reward")
        return math.sin(len(completion) * 7 + 3 * completion.count("a"))

    def h(mdp, prompts, nodes):
        count("heuristic")
        return BoundHeuristic()(mdp, prompts, nodes)

    mdp = DecodingMDP(
        TabularLM.random(4, 1, seed=1), reward=as_reward(reward, lower=-1, upper=1.5), top_k=4, max_new_tokens=5
    )
    planner = AStarPlanner(mdp, heuristic=h, width=1)
    plan = planner.plan("a", progress=lambda search: count("progress"))
    assert plan.stop_reason == "interrupted"
    assert plan.completions
    assert plan.objective == plan.lower_bound == max(c.objective for c in plan.completions)
    resumed = planner.resume(plan)
    assert resumed.certified
    assert resumed.objective == pytest.approx(AStarPlanner(mdp.with_empty_tree()).plan("a").objective)


# -- bounds for prefixes


class CountA(Reward):
    """The share of a's among the letters that there may be; each token adds at most one."""

    name, lower, upper = "count_a", 0.0, 1.0

    def __init__(self, horizon, slack=0.0):
        super().__init__()
        self.horizon, self.slack = horizon, slack

    def score(self, prompts, completions, completion_ids=None, **columns):
        return [text.count("a") / self.horizon for text in completions]

    def bound_prefixes(self, prompts, completions, remaining, completion_ids=None, **columns):
        return [
            (text.count("a") + left) / self.horizon + self.slack
            for text, left in zip(completions, remaining, strict=True)
        ]


def test_a_bound_for_prefixes_makes_certificates_cheaper():
    def plan(reward, **kwargs):
        mdp = DecodingMDP(TabularLM.random(3, 1, seed=1), reward=reward, top_k=3, max_new_tokens=6, **kwargs)
        objectives = enumerate_objectives(mdp)
        plan = AStarPlanner(mdp).plan("a")
        assert plan.certified
        assert plan.objective == pytest.approx(max(objectives.values()), abs=1e-5)
        assert all(a.upper_bound >= b.upper_bound for a, b in itertools.pairwise(plan.trace))
        return plan.usage.lm_tokens

    loose = as_reward(lambda prompt, completion: completion.count("a") / 6, lower=0, upper=1)
    assert plan(CountA(6)) < plan(loose)
    # Sums: what is added keeps its bound, what is subtracted counts with its least.
    assert plan(0.5 * CountA(6) + 0.5 * loose) <= plan(loose)
    assert plan(CountA(6) - 0.1 * loose) <= plan(loose - 0.1 * loose)


def test_a_length_bonus_is_bounded_by_what_remains():
    def plan(reward):
        mdp = DecodingMDP(TabularLM.random(4, 1, seed=3), reward=reward, top_k=4, max_new_tokens=6)
        plan = AStarPlanner(mdp).plan("a")
        assert plan.certified
        return plan

    assert len(plan(as_reward("length")).token_ids) == 6
    assert len(plan(-1.0 * as_reward("length")).token_ids) == 1
    # In a sum its bound is what U knows of it: far below 1, as only 6 of 32 tokens can be written.
    mixed = plan(0.1 * PseudoRandom(1) + 1.0 * as_reward("length"))
    assert mixed.trace[0].upper_bound <= 0.1 + 6 / 32


def test_a_bound_that_is_broken_is_an_error():
    mdp = DecodingMDP(TabularLM.random(3, 1, seed=1), reward=CountA(6, slack=-2.0), top_k=3, max_new_tokens=6)
    with pytest.raises(RewardError, match=r"'count_a' gave .* to '.*', though it had stated .* no certificate"):
        AStarPlanner(mdp).plan("a")


@pytest.mark.parametrize(("bounds", "message"), [([math.nan], "is nan for"), ([None], "is None for"), ([], "0 value")])
def test_a_bound_that_is_no_number_is_an_error(bounds, message):
    class Odd(CountA):
        def bound_prefixes(self, *arguments, **columns):
            return bounds

    mdp = DecodingMDP(TabularLM.random(3, 1, seed=1), reward=Odd(6), top_k=3, max_new_tokens=6)
    with pytest.raises(RewardError, match=message):
        AStarPlanner(mdp).plan("a")


# -- several texts


def test_the_n_best_texts_are_found_and_distinct(mdp):
    best = sorted(enumerate_objectives(mdp).values(), reverse=True)[:5]
    plan = AStarPlanner(mdp, n=5).plan("a")
    np.testing.assert_allclose([c.objective for c in plan.completions[:5]], best, atol=1e-5)
    texts = [c.text.strip() for c in plan.best(5)]
    assert len(set(texts)) == len(texts) == 5
    assert plan.best(1)[0].text == plan.text


def test_a_diversity_penalty_prefers_other_words():
    words = ["the ", "a ", "cat ", "dog ", "sat ", "ran ", ""]
    reward = as_reward(lambda p, c: 1.0 if c.startswith("the cat") else 0.9, lower=0, upper=1)
    mdp = DecodingMDP(
        TabularLM(np.ones(7), vocabulary=words), reward=reward, top_k=7, max_new_tokens=3, logprob_weight=0.0
    )
    plan = AStarPlanner(mdp, n=400).plan("a ")
    plain, diverse = plan.best(2), plan.best(2, diversity=0.5)
    assert plain[1].text.startswith("the cat")
    assert not diverse[1].text.startswith("the cat")
    assert diverse[0] == plain[0]


def test_drawing_follows_the_temperature(mdp):
    plan = AStarPlanner(mdp, n=10).plan("a")
    cold, warm = plan.sample(50, temperature=1e-6, seed=0), plan.sample(50, temperature=100.0, seed=0)
    assert {c.token_ids for c in cold} == {plan.token_ids}
    assert len({c.token_ids for c in warm}) > 5
    with pytest.raises(ConfigurationError, match="temperature"):
        plan.sample(temperature=0)
    with pytest.raises(ConfigurationError, match="no completion was finished"):
        AStarPlanner(mdp, search="qstar").plan("a", 1).sample(temperature=1)


@pytest.fixture
def mdp():
    return DecodingMDP(
        TabularLM.random(4, 2, seed=1), reward=pseudo_random_reward(3), top_k=3, max_new_tokens=6, logprob_weight=0.05
    )


def test_a_searched_tree_does_not_make_the_next_search_look_cheaper(mdp):
    first, second = (AStarPlanner(mdp).plan("a", 30) for _ in range(2))
    assert first.usage.lm_tokens == second.usage.lm_tokens
    assert first.text == second.text


def test_a_better_heuristic_needs_fewer_tokens_to_the_same_optimum(mdp):
    objectives = enumerate_objectives(mdp)

    def oracle(mdp, prompts, nodes):
        values = np.full((len(nodes), mdp.top_k), -10.0)
        for row, node in enumerate(nodes):
            prefix = tuple(mdp.tree.completion_ids(int(node)))
            for action, token in enumerate(mdp.tree.tokens[node]):
                below = [v for ids, v in objectives.items() if ids[: len(prefix) + 1] == (*prefix, int(token))]
                values[row, action] = max(below, default=-10.0) - mdp.path_return(np.array([node]))[0]
        return values

    best = max(objectives, key=objectives.get)
    path = len(best) - 1  # LM tokens: the last one needs no forward, nor does the prompt count
    with_oracle = AStarPlanner(mdp, heuristic=oracle, width=1).plan("a", path)
    assert with_oracle.token_ids == best
    assert with_oracle.usage.lm_tokens == path
    without = AStarPlanner(mdp, heuristic=ZeroHeuristic(), width=1).plan("a", path)
    assert without.token_ids != best


def test_greedy_follows_the_likeliest_tokens(mdp):
    ids, logprob, context = [], 0.0, [0]
    while len(ids) < mdp.max_new_tokens and not (ids and ids[-1] in mdp.model.eos_token_ids):
        logprobs = mdp.model.forward([[*context, *ids]])[1][0]
        ids.append(int(logprobs.argmax()))
        logprob += float(logprobs.max())
    plan = GreedyDecoder(mdp).plan("a")
    assert plan.token_ids == tuple(ids)
    assert plan.logprob == pytest.approx(logprob, abs=1e-5)


def test_a_wide_beam_without_eos_finds_the_likeliest_text():
    mdp = DecodingMDP(
        TabularLM.random(4, 1, seed=5, eos_token_ids=[]),
        reward=as_reward(lambda prompt, completion: 0.0, lower=0.0, upper=0.0),
        top_k=4,
        max_new_tokens=4,
        logprob_weight=1.0,
    )
    plan = BeamSearch(mdp, width=4**4).plan("a")
    assert plan.logprob == pytest.approx(max(enumerate_objectives(mdp).values()), abs=1e-5)


def test_sampling_follows_the_models_distribution():
    table = [0.6, 0.3, 0.1]
    mdp = DecodingMDP(TabularLM(table, eos_token_ids=[]), reward=as_reward(lambda p, c: 0.0), top_k=2, max_new_tokens=1)
    first = [SamplingDecoder(mdp, n=1, seed=seed).plan("a").text for seed in range(600)]
    assert set(first) == {"a", "b"}
    assert first.count("a") / 600 == pytest.approx(2 / 3, abs=0.06)  # renormalised over the top k; 3 sigma


def test_sampling_is_reproducible_and_seeded(mdp):
    texts = [[c.text for c in SamplingDecoder(mdp, n=8, seed=s).plan("a").completions] for s in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_best_of_n_improves_with_n(mdp):
    few, many = (SamplingDecoder(mdp, n=n).plan("a").objective for n in (1, 64))
    assert many > few


def test_the_full_vocabulary_bound_is_at_least_the_trees(mdp):
    tree, full = (AStarPlanner(mdp, scope=scope).plan("a", 20) for scope in ("top-k tree", "full vocabulary"))
    assert full.upper_bound >= tree.upper_bound
    assert full.scope == "full vocabulary"


def test_a_reward_without_an_upper_bound_is_searched_but_not_certified():
    mdp = DecodingMDP(TabularLM.random(3, 1), reward=lambda p, c: float(len(c)), top_k=3, max_new_tokens=4)
    plan = AStarPlanner(mdp).plan("a")
    assert plan.stop_reason == "certified"  # the whole tree was searched: that is a proof too
    partly = AStarPlanner(mdp).plan("a", 3)
    assert math.isinf(partly.upper_bound)
    assert math.isinf(partly.gap)
    assert not partly.certified


def test_completions_that_cannot_be_scored_are_no_candidates():
    mdp = DecodingMDP(
        TabularLM.random(3, 1),
        reward=as_reward(lambda prompts, completions: [None if "b" in c else 0.5 for c in completions], upper=1.0),
        top_k=3,
        max_new_tokens=3,
    )
    plan = AStarPlanner(mdp).plan("a")
    assert "b" not in plan.text
    assert all("b" not in c.text for c in plan.completions)


def test_too_small_a_budget_gives_a_partial_text(mdp):
    plan = AStarPlanner(mdp).plan("a", 1)
    if not plan.completions:
        assert plan.stop == "partial"
        assert math.isnan(plan.objective)
    assert plan.stop_reason == "budget"


def test_reward_calls_and_seconds_are_budgets_too(mdp):
    assert AStarPlanner(mdp).plan("a", Budget(reward_calls=2)).usage.reward_calls <= 2
    timed = AStarPlanner(mdp).plan("a", Budget(seconds=1e-9))
    assert timed.stop_reason == "budget"
    assert timed.usage.lm_tokens == 0


def test_the_tree_tells_what_became_of_every_edge(mdp):
    plan = AStarPlanner(mdp).plan("a", 15)
    edges = list(plan.tree.edges())
    assert len(edges) == len(plan.tree) == (plan.usage.lm_tokens + 1) * mdp.top_k
    assert sum(e["status"] == "expanded" for e in edges) == plan.usage.lm_tokens
    assert max(e["objective"] for e in edges if e["status"] == "finished") == plan.objective
    open_bounds = [e["bound"] for e in edges if e["status"] == "open"]
    assert plan.upper_bound == max([plan.lower_bound, *open_bounds])


def test_backup_is_the_best_completion_below_each_edge(mdp):
    search = AStarPlanner(mdp, width=2).run_searches(load_prompts("a"), Budget(25))[0]
    value = backup(search, np.full((search.size, mdp.top_k), -9.0))
    by_prefix = {}
    for (row, action), completion in search.completions.items():
        for length in range(1, len(completion.token_ids) + 1):
            key = completion.token_ids[:length]
            by_prefix[key] = max(by_prefix.get(key, -math.inf), completion.objective)
        assert value[row, action] == completion.objective
    for row in range(search.size):
        prefix = mdp.tree.completion_ids(int(search.node[row]))
        for action, token in enumerate(mdp.tree.tokens[search.node[row]]):
            found = by_prefix.get((*prefix, int(token)))
            if found is not None:
                assert value[row, action] == found
            else:  # followed without finding an end: the estimate at the border; not followed: no target
                assert value[row, action] == -9.0 or np.isnan(value[row, action])


@pytest.mark.parametrize(
    ("heuristic", "message"),
    [
        (lambda mdp, prompts, nodes: np.full((len(nodes), mdp.top_k), np.nan), "returned NaN"),
        (lambda mdp, prompts, nodes: np.zeros(len(nodes)), r"returned shape \(1,\), expected \(1, 3\)"),
        (lambda mdp, prompts, nodes: 1 / 0, "raised ZeroDivisionError for 1 nodes, the first after the text ''"),
    ],
)
def test_a_broken_heuristic_is_an_error(mdp, heuristic, message):
    with pytest.raises(HeuristicError, match=message):
        AStarPlanner(mdp, heuristic=heuristic).plan("a")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda mdp: AStarPlanner(mdp, width=0), "width"),
        (lambda mdp: AStarPlanner(mdp, growth=1.0), "growth"),
        (lambda mdp: AStarPlanner(mdp, weight=-1), "weight"),
        (lambda mdp: AStarPlanner(mdp, margin=-0.1), "margin"),
        (lambda mdp: AStarPlanner(mdp, prior=-0.1), "prior"),
        (lambda mdp: AStarPlanner(mdp, search="astar", prior=0.1), "stops when f says so"),
        (lambda mdp: AStarPlanner(mdp, search="anytime", depth_bonus=-0.1), "depth_bonus"),
        (lambda mdp: AStarPlanner(mdp, depth_bonus=0.1), "leave it out"),
        (lambda mdp: AStarPlanner(mdp, search="qstar", depth_bonus=0.1), "leave it out"),
        (lambda mdp: AStarPlanner(mdp, scope="everything"), "scope"),
        (lambda mdp: AStarPlanner("not an env"), "TokenDecoding"),
        (lambda mdp: BeamSearch(mdp, width=0), "width"),
        (lambda mdp: SamplingDecoder(mdp, n=0), "n is"),
        (lambda mdp: SamplingDecoder(mdp, temperature=0), "temperature"),
        (lambda mdp: AStarPlanner(mdp).plan("a", 0), "lm_tokens"),
        (lambda mdp: AStarPlanner(mdp).plan("a", Budget(seconds=-1)), "seconds"),
        (lambda mdp: AStarPlanner(mdp).plan("a", "many"), "lm_tokens"),
        (lambda mdp: AStarPlanner(mdp, pathmax="no"), "pathmax is true or false"),
        (lambda mdp: BeamSearch(mdp, all_endings="no"), "all_endings is true or false"),
        (lambda mdp: BeamSearch(mdp, rerank="no"), "rerank is true or false"),
        (lambda mdp: AStarPlanner(mdp).plan_many(["a"], 9, shared="no"), "shared is true or false"),
        (lambda mdp: SamplingDecoder(mdp, seed=-1), "seed is an integer >= 0"),
        (lambda mdp: SamplingDecoder(mdp, n="2"), "n is an integer"),
        (lambda mdp: SamplingDecoder(mdp, temperature="hot"), "temperature"),
        (lambda mdp: AStarPlanner(mdp).resume("a", 9), "resume goes on with a plan"),
        (lambda mdp: AStarPlanner(mdp).plan("a", 9, logprob_weight=1e308), "logprob_weight is a finite number"),
    ],
)
def test_bad_arguments_are_named(mdp, call, message):
    with pytest.raises(ConfigurationError, match=message):
        call(mdp)


def test_unknown_decoders_and_empty_prompts_are_named(mdp):
    with pytest.raises(UnknownNameError, match="unknown decoder 'asta'; known, nearest first: 'astar'"):
        make_decoder("asta", mdp)
    for bad in ("", "  ", [], None, 3):
        with pytest.raises(PromptError):
            AStarPlanner(mdp).plan(bad)


def test_the_bound_heuristic_is_admissible(mdp):
    objectives = enumerate_objectives(mdp)
    search = AStarPlanner(mdp).run_searches(load_prompts("a"), Budget(20))[0]
    h = BoundHeuristic()(mdp, load_prompts("a") * search.size, search.node[: search.size])
    for row in range(search.size):
        prefix = tuple(mdp.tree.completion_ids(int(search.node[row])))
        for action, token in enumerate(mdp.tree.tokens[search.node[row]]):
            below = [v for ids, v in objectives.items() if ids[: len(prefix) + 1] == (*prefix, int(token))]
            if below:
                assert search.g[row] + h[row, action] >= max(below) - 1e-5


# -- the budget over the depths


@pytest.fixture
def wide():
    """A process without early ends, so that what a depth gets is what it was given."""
    return DecodingMDP(
        TabularLM.random(6, 1, seed=3, eos_token_ids=[]), reward=pseudo_random_reward(1), top_k=6, max_new_tokens=8
    )


def expanded_by_depth(decoder, budget):
    search = decoder.run_searches(load_prompts(["a"]), Budget(budget))[0]
    return np.bincount(search.depth[1 : search.size])[1:]


def test_the_budget_is_spent_early_rather_than_late(wide):
    even, early = (
        expanded_by_depth(AStarPlanner(wide, heuristic=ZeroHeuristic(), taper=taper, margin=np.inf), 70)
        for taper in (0.0, 2.0)
    )
    assert even.sum() == early.sum() == 70
    assert even.max() - even[1:].min() <= 2  # but for the first depth, which has only six
    assert early[1] > 2 * early[-1]
    assert early[-1] >= 1


def test_a_prior_prefers_what_the_language_model_holds_likely(wide):
    def expanded(decoder):
        [search] = decoder.run_searches(load_prompts(["a"]), Budget(3 * (wide.max_new_tokens - 1)))
        return set(search.node[: search.size])

    wild = {"heuristic": WildHeuristic(0), "width": 3, "taper": None, "margin": np.inf}
    likeliest = expanded(BeamSearch(wide, width=3))
    assert len(likeliest) == 1 + 3 * (wide.max_new_tokens - 1)
    assert expanded(AStarPlanner(wide, prior=1e15, **wild)) == likeliest
    assert expanded(AStarPlanner(wide, **wild)) != likeliest


def first_text(mdp, **options):
    """Return the depths of the rows that a search expands before it has a text."""
    planner = AStarPlanner(mdp, search="anytime", weight=1.0, margin=np.inf, **options)
    [search] = planner.run_searches(load_prompts(["a"]), Budget(target=-10.0))
    assert search.completions
    return search.depth[: search.size].tolist()


def test_a_depth_bonus_leads_straight_to_a_text(wide):
    breadth_first = first_text(wide, heuristic=ZeroHeuristic())
    straight = first_text(wide, heuristic=WildHeuristic(0), depth_bonus=1e9)
    assert straight == list(range(len(straight)))
    assert len(breadth_first) > len(straight)


class FirstLetterDecides(Reward):
    """1 for texts that begin with b, which the first letter settles."""

    lower, upper = 0.0, 1.0

    def score(self, prompts, completions, completion_ids=None, **columns):
        return [float(text.startswith("b")) for text in completions]

    def bound_prefixes(self, prompts, completions, remaining, completion_ids=None, **columns):
        return [float(not text or text.startswith("b")) for text in completions]


def test_a_bound_takes_the_depth_bonus_away():
    mdp = DecodingMDP(
        TabularLM.random(4, 1, seed=1, eos_token_ids=[]), reward=FirstLetterDecides(), top_k=4, max_new_tokens=6
    )
    options = {"heuristic": WildHeuristic(0), "depth_bonus": 1e9}
    [search] = AStarPlanner(mdp, search="anytime", weight=1.0, **options).run_searches(
        load_prompts(["a"]), Budget(target=0.5)
    )
    assert search.best.reward == 1.0
    assert search.lm_tokens == 5  # those of one text, whose last token costs nothing


def test_a_depth_bonus_does_not_read_the_bound_where_the_reward_is_not_asked():
    mdp = DecodingMDP(
        TabularLM.random(4, 1, seed=1, eos_token_ids=[]), reward=FirstLetterDecides(), top_k=4, max_new_tokens=6
    )

    def texts(reward):
        process = mdp.with_changes(reward=reward)
        options = {"search": "anytime", "weight": 1.0, "depth_bonus": 1.0, "score": "q"}
        planner = AStarPlanner(process, heuristic=lambda m, p, n: m.logprobs(n), **options)
        return [completion.text for completion in planner.plan("a", 40).completions]

    assert texts(FirstLetterDecides()) == texts(0 * FirstLetterDecides())


@settings(max_examples=30)
@given(st.integers(7, 60), st.floats(0, 5))
def test_a_budget_of_one_text_or_more_finishes_one(budget, taper):
    mdp = DecodingMDP(
        TabularLM.random(6, 1, seed=3, eos_token_ids=[]), reward=pseudo_random_reward(1), top_k=6, max_new_tokens=8
    )
    plan = AStarPlanner(mdp, heuristic=ZeroHeuristic(), taper=taper).plan("a", budget)
    assert plan.completions
    assert plan.usage.lm_tokens <= budget


# -- without the reward


def test_without_the_reward_the_heuristic_alone_ranks_and_nothing_is_proven():
    calls = []

    def reward(prompt, completion):
        calls.append(completion)
        return 0.5

    mdp = DecodingMDP(
        TabularLM.random(4, 1, seed=0), reward=as_reward(reward, lower=0, upper=1), top_k=4, max_new_tokens=4
    )
    rng = np.random.default_rng(0)
    table = {}

    def h(mdp, prompts, nodes):
        return np.array([[table.setdefault((int(n), a), rng.random()) for a in range(mdp.top_k)] for n in nodes])

    plan = AStarPlanner(mdp, heuristic=h, score="q").plan("a")
    assert not calls
    assert plan.usage.reward_calls == 0
    assert math.isnan(plan.reward)
    assert not plan.certified
    assert plan.lower_bound == -math.inf
    assert plan.stop_reason == "exhausted"  # everything was looked at
    tree = plan.tree
    f, finished = np.array(tree.f), np.array(tree.status) == "finished"
    assert plan.objective == f[finished].max()
    assert len(plan.completions) == finished.sum()


def test_completions_of_a_search_without_the_reward_can_be_scored_afterwards():
    mdp = DecodingMDP(TabularLM.random(4, 1, seed=0), reward=pseudo_random_reward(2), top_k=4, max_new_tokens=4)
    search = AStarPlanner(mdp, heuristic=ZeroHeuristic(), score="q").run_searches(load_prompts(["a"]), Budget(20))[0]
    score_completions([search])
    for completion in search.completions.values():
        assert completion.reward == pytest.approx(mdp.reward(["a"], [completion.text])[0])
        assert completion.objective == pytest.approx(completion.reward + 0.02 * completion.logprob)
    best = max(c.objective for c in search.completions.values())
    assert np.nanmax(best_found(search)[0]) == best


def test_a_search_without_reward_and_heuristic_is_refused():
    mdp = DecodingMDP(TabularLM.random(4, 1, seed=0), reward=pseudo_random_reward(2), top_k=4, max_new_tokens=4)
    with pytest.raises(ConfigurationError, match="ranks texts by the heuristic; give one"):
        AStarPlanner(mdp, score="q")
    with pytest.raises(ConfigurationError, match="score is one of"):
        AStarPlanner(mdp, score="Q")


def test_with_pathmax_no_edge_promises_more_than_the_one_before(wide):
    def noisy(mdp, prompts, nodes):
        return np.random.default_rng(int(nodes[0])).normal(size=(len(nodes), mdp.top_k))

    for pathmax, expected in ((True, True), (False, False)):
        tree = AStarPlanner(wide, heuristic=noisy, pathmax=pathmax).plan("a", 40).tree
        parent_edges = {child: f for child, f in zip(tree.child, tree.f, strict=True) if child >= 0}
        holds = [f <= parent_edges[parent] for parent, f in zip(tree.parent, tree.f, strict=True) if parent > 0]
        assert all(holds) is expected


def test_sampling_with_a_heuristic_draws_in_proportion():
    mdp = DecodingMDP(
        TabularLM([0.5, 0.3, 0.2], vocabulary="abc", eos_token_ids=[]),
        reward=lambda p, c: 0.0,
        top_k=3,
        max_new_tokens=1,
    )

    def h(mdp, prompts, nodes):
        return np.tile([0.0, 0.1, 0.2], (len(nodes), 1))

    texts = [SamplingDecoder(mdp, heuristic=h, n=1, beta=0.1, seed=s).plan("a").text for s in range(2000)]
    weights = np.array([0.5, 0.3, 0.2]) * np.exp([0.0, 1.0, 2.0])
    seen = np.array([texts.count(letter) for letter in "abc"]) / 2000
    np.testing.assert_allclose(seen, weights / weights.sum(), atol=0.04)


def test_what_a_stop_string_may_cut_off_does_not_count_against_a_text():
    model = TabularLM.random(5, 1, seed=0, eos_token_ids=[])  # no end but by the stop string and the horizon
    mdp = DecodingMDP(model, reward="exact_answer", top_k=5, max_new_tokens=4, stop="bc", logprob_weight=0.01)
    plan = AStarPlanner(mdp).plan({"prompt": "d", "answer": "a"})
    assert (plan.text, plan.stop, plan.reward) == ("a", "stop", 1.0)  # by way of "ab", which begins no right answer
    assert plan.certified
