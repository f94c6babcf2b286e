"""A reward of your own, checked, learned and searched: alliteration. About a minute on two CPU cores."""

import itertools
import re

from qstar_decoding.agents import AStarPlanner, QHeuristic, QStar
from qstar_decoding.envs import TokenDecodingVecEnv
from qstar_decoding.rewards import as_reward
from qstar_decoding.rewards.testing import check_reward


def alliteration(prompt: str, completion: str) -> float:
    """The share of neighbouring words that begin with the same letter, of five pairs at most."""
    letters = re.findall(r"\b[a-z]", completion.lower())
    return min(sum(a == b for a, b in itertools.pairwise(letters)), 5) / 5


# With bounds A* can tell how close it came; the share so far, as a potential, helps Q to learn.
reward = as_reward(alliteration, lower=0, upper=1, potential=alliteration)
check_reward(reward)

things = ["sea", "forest", "city", "garden", "market", "river", "village", "museum"]
env = TokenDecodingVecEnv(
    num_envs=8,
    prompts=[f"In the {thing} we saw" for thing in things],
    reward=0.8 * reward + 0.2 * as_reward("complete_sentence"),
    max_new_tokens=12,
)
held_out = ["In the mountains we saw", "In the school we saw", "On the island we saw"]
agent = QStar(env=env, seed=0, tokens_per_search=60, searches_per_round=16)


def show(title, planner):
    plans = planner.plan_many(held_out, 50)
    print(f"{title}: mean J {sum(plan.objective for plan in plans) / len(plans):.3f}")
    for plan in plans:
        print(f"    {plan.prompt}{plan.text!s:<70} reward {plan.reward:.2f}")


show("before, A* without Q, 50 LM tokens", AStarPlanner(env))
agent.learn(5_000)
show("after, A* on Q, 50 LM tokens", AStarPlanner(env, heuristic=QHeuristic(agent)))
