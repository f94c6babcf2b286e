"""What a Ray cluster brings: throughput with one and two workers, what scheduling and Q cost, and how far that carries.

    python benchmarks/ray.py [--json FILE]

One and two workers of one thread each decode the same prompts in turn, each job in an empty token tree. From what a
job, its scheduling and Q cost follows how many workers one driver can keep busy.
"""

import sys
from pathlib import Path

from rows import add_json_option, out, row, write

# Python puts a script's folder before everything else, and there this very file is called ray.
sys.path.remove(str(Path(__file__).resolve().parent))

import argparse
import os
import tempfile
import time
from functools import partial

# Before Ray is imported: it keeps to the loopback interface, and its workers are not made to wait for others.
os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
}

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from qstar_decoding.agents import AStarPlanner, QHeuristic, QStar
from qstar_decoding.agents.distributed.jobs import Job
from qstar_decoding.agents.distributed.ray_workers import RayWorkers
from qstar_decoding.agents.learning.experience import Searcher
from qstar_decoding.envs import TokenDecodingVecEnv
from qstar_decoding.tasks import load_task

BATCH = 8  # prompts a job
ROUNDS = 3
BUDGETS = {"toy": 24, "sentiment": 100}  # LM tokens a prompt
NETWORK = 1e9  # bytes a second between machines: an assumption, 10 Gbit/s Ethernet at four fifths


class Planner(Searcher):
    """What the workers hold: for searches of QStar, and for plans with the shipped Q."""

    def plan(self, prompts, task):
        """Return the seconds that the job took, of the clock and of the processor."""
        begin = time.perf_counter(), time.process_time()
        # In an empty tree, so that every job is the same work whoever had which before.
        planner = AStarPlanner(self.mdp.with_empty_tree(), heuristic=QHeuristic(task.name), **task.planner)
        planner.plan_many(prompts, BUDGETS[task.name])
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    def nothing(self):
        pass


def seconds(workers, jobs):
    return run(workers, jobs)[0]


def run(workers, jobs):
    """Return the seconds that the jobs took together, and what each returned."""
    start = time.perf_counter()
    results = [result for _, result in workers.run(jobs)]
    assert len(results) == len(jobs)
    return time.perf_counter() - start, results


def throughput(name, count):
    """Return prompts a second with one worker and with two, the efficiency, and what it consists of.

    Efficiency is the median over interleaved rounds of rate(2) / (2 rate(1)). On a machine that others use too it says
    little; two parts of it hold there: the share of the time that the workers had a job in hand, and how much more
    processor time a job takes when two share the memory.
    """
    task = load_task(name)
    prompts = (task.prompts.of("train") * 8)[: BATCH * count]
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    jobs = [Job("plan", (batch, task), "a batch") for batch in batches]
    make = partial(Planner, task.mdp)
    with RayWorkers("local", make, count=1) as one, RayWorkers("local", make, count=2) as two:
        for workers in (one, two):
            workers.pids()
            seconds(workers, jobs[:4])  # the first forward loads and packs
        rounds = [(run(one, jobs), run(two, jobs)) for _ in range(ROUNDS)]
    took = np.array([[whole for whole, _ in pair] for pair in rounds])  # [rounds, 2]
    in_jobs = np.array([[np.sum(parts, axis=0) for _, parts in pair] for pair in rounds])  # [rounds, 2, clock or CPU]
    rates = len(prompts) / np.median(took, axis=0)
    efficiency = float(np.median(took[:, 0] / took[:, 1])) / 2
    busy = float(np.median(in_jobs[:, 1, 0] / took[:, 1])) / 2
    dearer = float(np.median(in_jobs[:, 1, 1] / in_jobs[:, 0, 1]))
    return rates, efficiency, busy, dearer


