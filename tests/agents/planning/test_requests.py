"""Requests: every setting may differ from call to call, on one model, one memory, and one tree for equal settings."""

import copy
import dataclasses
import math
import pickle

import pytest

from qstar_decoding.agents import (
    AStarPlanner,
    BeamSearch,
    BoundHeuristic,
    Budget,
    MajorityVote,
    Request,
    SamplingDecoder,
    SearchEngine,
    ZeroHeuristic,
    make_decoder,
)
from qstar_decoding.agents.search.problem import Processes
from qstar_decoding.envs import DecodingMDP, ForcedStrings, RegexConstraint, TabularLM
from qstar_decoding.errors import CheckpointError, ConfigurationError, PromptError, UnknownNameError
from qstar_decoding.rewards import as_reward

LM = TabularLM.random(6, 2, seed=3)

spread = as_reward(lambda prompt, text: len(set(text)) / 6, lower=0, upper=1)
vowels = as_reward(lambda prompt, text: sum(letter in "ae" for letter in text) / 20, lower=0, upper=1)
unbounded = as_reward(lambda prompt, text: float(len(text)))


def make(lm=LM, **options):
    return DecodingMDP(lm, **{"reward": spread, "top_k": 4, "max_new_tokens": 5, **options})


def facts(plan):
    usage = (plan.usage.lm_tokens, plan.usage.reward_calls, plan.usage.pops)
    bounds = (plan.lower_bound, plan.upper_bound, plan.certified, plan.stop_reason)
    return plan.token_ids, plan.objective, *bounds, *usage, [c.token_ids for c in plan.completions]


PROCESS = [
    {"reward": vowels},
    {"max_new_tokens": 3},
    {"stop": "b"},
    {"stop": ["c", "ab"]},
    {"constraint": ForcedStrings("d")},
    {"constraint": [ForcedStrings("d"), RegexConstraint("[a-d]*")]},
    {"logprob_weight": 0.5},
    {"top_k": 2},
    {"reward": vowels, "max_new_tokens": 7, "top_k": 6, "logprob_weight": 0.0},
]


@pytest.mark.parametrize("changes", PROCESS, ids=str)
@pytest.mark.parametrize("kind", [AStarPlanner, BeamSearch])
def test_a_changed_call_equals_a_planner_made_so(kind, changes):
    planner, made_so = kind(make()), kind(make(**changes))
    before = facts(planner.plan("a", 30))
    wanted = [facts(made_so.plan(prompt, 30)) for prompt in ("a", "bc")]
    assert [facts(planner.plan(prompt, 30, **changes)) for prompt in ("a", "bc")] == wanted
    assert [facts(plan) for plan in planner.plan_many(["a", "bc"], 30, **changes)] == wanted
    *_, last = planner.stream("a", 30, **changes)
    assert last.objective == wanted[0][1]
    assert facts(planner.plan("a", 30)) == before  # the planner is as it was


def test_n_seed_and_heuristic_of_a_call():
    mdp = make()
    planner = AStarPlanner(mdp)
    assert facts(planner.plan("a", n=5)) == facts(AStarPlanner(mdp, n=5).plan("a"))
    assert planner.n_best == 1
    zero = ZeroHeuristic()
    assert facts(planner.plan("a", 30, heuristic=zero)) == facts(AStarPlanner(mdp, heuristic=zero).plan("a", 30))
    assert isinstance(planner.heuristic, BoundHeuristic)
    sampler = SamplingDecoder(mdp, n=2)
    for seed in range(5):
        assert facts(sampler.plan("a", n=7, seed=seed)) == facts(SamplingDecoder(mdp, n=7, seed=seed).plan("a"))
    assert len({sampler.plan("a", seed=seed).token_ids for seed in range(20)}) > 1
    votes = MajorityVote(mdp, n=3).plan("a", n=9, seed=4)
    assert facts(votes)[0] == facts(MajorityVote(mdp, n=9, seed=4).plan("a"))[0]


