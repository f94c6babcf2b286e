"""How fast agents train: environment steps a second, gradient steps included, 32 environments.

    python benchmarks/training.py [--steps 2560] [--repeats 3] [--json FILE]

The same task (sentiment), network (TokenQPolicy), batch and gradient steps for all; each repeat begins with an empty
token tree, and the agents take turns. A step is one token of the language model. The first row is what a user
of stable-baselines3 writes first: 32 single environments in a DummyVecEnv, each with a model call of its own.
"""

import argparse
import statistics
import time

import gymnasium as gym
from rich.table import Table
from rows import add_json_option, out, row, write
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

import qstar_decoding  # noqa: F401  registers the environment
from qstar_decoding.agents import MaskableDQN, QStar, TokenQPolicy
from qstar_decoding.envs import TokenDecodingVecEnv
from qstar_decoding.tasks import load_task

ENVS, BATCH, GRADIENT_STEPS = 32, 128, 4  # gradient steps per vector step
TASK = load_task("sentiment")
DQN_ARGUMENTS = {
    "batch_size": BATCH,
    "gradient_steps": GRADIENT_STEPS,
    "train_freq": 1,
    "learning_starts": 0,
    "seed": 0,
}


class Clock(BaseCallback):
    """Times the steps after the first tenth: by then everything is loaded and the buffer holds a batch."""

    def __init__(self, steps):
        super().__init__()
        self.warm_up, self.begun = steps // 10, None

    def _on_step(self):
        if self.begun is None and self.num_timesteps >= self.warm_up:
            self.begun = self.num_timesteps, time.perf_counter()
        return True

    def _on_training_end(self):
        steps, seconds = self.begun
        self.rate = (self.num_timesteps - steps) / (time.perf_counter() - seconds)


def arguments_of_env():
    return {"prompts": TASK.prompts.of("train"), **TASK.env}


def dummy_dqn():
    env = DummyVecEnv([lambda: gym.make("TokenDecoding-v0", **arguments_of_env()) for _ in range(ENVS)])
    return DQN(TokenQPolicy, env, buffer_size=10_000, **DQN_ARGUMENTS)


def vector_dqn():
    return DQN(TokenQPolicy, TokenDecodingVecEnv(ENVS, **arguments_of_env()), buffer_size=10_000, **DQN_ARGUMENTS)


def maskable_dqn():
    env = TokenDecodingVecEnv(ENVS, **arguments_of_env())
    return MaskableDQN(TokenQPolicy, env, buffer_size=10_000, **DQN_ARGUMENTS)


def qstar():
    # As many gradient steps for a token as above: a round of 32 searches of 24 tokens is 24 vector steps' worth.
    options = {"searches_per_round": ENVS, "tokens_per_search": 24, "gradient_steps": 24 * GRADIENT_STEPS}
    return QStar(TokenQPolicy, TokenDecodingVecEnv(1, **arguments_of_env()), batch_size=BATCH, seed=0, **options)


AGENTS = {
    "DQN on DummyVecEnv of 32": dummy_dqn,
    "DQN on TokenDecodingVecEnv": vector_dqn,
    "MaskableDQN on TokenDecodingVecEnv": maskable_dqn,
    "QStar": qstar,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2560)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(AGENTS), default=list(AGENTS))
    add_json_option(parser)
    arguments = parser.parse_args()
    rates = {name: [] for name in arguments.only}
    for _ in range(arguments.repeats):
        for name, found in rates.items():
            clock = Clock(arguments.steps)
            AGENTS[name]().learn(arguments.steps, callback=clock)
            found.append(clock.rate)
    table = Table(
        title=f"{ENVS} environments, batch {BATCH}, {GRADIENT_STEPS} gradient steps a vector step, {TASK.name}"
    )
    for column in ("agent", "env steps/s", "all repeats", "ratio"):
        table.add_column(column, justify="left" if column == "agent" else "right")
    first, rows = statistics.median(next(iter(rates.values()))), []
    for i, (name, found) in enumerate(rates.items()):
        rate = statistics.median(found)
        table.add_row(name, f"{rate:.0f}", " ".join(f"{r:.0f}" for r in found), f"{rate / first:.2f}")
        rows.append(row(name, rate, "env steps/s"))
        if i:
            rows.append(row(f"{name} / {next(iter(rates))}", rate / first, "ratio", 3))
    out.print(table)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
