"""The search engine: results equal those made alone, whatever the threads, event loops, cancels, errors and splits."""

import asyncio
import concurrent.futures
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qstar_decoding.agents import (
    AStarPlanner,
    Budget,
    LookAheadHeuristic,
    Request,
    SamplingDecoder,
    SearchEngine,
    ZeroHeuristic,
    make_decoder,
)
from qstar_decoding.agents.search import slow_rewards
from qstar_decoding.envs import Constraint, DecodingMDP, ForcedStrings, RegexConstraint, TabularLM, TokenDecodingEnv
from qstar_decoding.errors import (
    ConfigurationError,
    ConstraintError,
    DeadlineError,
    EngineClosedError,
    HeuristicError,
    PromptError,
    QueueFullError,
    RewardError,
)
from qstar_decoding.rewards import as_reward

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

LM = TabularLM.random(6, 2, seed=3)

spread = as_reward(lambda prompt, text: len(set(text)) / 6, lower=0, upper=1)
vowels = as_reward(lambda prompt, text: sum(letter in "ae" for letter in text) / 20, lower=0, upper=1)


def make(lm=LM, **options):
    return DecodingMDP(lm, **{"reward": spread, "top_k": 4, "max_new_tokens": 5, **options})


def facts(plan):
    usage = (plan.usage.lm_tokens, plan.usage.reward_calls, plan.usage.pops)
    bounds = (plan.lower_bound, plan.upper_bound, plan.certified, plan.stop_reason)
    return plan.token_ids, plan.objective, *bounds, *usage, [c.token_ids for c in plan.completions]


def random_request(rng):
    """Return a request whose settings are drawn; every setting is left open half of the time."""
    values = {
        "reward": [spread, vowels],
        "max_new_tokens": [2, 4, 7],
        "stop": ["b", ("c", "ab"), ()],
        "constraint": [ForcedStrings("d"), RegexConstraint("[a-d]*"), ()],
        "logprob_weight": [0.0, 0.1, 0.5],
        "top_k": [2, 3, 6],
        "n": [1, 3],
        "seed": [0, 7],
        "heuristic": [ZeroHeuristic()],
        "decoder": ["beam", "sample", "mcts", "astar"],
    }
    changes = {name: some[rng.integers(len(some))] for name, some in values.items() if rng.random() < 0.5}
    budgets = [Budget(int(rng.integers(1, 40))), Budget(lm_tokens=30, gap=0.2), Budget(lm_tokens=40, patience=5)]
    budgets += [Budget(pops=20), Budget(lm_tokens=30, target=0.5), Budget(lm_tokens=60, reward_calls=4)]
    prompt = "".join(rng.choice(list("abcd"), size=rng.integers(1, 4)))
    return Request(prompt, budgets[rng.integers(len(budgets))], **changes)


REQUESTS = [random_request(np.random.default_rng([7, i])) for i in range(60)]


def outcome(work):
    """Return the facts of a plan, or the error that there is instead."""
    try:
        return facts(work())
    except ConstraintError as error:
        return str(error)


def alone(request):
    decoder = make_decoder(request.decoder or "astar", make())
    return outcome(lambda: decoder.plan(request.prompt, request.budget, **request.changes))


@pytest.fixture(scope="module")
def wanted():
    return [alone(request) for request in REQUESTS]


@pytest.mark.parametrize(("tick_edges", "count"), [(256, 200), (7, 25)])
def test_8_threads_of_200_requests_get_what_they_get_alone(wanted, tick_edges, count):
    engine = SearchEngine(make(), max_live=8, tick_edges=tick_edges)
    wrong, failures = [], []

    def work(seed):
        try:
            rng = np.random.default_rng([1, seed])
            for _ in range(count):
                i = int(rng.integers(len(REQUESTS)))
                if outcome(lambda i=i: engine.submit(REQUESTS[i]).result(60)) != wanted[i]:
                    wrong.append(i)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failures
    assert not wrong
    assert [outcome(engine.submit(request).result) for request in REQUESTS] == wanted  # and afterwards
    assert (engine.live, engine.waiting) == (0, 0)


