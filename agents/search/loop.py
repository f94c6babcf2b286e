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
from typing import Any, TypeVar

import numpy as np

from ...envs.mdp import Completion, Finish, Values
from ...envs.token_tree import GrowRequest, grow_together
from ...models.base import IntArray
from .problem import Problem
from .state import NO_EDGES, Edges, Search, Status

__all__ = ["ActiveSearch", "Progress", "Strategy", "begin", "drive", "drive_to_end", "score_completions", "step"]
__all__ += ["step_each", "turn"]

_T = TypeVar("_T")

Strategy = Callable[[Search], Iterator[Edges]]
Progress = Callable[[Search], None]

_NO_NODES = np.empty(0, dtype=np.int64)


class ActiveSearch:
    """A search together with the strategy that advances it.

    Attributes:
        search: The state.
        strategy: Yields the edges to follow.
    """

    def __init__(self, search: Search, strategy: Strategy, first: Strategy | None = None) -> None:
        """Prepare; the strategy runs when edges are first asked for, after all of ``first``, if that is given."""
        self.search, self.strategy = search, strategy
        self._steps = strategy(search) if first is None else itertools.chain(first(search), strategy(search))
        self._pending = NO_EDGES  # what it asked for last
        self._due = NO_EDGES  # what the budget pays for of that

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
        for mdp in {id(search.mdp): search.mdp for search in searches}.values():
            mdp.evict_if_full()
        requests = [search.mdp.grow_request([search.prompt], _NO_NODES, _NO_NODES) for search in searches]
        roots = [roots for roots, _ in grow_together(requests)]
        for search, nodes, (h, tokens) in zip(searches, roots, _evaluate(searches, roots), strict=True):
            search.add(nodes, h, parent_edges=None)
            search.charge(tokens)
            search.mdp.tree.pin(search)
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
    for (search, edges), completions in zip(work, _complete(work, score=True), strict=True):
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


def step_each(active: Sequence[ActiveSearch], most: int | None = None) -> list[Edges | Exception | None]:
    """Do as :func:`step`, so that an error of one search is returned in its place and the others take their step.

    Args:
        active: The searches.
        most: The most edges of each search; the others of its step come with the next calls.
    """
    searches = [one.search for one in active]
    with turn(searches):
        start = time.perf_counter()
        asked = [_try(one.next_edges, most) for one in active]
        batch = [(i, edges) for i, edges in enumerate(asked) if isinstance(edges, Edges) and len(edges.rows)]
        if isinstance(_try(_follow, [(searches[i], edges) for i, edges in batch]), Exception):
            # One by one: what the batch has followed already is not followed again.
            for i, edges in batch:
                left = still_open(searches[i], edges)
                if len(left.rows) and isinstance(error := _try(_follow, [(searches[i], left)]), Exception):
                    asked[i] = error
        _charge_seconds(searches, [len(e.rows) if isinstance(e, Edges) else 0 for e in asked], start)
    return asked


def _try(function: Callable[..., _T], *args: Any) -> _T | Exception:
    """Return what a function returns, or the error that it raises."""
    try:
        return function(*args)
    except Exception as error:
        return error


def _follow(batch: Sequence[tuple[Search, Edges]]) -> None:
    """Follow every search's edges: expand those that go on, score those that finish."""
    continuing: list[tuple[Search, Edges]] = []
    finishing: list[tuple[Search, Edges]] = []
    for search, edges in batch:
        finishes = search.finish[edges] != Finish.NO
        for selected, work in ((~finishes, continuing), (finishes, finishing)):
            if selected.any():
                work.append((search, Edges(edges.rows[selected], edges.actions[selected])))
    if continuing:
        _expand(continuing)
    for by_reward in (True, False):
        work = [(search, edges) for search, edges in finishing if (search.score == "reward") == by_reward]
        for (search, edges), completions in zip(work, _complete(work, score=by_reward), strict=True):
            if not by_reward:
                f = search.f[edges].tolist()
                completions = [c._replace(objective=value) for c, value in zip(completions, f, strict=True)]
            search.finish_edges(edges, completions)


def _expand(work: Sequence[tuple[Search, Edges]]) -> None:
    """Expand edges that go on: one forward of each language model, one call of each heuristic."""
    requests = [GrowRequest(s.mdp.tree, [], s.node[edges.rows], edges.actions) for s, edges in work]
    children = [children for _, children in grow_together(requests)]
    estimates = _evaluate([search for search, _ in work], children)
    for (search, edges), nodes, (h, tokens) in zip(work, children, estimates, strict=True):
        search.add(nodes, h, parent_edges=edges)
        search.charge(tokens)
        search.lm_forwards += 1


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


def _complete(work: Sequence[tuple[Search, Edges]], *, score: bool) -> list[list[Completion]]:
    """Return the completions that each search's finishing edges make: one call of each reward."""
    completions: list[list[Completion]] = [[] for _ in work]
    searches = [search for search, _ in work]
    for members in _grouped(searches, lambda problem: id(problem.mdp)):
        prompts = [work[i][0].prompt for i in members for _ in work[i][1].rows]
        nodes = np.concatenate([work[i][0].node[work[i][1].rows] for i in members])
        actions = np.concatenate([work[i][1].actions for i in members])
        made = iter(work[members[0]][0].mdp.complete(prompts, nodes, actions, score=False))
        for i in members:
            completions[i] = list(itertools.islice(made, len(work[i][1].rows)))
    for members in _grouped(searches, lambda problem: id(problem.mdp.reward)) if score else ():
        texts = [(searches[i].prompt, c.text, c.token_ids) for i in members for c in completions[i]]
        rewards = iter(searches[members[0]].mdp.rewards(*zip(*texts, strict=True)).tolist())
        for i in members:
            weight = searches[i].mdp.logprob_weight
            scored = zip(completions[i], rewards, strict=False)
            completions[i] = [c._replace(reward=r, objective=weight * c.logprob + r) for c, r in scored]
    return completions


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