def scheduling(jobs=2000):
    """Return the seconds from one job's end to the next one's begin, and the driver's processor time a job."""
    nothing = [Job("nothing", (), "nothing") for _ in range(jobs)]
    with RayWorkers("local", partial(Planner, load_task("toy").mdp), count=1) as one:
        one.pids()
        seconds(one, nothing[:100])
        begin = time.process_time()
        latency = seconds(one, nothing) / jobs
        return latency, (time.process_time() - begin) / jobs


@ray.remote(num_cpus=0)
class Sleeper:
    def sleep(self, duration):
        time.sleep(duration)


def looking(workers):
    """Return the seconds that it takes to look which of so many calls are over."""
    sleepers = [Sleeper.remote() for _ in range(4)]
    refs = [sleepers[i % 4].sleep.remote(60.0) for i in range(workers)]
    took = []
    for _ in range(5):
        start = time.perf_counter()
        ray.wait(refs, num_returns=len(refs), timeout=0)
        took.append(time.perf_counter() - start)
    for sleeper in sleepers:
        ray.kill(sleeper)
    return float(np.median(took))


def broadcast():
    """Return Q's bytes, the seconds to publish it, to fetch it, and to learn a round from what a worker has found."""
    task = load_task("sentiment")
    env = TokenDecodingVecEnv(2, prompts=task.prompts.of("train"), **task.env)
    agent = QStar(env=env, seed=0, **task.training)
    size = len(ray.cloudpickle.dumps(agent.q_function()))
    nothing = [Job("nothing", (), "nothing")]
    with RayWorkers("local", partial(Planner, task.mdp), count=1) as workers:
        workers.pids()
        publish, fetch = [], []
        for _ in range(10):
            start = time.perf_counter()
            workers.share(agent.q_function())
            publish.append(time.perf_counter() - start)
            new = seconds(workers, nothing)
            fetch.append(new - seconds(workers, nothing))
        agent.workers = workers
        took = {"search": [], "enter": [], "learn": []}
        search, train = agent._search, agent.train

        def timed(name, function):
            def call(*args, **kwargs):
                start = time.perf_counter()
                result = function(*args, **kwargs)
                took[name].append(time.perf_counter() - start)
                return result

            return call

        agent._search, agent.train = timed("search", search), timed("learn", train)
        agent.learn(1)
        agent.experience.add = timed("enter", agent.experience.add)
        agent.learn(2 * agent.searches_per_round * agent.tokens_per_search, reset_num_timesteps=False)
    searches = agent.searches_per_round
    return {
        "bytes": size,
        "publish": float(np.median(publish)),
        "fetch": max(float(np.median(fetch)), 0.0),
        "search": float(np.median(took["search"])) / searches,
        "enter": float(np.median(took["enter"])),
        "learn": float(np.median(took["learn"])),
        "searches": searches,
    }


