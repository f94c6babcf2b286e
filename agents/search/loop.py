"""The loop that advances many searches in lock-step, one forward of each language model a step.

A *strategy* is a generator: it looks at its :class:`Search`, yields the edges to follow, and finds them followed when
it goes on. :func:`drive` advances many of them together. The searches may belong to different problems. What they ask
of one language model is one forward; what they ask of one heuristic or one reward is one call.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ...envs.mdp import Completion, DecodingMDP, Finish, Values, grow_processes
from ...envs.prompts import Prompt
from ...models.base import IntArray
from .problem import Problem
from .slow_rewards import SlowRewards
from .state import NO_EDGES, Edges, Search, Status

__all__ = ["ActiveSearch", "Progress", "Strategy", "begin", "drive", "drive_to_end", "score_completions", "step"]
__all__ += ["step_each", "turn"]

_T = TypeVar("_T")

Strategy = Callable[[Search], Iterator[Edges]]
Progress = Callable[[Search], None]
Ask = Callable[[DecodingMDP, Sequence[Prompt], Sequence[Completion]], Values]

_NO_NODES = np.empty(0, dtype=np.int64)


class Awaited(NamedTuple):
    """Completions that wait for a slow reward."""

    edges: Edges
    completions: list[Completion]
    rewards: Future[Values]


class ActiveSearch:
    """A search together with the strategy that advances it.

    Attributes:
        search: The state.
        strategy: Yields the edges to follow.
        awaited: The end of its last step, while a slow reward is asked for it in a thread.
    """

    def __init__(self, search: Search, strategy: Strategy, first: Strategy | None = None) -> None:
        """Prepare; the strategy runs when edges are first asked for, after all of ``first``, if that is given."""
        self.search, self.strategy = search, strategy
        self._steps = strategy(search) if first is None else itertools.chain(first(search), strategy(search))
        self._pending = NO_EDGES  # what it asked for last
        self._due = NO_EDGES  # what the budget pays for of that
        self.awaited: Awaited | None = None

    def next_edges(self, most: int | None = None) -> Edges | None:
        """Return what the strategy follows next, as far as the budget pays for it; None when the search is over.

        Edges that the budget did not pay for come first when the search is resumed.

        Args:
            most: The most edges to return; the others of the step come with the next calls.
        """
        search, due = self.search, still_open(self.search, self._due)
        if not len(due.rows):
            search.stop_if_good_enough()
            if search.is_over:
                return None
            left = still_open(search, self._pending)
            wanted = left if len(left.rows) else next(self._steps, None)
            if wanted is None:
                search.stop_reason = search.stop_reason or ("certified" if search.is_certified else "finished")
                return None
            self._pending, due = wanted, search.affordable(wanted)
            # In the order in which a whole step follows them, so that a step in parts has the same outcome.
            last = np.argsort(search.finish[due] != Finish.NO, kind="stable")
            due = Edges(due.rows[last], due.actions[last])
        elif search.is_late or search.stop_reason not in ("", "budget"):  # "budget" says that this step is the last
            search.stop_reason = search.stop_reason or "budget"
            return None
        self._due = due
        return Edges(due.rows[:most], due.actions[:most])

    def enter_rewards(self) -> None:
        """Enter the completions that waited for a slow reward, once it has answered; raise what it has raised."""
        assert self.awaited is not None
        (edges, completions, rewards), self.awaited = self.awaited, None
        self.search.finish_edges(edges, _scored(self.search, completions, rewards.result()))

    @property
    def is_between_steps(self) -> bool:
        """Whether all edges of its last step are followed."""
        return not len(still_open(self.search, self._due).rows)


def still_open(search: Search, edges: Edges) -> Edges:
    """Return those of ``edges`` that have not been followed."""
    left = search.status[edges] == Status.OPEN
    return Edges(edges.rows[left], edges.actions[left])


def begin(searches: Sequence[Search]) -> None:
    """Expand the prompts of new searches, in one forward of each language model."""
    with turn(searches):
        start = time.perf_counter()
        _make_room(searches)
        _expand([], searches)
        _charge_seconds(searches, [1] * len(searches), start)
    for search in searches:
        search.record()


def drive(active: Sequence[ActiveSearch]) -> Iterator[list[Search]]:
    """Advance the searches in lock-step until all are over; yield, after every step, those that took it.

    Threads take turns with a language model, step by step.
    """
    continuing = list(active)
    while continuing:
        asked = step(continuing)
        continuing = [one for one, edges in zip(continuing, asked, strict=True) if edges is not None]
        for one in continuing:
            one.search.record()
        if continuing:
            yield [one.search for one in continuing]


def drive_to_end(active: Sequence[ActiveSearch], progress: Progress | None = None) -> None:
    """Run the searches and report every step to ``progress``; an interrupt ends them all."""
    try:
        for searches in drive(active):
            if progress is not None:
                for search in searches:
                    progress(search)
    except KeyboardInterrupt:
        for one in active:
            one.search.stop_reason = one.search.stop_reason or "interrupted"


def score_completions(searches: Sequence[Search]) -> None:
    """Ask the reward for the texts that searches with ``score="q"`` have finished; their order stays as it was."""
    work = []
    for search in searches:
        if search.completions:
            rows, actions = np.array(list(search.completions), dtype=np.int64).T
            work.append((search, Edges(rows, actions)))
    for (search, edges), completions in zip(work, _complete(work, _ask), strict=True):
        search.completions.update(zip(zip(*(e.tolist() for e in edges), strict=True), completions, strict=True))


@contextlib.contextmanager
def turn(searches: Sequence[Search]) -> Iterator[None]:
    """Keep other threads from the language models of these searches, and from their trees, while the context lasts."""
    models = {id(search.mdp.model): search.mdp.model for search in searches}
    with contextlib.ExitStack() as stack:
        for _, model in sorted(models.items()):  # in one order, so that two threads never wait for each other
            stack.enter_context(model.lock)
        yield


# -- one step ---------------------------------------------------------------------------------------------------------


def step(active: Sequence[ActiveSearch]) -> list[Edges | None]:
    """Follow what each search's strategy asks for; return that, None where the search is over."""
    searches = [one.search for one in active]
    with turn(searches):
        start = time.perf_counter()
        asked = [one.next_edges() for one in active]
        _follow([(search, e) for search, e in zip(searches, asked, strict=True) if e is not None and len(e.rows)])
        _charge_seconds(searches, [0 if edges is None else len(edges.rows) for edges in asked], start)
    return asked


