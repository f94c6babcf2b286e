"""Is the learned Q worth its training? Several training seeds, held-out prompts, equal LM tokens, paired intervals.

    python benchmarks/learning.py review|sentiment|keywords|… [--seeds 3] [--runs runs] [--json FILE]
    python benchmarks/learning.py countdown-3 countdown-4 game-of-24 [--q FOLDER …] [--prompts 100] [--choose]
    python benchmarks/learning.py review --model gemma3-270m                     the same with another language model
    python benchmarks/learning.py star-graph [--q FOLDER …] [--prompts 80]       share right by degree, Q ranks

Trains each seed with `qstar train` into RUNS/TASK-SEED unless a finished run is there; decodes the held-out prompts.
Decoders without Q do not depend on a training seed; best-of-n gets as many sampling seeds as there are training seeds,
but for the comparison at 3,200 tokens one.
Puzzles with a checker have tables of their own, see solving.py.
Differences are paired by prompt, means over the seeds; intervals resample the prompts (95 %, bootstrap).
"""

import argparse
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import add_json_option, out, row, write
from solving import by_ranking, by_solved, choose_search

from qstar_decoding.agents import AStarPlanner, BeamSearch, GreedyDecoder, QHeuristic, SamplingDecoder
from qstar_decoding.agents.evaluation.comparison import measurements
from qstar_decoding.agents.evaluation.outcomes import evaluate, paired_bootstrap
from qstar_decoding.envs import load_language_model
from qstar_decoding.rewards import as_reward
from qstar_decoding.tasks import load_task

BUDGETS = [50, 100, 200, 400, 800]
MOST = 3200  # what best-of-n may spend against Q* at the smallest budget
NO_Q, Q_ONLY = (
    ["best-of-n", "beam, reranked", "A*, no Q (bound)"],
    ["arg max Q", "sampling π·exp(Q/β)", "beam on g + Q"],
)
UNBUDGETED = ["greedy LM", "arg max Q"]
BY_LIKELIHOOD = ["beam, by log π", "best-of-n, by log π"]  # no checker and no Q: the likeliest text counts


def trained(task, seed, runs):
    """Return the folder of a finished run, training it first if need be."""
    folder = Path(runs) / f"{Path(task).stem}-{seed}"
    if not (folder / "q" / "config.json").is_file():
        resume = ["--resume"] if (folder / "checkpoint").is_dir() else []
        command = [sys.executable, "-m", "qstar_decoding.cli", "train", task, "--seed", str(seed), "--out", str(folder)]
        subprocess.run([*command, *resume], check=True, stdout=sys.stderr)
    return folder


def depth(model):
    """Return the number of a language model's layers."""
    return int(load_language_model(model).model.config.get_text_config().num_hidden_layers)


def with_model(task, model, runs):
    """Write a shipped task, with another language model, as a file of one's own; return its path.

    Hidden layers that the task names become those at the same share of the other model's depth.
    """
    content = yaml.safe_load((files("qstar_decoding.tasks") / f"{task}.yaml").read_text(encoding="utf-8"))
    env = {**content["env"], "model": model}
    if "hidden_layers" in env:
        share = depth(model) / depth(content["env"].get("model", "smollm2-135m-instruct"))
        env["hidden_layers"] = [round(layer * share) for layer in env["hidden_layers"]]
    path = Path(runs) / f"{task}-{Path(model).name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**content, "env": env}), encoding="utf-8")
    return str(path)


def make(name, mdp, q, task, seed):
    planner = {key: value for key, value in task.planner.items() if key == "score"}
    likelihood = mdp.with_changes(reward=0 * mdp.reward) if name in BY_LIKELIHOOD else mdp
    return {
        "beam, by log π": lambda: BeamSearch(likelihood),
        "best-of-n, by log π": lambda: SamplingDecoder(likelihood, seed=seed),
        "greedy LM": lambda: GreedyDecoder(mdp),
        "best-of-n": lambda: SamplingDecoder(mdp, seed=seed),
        "beam, reranked": lambda: BeamSearch(mdp),
        "A*, no Q (bound)": lambda: AStarPlanner(mdp),
        "arg max Q": lambda: GreedyDecoder(mdp, heuristic=q, **planner),
        "sampling π·exp(Q/β)": lambda: SamplingDecoder(mdp, heuristic=q, seed=seed, **planner),
        "beam on g + Q": lambda: BeamSearch(mdp, heuristic=q, **planner),
        "Q*": lambda: AStarPlanner(mdp, heuristic=q, **task.planner),
    }[name]()


