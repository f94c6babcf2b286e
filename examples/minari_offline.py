"""A Minari data set of A*'s searches: record, reload, and learn Q offline from it. Half a minute on a CPU core."""

import os
import tempfile

os.environ.setdefault("MINARI_DATASETS_PATH", tempfile.mkdtemp())  # unset, Minari writes into your home folder

import gymnasium as gym
import minari
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer
from stable_baselines3 import DQN
from stable_baselines3.common.utils import obs_as_tensor

from qstar_decoding.agents import AStarPlanner, QHeuristic, TokenQPolicy
from qstar_decoding.tasks import load_task

BUDGET, STEPS, NAME = 300, 600, "token-decoding/toy-searches-v0"
task = load_task("toy")  # a language of seven letters; the reward is for using many of them
prompts = task.prompts.of("train")
env = gym.make("qstar_decoding:TokenDecoding-v0", prompts=prompts, **task.env)


def played(prompt, tree):
    """Yield every text that a search finished, as an episode of the environment."""
    arrives = {int(child): edge for edge, child in enumerate(tree.child)}
    for edge in np.flatnonzero([status == "finished" for status in tree.status]):
        actions = [int(tree.action[edge])]
        while node := int(tree.parent[edge]):
            actions.insert(0, int(tree.action[edge := arrives[node]]))
        first, _ = env.reset(options={"prompt": prompt})
        seen, rewards, ends, cuts, _ = zip(*[env.step(action) for action in actions], strict=True)
        columns = {key: np.stack([o[key] for o in (first, *seen)]) for key in first}
        yield EpisodeBuffer(None, None, None, columns, actions, [*rewards], [*ends], [*cuts])


plans = AStarPlanner(env, n=100).plan_many(prompts, BUDGET)
episodes = [e for prompt, plan in zip(prompts, plans, strict=True) for e in played(prompt, plan.tree)]
about = {"author": "you", "author_email": "you@example.org", "code_permalink": "https://…", "description": "…"}
minari.create_dataset_from_buffers(NAME, episodes, env=env, eval_env=env, algorithm_name="A*", **about)

# From here on only the data set is needed. Q learns the better of the returns that were found beyond each edge.
episodes = [*(dataset := minari.load_dataset(NAME))]
agent = DQN(TokenQPolicy, dataset.recover_environment(), gamma=1.0, buffer_size=1, learning_rate=1e-3, seed=0)
states = {k: np.concatenate([e.observations[k][:-1] for e in episodes]) for k in agent.observation_space}
actions = torch.tensor(np.concatenate([e.actions for e in episodes]))
returns = torch.tensor(np.concatenate([np.cumsum(e.rewards[::-1])[::-1] for e in episodes])).float()
planner, held_out = AStarPlanner(agent.env, heuristic=QHeuristic(agent)), task.prompts.of("test")
before = planner.plan_many(held_out, budget=12)
for _ in range(STEPS):
    batch = torch.randint(len(returns), (256,))
    q = agent.q_net(obs_as_tensor({k: column[batch] for k, column in states.items()}, agent.device))
    error = returns[batch] - q.gather(1, actions[batch, None])[:, 0]
    loss = (torch.where(error > 0, 0.9, 0.1) * error.square()).mean()  # an expectile, as in QStar
    agent.policy.optimizer.zero_grad(), loss.backward(), agent.policy.optimizer.step()
print(f"{dataset.total_episodes} episodes, {dataset.total_steps} steps in {NAME}")
before, after = (np.mean([p.objective for p in plans]) for plans in (before, planner.plan_many(held_out, 12)))
print(f"A* with 12 LM tokens on held-out prompts: mean J {before:.3f} untrained, {after:.3f} trained offline")
