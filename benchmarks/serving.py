"""Throughput of concurrent requests: SearchEngine against plan_many, and against one request after the other.

    python benchmarks/serving.py [--model NAME] [--requests 64] [--clients 1 4 16 64] [--json FILE]

The requests differ in prompt, budget, reward, horizon and k. The engine serves them to 1, 4, 16 and 64 clients, each of
which submits its next request when it has the plan of the last one. plan_many gets all requests in one call. Every way
starts with an empty key-value memory, after one request that warms the model up.

Targets: at 16 clients at least 0.85 of the LM tokens per second of plan_many, and at least 4 times those of one request
after the other. The column "as alone" counts the requests with the text that they have alone: in floating point the
composition of a batch changes log-probabilities in the last digits, which can turn a near tie.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from rich.table import Table
from rows import add_json_option, out, row, write

from qstar_decoding.agents import AStarPlanner, Budget, Request, SearchEngine
from qstar_decoding.envs import DecodingMDP, TabularLM
from qstar_decoding.envs.prompts import DEFAULT_PROMPTS


def make_requests(count, prompts, rewards, seed=0):
    """Return requests with mixed settings."""
    rng = np.random.default_rng(seed)

    def one(i):
        return Request(
            prompts[i % len(prompts)],
            Budget(lm_tokens=int(rng.choice([20, 40, 80, 120]))),
            reward=str(rng.choice(rewards)),
            max_new_tokens=int(rng.choice([8, 12, 16, 24])),
            top_k=int(rng.choice([4, 6, 8])),
        )

    return [one(i) for i in range(count)]


def one_after_the_other(mdp, requests):
    planner, plans, seconds = AStarPlanner(mdp), [], []
    for request in requests:
        start = time.perf_counter()
        plans.append(planner.plan(request))
        seconds.append(time.perf_counter() - start)
    return plans, seconds


def all_at_once(mdp, requests):
    start = time.perf_counter()
    plans = AStarPlanner(mdp).plan_many(requests)
    return plans, [time.perf_counter() - start] * len(plans)


def clients(count):
    """Return the way in which ``count`` clients share one engine."""

    def serve(mdp, requests):
        engine = SearchEngine(mdp, max_live=count)

        def ask(request):
            start = time.perf_counter()
            return engine.submit(request).result(), time.perf_counter() - start

        with ThreadPoolExecutor(count) as pool:
            plans, seconds = zip(*pool.map(ask, requests), strict=True)
        return plans, seconds

    return serve


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rewards", nargs="+", default=["sentiment", "length", "0.7*sentiment + 0.3*length"])
    add_json_option(parser)
    arguments = parser.parse_args()

    process = DecodingMDP(arguments.model, reward=arguments.rewards[0])
    toy = isinstance(process.model, TabularLM)
    prompts = ["a", "bc", "cab", "dd", "e"] if toy else DEFAULT_PROMPTS
    requests = make_requests(arguments.requests, prompts, arguments.rewards)
    one_after_the_other(process.with_empty_tree(), requests[:1])

    ways = {"one after the other": one_after_the_other, "plan_many": all_at_once}
    ways |= {f"engine, {count} clients": clients(count) for count in arguments.clients}
    table = Table(title=f"{len(requests)} requests on {process.model.name}")
    for column in ("way", "LM tokens/s", "requests/s", "p50, s", "p95, s", "as alone"):
        table.add_column(column, justify="left" if column == "way" else "right")
    rows, speeds, alone = [], {}, []
    for name, way in ways.items():
        start = time.perf_counter()
        plans, seconds = way(process.with_empty_tree(), requests)
        elapsed = time.perf_counter() - start
        alone = alone or [plan.text for plan in plans]
        same = sum(plan.text == text for plan, text in zip(plans, alone, strict=True))
        speeds[name] = sum(plan.usage.lm_tokens for plan in plans) / elapsed
        half, most = np.quantile(seconds, [0.5, 0.95])
        per_second = len(plans) / elapsed
        table.add_row(name, f"{speeds[name]:.0f}", f"{per_second:.2f}", f"{half:.2f}", f"{most:.2f}", str(same))
        rows += [
            row(f"LM tokens per second, {name}", speeds[name], "tokens/s"),
            row(f"requests per second, {name}", per_second, "requests/s"),
            row(f"median latency, {name}", half, "s", higher_is_better=False),
            row(f"95th percentile of latency, {name}", most, "s", higher_is_better=False),
            row(f"texts as alone, {name}", same, "requests", len(plans) if toy else None),
        ]
    for count in arguments.clients:
        targets = (0.85, 4.0) if count == 16 else (None, None)
        for other, target in zip(("plan_many", "one after the other"), targets, strict=True):
            ratio = speeds[f"engine, {count} clients"] / speeds[other]
            rows.append(row(f"engine with {count} clients over {other}", ratio, "ratio", target))
    out.print(table)
    for one in rows[-2 * len(arguments.clients) :]:
        out.print(f"{one['name']}: {one['value']:.2f}" + (f" (target {one['target']:g})" if one["target"] else ""))
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
