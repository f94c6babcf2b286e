"""Concurrent requests on one language model: speed, equality of results, cancelling, memory, deadlines.

    python benchmarks/serving.py [PART …] [--check] [--model NAME] [--requests 64] [--clients 1 4 16 64] [--json FILE]

Parts, by default the first three:

speed      SearchEngine against plan_many and one request after the other. Requests differ in prompt, budget, reward,
           horizon and k. 1, 4, 16 and 64 clients each submit their next request when they have the plan of the last
           one. Targets at 16 clients: 0.85 of the LM tokens per second of plan_many on 16 requests at once, and 4
           times those of one request after the other. Each way computes in a thread of its own. "As alone" counts
           texts that are those of the request alone: in floating point the composition of a batch changes
           log-probabilities in the last digits, which can turn a near tie.
chat       LM tokens that the second turn of a chat of 1,000 tokens computes, with 20 other requests in between.
memory     resident memory after every 250 of 2,000 requests with ever new prompts, on the toy model.
deadlines  Budget(seconds=1, 3 and 6) on 20 prompts, one after the other: finished texts, and seconds over the deadline.
check      (also --check) 8 threads on one planner and on one engine, and 64 asyncio streams of each: every result
           against the one made alone. Cancels: forwards that begin after the step under way has ended.

All parts together take about ten minutes on two idle cores.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
from rich.table import Table
from rows import add_json_option, out, row, write

from qstar_decoding.agents import AStarPlanner, Budget, Request, SearchEngine
from qstar_decoding.envs import DecodingMDP, TabularLM, load_language_model
from qstar_decoding.envs.prompts import DEFAULT_PROMPTS, load_prompts
from qstar_decoding.models.devices import one_compute_thread

LETTERS = ("a", "bc", "cab", "dd", "e")


def table_of(title, *columns):
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def make_requests(count, prompts, rewards, seed=0, budgets=(20, 40, 80, 120)):
    """Return requests with mixed settings."""
    rng = np.random.default_rng(seed)

    def one(i):
        return Request(
            prompts[i % len(prompts)],
            Budget(lm_tokens=int(rng.choice(budgets))),
            reward=str(rng.choice(rewards)),
            max_new_tokens=int(rng.choice([8, 12, 16, 24])),
            top_k=int(rng.choice([4, 6, 8])),
        )

    return [one(i) for i in range(count)]


# -- speed -----------------------------------------------------------------------------------------------------------


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


def in_groups(size):
    """Return plan_many on as many requests at once as there are clients."""

    def serve(mdp, requests):
        groups = [all_at_once(mdp, requests[i : i + size]) for i in range(0, len(requests), size)]
        return [plan for plans, _ in groups for plan in plans], [second for _, each in groups for second in each]

    return serve


def in_a_thread(function, *arguments):
    """Call a function in a thread of its own, as an engine computes in one: its OpenMP workers end with it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def speed(options):
    """Compare ways to serve the same requests; each starts with an empty key-value memory on a warm model."""
    with one_compute_thread():  # as in qstar serve
        process = DecodingMDP(options.model, reward=options.rewards[0])
    toy = isinstance(process.model, TabularLM)
    requests = make_requests(options.requests, LETTERS if toy else DEFAULT_PROMPTS, options.rewards)
    in_a_thread(one_after_the_other, process.with_empty_tree(), requests[:1])
    ways = {"one after the other": one_after_the_other}
    ways |= {f"plan_many, {count} at once": in_groups(count) for count in options.clients}
    ways |= {f"engine, {count} clients": clients(count) for count in options.clients}
    title = f"{len(requests)} requests on {process.model.name}"
    table = table_of(title, "way", "LM tokens/s", "requests/s", "p50, s", "p95, s", "CPU, s", "as alone")
    rows, speeds, alone = [], {}, []
    for name, way in ways.items():
        start, cpu = time.perf_counter(), time.process_time()
        plans, seconds = in_a_thread(way, process.with_empty_tree(), requests)
        elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
        alone = alone or [plan.text for plan in plans]
        same = sum(plan.text == text for plan, text in zip(plans, alone, strict=True))
        speeds[name] = sum(plan.usage.lm_tokens for plan in plans) / elapsed
        half, most = np.quantile(seconds, [0.5, 0.95])
        per_second = len(plans) / elapsed
        figures = f"{speeds[name]:.0f} {per_second:.2f} {half:.2f} {most:.2f} {cpu:.1f} {same}"
        table.add_row(name, *figures.split())
        rows += [
            row(f"LM tokens per second, {name}", speeds[name], "tokens/s"),
            row(f"requests per second, {name}", per_second, "requests/s"),
            row(f"median latency, {name}", half, "s", higher_is_better=False),
            row(f"95th percentile of latency, {name}", most, "s", higher_is_better=False),
            row(f"texts as alone, {name}", same, "requests", len(plans) if toy else None),
        ]
    out.print(table)
    for count in options.clients:
        targets = (0.85, 4.0) if count == 16 else (None, None)
        for other, target in zip((f"plan_many, {count} at once", "one after the other"), targets, strict=True):
            ratio = speeds[f"engine, {count} clients"] / speeds[other]
            rows.append(row(f"engine with {count} clients over {other}", ratio, "ratio", target))
            goal = f" (target {target:g})" if target else ""
            out.print(f"engine with {count} clients over {other}: {ratio:.2f}{goal}")
    return rows


