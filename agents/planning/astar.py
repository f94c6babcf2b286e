"""A* over the tree of completions: one account of what is known, one core, and a few named ways through.

Textbook A* compares prefixes of different lengths, and a heuristic whose error depends on the length misleads it: on
24-token texts it hardly ever finishes one. A beam compares equal lengths only, but spends its whole width on texts that
can no longer win. The default search, level by level, takes the half of each that works:

* **select** at every depth the edges of highest f = g + h, as many as the round is wide;
* **ration** the budget: each depth may spend its share of what is left, the early ones more, since everything later
  hangs on them; what pruning saves at one depth is spent at the next;
* **expand** what is not expanded yet, in one forward of the language model;
* **evaluate** the completions found: the best is the incumbent, LB;
* **prune** what cannot beat the incumbent: certainly not, if its bound U is not above LB, and probably not, if its f is
  below LB by more than a margin;
* **widen** when a round is through, in the same tree, so that what earlier rounds paid for is not paid for again.

The others follow the best edges of all depths at once, from a queue (:func:`best_first`); they differ in the order, in
what is followed together, and in when they stop (:data:`SEARCHES`).

Two numbers rank an edge. f may use a learned Q, and decides the order. U may not, and decides what is proven: UB is the
largest U of everything open *or pruned*. When UB meets LB the incumbent is certified to be optimal. Pruning by f is a
bet; once nothing else is left it is called off, so that the search is complete in the limit for any heuristic.
"""

from __future__ import annotations

import copy
import functools
import heapq
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ...checks import check_integer, check_number
from ...envs import DecodingMDP, Finish
from ...errors import ConfigurationError, UnknownNameError
from ..heuristics import BoundHeuristic, Heuristic
from ..search.budget import Budget
from ..search.plan import Plan
from ..search.problem import Learner, Scope, Score
from ..search.state import NO_EDGES, Edges, IntArray, Search, Status, Values
from .beam import LevelSearch, widest

__all__ = ["SEARCHES", "AStarPlanner", "Order"]


class Order(NamedTuple):
    """How a best-first search goes through the tree.

    Attributes:
        weight: w in f_w = g_c + w · h_c, over costs; see :class:`AStarPlanner`.
        whole_nodes: Whether all edges of the best node are followed together, so that each child is compared by its own
            h, as in A* over nodes; else the best edge alone, compared by the h that its parent gave it.
        persistent: Whether the search goes on after the first text that the theory accepts.
        capped: Whether each depth may be popped ``width`` times only, until nothing else is left.
    """

    weight: float = 1.0
    whole_nodes: bool = False
    persistent: bool = False
    capped: bool = False


SEARCHES: dict[str, Order | None] = {
    "level": None,  # see the module's docstring
    "astar": Order(whole_nodes=True),  # Hart, Nilsson & Raphael 1968
    "weighted": Order(weight=2.0),  # Pohl 1970: at most w times the optimal cost
    "anytime": Order(weight=2.0, persistent=True),  # Hansen & Zhou 2007, anytime weighted A*
    "capped": Order(persistent=True, capped=True),  # Meister, Vieira & Cotterell 2020, best-first beam search
    "qstar": Order(),  # Agostinelli et al. 2021 (arXiv 2102.04518), Q* search: a queue of edges
}


