"""Start-up and memory: seconds to the first finished text of a new process, and resident bytes as it goes on.

    python benchmarks/footprint.py [startup] [memory] [--ways exact flat float16 llama.cpp] [--json FILE]
    python benchmarks/footprint.py --python OTHER/bin/python        # the same with another installation, such as 0.1

``startup`` counts a plan of 200 LM tokens with the shipped Q of the task `sentiment`, imports and loading included, and
a second plan in the same process, the median of ``--repeats``; seconds need an idle machine. ``memory`` counts resident
bytes after loading, after the first plan and after 50 prompts. Each run is a process of its own.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time

from rich.table import Table
from rows import add_json_option, out, row, write

OPTIONS = {
    "exact": {},
    "flat": {"weights": "flat"},
    "float16": {"weights": "float16"},
    "llama.cpp": {"engine": "llama.cpp"},
}
PROMPTS = 50
TARGETS = {"first text": 3.0, f"{PROMPTS} prompts": 1.2}

# Runs in a process of its own, on version 0.1 too.
CHILD = """
import json, os, sys, time
options, prompts = json.loads(sys.argv[1]), int(sys.argv[2])
import psutil
seen = {}
def note(what):
    seen[what] = [time.time(), psutil.Process().memory_info().rss]
import gymnasium as gym
import qstar_decoding.envs
from qstar_decoding.agents import AStarPlanner, QHeuristic
from qstar_decoding.envs import load_language_model
from qstar_decoding.tasks import load_task
note("imports")
lm = load_language_model("smollm2-135m-instruct", **options)
note("loaded")
env = gym.make("TokenDecoding-v0", model=lm, prompts=["The play was"], reward="sentiment")
planner = AStarPlanner(env, heuristic=QHeuristic("sentiment"))
planner.plan("The play was", 200)
note("first text")
if prompts:
    texts = load_task("sentiment").prompts.of("train")[: prompts]
    for text in texts:
        planner.plan(text, 200)
    note(f"{prompts} prompts")
else:
    planner.plan("The film was", 200)
    note("second text")
print(json.dumps(seen))
"""


def run(python, options, prompts):
    """Return what a new process notes: by event, seconds since its start and resident bytes."""
    start = time.time()
    command = [python, "-c", CHILD, json.dumps(options), str(prompts)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} failed: {done.stderr.strip().splitlines()[-1]}")
    return {what: (at - start, rss) for what, (at, rss) in json.loads(done.stdout.splitlines()[-1]).items()}


def startup(python, options, repeats):
    """Return seconds by event; a second text counts from the first one on."""
    runs = [run(python, options, 0) for _ in range(repeats)]
    seconds = {what: statistics.median(one[what][0] for one in runs) for what in runs[0]}
    seconds["second text"] -= seconds["first text"]
    return seconds


def memory(python, options, _):
    """Return resident GB by event; one process is enough."""
    return {what: rss / 1e9 for what, (_, rss) in run(python, options, PROMPTS).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measurements = {"startup": (startup, "s"), "memory": (memory, "GB")}
    parser.add_argument("what", nargs="*", help="startup, memory or both (the default)")
    parser.add_argument("--ways", nargs="+", choices=OPTIONS, help="how the model is run")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the installation to measure")
    parser.add_argument("--repeats", type=int, default=3)
    add_json_option(parser)
    arguments = parser.parse_args()
    if unknown := set(arguments.what) - set(measurements):
        parser.error(f"startup and memory can be measured; got {', '.join(sorted(unknown))}")
    has_llama_cpp = importlib.util.find_spec("llama_cpp") is not None
    chosen = arguments.ways or [way for way in OPTIONS if way != "llama.cpp" or has_llama_cpp]
    rows = []
    for what in arguments.what or measurements:
        measure, unit = measurements[what]
        table = None
        for way in chosen:
            figures = measure(arguments.python, OPTIONS[way], arguments.repeats)
            table = table or Table(f"{what}, {unit}", *figures)
            table.add_row(way, *(f"{value:.2f}" for value in figures.values()))
            print(what, way, {event: round(value, 3) for event, value in figures.items()}, file=sys.stderr, flush=True)
            for event, value in figures.items():
                target = TARGETS.get(event) if (unit == "s") == (event == "first text") else None
                rows.append(row(f"{way}: {event}", value, unit, target, higher_is_better=False))
        out.print(table)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