def test_requests_of_all_kinds_go_into_one_plan_many():
    planner = AStarPlanner(make())
    requests = [Request(prompt, 20 + i, **changes) for i, changes in enumerate(PROCESS) for prompt in ("a", "bc")]
    alone = [facts(AStarPlanner(make()).plan(r.prompt, r.budget, **r.changes)) for r in requests]
    assert [facts(plan) for plan in planner.plan_many(requests)] == alone
    assert facts(planner.plan(requests[3])) == alone[3]
    # What a request leaves open, the call says.
    mixed = planner.plan_many([Request("a", top_k=2), "b"], 12, max_new_tokens=3)
    assert facts(mixed[0]) == facts(AStarPlanner(make(top_k=2, max_new_tokens=3)).plan("a", 12))
    assert facts(mixed[1]) == facts(AStarPlanner(make(max_new_tokens=3)).plan("b", 12))


def test_equal_settings_share_a_tree_and_a_reward_is_made_once(monkeypatch):
    planner = AStarPlanner(make())
    first = planner.with_changes(stop=["c"], constraint=RegexConstraint("[a-c]*"), reward="length")
    second = planner.with_changes(reward="length", constraint=RegexConstraint("[a-c]*"), stop=["c"])
    assert first.mdp is second.mdp
    assert planner.with_changes(reward="length", top_k=2).mdp.reward is first.mdp.reward
    assert planner.with_changes(constraint=RegexConstraint("[a-d]*"), reward="length", stop=["c"]).mdp is not first.mdp
    assert planner.with_changes().mdp is planner.mdp
    assert planner.with_changes(reward=None, stop=None) is planner
    for mdp in (first.mdp, planner.with_changes(top_k=2).mdp):
        assert mdp.tree.engine is planner.mdp.tree.engine
        assert mdp.model is planner.mdp.model
    # A reward without a hash, or one that merely looks the same, is another one.
    one, other = {"spec": "length"}, {"spec": "length"}
    key = type(next(iter(planner.processes._made))[0][1])
    assert key(one) == key(one) != key(other)
    assert key(1) != key(True)
    assert key(1.0) != key(1)


def test_the_processes_that_are_kept_are_few():
    processes = Processes(make(), most=4)
    made = [processes.get(max_new_tokens=n) for n in range(1, 9)]
    assert len(processes._made) == 4
    assert processes.get(max_new_tokens=8) is made[-1]
    assert processes.get(max_new_tokens=1) is not made[0]
    small = AStarPlanner(make(max_prefixes=50))
    for n in range(1, 12):
        small.plan("abc", 40, max_new_tokens=5, logprob_weight=n / 10)
    assert small.processes._prefixes <= 100
    assert len(small.processes._made) < 11


def test_rewards_that_requests_name_cache_few_scores():
    planner = AStarPlanner(make())
    named = planner.with_changes(reward="0.5*length + 0.5*distinct").mdp.reward
    assert [named.cache_size, *(part.cache_size for part in named.parts)] == [8192] * 3
    assert planner.with_changes(reward=spread).mdp.reward.cache_size == type(spread).cache_size > 8192
    assert SearchEngine("toy", reward="length").mdp.reward.cache_size == 8192


def test_a_planners_own_settings_can_be_lifted():
    planner = AStarPlanner(make(constraint=ForcedStrings("dd"), stop="b"))
    assert facts(planner.plan("a", constraint=[], stop=())) == facts(AStarPlanner(make()).plan("a"))


