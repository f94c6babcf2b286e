"""How far do component heads carry, when the weights of the reward's terms change after training?

    python benchmarks/components.py [--prompts 20] [--budget 100] [--steps 15000] [--runs runs/components] [--json FILE]

Trains Q-functions for one weighted sum on the training prompts of the task `sentiment`, then decodes its first test
prompts at five weightings of the same terms, with equal LM tokens a prompt:

- bound: A* without Q;
- whole: A* with a Q that learned the sum as one number, for the first weighting;
- heads: one head a term, learned from searches for the first weighting;
- retrained: as *whole*, for the weighting itself, of two weightings; for `sentiment` the shipped Q, which had 100,000
  LM tokens.

Trainings and results are kept in --runs: a second call goes on.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
from rich.table import Table
from rows import add_json_option, out, read_or_measure, row, with_the_worst, write
from stable_baselines3.common.callbacks import BaseCallback

from qstar_decoding.agents import AStarPlanner, BoundHeuristic, QHeuristic, QStar
from qstar_decoding.agents.evaluation.outcomes import paired_bootstrap
from qstar_decoding.agents.learning.checkpoints import find_checkpoint
from qstar_decoding.tasks import load_task

# The first one is trained for.
WEIGHTINGS = (
    "0.4 * sentiment + 0.3 * address + 0.3 * complete_sentence",
    "sentiment",
    "address",
    "0.1 * sentiment + 0.1 * address + 0.8 * complete_sentence",
    "-0.4 * sentiment + 0.3 * address + 0.3 * complete_sentence",
)
# The weightings that a Q was trained for, by number; with a name where the package ships it.
RETRAINED = {1: "sentiment", 4: None}
# Environment of each kind of Q.
KINDS = {"whole": {}, "heads": {"components": True}}


class Saving(BaseCallback):
    """Saves the agent before every round, so that a call that was cut off loses one."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        self.model.save(self.folder)


def trained(kind, reward, steps, folder, task):
    """Return the folder of a Q that learned from so many LM tokens, trained first where there is none."""
    done, begun = folder / "q", folder / "checkpoint"
    if find_checkpoint(done) is None:
        env = gym.make(
            "TokenDecoding-v0", prompts=task.prompts.of("train"), **{**task.env, **KINDS[kind], "reward": reward}
        )
        fresh = find_checkpoint(begun) is None
        agent = QStar(env=env, seed=0, **task.training) if fresh else QStar.load(begun, env)
        start = time.perf_counter()
        agent.learn(steps - agent.num_timesteps, callback=Saving(begun), reset_num_timesteps=fresh)
        print(f"{kind} for {reward}: trained in {time.perf_counter() - start:.0f} s", flush=True)
        agent.save(done, training_state=False, reward=reward, time_steps=agent.num_timesteps)
    return done


def measure(mdp, reward, q, prompts, budget):
    """Return the J of each prompt, and the seconds."""
    start = time.perf_counter()
    heuristic = BoundHeuristic() if q is None else QHeuristic(q())
    plans = AStarPlanner(mdp, heuristic=heuristic).plan_many(prompts, budget, reward=reward)
    found = [plan.objective for plan in plans]
    return {"objective": found, "texts": [p.text for p in plans], "seconds": time.perf_counter() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--budget", type=int, default=100, help="LM tokens a prompt")
    parser.add_argument("--steps", type=int, default=15_000, help="LM tokens of each training")
    parser.add_argument("--runs", type=Path, default=Path("runs/components"), help="folder of trainings and results")
    parser.add_argument("--rows", nargs="+", default=["bound", "whole", "heads", "retrained"])
    add_json_option(parser)
    arguments = parser.parse_args()
    task = load_task("sentiment")
    mdp, prompts = task.mdp(reward=WEIGHTINGS[0]), task.prompts.of("test")[: arguments.prompts]
    found = {}
    for name in arguments.rows:
        for number, reward in enumerate(WEIGHTINGS):
            if name == "retrained" and number not in RETRAINED:
                continue
            kind, of = ("whole", number) if name == "retrained" else (name, 0)
            folder = arguments.runs / f"{kind}-{of}-{arguments.steps}"
            q = partial(trained, kind, WEIGHTINGS[of], arguments.steps, folder, task)
            if name == "bound":
                q = None
            elif name == "retrained" and RETRAINED[number]:
                q = partial(str, RETRAINED[number])
            path = arguments.runs / f"{name}-{number}-{arguments.steps}-{arguments.prompts}-{arguments.budget}.json"
            result = read_or_measure(path, partial(measure, mdp, reward, q, prompts, arguments.budget))
            found[name, number] = with_the_worst(result["objective"])
            print(f"{name}, {reward}: J {found[name, number].mean():.3f}", flush=True)
    rows = []
    table = Table(title=f"mean J over {len(prompts)} test prompts, {arguments.budget} LM tokens each; minus heads")
    for column in ("weights", *arguments.rows):
        table.add_column(column)
    for number, reward in enumerate(WEIGHTINGS):
        cells = []
        for name in arguments.rows:
            if (name, number) not in found:
                cells.append("")
                continue
            objective, heads = found[name, number], found.get(("heads", number))
            rows.append(row(f"{reward}, {name}", objective.mean(), "J"))
            cells.append(f"{objective.mean():.3f}")
            if heads is not None and name != "heads":
                low, high = paired_bootstrap(objective - heads)
                cells[-1] += f"\n{(objective - heads).mean():+.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(reward, *cells)
    out.print(table)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
