"""A data set of reasoning-gym as prompts and reward: greatest common divisors. About a minute on two CPU cores."""

import reasoning_gym

from qstar_decoding.agents import AStarPlanner, GreedyDecoder, QHeuristic, QStar, evaluate
from qstar_decoding.envs import TokenDecodingVecEnv
from qstar_decoding.rewards.adapters import from_reasoning_gym

dataset = reasoning_gym.create_dataset(
    "gcd", min_numbers=2, max_numbers=2, min_value=2, max_value=30, size=1000, seed=0
)
SHOTS = "gcd(4, 6) = 2\ngcd(9, 20) = 1\ngcd(7, 21) = 7\n"
rows = {tuple(e["metadata"]["numbers"]): e for e in dataset}  # each problem once
prompts = [{"prompt": f"{SHOTS}gcd({a}, {b}) =", "entry": entry} for (a, b), entry in rows.items()]
held_out, train = prompts[:100], prompts[100:]

env = TokenDecodingVecEnv(
    num_envs=8,
    prompts=train,
    reward=from_reasoning_gym(dataset),
    max_new_tokens=4,
    stop="\n",
    logprob_weight=0.01,
    shaping=False,
    hidden_layers=[14],  # what the model knows of numbers stands clearest in its middle
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