def test_a_changed_plan_is_resumed_by_its_planner_and_by_no_other():
    planner, changes = AStarPlanner(make(), width=2), {"reward": vowels, "max_new_tokens": 6}
    plan = planner.plan("a", 10, **changes)
    further = planner.resume(plan, 30)
    assert facts(further)[:2] == facts(AStarPlanner(make(**changes), width=2).plan("a", 40))[:2]
    assert further.usage.lm_tokens > plan.usage.lm_tokens
    with pytest.raises(ConfigurationError, match="another decoder"):
        AStarPlanner(make()).resume(further, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rewrd": spread}, ConfigurationError, "did you mean 'reward'"),
        ({"max_tokens": 5}, ConfigurationError, "did you mean 'max_new_tokens'"),
        ({"qqqq": 5}, ConfigurationError, "it takes constraint, heuristic"),
        ({"max_new_tokens": 0}, ConfigurationError, "max_new_tokens is an integer >= 1"),
        ({"max_new_tokens": 5000}, ConfigurationError, "leaves no room for a prompt"),
        ({"top_k": 7}, ConfigurationError, "top_k is an integer from 1 to 6"),
        ({"top_k": True}, ConfigurationError, "top_k is an integer"),
        ({"stop": ""}, ConfigurationError, "stop is a non-empty string"),
        ({"stop": 5}, ConfigurationError, "stop is a non-empty string"),
        ({"constraint": 3}, ConfigurationError, "constraint is a Constraint"),
        ({"constraint": "[a-z]"}, UnknownNameError, "unknown constraint"),
        ({"logprob_weight": -1}, ConfigurationError, "logprob_weight is a finite number"),
        ({"logprob_weight": math.nan}, ConfigurationError, "logprob_weight is a finite number"),
        ({"reward": "sentimant"}, ConfigurationError, "known, nearest first: 'sentiment'"),
        ({"n": 0}, ConfigurationError, "n is an integer >= 1"),
        ({"seed": -1}, ConfigurationError, "seed is an integer >= 0"),
        ({"heuristic": 3}, ConfigurationError, "heuristic is a callable"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for_is_said_before_any_work(changes, error, message):
    planner = AStarPlanner(make(TabularLM.random(6, 2, seed=3)))
    calls = [planner.plan, planner.plan_many, planner.stream]
    for call in calls:
        with pytest.raises(error, match=message):
            call("a", 10, **changes)
    assert len(planner.mdp.tree) == 0
    if next(iter(changes)) not in ("rewrd", "max_tokens", "qqqq"):
        with pytest.raises(error, match=message):
            planner.plan_many([Request("b"), Request("a", 10, **changes)])


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [
        (Request, "rewrd", "reward"),
        (Request, "max_tokens", "max_new_tokens"),
        (Request, "budgett", "budget"),
        (Request, "promt", "prompt"),
        (Budget, "lm_token", "lm_tokens"),
        (Budget, "secs", "seconds"),
        (Budget, "patient", "patience"),
    ],
)
def test_a_misspelt_field_is_named_with_the_nearest_right_one(kind, name, nearest):
    given = ["a"] if kind is Request and name != "promt" else []
    with pytest.raises(ConfigurationError) as caught:
        kind(*given, **{name: 3})
    assert str(caught.value) == f"{kind.__name__} has no argument {name!r}; did you mean {nearest!r}?"


def test_requests_and_budgets_are_plain_values():
    request = Request("a", Budget(lm_tokens=3, seconds=2.0), reward="length", top_k=3)
    for other in (copy.deepcopy(request), pickle.loads(pickle.dumps(request)), dataclasses.replace(request, top_k=3)):
        assert other == request
    assert dataclasses.replace(request.budget, seconds=1).seconds == 1
    with pytest.raises(ConfigurationError, match="Request has no argument 'topk'"):
        dataclasses.replace(request, topk=4)
    with pytest.raises(TypeError, match="positional"):
        Request("a", 3, "length")


def test_requests_that_do_not_fit_the_planner():
    planner = AStarPlanner(make(), search="weighted")
    with pytest.raises(ConfigurationError, match="no upper bound"):
        planner.plan("a", 10, reward=unbounded)
    with pytest.raises(ConfigurationError, match="no potential"):
        make_decoder("args", make(reward="length")).plan("a", 10, reward=vowels)
    with pytest.raises(ConfigurationError, match="for a SearchEngine"):
        planner.plan(Request("a", decoder="beam"))
    with pytest.raises(ConfigurationError, match="a shared budget needs"):
        planner.plan_many([Request("a", 10), Request("b", 20)], shared=True)
    with pytest.raises(PromptError, match="there are no prompts, got None"):
        planner.plan_many(None)
    with pytest.raises(PromptError, match="has 1020 tokens"):
        planner.plan("a" * 1020)
    shared = planner.plan_many([Request("a", top_k=2), Request("b")], 30, shared=True)
    assert sum(plan.usage.lm_tokens for plan in shared) <= 30


def test_a_learned_q_for_another_k_is_refused_and_one_for_another_reward_is_not():
    from qstar_decoding.agents import QHeuristic, QStar, TokenQPolicy, maximum
    from qstar_decoding.envs import TokenDecodingVecEnv

    options = {"model": LM, "prompts": ["a"], "top_k": 4, "max_new_tokens": 5, "candidate_dims": 4}
    heuristic = QHeuristic(QStar(TokenQPolicy, TokenDecodingVecEnv(num_envs=1, reward=spread, **options), seed=0))
    planner = AStarPlanner(make(), heuristic=heuristic)
    for call in (
        lambda: planner.plan("a", 10, top_k=3),
        lambda: AStarPlanner(make()).plan("a", 10, top_k=3, heuristic=maximum(heuristic, BoundHeuristic())),
    ):
        with pytest.raises(CheckpointError, match=r"top_k 4 \(trained\) against 3 \(here\)"):
            call()
    changed = planner.plan("a", 10, reward=vowels, max_new_tokens=4)
    made_so = AStarPlanner(make(reward=vowels, max_new_tokens=4), heuristic=heuristic).plan("a", 10)
    assert facts(changed) == facts(made_so)
    # In turn with the planner's own process, without a mix-up of observations.
    for _ in range(3):
        assert facts(planner.plan("b", 10)) == facts(AStarPlanner(make(), heuristic=heuristic).plan("b", 10))
        assert facts(planner.plan("a", 10, reward=vowels, max_new_tokens=4)) == facts(changed)


def test_a_shared_beginning_is_computed_once_whatever_the_settings(tiny_lm):
    lm = tiny_lm("Llama")
    planner = AStarPlanner(DecodingMDP(lm, reward="length", top_k=4, max_new_tokens=3), width=1)
    computed, compute = [], type(planner.mdp.tree.engine)._forward

    def counting(self, rows, *args):
        computed.append(len(rows))
        return compute(self, rows, *args)

    header = " ".join(f"w{i}" for i in range(2, 22))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(planner.mdp.tree.engine), "_forward", counting)
        for i, changes in enumerate(
            [{}, {"top_k": 6}, {"max_new_tokens": 2}, {"reward": vowels}, {"constraint": ForcedStrings("w7")}]
        ):
            computed.clear()
            planner.plan(f"{header} w{25 + i}", 1, **changes)
            assert 0 < sum(computed) <= (23 if i == 0 else 3)


