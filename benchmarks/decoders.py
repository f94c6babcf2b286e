"""Decoders compared at equal LM tokens on a task's held-out prompts.

    python benchmarks/decoders.py [--task sentiment] [--q FOLDER] [--split test] [--budgets 50 100 …] [--json FILE]

All share one token tree, one top-k and one accounting. The last columns are the paired difference of J to Q* (its own
row: none) with a 95 % bootstrap interval over the prompts.
"""

import argparse
import json

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qstar_decoding.agents import AStarPlanner, BeamSearch, GreedyDecoder, QHeuristic, SamplingDecoder
from qstar_decoding.envs import DecodingMDP
from qstar_decoding.tasks import load_task


def bootstrap(differences, samples=10_000):
    rng = np.random.default_rng(0)
    means = rng.choice(differences, size=(samples, len(differences))).mean(axis=1)
    return np.percentile(means, [2.5, 97.5])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--q", help="folder of a checkpoint; default: the one shipped for the task")
    parser.add_argument("--split", default="test", choices=["dev", "test"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()

    task = load_task(arguments.task)
    prompts, mdp = task.prompts.of(arguments.split), DecodingMDP(**task.env)
    q = QHeuristic(arguments.q or task.name)
    unbudgeted = {"greedy LM": GreedyDecoder(mdp), "arg max Q": GreedyDecoder(mdp, heuristic=q)}
    budgeted = {
        "best-of-n": SamplingDecoder(mdp),
        "beam, reranked": BeamSearch(mdp),
        "A*, no Q (bound)": AStarPlanner(mdp),
        "beam on g + Q": BeamSearch(mdp, heuristic=q),
        "Q*": AStarPlanner(mdp, heuristic=q, **task.planner),
    }
    runs = [(name, decoder, None) for name, decoder in unbudgeted.items()]
    runs += [(name, decoder, budget) for budget in arguments.budgets for name, decoder in budgeted.items()]
    plans = {
        (name, budget): decoder.plan_many(prompts, budget)
        for name, decoder, budget in track(runs, "decoding", console=Console(stderr=True), transient=True)
    }

    table = Table(
        title=f"{task.name}: {len(prompts)} {arguments.split} prompts, k = {mdp.top_k}, α = {mdp.logprob_weight}"
    )
    for column in ("decoder", "budget", "LM tokens", "reward", "log-prob", "J", "Q* minus it", "95 %"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    rows = []
    for (name, budget), found in plans.items():
        objective = np.array([plan.objective for plan in found])
        tokens = np.mean([plan.usage.lm_tokens for plan in found])
        cells = [name, str(budget or ""), f"{tokens:.0f}", f"{np.mean([p.reward for p in found]):.3f}"]
        cells += [f"{np.mean([p.logprob for p in found]):.1f}", f"{objective.mean():.3f}"]
        if budget and name != "Q*":
            differences = np.array([plan.objective for plan in plans["Q*", budget]]) - objective
            low, high = bootstrap(differences)
            cells += [f"{differences.mean():+.3f}", f"[{low:+.3f}, {high:+.3f}]"]
        table.add_row(*cells, end_section=name == "Q*", style="bold" if name == "Q*" else "")
        label = f"J of {name}" + (f" at {budget} LM tokens" if budget else "")
        rows.append({"name": label, "value": objective.mean(), "unit": "J", "target": None, "higher_is_better": True})
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
