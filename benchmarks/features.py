"""What is each feature and each target of a Q worth? A training without it, held-out problems.

    python benchmarks/features.py [TASK] [--seed 0] [--budget 60] [--runs runs/features] [--json FILE]

Trains the task as it is, then once without each of the settings below that it has, with `qstar train`, into --runs.
Finished trainings and results there are kept: a second call goes on. J of Q* with --budget LM tokens, and of arg max Q,
on the task's test prompts; differences are paired by prompt (95 %, bootstrap). The milliseconds are those of Q alone,
for 16 prefixes on one thread, in turn.
"""

import argparse
import statistics
import time
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import yaml
from learning import make, trained
from rich.table import Table
from rows import add_json_option, out, read_or_measure, row, with_the_worst, write

from qstar_decoding.agents import QHeuristic
from qstar_decoding.agents.evaluation.outcomes import evaluate, paired_bootstrap
from qstar_decoding.envs.prompts import as_prompt
from qstar_decoding.tasks import load_task

FULL = "nothing"
# What is left out: the section of the task's file, its settings, and what stands there instead; None for the default.
PARTS = {
    "the last tokens": ("env", {"context_tokens": None}),
    "the middle layer": ("env", {"hidden_layers": None}),
    "bounds as targets": ("training", {"bound_targets": None}),
    "searches on bounds": ("training", {"bound_share": None, "bound_targets": None}),
    "replay by priority": ("training", {"priority": None}),
    "estimates as targets": ("training", {"estimate_weight": 0.0}),
    "optimism": ("training", {"optimism": 0.5}),
    "dropout": ("training", {"policy_kwargs": {"dropout": 0.0}}),
}
PREFIXES = 16


def without(content, part):
    """Return a task's content without one of the parts, None where it does not have that."""
    if part == FULL:
        return content
    section, changes = PARTS[part]
    if not changes.keys() & content[section].keys():
        return None
    changed = {**content[section], **changes}
    return {**content, section: {key: value for key, value in changed.items() if value is not None}}


def measure(task, folder, budget):
    """Return J of every test prompt by decoder, and the size of the network."""
    q, prompts = QHeuristic(folder / "q"), task.prompts.of("test")
    found = {
        name: evaluate(make(name, task.mdp(), q, task, 0), prompts, tokens).objectives.tolist()
        for name, tokens in (("arg max Q", None), ("Q*", budget))
    }
    description = q.q.description
    return {
        **found,
        "parameters": sum(parameter.numel() for parameter in q.q.scorer.parameters()),
        "lm_tokens": description["time_steps"],
        "minutes": description["minutes"],
    }


def milliseconds(runs, repeats=30):
    """Return the time of each run's Q for 16 prefixes, the median of repeats in turn."""
    calls = {}
    for name, (task, folder) in runs.items():
        mdp, q = task.mdp(), QHeuristic(folder / "q")
        prompts = [as_prompt(prompt) for prompt in task.prompts.of("test")[:PREFIXES]]
        calls[name] = partial(q, mdp, prompts, mdp.roots(prompts))
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="arithmetic", help="name of a shipped task")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings")
    parser.add_argument("--budget", type=int, default=60, help="LM tokens of Q*")
    parser.add_argument("--runs", type=Path, default=Path("runs/features"), help="folder of trainings and results")
    add_json_option(parser)
    arguments = parser.parse_args()
    content = yaml.safe_load((files("qstar_decoding.tasks") / f"{arguments.task}.yaml").read_text(encoding="utf-8"))
    arguments.runs.mkdir(parents=True, exist_ok=True)
    runs, found = {}, {}
    for part in (FULL, *PARTS):
        if (changed := without(content, part)) is None:
            continue
        path = arguments.runs / f"{arguments.task}-without-{part.replace(' ', '-')}.yaml"
        path.write_text(yaml.safe_dump(changed), encoding="utf-8")
        task, folder = load_task(str(path)), trained(str(path), arguments.seed, arguments.runs)
        runs[part] = task, folder
        result = folder / f"features-{arguments.budget}.json"
        found[part] = read_or_measure(result, partial(measure, task, folder, arguments.budget))
        print(f"without {part}: {np.mean(with_the_worst(found[part]['Q*'])):.3f}", flush=True)

    table = Table(title=f"{arguments.task}, training seed {arguments.seed}: J on the test prompts")
    for column in ("without", "arg max Q", "Q*", "Q* against all parts", "parameters", "ms", "LM tokens", "minutes"):
        table.add_column(column, justify="left" if column == "without" else "right")
    rows, times = [], milliseconds(runs)
    complete = with_the_worst(found[FULL]["Q*"])
    for part, result in found.items():
        greedy, searched = (with_the_worst(result[name]) for name in ("arg max Q", "Q*"))
        low, high = paired_bootstrap(searched - complete)
        difference = "" if part == FULL else f"{(searched - complete).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        sizes = f"{result['parameters']:,}", f"{times[part]:.1f}", f"{result['lm_tokens']:,}", f"{result['minutes']}"
        table.add_row(part, f"{greedy.mean():.3f}", f"{searched.mean():.3f}", difference, *sizes)
        rows.append(row(f"{arguments.task} without {part}: Q*", searched.mean(), "J"))
    out.print(table)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