# -- the next turn of a chat -----------------------------------------------------------------------------------------


def chat(options):
    """Count the tokens that the second turn of a long chat computes, through the engine and through a planner."""
    rows, table = [], table_of("second turn of a chat", "through", "prompt", "new in it", "search", "computed")
    words = " ".join(f"Rule {i}: be brief, polite and right." for i in range(1, 101))
    first = [{"role": "system", "content": words}, {"role": "user", "content": "Name a river."}]
    for way in ("engine", "plan"):
        engine = SearchEngine(DecodingMDP(options.model, reward="length").with_empty_tree())
        planner, kv = AStarPlanner(engine.mdp), engine.mdp.tree.engine
        if not hasattr(kv, "_forward"):
            out.print(f"{engine.mdp.model.name} keeps no keys and values; nothing to count")
            return rows
        computed, forward = [], kv._forward

        def counting(tokens, *rest, computed=computed, forward=forward):
            computed.append(len(tokens))
            return forward(tokens, *rest)

        kv._forward = counting

        def ask(prompt, budget, engine=engine, planner=planner, way=way, **changes):
            request = Request(prompt, budget, **changes)
            return engine.submit(request).result() if way == "engine" else planner.plan(request)

        plan = ask(first, 20)
        ids = planner.mdp.encode(load_prompts([first])[0])
        for i in range(20):
            ask(DEFAULT_PROMPTS[i % 8], 10, logprob_weight=i / 100, top_k=4 + i % 4)
        second = [*first, {"role": "assistant", "content": plan.text}, {"role": "user", "content": "And a lake?"}]
        longer = planner.mdp.encode(load_prompts([second])[0])
        known = [*ids, *plan.token_ids[:-1]]  # the last token ended the text, and was not processed
        new = next(i for i, (a, b) in enumerate(zip([*known, None], longer, strict=False)) if a != b)
        computed.clear()
        plan = ask(second, 20, top_k=5, max_new_tokens=12, reward="distinct")
        total, wanted = sum(computed), len(longer) - new + plan.usage.lm_tokens
        table.add_row(way, str(len(longer)), str(len(longer) - new), str(plan.usage.lm_tokens), str(total))
        rows.append(row(f"tokens computed in a second turn, {way}", total, "tokens", wanted, higher_is_better=False))
    out.print(table)
    return rows


# -- memory ----------------------------------------------------------------------------------------------------------