def test_8_threads_of_200_plans_on_one_planner_get_what_they_get_alone(wanted):
    mdp = make()
    decoders = {name: make_decoder(name, mdp) for name in ("beam", "sample", "mcts", "astar")}

    def work(seed):
        rng, wrong = np.random.default_rng([2, seed]), []
        for _ in range(200):
            i = int(rng.integers(len(REQUESTS)))
            r = REQUESTS[i]
            decoder = decoders[r.decoder or "astar"]
            if outcome(lambda r=r, d=decoder: d.plan(r.prompt, r.budget, **r.changes)) != wanted[i]:
                wrong.append(i)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(work, range(8))] == [[]] * 8


def test_64_streams_of_one_event_loop(wanted):
    engine = SearchEngine(make(), max_live=16)

    async def follow(i):
        request = REQUESTS[i % len(REQUESTS)]
        handle, found = engine.submit(request), []
        try:
            found.extend([better.objective async for better in handle])
            plan = await handle
        except ConstraintError as error:
            return str(error)
        assert found == sorted(found)
        if found and request.decoder != "sample":
            assert found[-1] == plan.objective
        return facts(plan)

    async def together():
        return await asyncio.gather(*(follow(i) for i in range(64)))

    assert asyncio.run(together()) == [wanted[i % len(REQUESTS)] for i in range(64)]


def test_100_random_cancels_leave_the_engine_right(wanted):
    engine, rng = SearchEngine(make(), max_live=8, tick_edges=16), np.random.default_rng(0)
    handles = []
    for _ in range(100):
        handles.append(engine.submit("abcd"[rng.integers(4)], max_new_tokens=200, top_k=6))  # hours of work
        for _ in range(int(rng.integers(3))):
            handles[rng.integers(len(handles))].cancel()
        if rng.random() < 0.3:
            i = int(rng.integers(len(REQUESTS)))
            handle = engine.submit(REQUESTS[i])
            for other in handles:
                other.cancel()
            assert outcome(lambda h=handle: h.result(60)) == wanted[i]
    for handle in handles:
        handle.cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            handle.result(60)
        assert handle.cancelled()
    assert [outcome(engine.submit(request).result) for request in REQUESTS] == wanted
    assert (engine.live, engine.waiting) == (0, 0)


