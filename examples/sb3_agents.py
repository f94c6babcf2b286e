"""Agents of stable-baselines3 and sb3-contrib as heuristics of A*; about a minute on two CPU cores."""

import time

from sb3_contrib import QRDQN, MaskablePPO
from stable_baselines3 import DQN, PPO

from qstar_decoding.agents import AStarPlanner, QHeuristic, TokenQPolicy, TokenQuantilePolicy, ValueHeuristic
from qstar_decoding.envs import TokenDecodingVecEnv

HELD_OUT = ["The phone was", "The play was", "The garden had", "My new office was", "The museum is", "Our guide seemed"]
STEPS, BUDGET = 4000, 16

# Eight environments of one language model. Whatever one agent has tried is in the tree that they all share.
env = TokenDecodingVecEnv(
    num_envs=8,
    prompts=[f"The {thing} was" for thing in ("movie", "food", "hotel", "service", "book", "concert")],
    reward="sentiment",
    max_new_tokens=5,
    top_k=4,
)


def mean_objective(heuristic):
    """What A* finds with so few LM tokens; the whole tree of a prompt has 341."""
    plans = AStarPlanner(env, heuristic=heuristic).plan_many(HELD_OUT, BUDGET)
    return sum(plan.objective for plan in plans) / len(plans)


# gamma=1, as in J: the horizon is finite.
q_learning = {
    "gamma": 1.0,
    "learning_rate": 1e-3,
    "buffer_size": 10_000,
    "learning_starts": 500,
    "batch_size": 64,
    "train_freq": 1,
    "gradient_steps": 2,
    "target_update_interval": 200,
    "exploration_fraction": 0.5,
}
actor_critic = {"gamma": 1.0, "learning_rate": 1e-3, "n_steps": 32, "batch_size": 64, "ent_coef": 0.01}
agents = [
    # A Q-network scores the edges themselves.
    (DQN(TokenQPolicy, env, seed=0, **q_learning), QHeuristic),
    (QRDQN(TokenQuantilePolicy, env, seed=0, policy_kwargs={"n_quantiles": 20}, **q_learning), QHeuristic),
    # A critic knows what a state is worth, and the policy which of its edges to try first.
    (PPO("MultiInputPolicy", env, seed=0, **actor_critic), ValueHeuristic),
    (MaskablePPO("MultiInputPolicy", env, seed=0, **actor_critic), ValueHeuristic),
]

print(f"A* with {BUDGET} LM tokens on held-out prompts: mean J {mean_objective(None):.3f} with the bound as heuristic")
print(f"{'agent':<12} {'heuristic':<15} {'untrained':>9} {f'{STEPS:,} steps':>12} {'seconds':>8}")
for agent, heuristic in agents:
    before, start = mean_objective(heuristic(agent)), time.perf_counter()
    agent.learn(STEPS)
    seconds, after = time.perf_counter() - start, mean_objective(heuristic(agent))
    print(f"{type(agent).__name__:<12} {heuristic.__name__:<15} {before:>9.3f} {after:>12.3f} {seconds:>8.0f}")
