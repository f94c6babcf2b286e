"""The base class of every decoder: plans, batches, streams, and searches that are resumed.

A decoder has a problem and a strategy, :meth:`Decoder.select`: a generator that looks at a :class:`Search`, yields the
edges to follow, and finds them followed when it goes on. The loop (:mod:`qstar_decoding.agents.search.loop`) does the
rest, so every decoder is batched over prompts, and all are accounted for alike.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Self, Unpack, get_args

import numpy as np

from ...checks import check_flag, check_integer, check_keywords
from ...envs.mdp import Completion, mdp_of
from ...envs.prompts import Prompt
from ...errors import ConfigurationError
from ..search.budget import Budget, SharedBudget
from ..search.loop import ActiveSearch, Progress, begin, drive, drive_to_end, turn
from ..search.plan import Plan, make_plan
from ..search.problem import Heuristic, Learner, Problem, Processes, Scope, Score
from ..search.request import CHANGES, Changes, Request, as_request, load_requests
from ..search.state import Edges, Search, Status

__all__ = ["Decoder", "Stream"]


class Decoder(ABC):
    """A way of choosing tokens; A* and every baseline answer the same :meth:`plan`.

    Attributes:
        mdp: The process whose J is maximised.
        heuristic: Estimates what each edge will bring; None without.
        scope: What upper bounds speak of.
        score: What ranks finished texts.
        n_best: How many of the best texts are wanted.
        pathmax: See :class:`LevelSearch`.
        processes: The processes of its requests.
        learner: Learns from its searches; None for a decoder that does not learn.
    """

    learner: Learner | None = None
    n_best = 1
    pathmax = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take the strategy of a subclass that still has it under its name of version 0.1, ``search``."""
        super().__init_subclass__(**kwargs)
        if "search" in vars(cls) and "select" not in vars(cls):
            warnings.warn(
                f"{cls.__name__}.search is called select since version 0.2; rename it", DeprecationWarning, stacklevel=2
            )
            cls.select = vars(cls)["search"]  # type: ignore[method-assign]

    def __init__(
        self,
        env: Any,
        *,
        heuristic: Heuristic | None = None,
        scope: Scope = "top-k tree",
        score: Score = "reward",
    ) -> None:
        """Decode in the MDP of ``env``.

        Args:
            env: An environment (wrapped or not) or a :class:`DecodingMDP`; its token tree is shared.
            heuristic: Estimates what each edge will bring; the decoder's docstring says what it does without one.
            scope: What upper bounds speak of, ``"top-k tree"`` or ``"full vocabulary"``.
            score: What ranks finished texts: ``"reward"``, the reward model, or ``"q"``, the heuristic alone: f = g + h
                of their last edge, as when a verifier knows the answer only at training time. The reward model is then
                never called, and nothing is certified.

        Raises:
            ConfigurationError: ``env`` has no decoding MDP, ``scope`` or ``score`` is none of its two values, or
                ``score="q"`` is asked for without a heuristic.
        """
        for name, value, values in (("scope", scope, get_args(Scope)), ("score", score, get_args(Score))):
            if value not in values:
                raise ConfigurationError(f"{name} is one of {values}, got {value!r}")
        if score == "q" and heuristic is None:
            raise ConfigurationError('score="q" ranks texts by the heuristic; give one, e.g. QHeuristic(agent)')
        self.mdp, self.heuristic, self.scope, self.score = mdp_of(env), heuristic, scope, score
        self.processes, self._family = Processes(self.mdp), object()

    @abstractmethod
    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the edges to follow next, best first, until there is nothing more to try."""

    def choose(self, search: Search) -> Completion | None:
        """Return the completion that the plan proposes: the incumbent, unless a decoder knows another rule."""
        return search.best

    def check(self) -> None:  # noqa: B027  most decoders work in every process
        """Check that the decoder works in its process; called again where a request changes that.

        Raises:
            ConfigurationError: It does not.
        """

    def with_changes(self, **changes: Unpack[Changes]) -> Self:
        """Return this decoder with other settings, on the same language model and its memory.

        Args:
            changes: See :class:`~qstar_decoding.agents.search.request.Changes`.

        Raises:
            ConfigurationError: There is no such setting, or a value is out of range.
            CheckpointError: The heuristic was learned for another k.
        """
        check_keywords("a request", changes, CHANGES)
        given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        if not given:
            return self
        changed = copy.copy(self)
        changed.heuristic = given.pop("heuristic", self.heuristic)
        if "heuristic" in changes:
            changed.learner = None if changes["heuristic"] is not None else self.learner
        if not (changed.heuristic is None or callable(changed.heuristic)):
            raise ConfigurationError(f"heuristic is a callable, such as QHeuristic(agent), got {changed.heuristic!r}")
        for name in ("n", "seed"):
            if name in given:
                value = check_integer(name, given.pop(name), low=1 if name == "n" else 0)
                setattr(changed, "n_best" if name == "n" and not hasattr(self, "n") else name, value)
        if self.processes.mdp is not self.mdp:
            changed.processes = Processes(self.mdp)
        changed.mdp = changed.processes.get(**given)
        changed.check()
        if callable(check := getattr(changed.heuristic, "check", None)):
            check(changed.mdp)
        return changed

    @property
    def problem(self) -> Problem:
        """What this decoder searches for, and where."""
        return Problem(self.mdp, self.heuristic, self.scope, self.score, self.n_best, self.pathmax)

    def start(self, prompts: Sequence[Prompt], budget: Budget, *, shared: bool = False) -> list[ActiveSearch]:
        """Return a new search for each prompt, with the prompt expanded.

        Raises:
            ConfigurationError: ``shared``, and no budget of LM tokens.
        """
        return self.start_requests([Request(prompt, budget) for prompt in prompts], shared=shared)

    def start_requests(self, requests: Sequence[Request], *, shared: bool = False) -> list[ActiveSearch]:
        """Return a new search for each request of :func:`load_requests`, with its prompt expanded.

        Raises:
            ConfigurationError: ``shared``, and no budget of LM tokens that all have; a setting is out of range.
        """
        together = None
        if shared:
            budget = Budget.of(requests[0].budget)
            if budget.lm_tokens is None or any(request.budget != budget for request in requests):
                raise ConfigurationError("a shared budget needs a number of LM tokens: plan_many(prompts, 1000, …)")
            together = SharedBudget(budget.lm_tokens)
            requests = [replace(request, budget=replace(budget, lm_tokens=None)) for request in requests]
        active = [self.new_search(request, together) for request in requests]
        begin([one.search for one in active])
        return active

    def new_search(
        self, request: Request, shared: SharedBudget | None = None, *, started: float | None = None
    ) -> ActiveSearch:
        """Return the search of a request of :func:`as_request`, with nothing expanded.

        Args:
            request: The request.
            shared: See :class:`Search`.
            started: See :class:`Search`.

        Raises:
            ConfigurationError: A setting is out of range.
            PromptError: The prompt is too long.
        """
        if request.decoder is not None:
            raise ConfigurationError(f"{type(self).__name__} is the decoder; a request with one is for a SearchEngine")
        decoder, budget = self.with_changes(**request.changes), Budget.of(request.budget)
        decoder.mdp.encode(request.prompt)  # too long a prompt is reported before any work
        name, learner = "", decoder.learner
        if learner is not None and learner.fits(decoder.mdp):
            decoder = copy.copy(decoder)
            name, decoder.heuristic = learner.choose(decoder.heuristic)
        search = Search(decoder.problem, request.prompt, budget, shared, started=started)
        if learner is not None and name:
            learner.begin(search, name)
        return ActiveSearch(search, decoder.select, None if budget.seconds is None else roll_out)

    def run_searches(self, prompts: Sequence[Prompt], budget: Budget) -> list[Search]:
        """Search all prompts and return the searches themselves; Ctrl-C is let through."""
        return self.run_requests([Request(prompt, budget) for prompt in prompts])

    def run_requests(self, requests: Sequence[Request]) -> list[Search]:
        """Do the same for requests of :func:`load_requests`, each with settings of its own."""
        active = self.start_requests(requests)
        for _ in drive(active):
            pass
        return [one.search for one in active]

    def _run(self, requests: Sequence[Request], progress: Progress | None, *, shared: bool) -> list[Plan]:
        if shared and self.learner is not None:
            raise ConfigurationError(
                "prompts that share a budget are searched together; give shared or learn, not both"
            )
        group = len(requests) if self.learner is None else self.learner.group
        plans: list[Plan] = []
        for start in range(0, len(requests), max(group, 1)):
            active = self.start_requests(requests[start : start + group], shared=shared)
            if plans and plans[-1].stop_reason == "interrupted":
                for one in active:
                    one.search.stop_reason = "interrupted"
            drive_to_end(active, progress)
            plans += _learned_plans(active)
        return plans

    def plan(
        self,
        prompt: Any,
        budget: Budget | int | None = None,
        *,
        progress: Progress | None = None,
        **changes: Unpack[Changes],
    ) -> Plan:
        """Find the best completion of one prompt.

        Ctrl-C ends the search with ``stop_reason="interrupted"`` and what was found so far.

        Args:
            prompt: A string, chat messages, a dict with the key ``prompt``, or a :class:`Request`.
            budget: When to stop; an integer means LM tokens.
            progress: Called after every step.
            changes: Settings of this call alone, such as ``reward``, ``max_new_tokens`` or ``constraint``; see
                :class:`~qstar_decoding.agents.search.request.Changes`. They cost no new model and no new memory.

        Raises:
            PromptError: The prompt is empty or too long.
            ConfigurationError: There is no such setting, or a value is out of range.
            CheckpointError: The heuristic was learned for another k.
        """
        return self._run([as_request(prompt, budget, changes)], progress, shared=False)[0]

    def plan_many(
        self,
        prompts: Any,
        budget: Budget | int | None = None,
        *,
        shared: bool = False,
        progress: Progress | None = None,
        **changes: Unpack[Changes],
    ) -> list[Plan]:
        """Find the best completion of each prompt, in one batch of forwards.

        Args:
            prompts: See :func:`~qstar_decoding.envs.load_prompts`; requests, each with settings of its own, are taken
                too.
            budget: Of each prompt; an integer means LM tokens.
            shared: Whether the LM tokens are for all prompts together: what one does not need is there for the others.
                Plans of a shared budget cannot be resumed.
            progress: Called after every step of a search.
            changes: See :meth:`plan`.

        Raises:
            ConfigurationError: ``shared``, and no budget of LM tokens that all have; a setting is out of range.
        """
        return self._run(load_requests(prompts, budget, changes), progress, shared=check_flag("shared", shared))

    def resume(self, plan: Plan, budget: Budget | int | None = None, *, progress: Progress | None = None) -> Plan:
        """Go on with a search that this decoder began, paying only for what is new.

        A search that does not look at its budget continues as if it had been given both budgets at once. One that does
        - the default search with ``width=None``, which shares a budget out over the depths; a beam or a number of
        samples chosen to fit - shares out what is new.

        Args:
            plan: What ``plan``, ``plan_many`` or ``resume`` returned last for the prompt, in this process.
            budget: How much further; what was not used before is added to it. None is without limit.
            progress: Called after every step.

        Raises:
            ConfigurationError: The plan is another decoder's, was resumed before, or comes from another process.
        """
        if not isinstance(plan, Plan):
            raise ConfigurationError(f"resume goes on with a plan, what plan(prompt, …) returned; got {plan!r:.100}")
        active = plan._active
        if active is None:
            raise ConfigurationError(
                "this plan cannot be resumed: it was resumed already (go on with the newer plan), shared its budget, "
                "or was copied from another process"
            )
        decoder = decoder_of(active)
        if decoder is None or decoder._family is not self._family:
            raise ConfigurationError("this plan is another decoder's; resume it with the one that made it")
        object.__setattr__(plan, "_active", None)
        with turn([active.search]):
            decoder.mdp.evict_if_full()
            active.search.resume(Budget.of(budget))
            decoder.mdp.tree.pin(active.search)
        drive_to_end([active], progress)
        return _learned_plans([active])[0]

    def stream(self, prompt: Any, budget: Budget | int | None = None, **changes: Unpack[Changes]) -> Stream:
        """Yield each completion that is better than all before it, as soon as it is found.

        Works in ``for`` and in ``async for``, where the language model runs in a thread; the iterator's ``plan`` is
        the plan so far. The arguments are those of :meth:`plan`.
        """
        request = as_request(prompt, budget, changes)
        decoder = self.with_changes(**request.changes)
        return Stream(decoder, request.prompt, Budget.of(request.budget))


def decoder_of(active: ActiveSearch) -> Decoder | None:
    """Return the decoder whose strategy advances a search."""
    owner = getattr(active.strategy, "__self__", None)
    return owner if isinstance(owner, Decoder) else None


def plan_of(active: ActiveSearch) -> Plan:
    """Return the result of a search that a decoder began."""
    decoder = decoder_of(active)
    assert decoder is not None
    return make_plan(active, decoder.choose)


def _learned_plans(active: Sequence[ActiveSearch]) -> list[Plan]:
    """Return the results of searches that one decoder began, after it has learned from those that ended."""
    if (learner := take_lessons(active)) is not None:
        learner.learn()
    return [plan_of(one) for one in active]


def take_lessons(active: Sequence[ActiveSearch]) -> Learner | None:
    """Give the searches of one decoder that ended to its learner, while their prefixes are there; return it."""
    decoder = decoder_of(active[0]) if active else None
    learner = None if decoder is None else decoder.learner
    if learner is not None:
        searches = [one.search for one in active if one.search.is_over]
        with turn(searches):
            learner.finish(searches)
    return learner


def roll_out(search: Search) -> Iterator[Edges]:
    """Follow the edges of largest f until a text is finished, going back where a constraint leaves nothing to write."""
    row = 0
    while search.best is None and search.can_improve:
        is_open = search.status[row] == Status.OPEN
        if not is_open.any():  # the deepest row that has anything left
            rows = np.flatnonzero((search.status[: search.size] == Status.OPEN).any(axis=1))
            row = int(rows[search.depth[rows].argmax()])
            continue
        edge = Edges(np.array([row]), np.array([np.where(is_open, search.f[row], -np.inf).argmax()]))
        if not is_open[edge.actions[0]]:  # all of them are -inf
            edge = Edges(edge.rows, np.array([is_open.argmax()]))
        yield edge
        row = max(int(search.child[edge][0]), 0)


class Stream:
    """Ever better completions of one prompt; see :meth:`Decoder.stream`.

    The search ends before its next forward when the stream is closed, or when the task that waits for it is cancelled.
    """

    def __init__(self, decoder: Decoder, prompt: Prompt, budget: Budget) -> None:
        """Prepare the search; nothing runs until the first completion is asked for."""
        self._decoder, self._prompt, self._budget = decoder, prompt, budget
        self._active: ActiveSearch | None = None
        self._plan: Plan | None = None
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._found = self._run()

    def __reduce__(self) -> NoReturn:
        """Say what to do instead: a stream is a search that goes on here.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "a stream is a search that goes on in this process and cannot be copied or pickled; pickle the planner, "
            "or the plan of the stream"
        )

    def _run(self) -> Iterator[Completion]:
        if self._closed.is_set():
            return
        [active] = self._decoder.start([self._prompt], self._budget)
        self._active, search, best = active, active.search, None
        if self._closed.is_set():
            self.close()
        for _ in drive([active]):
            if search.best is not best:
                best = search.best
                assert best is not None
                yield best
        _learned_plans([active])

    @property
    def plan(self) -> Plan:
        """The plan so far; ``resume`` goes on from it once the iterator is exhausted.

        Raises:
            ConfigurationError: Nothing was asked for yet.
        """
        if self._active is None:
            raise ConfigurationError("the search has not begun; take the first completion from the iterator")
        if self._plan is None or not self._active.search.is_over:
            self._plan = make_plan(self._active, self._decoder.choose)
        return self._plan

    def close(self) -> None:
        """End the search before its next forward, with ``stop_reason="cancelled"``; the iterator ends."""
        self._closed.set()
        if self._active is not None:
            self._active.search.stop_reason = self._active.search.stop_reason or "cancelled"

    async def aclose(self) -> None:
        """Do as :meth:`close`."""
        self.close()

    def __iter__(self) -> Iterator[Completion]:
        """Return the iterator itself."""
        return self

    def __next__(self) -> Completion:
        """Search until a better completion is found."""
        with self._lock:  # several threads may take turns
            return next(self._found)

    def __aiter__(self) -> AsyncIterator[Completion]:
        """Return the iterator itself."""
        return self

    async def __anext__(self) -> Completion:
        """Search, in a thread, until a better completion is found."""
        try:
            found = await asyncio.to_thread(next, self, None)
        except asyncio.CancelledError:
            self.close()  # the thread goes on until its forward is done
            raise
        if found is None:
            raise StopAsyncIteration
        return found