def decoding_rate(workers, prompt, latency, driver, look):
    """Return prompts a second: what the workers could do, and what the driver can hand out, whichever is less."""
    # Busy, the driver finds many jobs done at one look; at worst it looks once for each.
    return min(workers / (prompt + latency / BATCH), BATCH / driver), BATCH / (driver + 2 * look)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    arguments = parser.parse_args()
    rows = []

    def add(*figure, higher=True):
        rows.append(row(*figure, higher_is_better=higher))

    folder = tempfile.TemporaryDirectory(prefix="qstar-", dir="/tmp")
    # Room for both sets of workers; only one of them is at work at a time.
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        object_store_memory=1 << 28,
        _temp_dir=folder.name,
        log_to_driver=False,
        logging_level="ERROR",
    )
    with folder:
        try:
            with Console(stderr=True).status("measuring") as status:
                rates = {}
                for name, count in (("toy", 24), ("sentiment", 6)):
                    status.update(f"{name} with 1 and 2 workers")
                    rates[name] = throughput(name, count)
                status.update("scheduling")
                latency, driver = scheduling()
                look = {workers: looking(workers) for workers in (100, 10_000)}
                status.update("Q's way to the workers")
                q = broadcast()
        finally:
            ray.shutdown()
    for name, ((one, two), efficiency, busy, dearer) in rates.items():
        add(f"{name}, 1 worker", one, "prompts/s")
        add(f"{name}, 2 workers", two, "prompts/s")
        add(f"{name}, efficiency of 2 workers", efficiency, "share", 0.85)
        add(f"{name}, share of the time that 2 workers had work", busy, "share")
        add(f"{name}, processor time a job, 2 workers against 1", dearer, "ratio", higher=False)
    add("scheduling overhead", 1e3 * latency / BATCH, "ms/prompt", higher=False)
    add("from a job's end to the next one's begin", 1e3 * latency, "ms/job", higher=False)
    add("processor time of the driver", 1e3 * driver, "ms/job", higher=False)
    for workers, took in look.items():
        add(f"looking at {workers:,} workers", 1e3 * took, "ms", higher=False)
    add("Q, size", q["bytes"] / 1e6, "MB", higher=False)
    add("Q, publishing a version", 1e3 * q["publish"], "ms", higher=False)
    add("Q, fetching a version", 1e3 * q["fetch"], "ms/worker", higher=False)
    add("QStar, one search", 1e3 * q["search"], "ms", higher=False)
    add("QStar, entering a search", 1e3 * q["enter"], "ms", higher=False)
    add("QStar, learning after a round", 1e3 * q["learn"], "ms", higher=False)

    table = Table("measured", title="two cores, one thread a worker")
    for column in ("value", "unit", "wanted"):
        table.add_column(column, justify="right")
    for measured in rows:
        wanted = "" if measured["target"] is None else f"at least {measured['target']}"
        table.add_row(measured["name"], f"{measured['value']:.3g}", measured["unit"], wanted)
    out.print(table)

    prompt = 1 / rates["sentiment"][0][0]
    estimate = Table("", title="estimated from the above: sentiment, one driver")
    for column in ("100 workers", "10,000 workers", "saturates at"):
        estimate.add_column(column, justify="right")
    decoding, at_worst, training = [], [], []
    for workers in (100, 10_000):
        best, worst = decoding_rate(workers, prompt, latency, driver, look[workers])
        decoding.append(best)
        at_worst.append(min(best, worst))
        # Every worker one job of BATCH searches: search, send Q to each, enter what they found, learn.
        searches = workers * BATCH
        whole = BATCH * q["search"] + workers * q["bytes"] / NETWORK + searches * q["enter"] + q["learn"]
        training.append(searches / whole)
    full = BATCH / driver * prompt
    estimate.add_row("decode, prompts/s", *(f"{value:,.0f}" for value in decoding), f"{full:,.0f} workers")
    estimate.add_row("  if every job costs a look at all workers", *(f"{value:,.0f}" for value in at_worst), "")
    per_search = q["enter"] + q["bytes"] / NETWORK / BATCH
    limit = f"{q['search'] / per_search:,.0f} workers"
    estimate.add_row("train, searches/s", *(f"{value:,.0f}" for value in training), limit)
    out.print(estimate)
    out.print(
        f"decode: a prompt takes {1e3 * prompt:.0f} ms, so one driver, {1e3 * driver:.2f} ms a job of {BATCH}, keeps "
        f"{full:,.0f} workers busy. train: the learner takes {1e3 * q['enter']:.2f} ms to enter a search and "
        f"{1e9 * q['bytes'] / NETWORK / 1e6:.1f} ms to send Q to a machine (assumed: {NETWORK / 1e9:g} GB/s, all from "
        "the head), whatever the number of workers."
    )
    for workers, value, learnt in zip((100, 10_000), decoding, training, strict=True):
        add(f"estimate, decode with {workers:,} workers", value, "prompts/s")
        add(f"estimate, train with {workers:,} workers", learnt, "searches/s")
    add("estimate, workers that one driver keeps busy decoding", full, "workers")
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
