"""Tokens against steps as actions, at equal LM tokens and without Q, on puzzles with a checker and on reviews.

`python benchmarks/steps.py FOLDER` keeps each decoder's outcomes in the folder, and goes on where it was interrupted.
Puzzles are answered in steps, "3*7=21 (21 25), 25-21=4", and every search stops at its first right answer. Steps end
with a comma there, and with a sentence in reviews. A budget of steps may be exceeded by one state's drawing; a puzzle
counts as solved within a budget only if it was, and means of LM tokens are stated.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.table import Table
from rows import add_json_option, out, read_or_measure, row, write
from solving import OneByOne

from qstar_decoding.agents import AStarPlanner, BeamSearch, Budget, SamplingDecoder
from qstar_decoding.agents.evaluation.outcomes import evaluate, paired_bootstrap
from qstar_decoding.envs import load_language_model
from qstar_decoding.tasks import load_task
from qstar_decoding.tasks.generators import countdown

TARGET = 0.5  # J of a right answer is above, of a wrong one below
ACTIONS = {
    "tokens": {},
    "steps, 4 samples": {"action": "step", "top_k": 4},
    "steps, 4 beams": {"action": "step", "top_k": 4, "step_proposals": "beam"},
}
# By name: the task, changes of its environment, settings of steps, the arguments of its generator that differ.
PUZZLE = {"delimiter": ",", "max_step_tokens": 24, "token_top_k": 12}
SETTINGS = {
    "countdown-3": ("countdown-3", {"constraint": {"countdown": {"format": "steps"}}, "max_new_tokens": 32}, PUZZLE),
    "reviews": (
        "review",
        {"max_new_tokens": 48},
        {"delimiter": [".", "!", "?"], "max_step_tokens": 16, "token_top_k": 8},
    ),
    "countdown-3, no mask": ("countdown-3", {"constraint": None, "max_new_tokens": 32}, PUZZLE),
    "countdown-4": ("countdown-4", {"constraint": {"countdown": {"format": "steps"}}, "max_new_tokens": 56}, PUZZLE),
}
# Decoders of puzzles are not told the budget, except beams; those of texts choose their width by it.
ANY_BUDGET = {
    "A*": lambda mdp: AStarPlanner(mdp, search="anytime", weight=4.0),
    "best-of-n": OneByOne,
}
BY_BUDGET = {"A*": AStarPlanner, "beam": BeamSearch, "best-of-n": SamplingDecoder}


def prompts_of(name, task, count):
    """Return test prompts; those of puzzles with examples that are answered in steps."""
    if "countdown" not in name:
        return task.prompts.of("test")[:count]
    arguments = {"numbers": int(name[10]), "low": 1, "high": 15, "target": 60, "train": 1, "dev": 1, "test": count}
    return countdown(**arguments, format="steps", seed=1)["test"]


def figures(decoder, prompts, budget):
    """Return J and LM tokens of each prompt; a search for a right answer ends with it."""
    outcomes = evaluate(decoder, prompts, budget)
    return {"objectives": outcomes.objectives.tolist(), "lm_tokens": outcomes.lm_tokens.tolist()}


def measure(name, count, budgets, folder):
    """Return by action, decoder and budget what :func:`figures` returns; what the folder holds is not done again."""
    source, changes, steps = SETTINGS[name]
    changes = {"hidden_layers": (), **changes}  # no Q reads them
    task, found = load_task(source), {}
    prompts = prompts_of(name, task, count)
    for action, settings in ACTIONS.items():
        more = {**changes, **settings, **(steps if settings else {})}
        mdp = task.mdp(model=load_language_model(weights="float16"), **more)

        def run(label, make, budget, mdp=mdp, action=action):
            path = folder / f"{name} {action} {label}.json".replace(" ", "_").replace("*", "star")
            result = read_or_measure(path, lambda: figures(make(mdp), prompts, budget))
            objective, tokens = np.mean(result["objectives"]), np.mean(result["lm_tokens"])
            out.print(f"{name}, {action}, {label}: J {objective:.3f}, {tokens:.0f} LM tokens")
            return result

        is_puzzle = source != "review"
        for decoder, make in (ANY_BUDGET if is_puzzle else {}).items():
            found |= dict.fromkeys(
                ((action, decoder, b) for b in budgets),
                run(decoder, make, Budget(lm_tokens=budgets[-1] + 100, target=TARGET)),
            )
        for decoder, make in ({"beam": BeamSearch} if is_puzzle else BY_BUDGET).items():
            for b in budgets:
                limit = Budget(lm_tokens=b, target=TARGET if is_puzzle else None)
                found[action, decoder, b] = run(f"{decoder} {b}", make, limit)
    return found


def scores(name, result, budget):
    """Return of each prompt whether it was solved within the budget, or the text's J."""
    objectives, tokens = np.array(result["objectives"]), np.array(result["lm_tokens"])
    return objectives if name == "reviews" else ((objectives >= TARGET) & (tokens <= budget)).astype(float)


def report(name, found, budgets):
    """Print a table and return its rows."""
    table, rows = Table(title=name), []
    for heading in (
        "action",
        "decoder",
        *(f"{b} tokens" for b in budgets),
        "less tokens' own, last budget",
        "LM tokens",
    ):
        table.add_column(heading)
    for action, decoder in dict.fromkeys((a, d) for a, d, _ in found):
        values = {b: scores(name, found[action, decoder, b], b) for b in budgets}
        cells = [f"{v.mean():.2f}" for v in values.values()]
        for b, v in values.items():
            rows.append(
                row(f"{name}, {action}, {decoder}, {b} LM tokens", v.mean(), "J" if name == "reviews" else "solved")
            )
        less = ""
        if action != "tokens":
            own = scores(name, found["tokens", decoder, budgets[-1]], budgets[-1])
            difference = values[budgets[-1]] - own
            low, high = paired_bootstrap(difference)
            less = f"{difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        used = np.mean(found[action, decoder, budgets[-1]]["lm_tokens"])
        table.add_row(action, decoder, *cells, less, f"{used:.0f}")
    out.print(table)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--settings", nargs="*", default=[*SETTINGS], choices=[*SETTINGS])
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--budgets", type=int, nargs="*", default=[100, 200, 400])
    add_json_option(parser)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.settings:
        found = measure(name, arguments.prompts, arguments.budgets, arguments.folder)
        rows += report(name, found, arguments.budgets)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