def measure(task, runs, seeds, budgets, names, prompts):
    """Return outcomes by (decoder, budget), one per seed."""
    mdp, qs = task.mdp(), [QHeuristic(folder) for folder in runs]
    cells = [(name, None) for name in names if name in UNBUDGETED]
    cells += [(name, budget) for budget in budgets for name in names if name not in UNBUDGETED]
    if "best-of-n" in names:
        cells.append(("best-of-n", MOST))
    found = {}
    for name, budget in track(cells, "decoding", console=Console(stderr=True), transient=True):
        # The largest budget is the dearest cell of all: there one draw of best-of-n must do.
        varies = name not in ("greedy LM", "beam, reranked", "beam, by log π", "A*, no Q (bound)") and budget != MOST
        found[name, budget] = [
            evaluate(make(name, mdp, q, task, seed), prompts, budget)
            for seed, q in (list(zip(seeds, qs, strict=False)) or [(0, None)])[: None if varies else 1]
        ]
    return found


def per_prompt(outcomes, what="objectives"):
    return np.mean([getattr(outcome, what) for outcome in outcomes], axis=0)


def by_objective(task, runs, seeds, budgets):
    """Print and return J of Q* and of every other decoder by budget."""
    prompts, gold = task.prompts.of("test"), task.gold and as_reward(task.gold)
    names = ["greedy LM", "arg max Q", *NO_Q, *Q_ONLY[1:], "Q*"]
    found = measure(task, runs, seeds, budgets, names, prompts)
    table = Table(title=f"{task.name}: {len(prompts)} held-out prompts, {len(seeds)} training seeds, means")
    golden = [f"gold: {task.gold}"] if gold else []
    measured = ("budget", "LM tokens", "texts scored", "reward", *golden, "J")
    for column in ("decoder", *measured, "by seed", "Q* minus it", "95 %"):
        table.add_column(column, justify="left" if column == "decoder" else "right")

    def against(name, budget, at):
        """Return the paired difference of Q* with the budget ``at``, and its interval."""
        differences = per_prompt(found["Q*", at]) - per_prompt(found[name, budget])
        return differences.mean(), *paired_bootstrap(differences)

    for (name, budget), outcomes in found.items():
        cells = [name, str(budget or ""), f"{per_prompt(outcomes, 'lm_tokens').mean():.0f}"]
        cells.append(f"{np.mean([plan.usage.reward_calls for o in outcomes for plan in o.plans]):.0f}")
        cells.append(f"{per_prompt(outcomes, 'rewards').mean():.3f}")
        if gold:
            golds = [m["gold"] for o in outcomes for m in measurements(o, prompts, gold)]
            cells.append(f"{np.array(golds, dtype=float).mean():.3f}")  # None, where it has no opinion, becomes NaN
        cells.append(f"{per_prompt(outcomes).mean():.3f}")
        cells.append(" ".join(f"{outcome.objectives.mean():.2f}" for outcome in outcomes) if len(outcomes) > 1 else "")
        if budget in budgets and name != "Q*":
            mean, low, high = against(name, budget, budget)
            cells += [f"{mean:+.3f}", f"[{low:+.3f}, {high:+.3f}]"]
        table.add_row(*cells, end_section=name in ("Q*", "arg max Q"), style="bold" if name == "Q*" else "")
    out.print(table)

    rows = []
    for budget in budgets:
        value = per_prompt(found["Q*", budget]).mean()
        rows.append(row(f"J of Q* at {budget}", value, "J"))
        worst = min(against(n, b, budget)[0] for n, b in found if b == budget and n != "Q*")
        rows.append(row(f"Q* minus the best other decoder at {budget}", worst, "J", 0.0))
    for group, label, wanted in ((NO_Q, "decoder without Q", budgets[:4]), (Q_ONLY, "Q-only control", budgets)):
        ahead = 0
        for budget in wanted:
            cells = [(n, None if n in UNBUDGETED else budget) for n in group]
            best = max(cells, key=lambda cell: per_prompt(found[cell]).mean())
            mean, low, high = against(*best, budget)
            ahead += low > 0
            out.print(
                f"{budget:>4} LM tokens: Q* minus the best {label} ({best[0]}): {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            )
            rows.append(row(f"lower end of Q* minus the best {label} at {budget}", low, "J", 0.0))
        rows.append(
            row(
                f"budgets where Q* is significantly ahead of the best {label}",
                ahead,
                "budgets",
                4 if group is NO_Q else 3,
            )
        )
    least = budgets[0]
    lead = per_prompt(found["Q*", least]).mean() - per_prompt(found["best-of-n", MOST]).mean()
    out.print(f"Q* at {least} LM tokens minus best-of-n at {MOST}: {lead:+.3f}")
    return [*rows, row(f"Q* at {least} minus best-of-n at {MOST}", lead, "J", 0.0)]


def by_accuracy(task, runs, seeds, budget=60, count=None):
    """Print and return how many answers are right; no decoder sees the checker."""
    prompts, checker = task.prompts.of("test")[:count], as_reward(task.env["reward"])
    names = [
        "greedy LM",
        *BY_LIKELIHOOD,
        *(["arg max Q", "sampling π·exp(Q/β)", "beam on g + Q", "Q*"] if runs else []),
    ]
    found = measure(task, runs, seeds, [budget], names, prompts)
    limits = task.prompts.arguments
    operands = f"operands {limits['low']}–{limits['high']}" if "low" in limits else task.name
    of = task.name if operands == task.name else f"{task.name}, {operands}"
    table = Table(title=f"{of}: {len(prompts)} unseen problems, {len(runs)} trained Q")
    for column in ("decoder", "LM tokens", "right", "by seed", "95 %"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    rows, targets = [], {"arg max Q": 0.85, "Q*": 0.92}
    for (name, _), outcomes in found.items():
        by_seeds = np.array([[m["gold"] for m in measurements(outcome, prompts, checker)] for outcome in outcomes])
        right = by_seeds.mean(axis=0)
        by_seed = " ".join(f"{mean:.3f}" for mean in by_seeds.mean(axis=1)) if len(outcomes) > 1 else ""
        interval = "[{:.3f}, {:.3f}]".format(*paired_bootstrap(right))
        tokens = per_prompt(outcomes, "lm_tokens").mean()
        table.add_row(name, f"{tokens:.0f}", f"{right.mean():.3f}", by_seed, interval)
        target = targets.get(name) if operands == "operands 10–49" else None
        rows.append(row(f"{name}, {operands}", right.mean(), "share right", target))
        degrees = np.array([prompt.get("degree", 0) for prompt in prompts])
        for degree in sorted({*degrees.tolist()} - {0}):
            share = right[degrees == degree].mean()
            rows.append(row(f"{name}, {operands}, degree {degree}", share, "share right"))
            out.print(f"{name}, degree {degree}: {share:.2f} of {np.sum(degrees == degree)}")
    out.print(table)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", help="names of tasks, or paths of YAML files")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds; 0 for what needs no Q, not for J")
    parser.add_argument("--model", help="language model in place of the task's own, for shipped tasks")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--runs", default="runs", help="folder of the training runs")
    parser.add_argument("--q", nargs="+", help="Q-functions to use instead of training, one a seed")
    parser.add_argument("--prompts", type=int, help="number of test prompts, all without it; not for J")
    parser.add_argument("--decoders", nargs="+", default=(), help="rows to measure, by their beginnings; puzzles only")
    parser.add_argument(
        "--choose", action="store_true", help="compare searches on 40 dev prompts instead; puzzles only"
    )
    add_json_option(parser)
    arguments = parser.parse_args()
    seeds, rows = range(arguments.seeds), []
    for name in (
        n for task in arguments.tasks for n in (["arithmetic", "arithmetic-99"] if task == "arithmetic" else [task])
    ):
        name = with_model(name, arguments.model, arguments.runs) if arguments.model else name
        task = load_task(name)
        runs = arguments.q or [trained(name, seed, arguments.runs) for seed in seeds]
        qs = [QHeuristic(folder) for folder in runs]
        minutes = [q.q.description.get("minutes", 0) for q in qs]
        if minutes:
            out.print(f"{name}: training took {', '.join(map(str, minutes))} minutes")
            rows.append(row(f"{name}: longest training", max(minutes), "minutes", 30, higher_is_better=False))
        if task.env["reward"] == "countdown" and arguments.choose:
            for q in [None, *qs[:1]]:
                choose_search(task, q, task.prompts.of("dev")[:40])
        elif task.env["reward"] == "countdown":
            found = Path(arguments.runs) / f"{task.name}-solved.json"
            every = range(max(len(qs), 1))
            rows += by_solved(task, qs, every, arguments.budgets, arguments.prompts, found, arguments.decoders)
            if qs and not arguments.decoders:
                rows += by_ranking(task, qs, arguments.budgets[:3], arguments.prompts)
        elif task.planner.get("score") == "q":
            rows += by_accuracy(task, runs, seeds, count=arguments.prompts)
        else:
            rows += by_objective(task, runs, seeds, arguments.budgets)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
