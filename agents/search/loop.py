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

import numpy as np

from ...envs.mdp import Completion, Finish, Values
from ...envs.token_tree import GrowRequest, grow_together
from ...models.base import IntArray
from .problem import Problem
from .state import NO_EDGES, Edges, Search, Status

__all__ = ["ActiveSearch", "Progress", "Strategy", "begin", "drive", "drive_to_end", "score_completions", "turn"]

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

    def next_edges(self) -> Edges | None:
        """Return what the strategy follows next, as far as the budget pays for it; None when the search is over.

        Edges that the budget did not pay for come first when the search is resumed.
        """
        search, pending = self.search, self._pending
        search.stop_if_good_enough()
        if search.is_over:
            return None
        left = search.status[pending] == Status.OPEN
        wanted = Edges(pending.rows[left], pending.actions[left]) if left.any() else next(self._steps, None)
        if wanted is None:
            search.stop_reason = search.stop_reason or ("certified" if search.is_certified else "finished")
            return None
        self._pending = wanted
        return search.affordable(wanted)


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
        asked = _step(continuing)
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


def _step(active: Sequence[ActiveSearch]) -> list[Edges | None]:
    """Follow what each search's strategy asks for; return that, None where the search is over."""
    searches = [one.search for one in active]
    with turn(searches):
        start = time.perf_counter()
        asked = [one.next_edges() for one in active]
        batch = [(search, edges) for search, edges in zip(searches, asked, strict=True) if edges is not None]
        _follow([(search, edges) for search, edges in batch if len(edges.rows)])
        _charge_seconds(searches, [0 if edges is None else len(edges.rows) for edges in asked], start)
    return asked


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
    for members in _grouped([search for search, _ in work], lambda problem: id(problem.mdp)):
        prompts = [work[i][0].prompt for i in members for _ in work[i][1].rows]
        nodes = np.concatenate([work[i][0].node[work[i][1].rows] for i in members])
        actions = np.concatenate([work[i][1].actions for i in members])
        made = iter(work[members[0]][0].mdp.complete(prompts, nodes, actions, score=score))
        for i in members:
            completions[i] = list(itertools.islice(made, len(work[i][1].rows)))
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