class AStarPlanner(LevelSearch):
    """A*, level-synchronised by default: it prunes by the incumbent and widens in rounds.

    Zhou & Hansen (2005, beam-stack search) and Vadlamudi et al. (2012, anytime pack search) widen in the same spirit;
    the pruning is branch and bound. With the bound as heuristic the two pruning rules coincide and the search is exact.

    A weight counts on costs, since weights on negative rewards mean nothing: a text costs C = r_max - J >= 0, an edge
    estimates f_w = g_c + w · h_c with g_c = -g and h_c = r_max - h. With an admissible h the text that ``"weighted"``
    stops at costs at most w times what the best one does.
    """

    unbudgeted_width = 16

    def __init__(
        self,
        env: Any,
        *,
        search: str = "level",
        heuristic: Heuristic | None = None,
        weight: float | None = None,
        margin: float = 0.1,
        width: int | None = None,
        growth: float | None = 2.0,
        taper: float | None = 2.0,
        prior: float = 0.0,
        depth_bonus: float = 0.0,
        all_endings: bool = True,
        batch_size: int = 1,
        n: int = 1,
        pathmax: bool = False,
        scope: Scope = "top-k tree",
        score: Score = "reward",
        learn: Any = None,
    ) -> None:
        """Plan in the MDP of ``env``.

        Args:
            env: An environment or a :class:`DecodingMDP`.
            search: ``"level"``, or one of the best-first :data:`SEARCHES`: ``"astar"``, ``"qstar"`` and ``"weighted"``
                stop at the first text that their theory accepts, ``"anytime"`` and ``"capped"`` go on.
            heuristic: Orders the search; :class:`BoundHeuristic` by default, with which it needs no training.
            weight: w in f_w; by default 2 for ``"weighted"`` and ``"anytime"``, 1 for the others.
            margin: An edge whose f is more than this (in units of J) below the incumbent is put off. Q underestimates
                too, so 0 prunes a little too much. ``"astar"``, ``"qstar"`` and ``"weighted"`` have none.
            width: Edges followed a depth in the first round of ``"level"``, pops per depth before ``"capped"`` widens.
                None for 16, and for ``"level"`` with a budget of LM tokens for as many as that pays for.
            growth: By what factor each round is wider than the one before. None for a single round of ``"level"``, so
                that it never returns to an edge that it has passed over.
            taper: See :class:`LevelSearch`. 0 is better on texts of a few tokens, where Q is as rough at the end as at
                the beginning. With None the search does not look at its budget, and one that is resumed equals one long
                run; it may then end before a text is finished.
            prior: See :class:`LevelSearch`. Pruning and bounds do not use it. Searches that stop by f do not take it.
            depth_bonus: What a token of the prefix counts in the order of ``"anytime"`` and ``"capped"``, in units of
                J, since every token still to come costs a forward: best-first utility-guided search (Ruml & Do 2007).
                An edge has the share of it that its bound U leaves of the reward's range.
            all_endings: See :class:`LevelSearch`.
            batch_size: How many edges, or nodes, a best-first search pops together, for one forward.
            n: How many of the best texts are wanted: an edge is pruned by the n-th best; see :meth:`Plan.best`.
            pathmax: See :class:`LevelSearch`.
            scope: See :class:`Decoder`.
            score: See :class:`Decoder`.
            learn: A :class:`QStar` agent, or an :class:`OnlineLearner` made of one: its Q learns from every search,
                and later searches use it as soon as it does them good. None for a planner that does not learn.

        Raises:
            ConfigurationError: An argument is out of range, or a weight is given and the reward has no upper bound.
            UnknownNameError: There is no such search.
        """
        if heuristic is None and score == "reward":
            heuristic = BoundHeuristic()
        super().__init__(
            env,
            width=width,
            growth=growth,
            taper=taper,
            prior=prior,
            pathmax=pathmax,
            all_endings=all_endings,
            heuristic=heuristic,
            scope=scope,
            score=score,
        )
        if search not in [*SEARCHES]:  # a list, for a task file may hold what cannot be hashed
            raise UnknownNameError("search", search, SEARCHES)
        self.order = SEARCHES[search]
        default = self.order.weight if self.order else 1.0
        self.weight = check_number("weight", default if weight is None else weight, low=0)
        self.check()
        if growth is None and self.order is not None:
            raise ConfigurationError(f'growth=None is for search="level"; search={search!r} needs a number > 1')
        self.margin = math.inf if margin == math.inf else check_number("margin", margin, low=0)
        self.depth_bonus = check_number("depth_bonus", depth_bonus, low=0)
        if self.depth_bonus and not (self.order and self.order.persistent):
            raise ConfigurationError(
                f"depth_bonus={self.depth_bonus:g} compares prefixes of different lengths, and search={search!r} does "
                'not, or stops when f says so: leave it out, or use "anytime" or "capped"'
            )
        if self.prior and self.order and not self.order.persistent:
            raise ConfigurationError(
                f"search={search!r} stops when f says so, and prior={self.prior:g} would order by something else; "
                'leave it out, or use "level", "anytime" or "capped"'
            )
        self.batch_size, self.n_best = check_integer("batch_size", batch_size), check_integer("n", n)
        self.learner = None if learn is None else as_learner(learn, self.mdp)

    def check(self) -> None:
        """Check that a weight has costs to count on.

        Raises:
            ConfigurationError: There is a weight, and the reward has no upper bound.
        """
        if self.weight != 1 and not math.isfinite(self.mdp.reward.upper):
            raise ConfigurationError(
                f"weight={self.weight:g} counts on costs, r_max - J, and the reward {self.mdp.reward.name!r} has no "
                "upper bound; declare one, as with as_reward(function, upper=1.0), or use weight=1"
            )

    def plan_many(
        self, prompts: Any, budget: Budget | int | None = None, *, learn: Any = None, **rest: Any
    ) -> list[Plan]:
        """Find the best completion of each prompt; see :meth:`Decoder.plan_many`.

        Args:
            prompts: As there.
            budget: As there.
            learn: As in the constructor, for this call alone. True is the planner's own learner, False is none.
            rest: As there.

        Raises:
            ConfigurationError: ``learn`` is none of these, or see there.
        """
        if learn is None:
            return super().plan_many(prompts, budget, **rest)
        if learn is True and self.learner is None:
            raise ConfigurationError("learn=True is for a planner with a learner: AStarPlanner(env, learn=agent)")
        planner = copy.copy(self)
        if learn is not True:
            planner.learner = as_learner(learn, self.mdp) if learn else None
        return planner.plan_many(prompts, budget, **rest)

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the edges to follow; see the module's docstring."""
        yield from level_by_level(self, search) if self.order is None else best_first(self, search, self.order)
        if not search.is_certified and not search.can_improve:
            search.stop_reason = "exhausted"

    def priority(self, search: Search, rows: IntArray) -> Values:
        """Return what the edges of these rows are ranked by, float64 [n, k].

        That is f, or -f_w + r_max where w is not 1, with a prior also prior · log π, and with a depth bonus also that.
        """
        values = super().priority(search, rows) if self.weight == 1 else self._weighted(search, rows)
        if self.depth_bonus:
            values = values + self.depth_bonus * (search.depth[rows, None] + 1) * self._room(search, rows)
        return values

    def _room(self, search: Search, rows: IntArray) -> Values:
        """Return the share of the reward's range that each edge's bound leaves, from 0 to 1, float64 [n, k].

        Bounds are the reward's: where it is not asked, every edge has all of it.
        """
        low, high = self.mdp.reward.lower, self.mdp.reward.upper
        if search.score != "reward" or not math.isfinite(high - low) or high == low:
            return np.ones_like(search.bound[rows])
        return np.clip((search.bound[rows] - low) / (high - low), 0.0, 1.0)

    def _weighted(self, search: Search, rows: IntArray) -> Values:
        """Return -f_w + r_max, with a prior also prior · log π, float64 [n, k]."""
        most, g, f = self.mdp.reward.upper, search.g[rows, None], search.f[rows]
        # With a weight of 0 the estimate counts for nothing, even where it is infinite.
        values = g + most - (self.weight * (most - (f - g)) if self.weight else np.zeros_like(f))
        return values + self.prior * search.edge_logprob(rows) if self.prior else values

    def prune(self, search: Search, edges: Edges, *, margin: float) -> Edges:
        """Return those of some open edges that may beat the incumbent.

        No bet is made on an edge that ends the text: to know what it is worth costs no forward of the language model.
        """
        can_win = search.bound[edges] > search.pruning_threshold
        may_win = (search.f[edges] >= search.nth_best - margin) | math.isinf(margin)
        keep = can_win & (may_win | (search.finish[edges] != Finish.NO))
        return Edges(edges.rows[keep], edges.actions[keep])


