"""Environment: checkers of Gymnasium and SB3, random tokens, DQN, a plan; about a minute on two CPU cores."""

import gymnasium as gym
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import DQN
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import qstar_decoding  # noqa: F401  registers the environment
from qstar_decoding.agents import AStarPlanner, Budget, QHeuristic

# An LLM as an environment: states are prefixes, actions are ranks in the list of the likeliest next tokens.
env = gym.make("TokenDecoding-v0", prompts=["The movie was", "The food at the new restaurant"])
check_env(env.unwrapped, skip_render_check=True)
check_env_sb3(env)

env.reset(seed=0)
env.action_space.seed(0)
finished = []
for _ in range(1000):
    _, _, terminated, _, info = env.step(env.action_space.sample())
    if terminated:
        finished.append(info["objective"])
        env.reset()
print(f"random tokens: {len(finished)} texts, mean J {sum(finished) / len(finished):.2f}")

# Any function is a reward, and any agent of stable-baselines3 trains on the environment.
brief = gym.make(
    "TokenDecoding-v0",
    prompts=["The movie was", "The food at the new restaurant"],
    reward=lambda prompt, completion: min(completion.count("e"), 10) / 10,
    max_new_tokens=8,
    top_k=4,
)
agent = DQN("MultiInputPolicy", brief, gamma=1.0, buffer_size=10_000, seed=0).learn(2000)
plan = AStarPlanner(brief, heuristic=QHeuristic(agent)).plan("The play was", budget=60)
print(f"after 2,000 steps of DQN: The play was{plan.text}   (J {plan.objective:.2f})")

# The package ships a Q-function trained for sentiment; A* searches with it and bounds what it may have missed.
planner = AStarPlanner(env, heuristic=QHeuristic("sentiment"))
plan = planner.plan("The play was", budget=Budget(lm_tokens=200))
print(f"Q*: The play was{plan.text}")
print(f"    J {plan.objective:.2f} = reward {plan.reward:.2f} + 0.02 · {plan.logprob:.1f} nats, gap {plan.gap:.2f}")
