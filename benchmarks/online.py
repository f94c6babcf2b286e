"""Does a Q that learns while it decodes pay, with no training before?

    python benchmarks/online.py [TASK …] [--prompts 300] [--budget 100] [--seeds 3] [--without beam best-of-n]
                                [--runs runs/online] [--json FILE]

Decodes a task's training prompts once, in an order drawn by the seed, with equal LM tokens a prompt. A prompt is
decoded before anything is learned from it. The rows are decoders without Q, Q* that learns from nothing, and Q* with
the Q that the package ships, which was trained beforehand on these very prompts. J is the mean of 30 prompts in a row.
Results are kept in --runs: a second call goes on.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
from rich.table import Table
from rows import add_json_option, out, read_or_measure, row, with_the_worst, write

from qstar_decoding.agents import (
    AStarPlanner,
    BeamSearch,
    BoundHeuristic,
    OnlineLearner,
    QHeuristic,
    QStar,
    SamplingDecoder,
    pretrained_names,
)
from qstar_decoding.tasks import load_task

BLOCK = 30  # prompts of a mean
WITHOUT_Q = ("A* on the bound", "beam", "best-of-n")
FROM_NOTHING, BEFOREHAND = "Q* from nothing", "Q* trained beforehand"


def decoders(task, seed):
    """Return, by name, functions that make a planner of a new environment, and its learner or None."""
    planner = task.planner

    def learning(env):
        learner = OnlineLearner(QStar(env=env, **{**task.training, "seed": seed}), seed=seed)
        return AStarPlanner(env, learn=learner, **planner), learner

    found = {
        FROM_NOTHING: learning,
        "A* on the bound": lambda env: (AStarPlanner(env, heuristic=BoundHeuristic(), **planner), None),
    }
    if task.name in pretrained_names():
        found[BEFOREHAND] = lambda env: (AStarPlanner(env, heuristic=QHeuristic(task.name), **planner), None)
    found["beam"] = lambda env: (BeamSearch(env), None)
    found["best-of-n"] = lambda env: (SamplingDecoder(env, seed=seed), None)
    return found


def run(task, seed, name, make, arguments):
    """Decode the prompts; return each one's J, the LM tokens, the seconds, and how often each heuristic was used."""
    prompts = task.prompts.of("train")
    order = np.random.default_rng(seed).permutation(len(prompts))[: arguments.prompts]
    env = gym.make("TokenDecoding-v0", prompts=prompts, **task.env)
    planner, learner = make(env)
    objectives, tokens, start = [], 0, time.perf_counter()
    for first in range(0, len(order), 8):
        # Of a plan only J and the tokens are kept: its search would hold its tree in memory.
        found = planner.plan_many([prompts[i] for i in order[first : first + 8]], arguments.budget)
        objectives += [plan.objective for plan in found]
        tokens += sum(plan.usage.lm_tokens for plan in found)
        print(
            f"{task.name}, seed {seed}, {name}: {len(objectives)} prompts, J {np.nanmean(objectives[-BLOCK:]):.3f}",
            flush=True,
        )
    return {
        "objective": objectives,
        "tokens": tokens,
        "seconds": time.perf_counter() - start,
        "learning": 0.0 if learner is None else learner.seconds,
        "uses": {} if learner is None else {key: list(use) for key, use in learner.uses().items()},
    }


def blocks(values):
    """Return the means of J over each BLOCK prompts in a row; an unfinished text counts as the worst one."""
    values = with_the_worst(values)
    return values[: len(values) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(axis=1)


def moving(values):
    """Return the means over every BLOCK prompts in a row."""
    return np.convolve(with_the_worst(values), np.ones(BLOCK) / BLOCK, mode="valid")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["sentiment", "keywords"], metavar="TASK")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--budget", type=int, default=100, help="LM tokens a prompt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--without", nargs="*", default=[], choices=["beam", "best-of-n"], help="rows to leave out")
    parser.add_argument("--runs", type=Path, default=Path("runs/online"), help="folder of the results")
    add_json_option(parser)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.tasks:
        task = load_task(name)
        found = {}
        for seed in range(arguments.seeds):
            for decoder, make in decoders(task, seed).items():
                if decoder in arguments.without:
                    continue
                file = f"{task.name}-{seed}-{decoder}-{arguments.prompts}-{arguments.budget}.json"
                measure = partial(run, task, seed, decoder, make, arguments)
                result = read_or_measure(arguments.runs / file.replace(" ", "_"), measure)
                found.setdefault(decoder, []).append(result)
        budget = f"{arguments.budget} LM tokens a prompt, {arguments.seeds} seeds"
        table = Table(title=f"{name}: mean J of {BLOCK} prompts in a row, {budget}")
        count = arguments.prompts // BLOCK
        shown = sorted({0, 1, 2, count // 2, count - 1} & set(range(count)))
        for column in ("decoder", *(f"{i * BLOCK + 1}–{(i + 1) * BLOCK}" for i in shown), "last 100", "all", "seconds"):
            table.add_column(column, justify="left" if column == "decoder" else "right")
        for decoder, results in found.items():
            per_seed = np.array([blocks(result["objective"]) for result in results])
            last = np.mean([np.nanmean(result["objective"][-100:]) for result in results])
            seconds = np.mean([result["seconds"] for result in results])
            means = per_seed.mean(axis=0)
            cells = [*(f"{means[i]:.3f}" for i in shown), f"{last:.3f}", f"{means.mean():.3f}", f"{seconds:.0f}"]
            table.add_row(decoder, *cells)
            rows.append(row(f"{name}, {decoder}: last 100 prompts", last, "J"))
            rows.append(row(f"{name}, {decoder}: all prompts", means.mean(), "J"))
        out.print(table)
        for result in found[FROM_NOTHING]:
            uses = ", ".join(f"{key} {count} (J {J:.3f})" for key, (count, J, _) in result["uses"].items())
            out.print(f"heuristics used: {uses}; learning took {result['learning']:.0f} of {result['seconds']:.0f} s")
        without = max(
            set(WITHOUT_Q) & set(found), key=lambda d: np.mean([np.nanmean(r["objective"]) for r in found[d]])
        )
        online, bound = found[FROM_NOTHING], found["A* on the bound"]
        worst = min(
            (moving(one["objective"]) - moving(other["objective"])).min()
            for one, other in zip(online, bound, strict=True)
        )
        best = np.mean([np.array(one["objective"]) for one in found[without]], axis=0)
        gain = np.cumsum(np.nan_to_num(np.mean([r["objective"] for r in online], axis=0) - best))
        behind = np.flatnonzero(gain <= 0)
        ahead = int(behind[-1]) + 2 if len(behind) else 1
        out.print(f"best decoder without Q: {without}; the sum of J is ahead of it for good from prompt {ahead} on")
        rows.append(row(f"{name}: ahead of {without} from prompt", ahead, "prompts", 30, higher_is_better=False))
        rows.append(row(f"{name}: worst {BLOCK} prompts against the bound", worst, "J", -0.02))
        if BEFOREHAND in found:
            last = (
                [np.nanmean(r["objective"][-100:]) for r in online],
                [np.nanmean(r["objective"][-100:]) for r in found[BEFOREHAND]],
            )
            rows.append(
                row(f"{name}: last 100, minus trained beforehand", np.mean(last[0]) - np.mean(last[1]), "J", -0.03)
            )
        for each in rows[-3:]:
            out.print(f"{each['name']}: {each['value']:.3f} (wanted {each['target']})")
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