def test_a_request_costs_no_new_model_and_no_new_engine(lm):
    planner = AStarPlanner(DecodingMDP(lm, reward="length", top_k=4, max_new_tokens=4))
    engine = planner.mdp.tree.engine
    for changes in ({"top_k": 3}, {"reward": "sentiment"}, {"constraint": RegexConstraint(r" [a-z]+")}):
        plan = planner.plan("The play was", 6, **changes)
        alone = AStarPlanner(DecodingMDP(lm, **{"reward": "length", "top_k": 4, "max_new_tokens": 4, **changes}))
        assert plan.text == alone.plan("The play was", 6).text
        assert planner.with_changes(**changes).mdp.tree.engine is engine


def test_a_certificate_of_a_changed_call_speaks_of_the_new_process():
    for changes in ({"reward": vowels, "top_k": 6}, {"logprob_weight": 0.3}, {"stop": "c"}):
        plan = AStarPlanner(make()).plan("ab", **changes)
        assert plan.certified
        every = AStarPlanner(make(**changes), n=10**6, margin=math.inf).plan("ab").completions
        assert plan.objective == pytest.approx(max(c.objective for c in every))


def test_processes_do_not_confuse_values_that_python_calls_equal():
    processes = Processes(make())
    made = [processes.get(logprob_weight=value) for value in (0.0, 1.0, 1)]
    assert made[0] is not made[1]
    assert [mdp.logprob_weight for mdp in made] == [0.0, 1.0, 1.0]
