"""Does a Q that was trained for one reward help a search for another one?

    python benchmarks/carrying.py [--prompts 40] [--budget 100] [--runs runs/carrying] [--json FILE]

Decodes the first test prompts of the task of the new reward, with equal LM tokens a prompt:

- bound: A* without Q;
- carried: A* with the Q that the package ships for the other task;
- on-line: the same, beside a Q that starts from it and learns from these searches, with the guard;
- retrained: A* with the Q that the package ships for the new reward, where there is one.

Results are kept in --runs: a second call goes on.
"""

import argparse
import time
from functools import partial
from pathlib import Path

from rich.table import Table
from rows import add_json_option, out, read_or_measure, row, with_the_worst, write

from qstar_decoding.agents import AStarPlanner, BoundHeuristic, OnlineLearner, QHeuristic, QStar, pretrained_names
from qstar_decoding.agents.learning import carried_weight, environment_like
from qstar_decoding.tasks import load_task

# Trained for this task, used for that task's prompts and settings, with this reward in place of its own.
PAIRS = (
    ("sentiment", "sentiment", "sentiment - repetition"),
    ("sentiment", "sentiment", "0.5 * sentiment + 0.5 * complete_sentence"),
    ("sentiment", "sentiment", "clip(sentiment, -1, 0.7) - repetition"),
    ("sentiment", "sentiment", "-1 * sentiment"),
    ("keywords", "keywords", "keywords"),
    ("sentiment", "review", None),
    ("review", "sentiment", None),
)
ROWS = ("bound", "carried", "on-line", "retrained")


def measure(row_name, trained, task, reward, prompts, budget):
    """Return the J of each prompt, how often the guard used which heuristic, and the seconds."""
    start = time.perf_counter()
    mdp = task.mdp(**({} if reward is None else {"reward": reward}))
    learner = None
    if row_name == "bound":
        heuristic = BoundHeuristic()
    else:
        heuristic = QHeuristic(task.name if row_name == "retrained" else trained)
    if row_name == "on-line":
        env = environment_like(mdp, task.prompts.of("train"), **task.env)
        learner = OnlineLearner(QStar.from_pretrained(trained, env, **{**task.training, "seed": 0}), seed=0)
        mdp = learner.mdp
    planner = AStarPlanner(mdp, heuristic=heuristic, learn=learner, **task.planner)
    found = [plan.objective for plan in planner.plan_many(prompts, budget)]
    uses = {} if learner is None else {name: list(use) for name, use in learner.uses().items()}
    seconds = time.perf_counter() - start
    return {"reward": reward or task.env["reward"], "objective": found, "uses": uses, "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--budget", type=int, default=100, help="LM tokens a prompt")
    parser.add_argument("--runs", type=Path, default=Path("runs/carrying"), help="folder of the results")
    add_json_option(parser)
    arguments = parser.parse_args()
    rows = []
    table = Table(title=f"mean J over {arguments.prompts} test prompts, {arguments.budget} LM tokens each")
    for column in ("Q trained for", "used for", "share", *ROWS, "late on-line", "heuristics used"):
        table.add_column(column)
    for number, (trained, name, reward) in enumerate(PAIRS):
        task = load_task(name)
        new = reward or task.env["reward"]
        prompts = task.prompts.of("test")[: arguments.prompts]
        means, late, uses = {}, float("nan"), {}
        for row_name in ROWS:
            if row_name == "retrained" and not (reward is None and name in pretrained_names()):
                continue
            path = arguments.runs / f"{number}-{trained}-{name}-{row_name}-{arguments.prompts}-{arguments.budget}.json"
            result = read_or_measure(path, partial(measure, row_name, trained, task, reward, prompts, arguments.budget))
            objective = with_the_worst(result["objective"])
            means[row_name] = objective.mean()
            rows.append(row(f"{trained} for {new}, {row_name}", objective.mean(), "J"))
            print(f"{trained} for {new}, {row_name}: J {objective.mean():.3f}", flush=True)
            if row_name == "on-line":
                late, uses = objective[len(objective) // 2 :].mean(), result["uses"]
        share = carried_weight(load_task(trained).env["reward"], new)
        cells = [f"{means[r]:.3f}" if r in means else "" for r in ROWS]
        shown = ", ".join(f"{key} {count}" for key, (count, *_) in uses.items())
        table.add_row(trained, new, f"{share:g}", *cells, f"{late:.3f}", shown)
    out.print(table)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
