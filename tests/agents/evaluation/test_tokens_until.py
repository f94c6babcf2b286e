"""LM tokens until a text is good enough: what every budget could have solved, from one run."""

import numpy as np
import pytest

from qstar_decoding.agents import AStarPlanner, Budget, SamplingDecoder
from qstar_decoding.agents.evaluation import tokens_until
from qstar_decoding.envs import DecodingMDP, TabularLM
from qstar_decoding.rewards import as_reward

PROMPTS = ["a", "b", "c", "d"]


def make():
    lm = TabularLM.random(5, 1, seed=4)
    reward = as_reward(lambda prompt, text: float(text == prompt + "bcd"), lower=0, upper=1)
    return DecodingMDP(lm, reward=reward, top_k=5, max_new_tokens=4, logprob_weight=0.0)


def sampling(mdp):
    return SamplingDecoder(mdp, seed=1)


@pytest.mark.parametrize("kind", [lambda mdp: AStarPlanner(mdp, search="anytime"), sampling], ids=["astar", "sampling"])
def test_a_prompt_is_solved_within_every_budget_from_its_tokens_on(kind):
    tokens = tokens_until(kind(make()), PROMPTS, 0.5)
    assert np.isfinite(tokens).any()
    for prompt, needed in zip(PROMPTS, tokens, strict=True):
        if not np.isfinite(needed):
            continue
        plan = kind(make()).plan(prompt, Budget(pops=1000, target=0.5))
        assert (plan.reward, plan.usage.lm_tokens, plan.stop_reason) == (1, needed, "target")
    astar = AStarPlanner(make(), search="anytime")
    for prompt, needed in zip(PROMPTS, tokens_until(astar, PROMPTS, 0.5), strict=True):
        assert astar.plan(prompt, int(needed)).reward == 1
        assert astar.plan(prompt, int(needed) - 1).reward == 0


def test_a_target_that_no_text_reaches_takes_forever():
    assert tokens_until(AStarPlanner(make(), search="anytime"), PROMPTS, 1.5).tolist() == [np.inf] * 4
    assert np.isinf(tokens_until(AStarPlanner(make(), search="anytime"), PROMPTS, 0.5, most=1)).all()