class Counting(TabularLM):
    """A model that counts the tokens it processes, and can be told to wait at each forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens, self.gate = 0, None

    def forward(self, sequences):
        if self.gate is not None:
            self.gate.acquire(timeout=60)
        self.tokens += len(sequences)
        return super().forward(sequences)


ENDLESS = {"max_new_tokens": 200, "top_k": 6, "reward": as_reward(lambda prompt, text: 0.0, lower=0, upper=1)}


def settled(model, engine=None):
    """Return the tokens that the model has processed once nothing runs any more."""
    if engine is not None:
        engine.close()
    last = -1
    while last != model.tokens:
        last = model.tokens
        time.sleep(0.05)
    return last


@pytest.mark.parametrize("how", ["cancel", "wait_for", "task", "dropped"])
def test_a_cancelled_search_ends_before_its_next_forward(how):
    model = Counting.random(6, 2, seed=3)
    engine, ticks = SearchEngine(make(model)), []
    handle = engine.submit("a", progress=lambda search: ticks.append(model.tokens), **ENDLESS)
    while len(ticks) < 5:
        time.sleep(0.001)
    model.gate = threading.Semaphore(0)  # the forward that runs now, or the next one, is the last

    async def cancel():
        nonlocal handle
        if how == "wait_for":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(handle, 0.01)
            return

        async def follow():
            async for _ in handle:
                pass

        task = asyncio.create_task(follow())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    if how == "cancel":
        assert handle.cancel()
    elif how in ("wait_for", "task"):
        asyncio.run(cancel())
    before = model.tokens
    if how == "dropped":
        del handle
        gc.collect()
    model.gate.release(10**6)
    assert settled(model, engine) - before <= 256  # the forward that was under way, of one tick
    assert engine.live == 0


@pytest.mark.parametrize("how", ["aclose", "task", "wait_for"])
def test_a_stream_ends_before_its_next_forward(how):
    model = Counting.random(6, 2, seed=3)
    stream = AStarPlanner(make(model), width=4).stream("a", 10**6, **ENDLESS)

    async def run():
        await anext(stream)
        model.gate = threading.Semaphore(0)
        task = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.05)  # it waits in its forward
        if how == "aclose":
            await stream.aclose()
        elif how == "task":
            task.cancel()
            await asyncio.sleep(0)  # the loop delivers it
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(task, 0.01)
        before = model.tokens
        model.gate.release(10**6)
        with pytest.raises((asyncio.CancelledError, StopAsyncIteration)):
            await task
        await asyncio.sleep(0.1)
        return before

    before = asyncio.run(run())
    assert model.tokens - before <= 8  # the forward that was under way
    assert stream.plan.stop_reason == "cancelled"
    assert stream.plan.completions
    assert next(stream, None) is None


def test_a_full_queue_says_so_and_a_cancelled_request_leaves_it():
    engine = SearchEngine(make(), max_live=2, max_waiting=3)
    handles = [engine.submit("a", **ENDLESS) for _ in range(2)]
    while engine.live < 2:
        time.sleep(0.001)
    handles += [engine.submit("b", **ENDLESS) for _ in range(3)]
    with pytest.raises(QueueFullError, match="2 searches run and 3 requests wait"):
        engine.submit("c", 10)
    handles[3].cancel()
    handles.append(engine.submit("c", 10))
    for handle in handles[:-1]:
        handle.cancel()
    assert facts(handles[-1].result(60)) == facts(AStarPlanner(make()).plan("c", 10))


def test_a_deadline_returns_the_best_finished_text():
    engine = SearchEngine(make(), max_live=4)
    handles = [engine.submit("abcd"[i % 4], Budget(seconds=0.5), top_k=6, max_new_tokens=40) for i in range(8)]
    plans = [handle.result(60) for handle in handles[:4]]
    for plan in plans:
        assert plan.stop in ("eos", "length", "stop")
        assert plan.stop_reason in ("budget", "certified", "exhausted")
    # Seconds count from the moment of submission: for those that waited there are none left.
    assert all(plan.trace[-1].seconds >= 0.5 for plan in plans if plan.stop_reason == "budget")
    for handle in handles[4:]:
        with pytest.raises(DeadlineError, match=r"the 0\.5 seconds of the request passed while it waited"):
            handle.result(60)


def test_nothing_is_computed_for_a_request_whose_deadline_passes_while_it_waits():
    model = Counting.random(6, 2, seed=3)
    engine = SearchEngine(make(model), max_live=1)
    late = engine.submit("a", Budget(seconds=1e-9))
    with pytest.raises(TimeoutError, match="larger max_live"):
        late.result(60)
    assert late.done()
    assert not late.cancelled()
    assert [*engine.submit("b", Budget(lm_tokens=20))][-1].stop == "length"
    busy = engine.submit("c", **ENDLESS)
    waiting = [engine.submit("d", Budget(seconds=0.05)), engine.submit("d", 20)]
    with pytest.raises(DeadlineError):  # while the other search goes on
        waiting[0].result(60)
    assert not busy.done()
    busy.cancel()
    assert facts(waiting[1].result(60)) == facts(AStarPlanner(make()).plan("d", 20))


def test_ticks_are_small_while_a_search_with_a_deadline_has_no_text():
    sizes, urgent = [], threading.Event()

    class Sized(TabularLM):
        def forward(self, sequences):
            sizes.append((urgent.is_set(), len(sequences)))
            return super().forward(sequences)

    engine = SearchEngine(AStarPlanner(make(Sized.random(6, 2, seed=3)), width=500), tick_edges=160)
    long = engine.submit("a", **{**ENDLESS, "max_new_tokens": 100})
    while not sizes or max(sizes)[1] < 100:
        time.sleep(0.001)
    quick = engine.submit("b", Budget(seconds=60, lm_tokens=40), top_k=4, max_new_tokens=30)
    next(iter(quick))  # its first text, of up to 30 ticks
    urgent.set()
    long.cancel()
    quick.result(60)
    last = [size for is_after, size in sizes if not is_after]
    assert min(last[-12:]) <= 160 // 8 + 1
    assert quick.best.stop in ("eos", "length")


def test_a_short_request_is_not_held_up_by_long_ones():
    engine, begun = SearchEngine(AStarPlanner(make(), width=500), tick_edges=64), threading.Event()
    edges = []

    def progress(search):
        edges.append(search.size)
        begun.set()

    long = [engine.submit(p, progress=progress, **{**ENDLESS, "max_new_tokens": 100}) for p in ("a", "b")]
    assert begun.wait(60)
    while engine.live < 2 or max(edges) < 2000:
        time.sleep(0.001)
    ticks = []
    request = Request("a", Budget(lm_tokens=8), decoder="beam")
    short = engine.submit(request, progress=lambda search: ticks.append(engine.ticks))
    begun_at = engine.ticks
    plan = short.result(60)
    assert facts(plan) == facts(make_decoder("beam", make()).plan("a", 8))
    # A step of the short one is a tick: 5 levels, and the tick that sees the end.
    assert ticks[-1] - ticks[0] <= 5
    assert len(ticks) >= 3
    assert begun_at <= ticks[0]
    for handle in long:
        handle.cancel()


def test_large_steps_are_split_when_others_wait():
    sizes = []

    class Sized(TabularLM):
        def forward(self, sequences):
            sizes.append(len(sequences))
            return super().forward(sequences)

    planner = AStarPlanner(make(Sized.random(6, 2, seed=3)), width=300)
    changes = {"max_new_tokens": 6, "top_k": 6}
    engine = SearchEngine(planner, tick_edges=20)
    plans = [handle.result(60) for handle in [engine.submit(p, 900, **changes) for p in ("a", "b", "c")]]
    assert max(sizes) <= 20
    whole = AStarPlanner(make(), width=300)
    assert [facts(plan) for plan in plans] == [facts(whole.plan(p, 900, **changes)) for p in ("a", "b", "c")]
    assert [len(plan.trace) for plan in plans] == [len(whole.plan(p, 900, **changes).trace) for p in ("a", "b", "c")]
    look = {"heuristic": LookAheadHeuristic(2), "top_k": 6}
    assert facts(engine.submit("a", 300, **look).result(60)) == facts(whole.plan("a", 300, **look))


def test_results_are_the_same_when_every_reward_is_asked_in_a_thread(wanted, monkeypatch):
    monkeypatch.setattr(slow_rewards, "SLOW", 0.0)
    asked = set()

    def ask(self, *args):
        asked.add(threading.current_thread().name)
        return plain(self, *args)

    plain = slow_rewards.SlowRewards.ask
    monkeypatch.setattr(slow_rewards.SlowRewards, "ask", ask)
    for tick_edges in (256, 5):
        engine = SearchEngine(make(), max_live=8, tick_edges=tick_edges)
        with ThreadPoolExecutor(8) as pool:
            found = [*pool.map(lambda request, e=engine: outcome(lambda: e.submit(request).result(60)), REQUESTS)]
        assert found == wanted
    assert asked == {"qstar reward"}
    planner = AStarPlanner(make(), width=300)  # and so are the steps that the trace tells of
    plan = SearchEngine(planner, tick_edges=20).submit("a", 300, top_k=6).result(60)
    assert [p[:1] + p[2:] for p in plan.trace] == [p[:1] + p[2:] for p in planner.plan("a", 300, top_k=6).trace]


class Gated:
    """A reward that waits for leave, as one that asks a service."""

    def __init__(self):
        self.gate, self.asked, self.together, self.at_once = threading.Semaphore(0), 0, [], 0

    def __call__(self, prompts, completions, **_):
        self.at_once += 1
        assert self.at_once == 1
        self.asked += 1
        self.together.append(len(completions))
        self.gate.acquire(timeout=60)
        self.at_once -= 1
        return [len(set(text)) / 6 for text in completions]


def test_other_searches_go_on_while_a_slow_reward_is_asked(monkeypatch):
    judge = Gated()
    reward = as_reward(judge, lower=0, upper=1)
    engine = SearchEngine(make(), max_live=16)
    engine._rewards._seconds[reward] = 1.0  # as after a call that took a second
    slow = [engine.submit(Request(p, 40, decoder="beam", reward=reward)) for p in ("a", "b", "c")]
    while not judge.asked:
        time.sleep(0.001)
    wanted = facts(AStarPlanner(make()).plan("d", 40))
    assert [facts(engine.submit("d", 40).result(60)) for _ in range(3)] == [wanted] * 3
    assert not any(handle.done() for handle in slow)
    while sum(job.active.awaited is not None for job in engine._live) < 3:
        time.sleep(0.001)
    assert slow[2].cancel()  # one that waits for the reward
    late = engine.submit("c", 40)
    assert facts(late.result(60)) == facts(AStarPlanner(make()).plan("c", 40))
    judge.gate.release(10**6)
    for handle, prompt in zip(slow[:2], "ab", strict=True):
        assert facts(handle.result(60)) == facts(make_decoder("beam", make()).plan(prompt, 40))
    assert max(judge.together) > judge.together[0]  # what had to wait was asked together
    engine.close()
    assert not engine._rewards._waiting


def test_a_slow_reward_that_raises_fails_the_requests_that_need_it(wanted):
    def broken(prompt, text):
        if prompt == "b":
            raise ZeroDivisionError("broken")
        return len(set(text)) / 6

    reward = as_reward(broken, lower=0, upper=1)
    engine = SearchEngine(make(), max_live=16)
    engine._rewards._seconds[reward] = 1.0
    handles = [engine.submit(p, 40, reward=reward) for p in "abcb"]
    for handle, prompt in zip(handles, "abcb", strict=True):
        if prompt == "b":
            with pytest.raises(RewardError, match="broken"):
                handle.result(60)
        else:
            assert facts(handle.result(60)) == facts(AStarPlanner(make()).plan(prompt, 40))
    assert outcome(engine.submit(REQUESTS[0]).result) == wanted[0]


class Refusing(Constraint):
    def bind(self, model, prompt=None):
        raise KeyError("keyword")


class Breaking(Constraint):
    """Raises after two tokens."""

    def bind(self, model):
        rule = ForcedStrings("a").bind(model)
        allowed = rule.allowed

        def breaks(token_ids):
            if len(token_ids) > 1:
                raise RuntimeError("this constraint is broken")
            return allowed(token_ids)

        rule.allowed = breaks
        return rule


def raising(*args, **kwargs):
    raise ZeroDivisionError("broken")


def too_good(prompts, completions, **_):
    return [5.0] * len(completions)


def failing_progress(search):
    raise OSError("nobody listens")


FAULTS = [
    ({"reward": raising}, (RewardError, ZeroDivisionError), "broken|division"),
    ({"reward": as_reward(too_good, lower=0, upper=1)}, RewardError, "5"),
    ({"heuristic": raising}, HeuristicError, "ZeroDivisionError"),
    ({"heuristic": lambda mdp, prompts, nodes: np.full((len(nodes), 4), np.nan)}, HeuristicError, "NaN"),
    ({"constraint": Refusing()}, ConfigurationError, "KeyError"),
    ({"constraint": Breaking()}, RuntimeError, "this constraint is broken"),
    ({"constraint": RegexConstraint("abcdabcd")}, ConstraintError, "satisfies the constraint"),
    ({"progress": failing_progress}, OSError, "nobody listens"),
]


def test_an_error_of_one_request_fails_that_request_only(wanted):
    engine, rng = SearchEngine(make(), max_live=64), np.random.default_rng(0)
    work = [(i, None) for i in range(len(REQUESTS))] + [(None, fault) for fault in FAULTS * 3]
    handles = []
    for number in rng.permutation(len(work)).tolist():
        i, fault = work[number]
        handles.append((i, fault, engine.submit(REQUESTS[i]) if fault is None else engine.submit("a", 60, **fault[0])))
    for i, fault, handle in handles:
        if fault is None:
            assert outcome(lambda h=handle: h.result(60)) == wanted[i]
        else:
            with pytest.raises(fault[1], match=fault[2]):
                handle.result(60)
    assert [outcome(engine.submit(request).result) for request in REQUESTS[:20]] == wanted[:20]


def test_a_strategy_that_raises_fails_its_request_only():
    class Broken(SamplingDecoder):
        def select(self, search):
            yield from SamplingDecoder.select(self, search) if search.size > 10**6 else []
            raise ZeroDivisionError("broken")

    engine = SearchEngine(make())
    handles = [engine.submit(Request("a", 20, decoder=Broken(engine.mdp))), engine.submit("a", 20)]
    with pytest.raises(ZeroDivisionError, match="broken"):
        handles[0].result(60)
    assert facts(handles[1].result(60)) == facts(AStarPlanner(make()).plan("a", 20))


def test_handles_can_be_followed_without_an_event_loop():
    engine = SearchEngine(make())
    handle = engine.submit("a", 40)
    found = [completion.objective for completion in handle]
    assert found == sorted(set(found))
    assert handle.done()
    assert handle.best.objective == found[-1] == handle.result().objective
    assert not handle.cancel()
    waiting = engine.submit("b", **ENDLESS)
    with pytest.raises(TimeoutError):
        waiting.result(0.01)
    waiting.cancel()
    assert isinstance([*waiting], list)  # ends without an error


def test_a_stopped_search_returns_what_it_has():
    engine, found = SearchEngine(make()), threading.Event()
    handle = engine.submit("a", progress=lambda search: found.set() if search.best else None, **ENDLESS)
    assert found.wait(60)
    handle.stop()
    plan = handle.result(60)
    assert plan.stop_reason == "interrupted"
    assert plan.stop in ("eos", "length")
    assert not plan.certified
    at_once = engine.submit("a", **ENDLESS)
    at_once.stop()
    assert at_once.result(60).stop_reason == "interrupted"


def test_nobody_else_has_the_handle_while_it_is_awaited():
    async def run():
        engine = SearchEngine(make())
        plan = await engine.submit("a", 30)
        gc.collect()
        found = [better async for better in engine.submit("a", 30)]
        return facts(plan), found[-1].objective

    plan, best = asyncio.run(run())
    assert plan == facts(AStarPlanner(make()).plan("a", 30))
    assert best == plan[1]


def test_closing_drains_or_cancels():
    with SearchEngine(make(), max_live=2) as engine:
        handles = [engine.submit(prompt, 30) for prompt in "abcd"]
    assert all(handle.done() for handle in handles)
    assert [facts(h.result()) for h in handles] == [facts(AStarPlanner(make()).plan(p, 30)) for p in "abcd"]
    with pytest.raises(EngineClosedError, match="was closed"):
        engine.submit("a", 10)
    engine.close()

    def fail():
        with SearchEngine(make(), max_live=2) as engine:
            handles.extend(engine.submit(prompt, **ENDLESS) for prompt in "abcd")
            raise OSError("of the caller")

    with pytest.raises(OSError, match="of the caller"):
        fail()
    assert all(handle.cancelled() for handle in handles[4:])


def test_an_engine_shares_its_model_with_planners_and_environments():
    mdp = make()
    engine, planner = SearchEngine(mdp), AStarPlanner(mdp)
    env = TokenDecodingEnv(LM, prompts=["a", "bd"], reward=spread, top_k=4, max_new_tokens=5)
    wanted, busy = facts(AStarPlanner(make()).plan("c", 40)), engine.submit("d", **ENDLESS)
    for seed in range(20):
        assert facts(planner.plan("c", 40)) == wanted
        assert facts(engine.submit("c", 40).result(60)) == wanted
        env.reset(seed=seed)
        while not env.step(0)[2]:
            pass
    assert busy.cancel()


def test_what_is_wrong_with_a_request_is_said_when_it_is_submitted():
    engine = SearchEngine(make())
    for request, error, message in (
        (lambda: engine.submit(""), PromptError, "a prompt is empty"),
        (lambda: engine.submit("a" * 1020), PromptError, "has 1020 tokens"),
        (lambda: engine.submit("a", rewrd=spread), ConfigurationError, "did you mean 'reward'"),
        (lambda: engine.submit(Request("a", top_k=0)), ConfigurationError, "top_k"),
        (lambda: engine.submit(Request("a", decoder="bean")), ConfigurationError, "'beam'"),
        (lambda: engine.submit(Request("a", decoder=3)), ConfigurationError, "decoder is a name or a Decoder"),
        (
            lambda: engine.submit(Request("a", decoder=AStarPlanner(make(TabularLM.random(6, 2, seed=4))))),
            ConfigurationError,
            "engine.mdp",
        ),
        (lambda: SearchEngine(make(), top_k=3), ConfigurationError, "top_k: a DecodingMDP has its settings"),
        (lambda: SearchEngine(make(), max_live=0), ConfigurationError, "max_live"),
        (
            lambda: SearchEngine("toy", rewardd="length"),
            ConfigurationError,
            "SearchEngine has .* did you mean 'reward'",
        ),
        (lambda: SearchEngine(3), ConfigurationError, "TokenDecoding environment or a DecodingMDP"),
    ):
        with pytest.raises(error, match=message):
            request()
    assert engine.ticks == 0
    named = SearchEngine("toy", reward="length", top_k=3)
    assert named.mdp.top_k == 3
    plan = named.submit(Request("a", 10)).result(60)
    assert named.decoder.resume(plan, 10).usage.lm_tokens >= plan.usage.lm_tokens


def test_requests_of_one_engine_compute_a_shared_beginning_once(tiny_lm):
    lm = tiny_lm("Llama")
    engine = SearchEngine(lm, reward="length", top_k=4, max_new_tokens=3)
    kind, computed = type(engine.mdp.tree.engine), []
    forward = kind._forward

    def counting(self, rows, *args):
        computed.append(len(rows))
        return forward(self, rows, *args)

    header = " ".join(f"w{i}" for i in range(2, 22))
    several = [{}, {"top_k": 6}, {"max_new_tokens": 2}, {"reward": vowels}, {"constraint": ForcedStrings("w7")}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_forward", counting)
        handles = [engine.submit(f"{header} w{25 + i}", 1, **changes) for i, changes in enumerate(several)]
        plans = [handle.result(60) for handle in handles]
    # 20 tokens of the header, and of each request its last word and one token of its text.
    assert sum(computed) - 20 <= 2 * len(several)
    assert all(plan.usage.prompt_tokens == 21 for plan in plans)


SECOND_TURNS = [
    {},
    {"top_k": 6},
    {"max_new_tokens": 2, "reward": vowels},
    {"constraint": ForcedStrings("w7")},
    {"stop": "w9", "logprob_weight": 0.5, "decoder": "beam"},
]


@pytest.mark.parametrize("through", ["engine", "plan"])
def test_a_second_turn_computes_its_new_tokens_only(new_tiny_lm, through):
    lm = new_tiny_lm("Llama")
    engine = SearchEngine(lm, reward="length", top_k=4, max_new_tokens=3, max_prefixes=60)
    planner = AStarPlanner(engine.mdp)
    kind, computed = type(engine.mdp.tree.engine), []
    forward = kind._forward

    def counting(self, rows, *args):
        computed.append(len(rows))
        return forward(self, rows, *args)

    def ask(prompt, budget, **changes):
        if through == "engine" or "decoder" in changes:
            return engine.submit(Request(prompt, budget, **changes)).result(60)
        return planner.plan(prompt, budget, **changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_forward", counting)
        chat = " ".join(f"w{i}" for i in range(2, 32))
        plan = ask(chat, 4)
        assert sum(computed) >= 30
        for turn, changes in enumerate(SECOND_TURNS):
            if through == "engine":  # other settings, and so many prefixes that those of the first turn are evicted
                handles = [engine.submit(f"w{turn} w{i}", 12, logprob_weight=i / 100) for i in range(70)]
                assert all(handle.result(60).completions for handle in handles)
            computed.clear()
            written = " ".join(lm.decode([token]) for token in plan.token_ids if token > 1)
            ask(f"{chat} {written} w3{turn} w4", 4, **changes)
            # The new words, the last of the text (which ended it, and was not processed), and the search itself.
            assert sum(computed) <= 2 + 1 + 4


def test_a_second_turn_is_right_where_memory_was_short(tiny_lm):
    lm = tiny_lm("Llama")
    alone = {"reward": "length", "top_k": 4, "max_new_tokens": 3}
    token_bytes = 2 * 2 * 2 * 8 * 4  # keys and values of 2 layers with 2 heads of 8 float32
    engine = SearchEngine(lm, kv_budget=50 * token_bytes, **alone)
    chat = " ".join(f"w{i}" for i in range(2, 32))
    first = engine.submit(chat, 6).result(60)
    for i in range(12):
        engine.submit(f"w{i + 2} w{i + 3} " * 8, 6).result(60)
    assert engine.mdp.tree.kv_bytes <= 50 * token_bytes
    for prompt in (chat, f"{chat} w9"):
        plan, other = engine.submit(prompt, 6).result(60), AStarPlanner(DecodingMDP(lm, **alone)).plan(prompt, 6)
        assert plan.token_ids == other.token_ids
        assert plan.objective == pytest.approx(other.objective, abs=1e-5)
    assert first.usage.prompt_tokens == 30


def test_memory_of_an_engine_is_bounded():
    engine, rng = SearchEngine(LM, reward=spread, top_k=4, max_new_tokens=5, max_prefixes=300), np.random.default_rng(0)
    prefixes, known = [], []
    for _ in range(20):
        handles = [
            engine.submit("".join(rng.choice(list("abcd"), size=8)), 30, logprob_weight=float(rng.integers(4)))
            for _ in range(20)
        ]
        assert all(handle.result(60).completions for handle in handles)
        processes = [engine.mdp, *engine.decoder.processes._made.values()]
        prefixes.append(sum(len(mdp.tree) for mdp in processes))
        known.append(sum(len(mdp._encoded) + len(mdp._texts) for mdp in processes))
    assert max(prefixes) <= 2 * 300 + 20 * 31  # of the process, of those made of it, and of what is live
    assert max(known) <= 2 * max(prefixes)
    assert len(engine._recent.handle) <= 2 * 128
    assert SearchEngine("toy").mdp.max_prefixes == 1 << 14


def test_submitting_does_not_wait_for_a_forward():
    model = Counting.random(6, 2, seed=3)
    engine = SearchEngine(make(model))
    busy = engine.submit("a", **ENDLESS)
    while not engine.ticks:
        time.sleep(0.001)
    model.gate = threading.Semaphore(0)
    while model.lock._owner is None:  # the engine's thread is in a forward, and stays there
        time.sleep(0.001)
    time.sleep(0.01)
    before = model.tokens
    handles = [
        engine.submit("b", 10, **changes)
        for changes in ({}, {"top_k": 2}, {"constraint": ForcedStrings("d")}, {"max_new_tokens": 3, "reward": vowels})
    ]
    assert model.tokens == before
    assert engine.waiting == 4
    busy.cancel()
    model.gate.release(10**6)
    assert all(handle.result(60).completions for handle in handles)


def test_the_embedded_model_serves_requests_of_several_threads(lm):
    options = {"reward": "length", "top_k": 4, "max_new_tokens": 4}
    engine = SearchEngine(DecodingMDP(lm, **options))
    requests = [
        Request("The play was", 12),
        Request("The play was", 12, top_k=3),
        Request("The hotel", 12, constraint=RegexConstraint(r" [a-z]+( [a-z]+)*")),
        Request("The hotel", 12, decoder="beam", max_new_tokens=3),
    ]
    wanted = [
        make_decoder(r.decoder or "astar", DecodingMDP(lm, **options)).plan(r.prompt, r.budget, **r.changes)
        for r in requests
    ]
    with ThreadPoolExecutor(4) as pool:
        plans = [*pool.map(lambda request: engine.submit(request).result(120), requests * 2)]
    for plan, other in zip(plans, wanted * 2, strict=True):
        assert plan.token_ids == other.token_ids
        assert plan.objective == pytest.approx(other.objective, abs=1e-4)
