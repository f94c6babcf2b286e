"""Heuristics of any value: no masked edge is followed, no text breaks a constraint, bounds stay true."""

import numpy as np
import pytest

from qstar_decoding.agents import DECODERS, SEARCHES, AStarPlanner, OracleHeuristic
from qstar_decoding.envs import BannedStrings, DecodingMDP, ForcedStrings, MinTokens, TabularLM
from qstar_decoding.rewards import as_reward

LM = TabularLM([0.4, 0.3, 0.2, 0.1], vocabulary=["a", "b", "c", ""])
REWARD = as_reward(lambda prompt, text: len(set(text)) / 3, lower=0, upper=1)


def constant(value):
    return lambda mdp, prompts, nodes: np.full((len(nodes), mdp.top_k), value)


def alternating(mdp, prompts, nodes):
    values = np.array([-np.inf, np.inf, 0.0, -np.inf])[: mdp.top_k]
    return np.tile(values, (len(nodes), 1))


HEURISTICS = {"-inf": constant(-np.inf), "+inf": constant(np.inf), "both": alternating, "oracle": OracleHeuristic()}
CONSTRAINTS = {
    "forced": (ForcedStrings("b"), lambda text: "b" in text),
    "banned": (BannedStrings("a"), lambda text: "a" not in text),
    "long": (MinTokens(2), lambda text: len(text) >= 2),
}
KINDS = [("astar", {"search": search}) for search in SEARCHES]
KINDS += [("astar", {"search": "anytime", "weight": 0.0}), ("astar", {"search": "capped", "width": 1})]
KINDS += [(name, {}) for name in sorted(DECODERS) if name not in ("astar", "args", "levin")]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("heuristic", HEURISTICS)
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_texts_keep_to_the_constraint_whatever_the_heuristic(name, options, heuristic, constraint):
    given, holds = CONSTRAINTS[constraint]
    mdp = DecodingMDP(LM, reward=REWARD, top_k=4, max_new_tokens=4, constraint=given)
    decoder = DECODERS[name](mdp, heuristic=HEURISTICS[heuristic], **options)
    plan = decoder.plan("a", 60)
    assert plan.stop != "partial"
    assert all(holds(completion.text) for completion in plan.completions)
    assert "masked" not in {
        status for status, child in zip(plan.tree.status, plan.tree.child, strict=True) if child >= 0
    }


@pytest.mark.parametrize("value", [-np.inf, np.inf])
def test_q_alone_may_be_infinite(value):
    mdp = DecodingMDP(LM, reward=REWARD, top_k=4, max_new_tokens=3)
    plan = AStarPlanner(mdp, heuristic=constant(value), score="q", n=2).plan("a", 40)
    assert plan.objective == value
    assert len(plan.best(2)) == 2
    assert len(plan.best(2, diversity=0.3)) == 2
    assert len(plan.sample(3, temperature=0.1, seed=0)) == 3
    plan.tree.to_json()


def test_an_infinite_incumbent_ends_no_search_in_a_loop():
    mdp = DecodingMDP(LM, reward=REWARD, top_k=4, max_new_tokens=3)
    plan = AStarPlanner(mdp, heuristic=alternating, score="q").plan("a")
    assert plan.stop_reason == "exhausted"
