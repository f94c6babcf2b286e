"""Quickstart: a search with the shipped Q, then DQN and a plan with your own reward; a minute on two CPU cores."""

import gymnasium as gym
from stable_baselines3 import DQN

import qstar_decoding  # noqa: F401  registers the environment
from qstar_decoding.agents import AStarPlanner, QHeuristic

env = gym.make("TokenDecoding-v0", reward="sentiment")
plan = AStarPlanner(env, heuristic=QHeuristic("sentiment")).plan("Staying at my cousin's farm", budget=200)
print(plan.text, plan.objective, plan.lower_bound, plan.upper_bound)

task = {"reward": lambda prompt, completion: min(completion.count("e"), 10) / 10, "max_new_tokens": 8, "top_k": 4}
env = gym.make("TokenDecoding-v0", prompts=["The movie was", "The soup had"], **task)
agent = DQN("MultiInputPolicy", env, gamma=1.0, buffer_size=10_000).learn(2_000)
print(AStarPlanner(env, heuristic=QHeuristic(agent)).plan("The play was", budget=60).text)
