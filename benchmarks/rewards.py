"""What rewards cost: texts a second, their share of an environment's step, and what is remembered in a search.

    python benchmarks/rewards.py [--json FILE]

Each reward alone at 1, 16 and 64 texts a call, without its memory of earlier texts; its share of a step of 64 envs on
the embedded model, potential and final scores together; and how many of the texts that a search asks for were known.
"""

import argparse
import time

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import add_json_option, out, row, write

from qstar_decoding.agents import AStarPlanner, SamplingDecoder, evaluate
from qstar_decoding.envs import DecodingMDP, TokenDecodingVecEnv
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import make_reward, registry, reward_names
from qstar_decoding.tasks import load_task

SIZES = [1, 16, 64]
ENVS, STEPS = 64, 60
MODELS = {"coherence", "relevance", "semantic_repetition"}  # a network each; all others read words


def texts_to_score(count):
    """Return prompts and completions that the language model wrote, all different."""
    task = load_task("sentiment")
    mdp, prompts = task.mdp(reward="length"), task.prompts.of("train")[:count]
    plans = evaluate(SamplingDecoder(mdp, n=1, seed=0), prompts).plans
    return [plan.prompt for plan in plans], [plan.text for plan in plans]


def columns_of(count):
    import reasoning_gym

    entry = next(iter(reasoning_gym.create_dataset("chain_sum", size=1, seed=0)))
    return {"answer": ["42"] * count, "keywords": [["dog", "run", "ball"]] * count, "entry": [entry] * count}


def throughput(reward, prompts, completions, seconds=0.5):
    """Return texts a second at each size, the median of the calls that fit into the time."""
    rates = []
    for size in SIZES:
        columns, took, start, end = columns_of(size), [], 0, time.perf_counter() + seconds
        while len(took) < 2 or time.perf_counter() < end:
            # Other texts each time: a reward may remember words.
            rows = [(start + i) % len(prompts) for i in range(size)]
            begin = time.perf_counter()
            reward.score([prompts[i] for i in rows], [completions[i] for i in rows], None, **columns)
            took.append(time.perf_counter() - begin)
            start += size
        rates.append(size / np.median(took[1:]))
    return rates


def share_of_a_step(name):
    """Return the share of the time of random steps in 64 environments that the reward takes."""
    task = load_task("sentiment")
    prompts = [{"prompt": p, **{k: v[0] for k, v in columns_of(1).items()}} for p in task.prompts.of("train")[:16]]
    env = TokenDecodingVecEnv(num_envs=ENVS, prompts=prompts, **{**task.env, "reward": name})
    env.seed(0)
    env.reset()
    env.step(np.zeros(ENVS, dtype=np.int64))  # the first step loads and packs
    rng, counters = np.random.default_rng(0), env.mdp.reward.counters
    before, start = counters.seconds, time.perf_counter()
    for _ in range(STEPS):
        env.step(rng.integers(0, task.env["top_k"], ENVS))
    return (counters.seconds - before) / (time.perf_counter() - start)


def remembered(name, budget=200):
    """Return the texts that a search of one prompt asked for, and the share of them that was known."""
    task = load_task("sentiment")
    mdp = DecodingMDP(task.mdp().model, **{**{k: v for k, v in task.env.items() if k != "reward"}, "reward": name})
    planner = AStarPlanner(mdp)
    for prompt in task.prompts.of("test")[:3]:
        row = {"prompt": prompt, **{k: v[0] for k, v in columns_of(1).items()}}
        planner.plan(row, budget)
    counters = mdp.reward.counters
    return counters.asked / 3, 1 - counters.scored / max(counters.asked, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    arguments = parser.parse_args()
    prompts, completions = texts_to_score(128)
    table = Table(title=f"texts of 24 tokens; a step of {ENVS} environments with random actions")
    table.add_column("reward")
    for column in (*(f"{n} a call" for n in SIZES), "share of a step", "asked a search", "remembered"):
        table.add_column(column, justify="right")
    rows, worst = [], 0.0
    names = [name for name in reward_names() if name not in registry.WITH_ARGUMENTS]
    for name in track(names, "timing", console=Console(stderr=True), transient=True):
        try:
            reward = make_reward(name)
        except ConfigurationError as error:
            out.print(f"{name}: left out, {error}")
            continue
        rates = throughput(reward, prompts, completions)
        share, (asked, known) = share_of_a_step(name), remembered(name)
        table.add_row(name, *(f"{rate:,.0f}" for rate in rates), f"{share:.1%}", f"{asked:.0f}", f"{known:.0%}")
        target = None if name in MODELS else 0.20
        rows.append(row(f"share of a step, {name}", share, "share", target, higher_is_better=False))
        rows += [row(f"{name}, {size} a call", rate, "texts/s") for size, rate in zip(SIZES, rates, strict=True)]
        rows.append(row(f"{name}, remembered in a search", known, "share"))
        worst = max(worst, 0.0 if name in MODELS else share)
    out.print(table)
    out.print(f"the largest share of a step that a lexical reward takes: {worst:.1%} (wanted: 20 % at most)")
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