def step_each(
    active: Sequence[ActiveSearch], most: int | None = None, rewards: SlowRewards | None = None
) -> list[Edges | Exception | None]:
    """Do as :func:`step`, so that an error of one search is returned in its place and the others take their step.

    New searches have their prompts expanded, in the same forward, and follow no edges.

    Args:
        active: The searches.
        most: The most edges of each search; the others of its step come with the next calls.
        rewards: Asks slow rewards in threads. A search that waits for one has it in ``awaited``, and takes no step
            before :meth:`ActiveSearch.enter_rewards`.
    """
    searches = [one.search for one in active]
    with turn(searches):
        start = time.perf_counter()
        new = [search for search in searches if not search.size]
        _make_room(new)
        asked = [_try(one.next_edges, most) if one.search.size else NO_EDGES for one in active]
        batch = [(i, edges) for i, edges in enumerate(asked) if isinstance(edges, Edges) and len(edges.rows)]
        work = [(active[i], edges) for i, edges in batch]
        if (work or new) and isinstance(_try(_follow_some, work, new, rewards), Exception):
            # One by one: what the batch has followed already is not followed again.
            for i, search in enumerate(searches):
                if not search.size and isinstance(error := _try(_expand, [], [search]), Exception):
                    asked[i] = error
            for i, edges in batch:
                left = NO_EDGES if active[i].awaited else still_open(searches[i], edges)
                if len(left.rows) and isinstance(error := _try(_follow, [(searches[i], left)]), Exception):
                    asked[i] = error
        _charge_seconds(searches, [max(len(e.rows), 1) if isinstance(e, Edges) else 0 for e in asked], start)
    return asked


def _make_room(searches: Sequence[Search]) -> None:
    """Evict nodes from the full trees of searches that have not begun."""
    for mdp in {id(search.mdp): search.mdp for search in searches}.values():
        mdp.evict_if_full()


def _try(function: Callable[..., _T], *args: Any) -> _T | Exception:
    """Return what a function returns, or the error that it raises."""
    try:
        return function(*args)
    except Exception as error:
        return error


def _follow_some(
    batch: Sequence[tuple[ActiveSearch, Edges]], new: Sequence[Search], rewards: SlowRewards | None
) -> None:
    """Expand new searches' prompts and follow the others' edges, except those that end a text for a slow reward."""
    work, slow = [], []
    for one, edges in batch:
        search = one.search
        if rewards is not None and search.score == "reward" and rewards.are_slow(search.mdp.reward):
            finishes = search.finish[edges] != Finish.NO
            if finishes.any():
                slow.append((one, Edges(edges.rows[finishes], edges.actions[finishes])))
                edges = Edges(edges.rows[~finishes], edges.actions[~finishes])
        work.append((search, edges))
    _follow(work, new, rewards)
    completions = _complete([(one.search, edges) for one, edges in slow], None)
    for (one, edges), made in zip(slow, completions, strict=True):
        assert rewards is not None
        search = one.search
        one.awaited = Awaited(edges, made, rewards.ask_later(search.mdp, [search.prompt] * len(made), made))


def _follow(
    batch: Sequence[tuple[Search, Edges]], new: Sequence[Search] = (), rewards: SlowRewards | None = None
) -> None:
    """Follow every search's edges: expand those that go on, and new searches' prompts; score those that finish."""
    continuing: list[tuple[Search, Edges]] = []
    finishing: list[tuple[Search, Edges]] = []
    for search, edges in batch:
        finishes = search.finish[edges] != Finish.NO
        for selected, work in ((~finishes, continuing), (finishes, finishing)):
            if selected.any():
                work.append((search, Edges(edges.rows[selected], edges.actions[selected])))
    if continuing or new:
        _expand(continuing, new)
    for by_reward in (True, False):
        work = [(search, edges) for search, edges in finishing if (search.score == "reward") == by_reward]
        ask = (rewards.ask if rewards else _ask) if by_reward else None
        for (search, edges), completions in zip(work, _complete(work, ask), strict=True):
            if not by_reward:
                f = search.f[edges].tolist()
                completions = [c._replace(objective=value) for c, value in zip(completions, f, strict=True)]
            search.finish_edges(edges, completions)