def memory(options):
    """Follow the resident memory of an engine that serves ever new prompts."""
    del options
    engine, rng, sizes = SearchEngine("toy", reward="length"), np.random.default_rng(0), []
    table = table_of("2,000 requests on the toy model", "requests", "resident, MiB", "prefixes", "processes")
    for count in range(250, 2001, 250):
        handles = []
        for _ in range(250):
            handles.append(
                engine.submit(
                    "".join(rng.choice(list("abcde"), size=5)),
                    int(rng.choice([20, 40, 80])),
                    max_new_tokens=int(rng.choice([8, 12, 16])),
                    reward=str(rng.choice(["length", "0.5*length + 0.5*distinct"])),
                )
            )
            if len(handles) > 16:
                handles.pop(0).result()
        for handle in handles:
            handle.result()
        gc.collect()
        processes = [engine.mdp, *engine.decoder.processes._made.values()]
        sizes.append(psutil.Process().memory_info().rss / 2**20)
        table.add_row(
            f"{count:,}", f"{sizes[-1]:.1f}", str(sum(len(mdp.tree) for mdp in processes)), str(len(processes))
        )
    out.print(table)
    growth = sizes[-1] / sizes[1] - 1
    out.print(f"growth from 500 to 2,000 requests: {growth:.1%}")
    return [row("growth of memory from 500 to 2,000 requests", growth, "share", 0.05, higher_is_better=False)]


# -- deadlines -------------------------------------------------------------------------------------------------------


def deadlines(options):
    """Give searches 1, 3 and 6 seconds, and look at what they return and when."""
    process = DecodingMDP(options.model, reward=options.rewards[0])
    prompts = LETTERS if isinstance(process.model, TabularLM) else DEFAULT_PROMPTS
    texts = [f"{prompt}{'' if i < len(prompts) else ' ' + prompts[i % 3]}" for i, prompt in enumerate(prompts * 4)][:20]
    AStarPlanner(process).plan(texts[0], 20)
    table = table_of("20 prompts with a deadline", "deadline, s", "finished", "median over, s", "worst over, s")
    rows = []
    for seconds in (1, 3, 6):
        engine, over, finished = SearchEngine(process.with_empty_tree()), [], 0
        for text in texts:
            start = time.perf_counter()
            plan = engine.submit(text, Budget(seconds=seconds)).result()
            over.append(max(time.perf_counter() - start - seconds, 0.0))
            finished += plan.stop in ("eos", "length", "stop")
        half, worst = float(np.median(over)), max(over)
        table.add_row(str(seconds), f"{finished} of {len(texts)}", f"{half:.3f}", f"{worst:.3f}")
        rows += [
            row(f"finished texts after {seconds} s", finished, "texts", len(texts)),
            row(f"median seconds over {seconds} s", half, "s", higher_is_better=False),
            row(f"most seconds over {seconds} s", worst, "s", higher_is_better=False),
        ]
    out.print(table)
    return rows


# -- equality and cancels --------------------------------------------------------------------------------------------


def same(plan, other, exact):
    """Return whether two plans are equal, or the same text with J within the rounding of a float32 model."""
    if not exact:
        close = np.isclose(plan.objective, other.objective, rtol=0, atol=1e-4, equal_nan=True)  # NaN: unfinished
        return plan.token_ids == other.token_ids and bool(close)
    return (plan.token_ids, plan.objective, plan.lower_bound, plan.upper_bound, plan.usage.lm_tokens) == (
        other.token_ids,
        other.objective,
        other.lower_bound,
        other.upper_bound,
        other.usage.lm_tokens,
    )


def by_threads(ask, requests, count=8):
    with ThreadPoolExecutor(count) as pool:
        return [*pool.map(ask, requests)]


def by_streams(stream, requests):
    """Follow a stream for each request in one event loop; return the best objective of each."""

    async def follow(request):
        best = None
        async for better in stream(request):
            best = better.objective
        return best

    async def together():
        return await asyncio.gather(*map(follow, requests))

    return asyncio.run(together())


class Forwards:
    """Counts the forwards of an engine of a language model, and their longest."""

    def __init__(self, mdp):
        self.begun, self.seconds, engine = 0, 0.0, mdp.tree.engine
        compute = engine.compute

        def counting(*args, **options):
            self.begun, start = self.begun + 1, time.perf_counter()
            try:
                return compute(*args, **options)
            finally:
                self.seconds = max(self.seconds, time.perf_counter() - start)

        engine.compute = counting


async def follow(source):
    async for _ in source:
        pass


async def cut_short(source, seconds, forwards):
    """Cancel a stream after some seconds; return how late that was, and the forwards that begin after it."""
    start = time.perf_counter()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(follow(source), seconds)
    late, begun = time.perf_counter() - start - seconds, forwards.begun
    await asyncio.sleep(0.05)
    return late, forwards.begun - begun


