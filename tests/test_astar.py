"""The planner against exhaustive enumeration: the optimum is the optimum, and a certificate is never wrong."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.agents import (
    DECODERS,
    AStarPlanner,
    BeamSearch,
    BoundHeuristic,
    Budget,
    GreedyDecoder,
    SamplingDecoder,
    ZeroHeuristic,
    make_decoder,
)
from qstar_decoding.agents.experience import backup, best_found
from qstar_decoding.agents.planning import run_searches, score_completions
from qstar_decoding.envs import DecodingMDP, TabularLM, load_prompts
from qstar_decoding.errors import ConfigurationError, HeuristicError, PromptError, UnknownNameError
from qstar_decoding.rewards import as_reward


def pseudo_random_reward(seed):
    """A reward in [-1, 1] with no structure that a search could exploit."""

    def reward(prompt, completion):
        return math.sin(sum((i + 1) * ord(c) for i, c in enumerate(completion)) * (seed + 1.37))

    return as_reward(reward, lower=-1.0, upper=1.0)


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
            inside = rank < mdp.top_k and (rank == 0 or (mass < mdp.top_p and logprobs[token] > -np.inf))
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


@settings(max_examples=150, deadline=None)
@given(mdp=processes(), width=st.integers(1, 5), growth=st.sampled_from([1.1, 2.0, 5.0]))
def test_the_bound_finds_and_certifies_the_enumerated_optimum(mdp, width, growth):
    objectives = enumerate_objectives(mdp)
    plan = AStarPlanner(mdp, width=width, growth=growth).plan("a")
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
)
def test_bounds_and_certificates_hold_under_any_heuristic(mdp, seed, budget, margin, weight, width, scope):
    objectives = enumerate_objectives(mdp, full_vocabulary=scope == "full vocabulary")
    planner = AStarPlanner(mdp, heuristic=WildHeuristic(seed), weight=weight, margin=margin, width=width, scope=scope)
    plan = planner.plan("a", budget)
    best = max(objectives.values())
    assert plan.upper_bound >= best - 1e-5
    if plan.completions:
        assert plan.lower_bound == plan.objective == pytest.approx(objectives[plan.token_ids], abs=1e-5)
    if plan.certified:
        assert plan.objective == pytest.approx(best, abs=1e-5)
    if budget is None and scope == "top-k tree":  # complete in the limit, however misled
        assert plan.certified
    lower, upper = zip(*((p.lower_bound, p.upper_bound) for p in plan.trace), strict=True)
    assert all(a <= b for a, b in itertools.pairwise(lower))
    assert all(a >= b for a, b in itertools.pairwise(upper))


@settings(max_examples=60, deadline=None)
@given(mdp=processes(), budget=st.integers(1, 40), name=st.sampled_from(sorted(DECODERS)), seed=st.integers(0, 9))
def test_every_decoder_keeps_its_budget_and_reports_what_it_found(mdp, budget, name, seed):
    options = {"seed": seed} if name == "sample" else {}
    plan = make_decoder(name, mdp, **options).plan("a", budget)
    objectives = enumerate_objectives(mdp)
    assert plan.usage.lm_tokens <= budget
    assert plan.upper_bound >= max(objectives.values()) - 1e-5
    for completion in plan.completions:
        assert completion.objective == pytest.approx(objectives[completion.token_ids], abs=1e-5)
    assert [c.objective for c in plan.completions] == sorted((c.objective for c in plan.completions), reverse=True)
    assert len({c.token_ids for c in plan.completions}) == len(plan.completions)


@settings(max_examples=40, deadline=None)
@given(mdp=processes(), budget=st.one_of(st.none(), st.integers(5, 40)), name=st.sampled_from(sorted(DECODERS)))
def test_planning_many_prompts_equals_planning_one_by_one(mdp, budget, name):
    prompts = ["a", "aa", "aaa"]
    together = make_decoder(name, mdp).plan_many(prompts, budget)
    alone = [make_decoder(name, mdp.fresh()).plan(prompt, budget) for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.lower_bound == pytest.approx(other.lower_bound, nan_ok=True)
        assert one.upper_bound == pytest.approx(other.upper_bound)
        assert one.usage.lm_tokens == other.usage.lm_tokens


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
    search = run_searches(AStarPlanner(mdp, width=2), load_prompts("a"), Budget(25))[0]
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
        (lambda mdp: AStarPlanner(mdp, scope="everything"), "scope"),
        (lambda mdp: AStarPlanner("not an env"), "TokenDecoding"),
        (lambda mdp: BeamSearch(mdp, width=0), "width"),
        (lambda mdp: SamplingDecoder(mdp, n=0), "n is"),
        (lambda mdp: SamplingDecoder(mdp, temperature=0), "temperature"),
        (lambda mdp: AStarPlanner(mdp).plan("a", 0), "lm_tokens"),
        (lambda mdp: AStarPlanner(mdp).plan("a", Budget(seconds=-1)), "seconds"),
        (lambda mdp: AStarPlanner(mdp).plan("a", "many"), "lm_tokens"),
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
    search = run_searches(AStarPlanner(mdp), load_prompts("a"), Budget(20))[0]
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
    search = run_searches(decoder, load_prompts(["a"]), Budget(budget))[0]
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
    search = run_searches(AStarPlanner(mdp, heuristic=ZeroHeuristic(), score="q"), load_prompts(["a"]), Budget(20))[0]
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
        came_by = {child: f for child, f in zip(tree.child, tree.f, strict=True) if child >= 0}
        holds = [f <= came_by[parent] for parent, f in zip(tree.parent, tree.f, strict=True) if parent > 0]
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