def as_learner(learn: Any, mdp: DecodingMDP) -> Learner:
    """Return an agent, or a learner, as a learner whose Q fits searches in ``mdp``.

    Raises:
        ConfigurationError: It is none, or belongs to another process.
    """
    learner: Any = learn.online() if callable(getattr(learn, "online", None)) else learn
    if not callable(getattr(learner, "finish", None)):
        raise ConfigurationError(f"learn is a QStar agent or an OnlineLearner, got {type(learn).__name__}")
    if not learner.fits(mdp):
        raise ConfigurationError("learn is an agent of another process; make it and the planner with one environment")
    found: Learner = learner
    return found


# -- level by level ---------------------------------------------------------------------------------------------------


def level_by_level(planner: AStarPlanner, search: Search) -> Iterator[Edges]:
    """Go through the depths in rounds of growing width, as long as anything can be better than what was found."""
    margin, width = planner.margin, planner.first_width(search)
    while search.can_improve:
        before = search.pops
        yield from planner.round(search, width, functools.partial(planner.prune, search, margin=margin))
        if planner.growth is None:
            return
        if search.pops == before and width >= widest(search):
            # Every edge that promised anything has been followed. Others may have better use for a budget in common;
            # if not, stop betting.
            search.is_exhausted = True
            while search.shared is not None and not search.shared.all_exhausted:
                yield NO_EDGES
            margin = math.inf
        width = planner.wider(width)