def _expand(work: Sequence[tuple[Search, Edges]], new: Sequence[Search] = ()) -> None:
    """Expand edges that go on, and the prompts of new searches: one forward a model, one call of each heuristic."""
    no_prompts: list[Prompt] = []
    grown = grow_processes(
        [(search.mdp, no_prompts, search.node[edges.rows], edges.actions) for search, edges in work]
        + [(search.mdp, [search.prompt], _NO_NODES, _NO_NODES) for search in new]
    )
    nodes = [children for _, children in grown[: len(work)]] + [roots for roots, _ in grown[len(work) :]]
    searches: list[tuple[Search, Edges | None]] = [*work, *((search, None) for search in new)]
    estimates = _evaluate([search for search, _ in searches], nodes)
    for (search, edges), expanded, (h, tokens) in zip(searches, nodes, estimates, strict=True):
        search.add(expanded, h, parent_edges=edges)
        search.charge(tokens + int(search.mdp.lm_tokens(expanded).sum()) - len(expanded))
        search.lm_forwards += search.mdp.lm_forwards(expanded) - (edges is None)
        if edges is None:
            search.mdp.tree.pin(search)


def _evaluate(searches: Sequence[Search], nodes: Sequence[IntArray]) -> list[tuple[Values, int]]:
    """Return h of each search's nodes, float64 [n, k], and the LM tokens that the heuristic used for them."""
    estimates: list[tuple[Values, int]] = [(np.empty(0), 0)] * len(searches)
    for members in _grouped(searches, lambda problem: (id(problem.mdp), id(problem.heuristic))):
        prompts = [searches[i].prompt for i in members for _ in nodes[i]]
        problem = searches[members[0]].problem
        h = problem.evaluate(prompts, np.concatenate([nodes[i] for i in members]))
        used = np.broadcast_to(getattr(problem.heuristic, "lm_tokens", 0), len(h))
        ends = list(itertools.accumulate(len(nodes[i]) for i in members))
        for i, end in zip(members, ends, strict=True):
            part = slice(end - len(nodes[i]), end)
            estimates[i] = h[part], int(used[part].sum())
    return estimates


def _ask(mdp: DecodingMDP, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Values:
    return mdp.rewards(prompts, [c.text for c in completions], [c.token_ids for c in completions])


def _complete(work: Sequence[tuple[Search, Edges]], ask: Ask | None) -> list[list[Completion]]:
    """Return the completions that each search's finishing edges make, scored if there is ``ask``, once a reward."""
    completions: list[list[Completion]] = [[] for _ in work]
    searches = [search for search, _ in work]
    for members in _grouped(searches, lambda problem: id(problem.mdp)):
        prompts = [work[i][0].prompt for i in members for _ in work[i][1].rows]
        nodes = np.concatenate([work[i][0].node[work[i][1].rows] for i in members])
        actions = np.concatenate([work[i][1].actions for i in members])
        made = iter(work[members[0]][0].mdp.complete(prompts, nodes, actions, score=False))
        for i in members:
            completions[i] = list(itertools.islice(made, len(work[i][1].rows)))
    for members in _grouped(searches, lambda problem: id(problem.mdp.reward)) if ask else ():
        assert ask is not None
        texts = [(searches[i].prompt, c) for i in members for c in completions[i]]
        values = ask(searches[members[0]].mdp, *zip(*texts, strict=True))
        ends = list(itertools.accumulate(len(completions[i]) for i in members))
        for i, end in zip(members, ends, strict=True):
            completions[i] = _scored(searches[i], completions[i], values[end - len(completions[i]) : end])
    return completions


def _scored(search: Search, completions: Sequence[Completion], rewards: Values) -> list[Completion]:
    weight = search.mdp.logprob_weight
    return [
        c._replace(reward=r, objective=weight * c.logprob + r)
        for c, r in zip(completions, rewards.tolist(), strict=True)
    ]


def _grouped(searches: Sequence[Search], key: Callable[[Problem], object]) -> list[list[int]]:
    """Return the indices of the searches whose problems have the same key, group by group."""
    groups: dict[object, list[int]] = {}
    for i, search in enumerate(searches):
        groups.setdefault(key(search.problem), []).append(i)
    return list(groups.values())


def _charge_seconds(searches: Sequence[Search], shares: Sequence[int], start: float) -> None:
    """Divide the wall-clock time since ``start`` among searches, in proportion to their shares of the step's work."""
    elapsed, total = time.perf_counter() - start, sum(shares)
    for search, share in zip(searches, shares, strict=True):
        search.busy_seconds += elapsed * (share / total if total else 1 / len(searches))
