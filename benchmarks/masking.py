"""What masks are worth: MaskableDQN and MaskableQRDQN against plain DQN where half of the actions are illegal lures.

    python benchmarks/masking.py [--steps 10000] [--seeds 0 1 2] [--json FILE]

A corridor of 10 rooms. In each, one of the 4 legal actions opens the next door, the others do nothing; behind the last
door lies a reward of 1, the optimum (an episode has 40 steps). The 4 illegal actions pay 0.2 at once and end the
episode. All agents have the same network, settings and steps; violations are counted in the environment, in training
and evaluation. The score is the mean return of 20 greedy episodes after training, lures included.

What plain DQN lacks is exploration: a random episode survives a step in one case of two. It is not bound to fail: with
8 rooms and 32 steps an episode, it got out for one seed of six (the masked agents for all six), hence the 10 rooms.
"""

import argparse

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import add_json_option, out, row, write
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback

from qstar_decoding.agents import MaskableDQN, MaskableQRDQN

OPTIMUM = 1.0
AGENTS = {
    "MaskableDQN": (MaskableDQN, {}),
    "MaskableQRDQN": (MaskableQRDQN, {"n_quantiles": 16}),
    "DQN": (DQN, {}),
}
SETTINGS = {
    "learning_rate": 1e-3,
    "buffer_size": 20_000,
    "learning_starts": 500,
    "gamma": 0.97,
    "train_freq": 2,
    "target_update_interval": 250,
    "exploration_fraction": 0.5,
    "exploration_final_eps": 0.05,
}


class LureCorridor(gym.Env):
    """Rooms in a row; which actions are legal, and which of them opens which door, is drawn once, by a fixed seed."""

    def __init__(self, rooms=10, actions=8, horizon=40, lure=0.2):
        order = np.random.default_rng(0).permutation(actions)
        self.legal = np.sort(order[: actions // 2])
        self.key = np.random.default_rng(1).choice(self.legal, size=rooms)
        self.rooms, self.horizon, self.lure = rooms, horizon, lure
        self.observation_space = spaces.Box(0.0, 1.0, (rooms + 1,), np.float32)
        self.action_space = spaces.Discrete(actions)
        self.violations = 0

    def action_masks(self):
        return np.isin(np.arange(self.action_space.n), self.legal)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.room, self.time = 0, 0
        return self._observation(), {}

    def step(self, action):
        self.time += 1
        if action not in self.legal:
            self.violations += 1
            return self._observation(), self.lure, True, False, {}
        self.room += int(action == self.key[self.room])
        out = self.room == self.rooms
        return self._observation(), float(out), out or self.time == self.horizon, False, {}

    def _observation(self):
        rooms = np.arange(self.rooms) == self.room
        return np.append(rooms, self.time / self.horizon).astype(np.float32)


class UntilSolved(BaseCallback):
    """Notes after how many steps the greedy policy first reaches the optimum, looking every ``every`` steps."""

    def __init__(self, env, masked, every=500):
        super().__init__()
        self.env, self.masked, self.every, self.steps = env, masked, every, None

    def _on_step(self):
        due = self.steps is None and self.num_timesteps % self.every == 0
        if due and score(self.model, self.env, self.masked, 1) >= OPTIMUM:
            self.steps = self.num_timesteps
        return True


def score(agent, env, masked, episodes):
    return evaluate_policy(agent, env, n_eval_episodes=episodes, warn=False, use_masking=masked)[0]


def run(name, seed, steps):
    """Return the score, the violations in training and evaluation, and the steps until the optimum was found."""
    agent_class, policy_kwargs = AGENTS[name]
    env, evaluation, masked = LureCorridor(), LureCorridor(), agent_class is not DQN
    policy_kwargs = {"net_arch": [64, 64], **policy_kwargs}
    agent = agent_class("MlpPolicy", env, seed=seed, device="cpu", policy_kwargs=policy_kwargs, **SETTINGS)
    solved = UntilSolved(evaluation, masked)
    agent.learn(steps, callback=solved)
    return score(agent, evaluation, masked, 20), env.violations, evaluation.violations, solved.steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are slower on more

    runs = [(name, seed) for name in AGENTS for seed in arguments.seeds]
    results = {name: [] for name in AGENTS}
    for name, seed in track(runs, "training", console=Console(stderr=True), transient=True):
        results[name].append(run(name, seed, arguments.steps))

    table = Table(title=f"corridor of lures: optimum {OPTIMUM:g}, {arguments.steps} steps, seeds {arguments.seeds}")
    for column in ("agent", "score", "of each seed", "violations: training", "evaluation", "optimum after steps"):
        table.add_column(column, justify="left" if column == "agent" else "right")
    rows = []
    for name, outcomes in results.items():
        scores, training, evaluation, solved = zip(*outcomes, strict=True)
        each = " ".join(f"{value:.2f}" for value in scores)
        after = " ".join("never" if value is None else str(value) for value in solved)
        table.add_row(name, f"{np.mean(scores):.2f}", each, str(sum(training)), str(sum(evaluation)), after)
        masked = AGENTS[name][0] is not DQN
        rows += [
            row(f"score of {name}", np.mean(scores), "return", OPTIMUM if masked else None),
            row(
                f"violations of {name}",
                sum(training) + sum(evaluation),
                "actions",
                0 if masked else None,
                higher_is_better=False,
            ),
        ]
    out.print(table)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