# -- best first -------------------------------------------------------------------------------------------------------


def best_first(planner: AStarPlanner, search: Search, order: Order) -> Iterator[Edges]:
    """Follow the best open edges of the whole tree, wherever they are, until the best is no better than the incumbent.

    A text's J is known once its last edge is followed, and stands in the queue in that edge's place: when nothing in
    the queue promises more than the incumbent, the incumbent is what A* would pop next.
    """
    queue = Queue(planner, search, order.whole_nodes)
    pops = np.zeros(search.mdp.max_new_tokens, dtype=np.int64)
    cap, margin = float(planner.width or planner.unbudgeted_width) if order.capped else math.inf, planner.margin
    waiting: list[Entry] = []
    idle = False
    while search.can_improve:
        queue.enter_new_rows()
        batch: list[tuple[int, int]] = []
        room = planner.batch_size
        while room and queue.entries:
            if not order.persistent and -math.inf < search.nth_best >= queue.entries[0].promise:
                if not batch:
                    return  # what is left promises no more; with an admissible h it keeps no more either
                break
            entry, actions = queue.pop()
            actions = actions[search.bound[entry.row, actions] > search.pruning_threshold]
            if not len(actions):
                continue
            depth = search.depth[entry.row]
            hopeless = order.persistent and search.f[entry.row, actions].max() < search.nth_best - margin
            if hopeless or pops[depth] >= cap:
                waiting.append(entry)
                continue
            pops[depth] += 1
            room -= 1
            batch += [(entry.row, action) for action in actions.tolist()]
        if batch:
            idle = False
            yield Edges(*np.array(batch, dtype=np.int64).T)
        elif waiting:
            # Widen; if that alone did not help, every edge that promised anything has been followed: stop betting.
            cap, margin = cap * (planner.growth or 1.0), math.inf if idle else margin
            idle = True
            queue.put_back(waiting)
        else:
            return


class Entry(NamedTuple):
    """What the queue holds of a row: its ``rank``-th best edge, or all its edges. Sorts best first, then oldest."""

    cost: float
    row: int
    rank: int
    last: bool  # whether the row's next edge must not follow, as it is in the queue already

    @property
    def promise(self) -> float:
        """The priority of its best edge."""
        return -self.cost


class Queue:
    """The open edges of a search, best first; each row is in it once, with the best edge that was not popped yet."""

    def __init__(self, planner: AStarPlanner, search: Search, whole_nodes: bool) -> None:
        """Start empty."""
        self.planner, self.search, self.whole_nodes = planner, search, whole_nodes
        self.entries: list[Entry] = []
        self._ranked: list[tuple[IntArray, list[float]]] = []  # by row: open edges, best first, and their priorities

    def enter_new_rows(self) -> None:
        """Enter what was expanded since the last time."""
        rows = np.arange(len(self._ranked), self.search.size)
        is_open = self.search.status[rows] == Status.OPEN
        # An open edge may have any priority; one that is NaN comes last, and never an edge that is not open.
        priority = np.nan_to_num(
            self.planner.priority(self.search, rows), nan=-math.inf, posinf=math.inf, neginf=-math.inf
        )
        ranked = np.lexsort((-priority, ~is_open), axis=1)
        counts = is_open.sum(axis=1)
        for row, actions, count, values in zip(rows.tolist(), ranked, counts.tolist(), priority, strict=True):
            best = actions[:count]
            self._ranked.append((best, values[best].tolist()))
            self._push(row, 0, last=self.whole_nodes)

    def pop(self) -> tuple[Entry, IntArray]:
        """Return the best entry, and the actions to follow there."""
        entry = heapq.heappop(self.entries)
        if not entry.last:
            self._push(entry.row, entry.rank + 1, last=False)
        actions = self._ranked[entry.row][0]
        return entry, actions if self.whole_nodes else actions[entry.rank : entry.rank + 1]

    def put_back(self, entries: list[Entry]) -> None:
        """Enter again what was popped and not followed; ``entries`` is empty afterwards."""
        for entry in entries:
            heapq.heappush(self.entries, entry._replace(last=True))
        entries.clear()

    def _push(self, row: int, rank: int, *, last: bool) -> None:
        _, priorities = self._ranked[row]
        if rank < len(priorities):
            heapq.heappush(self.entries, Entry(-priorities[rank], row, rank, last))