def cancels(process, count, prompts):
    """Cut streams short at random moments.

    Returns:
        Forwards that began after the step under way, most seconds late, and seconds of the longest forward.
    """
    rng, mdp, found = np.random.default_rng(0), process.with_empty_tree(), []
    forwards, engine, planner = Forwards(mdp), SearchEngine(mdp), AStarPlanner(mdp)
    for i in range(count):
        stream = planner.stream if i % 2 else engine.submit
        source = stream(prompts[i % len(prompts)], max_new_tokens=200 + i, logprob_weight=0.5)
        found.append(asyncio.run(cut_short(source, float(rng.uniform(0.01, 0.3)), forwards)))
    engine.close(cancel=True)
    late, after = zip(*found, strict=True)
    return sum(max(begun - 1, 0) for begun in after), max(late), forwards.seconds


def check_model(model, count, prompts, budgets, table):
    """Return the rows of one model: an exact one must give equal numbers, others equal texts and J up to rounding."""
    exact = isinstance(model, TabularLM)
    process = DecodingMDP(model, reward="length", top_k=4)
    requests = make_requests(count, prompts, ["length", "0.5*length + 0.5*distinct"], seed=1, budgets=budgets)
    if exact:
        requests = [dataclasses.replace(request, top_k=min(request.top_k, model.vocab_size)) for request in requests]
    alone = one_after_the_other(process.with_empty_tree(), requests)[0]
    planner, engine = AStarPlanner(process.with_empty_tree()), SearchEngine(process.with_empty_tree())
    rows = []

    def enter(way, equal, of):
        table.add_row(model.name, way, str(of), str(equal))
        rows.append(row(f"equal results, {model.name}, {way}", equal, "plans", of))

    def compare(way, plans):
        enter(way, sum(same(a, b, exact) for a, b in zip(plans, alone, strict=True)), len(alone))

    compare("8 threads, one planner", by_threads(planner.plan, requests))
    compare("8 threads, one engine", by_threads(lambda request: engine.submit(request).result(), requests))
    some, wanted, near = ([*requests] * 2)[:64], ([*alone] * 2)[:64], 0.0 if exact else 1e-4
    for name, stream in (("planner", planner.stream), ("engine", engine.submit)):
        found = by_streams(stream, some)
        equal = sum(
            np.isnan(plan.objective) if best is None else abs(best - plan.objective) <= near
            for best, plan in zip(found, wanted, strict=True)
        )
        enter(f"64 streams of the {name}", equal, 64)
    compare("one thread afterwards", [planner.plan(request) for request in requests])
    engine.close()
    count = 100 if exact else 10
    after, late, longest = cancels(process, count, prompts)
    enter(
        "one thread after the cancels",
        sum(same(planner.plan(r), p, exact) for r, p in zip(some, wanted, strict=True)),
        64,
    )
    out.print(
        f"{model.name}, {count} cancels: {after} forwards began after the step in which it came; "
        f"asyncio.wait_for returned at most {late:.3f} s late; the longest forward took {longest:.3f} s"
    )
    return [*rows, row(f"forwards after a cancel, {model.name}", after, "forwards", 0, higher_is_better=False)]


def check(options):
    """Compare what many threads and streams get with what each request gets alone; cancel searches at random."""
    table = table_of("results against those made alone", "model", "way", "requests", "equal")
    rows = check_model(TabularLM.random(8, 2, seed=3), 200, LETTERS[:4], (20, 40, 80, 120), table)
    if options.model != "toy":
        rows += check_model(load_language_model(options.model), 40, DEFAULT_PROMPTS, (6, 12, 20), table)
    out.print(table)
    return rows


PARTS = {part.__name__: part for part in (speed, chat, memory, deadlines, check)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--check", action="store_true", help="the part check, and no other unless it is named")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rewards", nargs="+", default=["sentiment", "length", "0.7*sentiment + 0.3*length"])
    add_json_option(parser)
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    parts = [*options.parts, *(["check"] if options.check and "check" not in options.parts else [])]
    write([one for part in parts or ["speed", "chat", "memory"] for one in PARTS[part](options)], options.json)


if __name__ == "__main__":
    main()
