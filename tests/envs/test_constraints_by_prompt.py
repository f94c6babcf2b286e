"""Constraints that differ from prompt to prompt, in one tree: planners, environments, eviction, and old classes."""

import numpy as np
import pytest

from qstar_decoding.agents import AStarPlanner, BeamSearch
from qstar_decoding.envs import (
    Constraint,
    DecodingMDP,
    ForcedStrings,
    MinTokens,
    RegexConstraint,
    TabularLM,
    TokenDecodingEnv,
)
from qstar_decoding.errors import ConfigurationError, ConstraintError
from qstar_decoding.rewards import as_reward


class Keyword(Constraint):
    """The completion contains the prompt's own keyword."""

    def __init__(self):
        self.bound = []

    def bind(self, model, prompt=None):
        self.bound.append(prompt)
        return ForcedStrings(prompt.columns["keyword"]).bind(model)


class Pattern(Constraint):
    def bind(self, model, prompt):
        return RegexConstraint(prompt.columns["pattern"]).bind(model)


reward = as_reward(lambda prompt, text: len(set(text)) / 6, lower=0, upper=1)


def make(constraint, **options):
    lm = TabularLM.random(5, 1, seed=4)
    return DecodingMDP(lm, **{"reward": reward, "top_k": 5, "max_new_tokens": 5, "constraint": constraint, **options})


def facts(plan):
    return plan.token_ids, plan.objective, plan.upper_bound, plan.certified, [c.token_ids for c in plan.completions]


PROMPTS = [{"prompt": text, "keyword": word} for text in ("a", "b") for word in ("cc", "dad", "ab", "b")]


@pytest.mark.parametrize("kind", [AStarPlanner, BeamSearch])
@pytest.mark.parametrize("max_prefixes", [10**6, 30])
def test_prompts_of_one_tree_with_constraints_of_their_own(kind, max_prefixes):
    planner = kind(make(Keyword(), max_prefixes=max_prefixes))
    alone = [facts(kind(make(ForcedStrings(p["keyword"]))).plan(p["prompt"], 60)) for p in PROMPTS]
    for _ in range(2):
        assert [facts(plan) for plan in planner.plan_many(PROMPTS, 60)] == alone
        assert [facts(planner.plan(prompt, 60)) for prompt in reversed(PROMPTS)] == alone[::-1]
    for prompt, plan in zip(PROMPTS, planner.plan_many(PROMPTS, 60), strict=True):
        assert all(prompt["keyword"] in completion.text for completion in plan.completions)


def test_masks_of_equal_beginnings_differ_by_prompt():
    prompts = [{"prompt": "a", "pattern": "c+"}, {"prompt": "a", "pattern": "b(c|d)"}, {"prompt": "a", "pattern": "d"}]
    planner = AStarPlanner(make(Pattern(), max_new_tokens=3))
    plans = planner.plan_many(prompts)
    assert [sorted({c.text for c in plan.completions}) for plan in plans][1:] == [["bc", "bd"], ["d"]]
    assert {c.text for c in plans[0].completions} <= {"c", "cc", "ccc"}
    assert len(planner.mdp.tree.rules) == 3


def test_a_rule_is_bound_once_for_equal_prompts_and_shares_the_tree():
    constraint = Keyword()
    planner = AStarPlanner(make([constraint, MinTokens(2)]))
    planner.plan(PROMPTS[0], 30)
    size = len(planner.mdp.tree)
    planner.plan(dict(PROMPTS[0]), 30)
    assert len(planner.mdp.tree) == size
    assert len(constraint.bound) == 1
    planner.plan({**PROMPTS[0], "other": 1}, 30)
    assert len(constraint.bound) == 2


def test_columns_that_cannot_be_pickled_are_told_apart_by_prompt():
    planner = AStarPlanner(make(Keyword()))
    plans = planner.plan_many([{**prompt, "odd": lambda: None} for prompt in PROMPTS], 60)
    alone = [facts(AStarPlanner(make(ForcedStrings(p["keyword"]))).plan(p["prompt"], 60)) for p in PROMPTS]
    assert [facts(plan) for plan in plans] == alone


def test_a_prompts_constraint_of_one_call():
    planner = AStarPlanner(make(None))
    plan = planner.plan(PROMPTS[1], 60, constraint=Keyword())
    assert facts(plan) == facts(AStarPlanner(make(ForcedStrings("dad"))).plan(PROMPTS[1], 60))


def test_the_environment_masks_by_prompt():
    env = TokenDecodingEnv(
        TabularLM.random(5, 1, seed=4), prompts=PROMPTS, reward=reward, top_k=5, max_new_tokens=5, constraint=Keyword()
    )
    rng = np.random.default_rng(0)
    for _ in range(4):
        for prompt in PROMPTS:
            _, info = env.reset(options={"prompt": prompt})
            ended = False
            while not ended and info["action_mask"].any():
                action = rng.choice(np.flatnonzero(info["action_mask"]))
                try:
                    _, _, ended, _, info = env.step(action)
                except ConstraintError:
                    break
            if ended:
                assert prompt["keyword"] in info["completion"]


def test_a_broken_binding_is_named():
    with pytest.raises(ConfigurationError, match=r"raised KeyError for the prompt 'a': 'keyword'"):
        AStarPlanner(make(Keyword())).plan("a")

    class Nothing(Constraint):
        def bind(self, model, prompt=None):
            return None

    with pytest.raises(ConfigurationError, match="returned None, which is no Rule"):
        AStarPlanner(make(Nothing())).plan("a")


def test_shipped_constraints_are_compared_by_value():
    assert RegexConstraint("a+") == RegexConstraint("a+") != RegexConstraint("b+")
    assert ForcedStrings("a", "b") == ForcedStrings("a", "b") != ForcedStrings("b", "a")
    assert len({MinTokens(2), MinTokens(2), MinTokens(3), RegexConstraint("a"), RegexConstraint("a")}) == 3
