"""Searches that a page watches: one thread each, and one language model that they take turns with."""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..agents import BoundHeuristic, Plan, QHeuristic, Search, pretrained_names
from ..agents.contenders import DECODERS, DRAWING, Q_GUIDED, make_decoder
from ..envs import DecodingMDP, load_prompts
from ..envs.prompts import Prompt, as_prompt
from ..errors import CheckpointError, ConfigurationError, QStarError, UnknownNameError
from ..tasks import load_task

__all__ = ["LIMITS", "Request", "Run", "Runs", "examples"]

LIMITS = {
    "prompt": 8000,
    "budget": 5000,
    "max_new_tokens": 64,
    "top_k": 32,
}  # characters, LM tokens, tokens, candidates
_KEPT = 50  # runs; older ones are forgotten
_EVERY = 0.1  # seconds between two reports of a search at most


class Start(BaseModel):
    """A node of an earlier run to go on from."""

    model_config = ConfigDict(extra="forbid")

    run: int
    node: int = Field(ge=0)


class Request(BaseModel):
    """What the page asks for."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = ""
    task: str = "sentiment"
    reward: str | None = None
    decoder: str = "astar"
    q: Literal["shipped", "none"] = "shipped"
    budget: int = Field(200, ge=1)
    logprob_weight: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=1)
    max_new_tokens: int | None = Field(None, ge=1)
    seed: int = 0
    start: Start | None = None

    def check(self) -> None:
        """Raise before any work what a page can get wrong.

        Raises:
            ConfigurationError: Something is longer or larger than the page allows, or there is no such decoder.
        """
        if len(self.prompt) > LIMITS["prompt"]:
            raise ConfigurationError(
                f"the prompt has {len(self.prompt):,} characters; at most {LIMITS['prompt']:,} work"
            )
        for name in ("budget", "max_new_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None and value > LIMITS[name]:
                raise ConfigurationError(f"{name} is {value:,}; this page allows at most {LIMITS[name]:,}")
        if self.decoder not in DECODERS:
            raise UnknownNameError("decoder", self.decoder, DECODERS)


class Run:
    """One search and what is told of it.

    Attributes:
        number: Its place among all.
        request: What was asked.
        prompt: What it continues.
        plan: What it found; None while it goes on.
        events: What was told so far, as plain dicts; the last one has ``"kind": "done"`` or ``"failed"``.
    """

    def __init__(self, number: int, request: Request, prompt: Prompt) -> None:
        """Begin with nothing told."""
        self.number, self.request, self.prompt = number, request, prompt
        self.plan: Plan | None = None
        self.events: list[dict[str, Any]] = []
        self.is_over = False
        self._stop, self._changed = threading.Event(), threading.Condition()

    def stop(self) -> None:
        """End it with what it has."""
        self._stop.set()

    def tell(self, event: dict[str, Any], *, last: bool = False) -> None:
        """Tell everybody who listens."""
        with self._changed:
            self.events.append(event)
            self.is_over = last
            self._changed.notify_all()

    def listen(self, patience: float = 15.0) -> Iterator[dict[str, Any] | None]:
        """Yield all events from the first on until it is over; None now and then while nothing happens."""
        for index in itertools.count():
            with self._changed:
                while len(self.events) <= index:
                    if self.is_over:
                        return
                    if not self._changed.wait(patience):
                        break
                known = len(self.events) > index
            while not known:
                yield None
                with self._changed:
                    known = len(self.events) > index or self._changed.wait(patience)
                    if not known and self.is_over:
                        return
            yield self.events[index]

    def work(self, mdp: DecodingMDP, model_lock: threading.Lock) -> None:
        """Search and tell, giving way to other runs after every step."""
        told, started, shown = 0.0, time.perf_counter(), ""

        def progress(search: Search) -> None:
            nonlocal told, shown
            if self._stop.is_set():
                raise KeyboardInterrupt  # the planner returns what it has
            now, text = time.perf_counter(), "" if search.best is None else search.best.text
            if now - told >= _EVERY or text != shown:
                told, shown = now, text
                self.tell(_state(search, now - started))
            model_lock.release()
            time.sleep(0.001)  # a lock is not fair: without a pause this thread would have it again at once
            model_lock.acquire()

        try:
            with model_lock:
                decoder = self._decoder(mdp)
                self.plan = decoder.plan(self.prompt, self.request.budget, progress=progress)
            self.tell({"kind": "done", **_result(self.plan)}, last=True)
        except QStarError as error:
            self.tell({"kind": "failed", "message": str(error)}, last=True)
        except Exception as error:  # the page must not wait for ever for a thread that has died
            self.tell({"kind": "failed", "message": f"{type(error).__name__}: {error}"}, last=True)

    def _decoder(self, mdp: DecodingMDP) -> Any:
        request, task = self.request, load_task(self.request.task)
        options: dict[str, Any] = {"seed": request.seed} if request.decoder in DRAWING else {}
        if request.decoder in Q_GUIDED:
            options["heuristic"] = BoundHeuristic()
            if request.q == "shipped" and task.name in pretrained_names():
                heuristic = QHeuristic(task.name)
                try:
                    heuristic.q.check(mdp)
                    options["heuristic"] = heuristic
                except CheckpointError as error:
                    self.tell({"kind": "note", "message": f"without Q: {error}"})
            if request.reward is None:
                known = task.planner
                options.update(
                    known if request.decoder == "astar" else {k: v for k, v in known.items() if k == "score"}
                )
        return make_decoder(request.decoder, mdp, **options)


class Runs:
    """All runs of one server; the language models are loaded once."""

    def __init__(self) -> None:
        """Begin with none."""
        self._runs: OrderedDict[int, Run] = OrderedDict()
        self._numbers, self._lock, self._model_lock = itertools.count(1), threading.Lock(), threading.Lock()

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
        with self._model_lock:  # a tree of its own for each run; the weights are shared
            mdp = task.mdp(**{name: value for name, value in changes.items() if value is not None})
        if request.start is not None:
            prompt = self._from(request.start, mdp)
        else:  # an example brings its columns along, such as the right answer
            prompt = examples(request.task).get(request.prompt) or as_prompt(request.prompt)
        mdp.encode(prompt)  # too long a prompt is said now
        with self._lock:
            run = Run(next(self._numbers), request, prompt)
            self._runs[run.number] = run
            while len(self._runs) > _KEPT:
                self._runs.popitem(last=False)[1].stop()
        threading.Thread(target=run.work, args=(mdp, self._model_lock), daemon=True).start()
        return run

    def _from(self, start: Start, mdp: DecodingMDP) -> Prompt:
        """Return the prompt of an earlier run with the tokens up to one of its nodes."""
        run = self._runs.get(start.run)
        if run is None or run.plan is None or run.plan.tree is None:
            raise ConfigurationError(f"run {start.run} has no tree to go on from; run it again")
        tree = run.plan.tree
        if start.node > int(tree.child.max(initial=0)):
            raise ConfigurationError(f"run {start.run} has no node {start.node}")
        tokens: list[int] = []
        node = start.node
        while node:
            edge = int(np.flatnonzero(tree.child == node)[0])
            tokens.append(int(tree.token[edge]))
            node = int(tree.parent[edge])
        tokens.reverse()
        ids = [*mdp.encode(run.prompt), *tokens]
        return Prompt(run.prompt.text + mdp.model.decode(tokens), run.prompt.columns, tuple(ids))


# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(32)
def examples(task: str) -> dict[str, Prompt]:
    """Return a task's held-out prompts by their text."""
    return {prompt.text: prompt for prompt in load_prompts(load_task(task).prompts.of("test"))}


def _state(search: Search, seconds: float) -> dict[str, Any]:
    best = search.best
    return {
        "kind": "state",
        "lm_tokens": search.lm_tokens,
        "seconds": round(seconds, 2),
        "nodes": search.size,
        "lower_bound": _plain(search.trace[-1].lower_bound),
        "upper_bound": _plain(search.trace[-1].upper_bound),
        "text": None if best is None else best.text,
        "objective": None if best is None else _plain(best.objective),
    }


def _result(plan: Plan) -> dict[str, Any]:
    return {
        "text": plan.text,
        "objective": _plain(plan.objective),
        "reward": _plain(plan.reward),
        "logprob": _plain(plan.logprob),
        "lower_bound": _plain(plan.lower_bound),
        "upper_bound": _plain(plan.upper_bound),
        "gap": _plain(plan.gap),
        "certified": plan.certified,
        "scope": plan.scope,
        "stop_reason": plan.stop_reason,
        "usage": plan.usage._asdict() if hasattr(plan.usage, "_asdict") else vars(plan.usage),
        "completions": [
            {"text": c.text, "objective": _plain(c.objective), "reward": _plain(c.reward)} for c in plan.completions[:5]
        ],
    }


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
