"""A data set of reasoning-gym as prompts and reward: sums of one-digit numbers. About a minute on two CPU cores."""

import reasoning_gym

from qstar_decoding.agents import AStarPlanner, GreedyDecoder, QHeuristic, QStar, evaluate
from qstar_decoding.envs import TokenDecodingVecEnv
from qstar_decoding.rewards.adapters import from_reasoning_gym

dataset = reasoning_gym.create_dataset(
    "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=300, seed=0
)
SHOTS = "Q: 3 + 4\nA: 7\n\nQ: 9 - 2\nA: 7\n\nQ: 8 + 5\nA: 13\n\n"
rows = {e["metadata"]["expression"]: e for e in dataset}  # each problem once
prompts = [{"prompt": f"{SHOTS}Q: {expression}\nA:", "entry": entry} for expression, entry in rows.items()]
held_out, train = prompts[:40], prompts[40:]

env = TokenDecodingVecEnv(
    num_envs=8,
    prompts=train,
    reward=from_reasoning_gym(dataset),
    max_new_tokens=4,
    stop="\n",
    logprob_weight=0.01,
    shaping=False,
    hidden_layers=[14],  # what the model knows of a sum stands clearest in its middle
)
# The checker is for training only: afterwards Q alone says which answer is best.
settings = {"optimism": 0.7, "estimate_weight": 0.7, "priority": 0.8, "policy_kwargs": {"dropout": 0.1}}
agent = QStar(env=env, seed=0, score="q", tokens_per_search=20, searches_per_round=64, gradient_steps=128, **settings)
q = QHeuristic(agent)


def show(title, decoder, budget=None):
    print(f"{title:<40} right: {evaluate(decoder, held_out, budget).rewards.mean():.2f}")


show("before, greedy", GreedyDecoder(env))
agent.learn(5_000)
show("after, arg max Q", GreedyDecoder(env, heuristic=q, score="q"))
show("after, A* on Q, 40 LM tokens", AStarPlanner(env, heuristic=q, score="q", pathmax=True), 40)
