"""Does a training that is killed again and again end where the others do?

    python benchmarks/resume.py [TASK] [--steps 20000] [--kills 5] [--seeds 3] [--runs runs/resume] [--json FILE]

Trains each seed undisturbed, then seed 0 once more with SIGKILL at random moments, each followed by `--resume`, and
compares what `qstar train` measures at its end on the held-out prompts. On an exact model a resumed run equals the
other to the last bit (tests/test_resume.py); with the embedded one, batches of other sizes round differently.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table
from rows import add_json_option, out, row, write


def start(task, folder, steps, seed, *more):
    """Start `qstar train`; its output goes to FOLDER.log."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    options = [
        "--steps",
        str(steps),
        "--save-every",
        str(max(steps // 10, 1)),
        "--seed",
        str(seed),
        "--out",
        str(folder),
    ]
    command = [sys.executable, "-m", "qstar_decoding.cli", "train", task, *options, *more]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def resumable(folder):
    return ["--resume"] if (folder / "checkpoint").is_dir() else []


def steps_saved(folder):
    """Return the LM tokens of the last checkpoint."""
    try:
        return json.loads((folder / "checkpoint" / "training_state.json").read_text(encoding="utf-8"))["num_timesteps"]
    except FileNotFoundError:  # before the first, and for an instant while one replaces another
        return 0


def wait_for(folder, steps, process):
    while steps_saved(folder) < steps and process.poll() is None:
        time.sleep(0.05)


def finish(process, folder):
    """Wait for a training's end; return what it measured."""
    if process.wait():
        sys.exit(f"the training in {folder} failed: {folder.with_suffix('.log').read_text(encoding='utf-8')[-2000:]}")
    return json.loads((folder / "q" / "config.json").read_text(encoding="utf-8"))["description"]["held_out"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="sentiment")
    parser.add_argument("--steps", type=int, default=20_000, help="LM tokens of a training")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/resume"), help="a new folder for the trainings")
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.runs.exists():
        parser.error(f"{arguments.runs} exists; name a new folder with --runs")

    held_out = {}
    for seed in range(arguments.seeds):
        folder = arguments.runs / str(seed)
        held_out[f"seed {seed}"] = finish(start(arguments.task, folder, arguments.steps, seed), folder)

    folder, moments = arguments.runs / "killed", []
    for i in range(arguments.kills):
        process = start(arguments.task, folder, arguments.steps, 0, *resumable(folder))
        # Somewhere in the i-th part of the training, so that each time something is there to be resumed.
        wait_for(folder, arguments.steps * (i + random.random()) / (arguments.kills + 1), process)
        time.sleep(random.uniform(0, 5))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            sys.exit(f"the training in {folder} ended before it could be killed: take more --steps or fewer --kills")
        moments.append(steps_saved(folder))
    last = start(arguments.task, folder, arguments.steps, 0, *resumable(folder))
    killed = finish(last, folder)

    out.print(f"killed with {', '.join(f'{steps:,}' for steps in moments)} LM tokens saved")
    table = Table(title=f"{arguments.task}, {arguments.steps:,} LM tokens of training: J on the held-out prompts")
    for column in ("decoder", *held_out, f"seed 0, killed {arguments.kills} times"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    rows = []
    for decoder, figures in killed.items():
        spread, J = [found[decoder]["objective"] for found in held_out.values()], figures["objective"]
        table.add_row(decoder, *(f"{value:.3f}" for value in (*spread, J)))
        rows += [row(f"{decoder}, {name}", value, "J") for name, value in zip(held_out, spread, strict=True)]
        rows.append(row(f"{decoder}, killed", J, "J"))
        outside = max(min(spread) - J, J - max(spread), 0.0)
        rows.append(row(f"{decoder}, killed: outside the seeds' spread by", outside, "J", 0.0, higher_is_better=False))
    out.print(table)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
