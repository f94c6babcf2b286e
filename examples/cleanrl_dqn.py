"""Masked DQN in one file of plain torch on `gym.make_vec`, in the manner of CleanRL. Twenty seconds on a CPU core.

The mask holds where actions are chosen and in the Bellman target. The network then serves A* as its heuristic.
"""

import gymnasium as gym
import numpy as np
import torch

from qstar_decoding.agents import AStarPlanner, QFunction, QHeuristic
from qstar_decoding.tasks import load_task

STEPS, ENVS = 4_000, 8
task = load_task("toy")  # a language of seven letters; the reward is for using many of them
arguments = {"prompts": task.prompts.of("train"), "top_p": 0.95, **task.env}  # top_p masks unlikely tokens
name = "qstar_decoding:TokenDecoding-v0"
envs = gym.make_vec(name, num_envs=ENVS, vectorization_mode="vector_entry_point", **arguments)
k, SEEN = int(envs.single_action_space.n), ("hidden", "candidates", "logprobs", "potential", "remaining")


class QNetwork(torch.nn.Sequential):
    def __init__(self):
        size = sum(envs.single_observation_space[key].shape[0] for key in SEEN)
        super().__init__(torch.nn.Linear(size, 128), torch.nn.ReLU(), torch.nn.Linear(128, k))

    def forward(self, observation):
        q = super().forward(torch.cat([torch.as_tensor(observation[key]) for key in SEEN], dim=1))
        return q.masked_fill(torch.as_tensor(observation["action_mask"]) == 0, -1e9)


rng, _, q, target = np.random.default_rng(0), torch.manual_seed(0), QNetwork(), QNetwork()
optimizer = torch.optim.Adam(q.parameters(), 1e-3)
planner = AStarPlanner(envs, heuristic=QHeuristic(QFunction(q, None, shaped=True, candidate_dims=32)))


def mean_objective():
    return np.mean([plan.objective for plan in planner.plan_many(task.prompts.of("test"), budget=12)])


before, memory, (observation, _) = mean_objective(), [], envs.reset(seed=0)
for step in range(STEPS):
    explore = rng.random(ENVS) < max(0.05, 1 - 2 * step / STEPS)
    legal = (rng.random((ENVS, k)) * observation["action_mask"]).argmax(1)
    actions = np.where(explore, legal, q(observation).argmax(1).numpy())
    following, rewards, terminated, _, _ = envs.step(actions)
    # After an end `following` is the next episode's first observation; its value counts nothing.
    then = {f"next {key}": value for key, value in following.items()}
    memory.append({**observation, **then, "action": actions, "reward": rewards, "end": terminated})
    observation = following
    batch = [memory[i] for i in rng.integers(len(memory), size=16)]
    batch = {key: torch.from_numpy(np.concatenate([part[key] for part in batch])) for key in batch[0]}
    with torch.no_grad():
        best = target({key: batch[f"next {key}"] for key in observation}).max(1).values
    goal = batch["reward"].float() + torch.where(batch["end"], 0, best)
    loss = torch.nn.functional.smooth_l1_loss(q(batch).gather(1, batch["action"][:, None])[:, 0], goal)
    optimizer.zero_grad(), loss.backward(), optimizer.step()
    if step % 100 == 0:
        target.load_state_dict(q.state_dict())
print(f"A* with 12 LM tokens on held-out prompts: mean J {before:.3f} untrained, {mean_objective():.3f} trained")
