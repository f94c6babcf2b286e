"""Searches that a page watches, all of one language model in one search engine."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from ..agents import BoundHeuristic, Decoder, Plan, Search, SearchEngine, SearchHandle
from ..agents import Request as PlanRequest
from ..agents.learning.q_heuristic import shipped_heuristic
from ..agents.planning.registry import by_command, decoder_options, make_decoder
from ..agents.search.snapshot import SearchTree
from ..envs import DecodingMDP, LanguageModel, load_prompts
from ..envs.constraints import Constraint, Rule
from ..envs.prompts import Prompt, as_prompt
from ..errors import ConfigurationError, QStarError, UnknownNameError
from ..files import to_jsonable
from ..tasks import Task, load_task, task_names

__all__ = ["LIMITS", "Request", "Run", "Runs", "examples"]

LIMITS = {
    "prompt": 8000,
    "budget": 5000,
    "max_new_tokens": 64,
    "top_k": 32,
}  # characters, LM tokens, tokens, candidates
_KEPT = 50  # runs; older ones are dropped
_EVERY = 0.1  # seconds between two reports of a search at most


class Start(BaseModel):
    """A node of an earlier run to go on from."""

    model_config = ConfigDict(extra="forbid")

    run: int
    node: int = Field(ge=0)


class Request(BaseModel):
    """A request of the page."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = ""
    task: str = "sentiment"
    # A weighted sum of names: one with arguments could name a folder of this machine.
    reward: str | None = Field(None, max_length=1000, pattern=r"^[\w\s.*+-]+$")
    decoder: str = "astar"
    q: Literal["shipped", "none"] = "shipped"
    budget: int = Field(200, ge=1)
    logprob_weight: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=1)
    max_new_tokens: int | None = Field(None, ge=1)
    seed: int = 0
    start: Start | None = None

    def check(self) -> None:
        """Check before any work the values that a page can get wrong.

        Raises:
            ConfigurationError: Something is longer or larger than the page allows, or there is no such task or decoder.
        """
        if len(self.prompt) > LIMITS["prompt"]:
            raise ConfigurationError(
                f"the prompt has {len(self.prompt):,} characters; at most {LIMITS['prompt']:,} work"
            )
        for name in ("budget", "max_new_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None and value > LIMITS[name]:
                raise ConfigurationError(f"{name} is {value:,}; this page allows at most {LIMITS[name]:,}")
        if self.task not in task_names():  # no paths: a page must not read files of this machine
            raise UnknownNameError("task", self.task, task_names())
        by_command(self.decoder)


class Beginning(Constraint, Rule):
    """Constraint that completions begin with given tokens: a search goes on from a node, with J from the prompt on."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        """Take the tokens from the prompt to the node."""
        self.token_ids, self._size = tuple(token_ids), 0

    def bind(self, model: LanguageModel) -> Rule:
        """Return itself: token ids need no translation."""
        self._size = model.vocab_size
        return self

    def allowed(self, token_ids: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return which tokens may follow, bool [V]: the one at this place, or any after the last."""
        allowed = np.full(self._size, len(token_ids) >= len(self.token_ids))
        allowed[list(self.token_ids[len(token_ids) : len(token_ids) + 1])] = True
        return allowed

    def accepts(self, text: str, token_ids: Sequence[int]) -> bool:
        """Tell whether a completion begins with all of them."""
        return tuple(token_ids[: len(self.token_ids)]) == self.token_ids


class Run:
    """One search and its events.

    Attributes:
        number: Its place among all runs.
        request: The request.
        prompt: The prompt.
        tree: The searched tree; None until the end. The search itself, with its keys and values, is dropped then.
        facts: Results in words; empty until the end.
        events: The events so far, as plain dicts; the last one has ``"kind": "done"`` or ``"failed"``.
        is_over: Whether there will be no more events.
    """

    def __init__(self, number: int, request: Request, prompt: Prompt) -> None:
        """Begin with nothing told."""
        self.number, self.request, self.prompt = number, request, prompt
        self.tree: SearchTree | None = None
        self.facts: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        self.is_over = False
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._handle: SearchHandle | None = None
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()  # listeners

    def stop(self) -> None:
        """End it with what it has."""
        self._stop.set()
        if self._handle is not None:
            self._handle.stop()

    def tell(self, event: dict[str, Any], *, last: bool = False) -> None:
        """Add an event and wake all listeners; called by the searching thread."""
        with self._lock:
            self.events.append(event)
            self.is_over = last
            for loop, changed in self._waiting:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(changed.set)

    async def listen(self, first: int = 0, patience: float = 15.0) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the events from ``first`` on until the run is over.

        A listener holds no thread while it waits, and is gone as soon as its task is cancelled.

        Args:
            first: Index of the first event.
            patience: Seconds of silence after which None is yielded, again and again.
        """
        index, changed = first, asyncio.Event()
        listener = asyncio.get_running_loop(), changed
        with self._lock:
            self._waiting.add(listener)
        try:
            while True:
                changed.clear()
                while index < len(self.events):
                    yield self.events[index]
                    index += 1
                if self.is_over:
                    if index >= len(self.events):
                        return
                    continue
                try:
                    async with asyncio.timeout(patience):  # wait_for can swallow a cancel in Python 3.11
                        await changed.wait()
                except TimeoutError:
                    yield None
        finally:
            with self._lock:
                self._waiting.discard(listener)

    def work(self, mdp: DecodingMDP, task: Task, engine: SearchEngine) -> None:
        """Search and report events."""
        latest: Search | None = None
        told, seen, shown = 0.0, (1, 0), ""

        def tell() -> None:
            nonlocal told, seen, shown
            if latest is not None:
                self.tell({"kind": "state", **_state(latest, *seen)})
                told, seen, shown = time.perf_counter(), (latest.size, len(latest.completions)), _text(latest)

        def progress(search: Search) -> None:
            nonlocal latest
            latest = search
            if time.perf_counter() - told >= _EVERY or _text(search) != shown:
                tell()

        try:
            asked = PlanRequest(self.prompt, self.request.budget, decoder=self._decoder(mdp, task))
            self._handle = engine.submit(asked, progress=progress)
            if self._stop.is_set():  # before there was a handle
                self._handle.stop()
            plan = self._handle.result()
            tell()
            self.tree, self.facts = plan.tree, _facts(self.request, mdp, plan)
            self.tell({"kind": "done", **_result(plan)}, last=True)
        except QStarError as error:
            self.tell({"kind": "failed", "message": str(error)}, last=True)
        except Exception as error:  # without this event the page would wait for ever
            self.tell({"kind": "failed", "message": f"{type(error).__name__}: {error}"}, last=True)

    def _decoder(self, mdp: DecodingMDP, task: Task) -> Decoder:
        request, heuristic = self.request, None
        if by_command(request.decoder).uses == "q":
            heuristic, misfit = shipped_heuristic(task.name, mdp) if request.q == "shipped" else (BoundHeuristic(), "")
            if misfit:
                self.tell({"kind": "note", "message": f"without Q: {misfit}"})
        planner = task.planner if request.reward is None else {}
        options = decoder_options(request.decoder, planner, heuristic, request.seed)
        return make_decoder(request.decoder, mdp, **options)


class Runs:
    """All runs of one server; the language models are loaded once."""

    def __init__(self) -> None:
        """Begin with none."""
        self._runs: OrderedDict[int, Run] = OrderedDict()
        self._numbers, self._lock, self._model_lock = itertools.count(1), threading.Lock(), threading.Lock()
        self._engines: dict[int, SearchEngine] = {}  # by model, which its engine keeps

    def __getitem__(self, number: int) -> Run:
        """Return a run.

        Raises:
            KeyError: There is none of that number, or it was forgotten.
        """
        return self._runs[number]

    def begin(self, request: Request) -> Run:
        """Check a request and begin to search.

        Raises:
            QStarError: The request cannot be met; nothing was begun.
        """
        request.check()
        task = load_task(request.task)
        changes = {name: getattr(request, name) for name in ("reward", "logprob_weight", "top_k", "max_new_tokens")}
        if request.start is not None:
            prompt, changes["constraint"] = self._from(request)
        else:  # an example brings its columns along, such as the right answer
            prompt = examples(request.task).get(request.prompt) or as_prompt(request.prompt)
        with self._model_lock:  # a tree of its own for each run; the weights are shared
            mdp = task.mdp(**{name: value for name, value in changes.items() if value is not None})
            if id(mdp.model) not in self._engines:
                self._engines[id(mdp.model)] = SearchEngine(mdp)
            engine = self._engines[id(mdp.model)]
        mdp.encode(prompt)  # too long a prompt is said now
        with self._lock:
            run = Run(next(self._numbers), request, prompt)
            self._runs[run.number] = run
            while len(self._runs) > _KEPT:
                self._runs.popitem(last=False)[1].stop()
        threading.Thread(target=run.work, args=(mdp, task, engine), daemon=True).start()
        return run

    def _from(self, request: Request) -> tuple[Prompt, Beginning]:
        """Return an earlier run's prompt, and that everything must begin as one of its nodes does."""
        assert request.start is not None
        number, node = request.start.run, request.start.node
        run = self._runs.get(number)
        if run is None or run.tree is None:
            raise ConfigurationError(f"run {number} has no tree to go on from; run it again")
        if load_task(request.task).env.get("action") == "step":
            raise ConfigurationError(f"task {request.task!r} has steps as actions; only one with tokens can go on so")
        if run.request.task != request.task:
            raise ConfigurationError(f"run {number} was of task {run.request.task!r}; it goes on with that one only")
        if node > int(run.tree.child.max(initial=0)):
            raise ConfigurationError(f"run {number} has no node {node}")
        return run.prompt, Beginning([int(run.tree.token[edge]) for edge in run.tree.path(node)])


# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(32)
def examples(task: str) -> dict[str, Prompt]:
    """Return a task's held-out prompts by their text."""
    return {prompt.text: prompt for prompt in load_prompts(load_task(task).prompts.of("test"))}


def _text(search: Search) -> str:
    return "" if search.best is None else search.best.text


def _state(search: Search, nodes: int, texts: int) -> dict[str, Any]:
    """Return the bounds of a search, and its nodes and texts after the first ``nodes`` and ``texts``."""
    finished, best = list(search.completions), search.best

    def token(row: int, action: int) -> str:
        return search.mdp.edge_texts(search.node[[row]], np.array([action]))[0]

    def edge_to(row: int) -> tuple[int, str]:
        parent = int(search.parent[row])
        return parent, token(parent, int(np.flatnonzero(search.child[parent] == row)[0]))

    values = [completion.objective for completion in search.completions.values()]
    state = {
        "lm_tokens": search.lm_tokens,
        "seconds": round(search.seconds, 2),
        "lower_bound": search.trace[-1].lower_bound,
        "upper_bound": search.trace[-1].upper_bound,
        "text": None if best is None else best.text,
        "objective": None if best is None else best.objective,
        "grown": [edge_to(row) for row in range(nodes, search.size)],
        "ended": [(row, token(row, action), values[i]) for i, (row, action) in enumerate(finished) if i >= texts],
        "best": None if best is None else next(i for i, e in enumerate(finished) if search.completions[e] is best),
    }
    return {name: to_jsonable(value) for name, value in state.items()}


def _result(plan: Plan) -> dict[str, Any]:
    numbers = ("objective", "reward", "logprob", "lower_bound", "upper_bound", "gap")
    result = {name: getattr(plan, name) for name in ("text", *numbers, "certified", "scope", "stop", "stop_reason")}
    texts = [{"text": c.text, "objective": c.objective} for c in plan.best(6)]
    return {
        name: to_jsonable(value) for name, value in {**result, "usage": vars(plan.usage), "completions": texts}.items()
    }


def _facts(request: Request, mdp: DecodingMDP, plan: Plan) -> dict[str, str]:
    """Return the settings and results of a run in words, for the exported page."""
    numbers = {"J": plan.objective, "reward r": plan.reward, "log π": plan.logprob, "gap": plan.gap}
    return {
        "task": f"{request.task}, {request.decoder}",
        "objective": f"J = {mdp.logprob_weight:g} · log π + r",
        "r": mdp.reward.name,
        **{name: f"{value:.3f}" if math.isfinite(value) else "none" for name, value in numbers.items()},
        "stopped": f"{plan.stop_reason}, {plan.usage.lm_tokens} of {request.budget} LM tokens",
    }
