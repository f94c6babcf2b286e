"""A* over the tree of completions: level by level, in rounds of growing width, until a budget or a certificate ends it.

Textbook A* compares prefixes of different lengths, and a heuristic whose error depends on the length misleads it: on
24-token texts it hardly ever finishes one. A beam compares equal lengths only, but spends its whole width on texts that
can no longer win. This search takes the half of each that works:

* **select** at every depth the edges of highest f = g + w · h, as many as the round is wide;
* **ration** the budget: each depth may spend its share of what is left, the early ones more, since everything later
  hangs on them; what pruning saves at one depth is spent at the next;
* **expand** what is not expanded yet, in one forward of the language model;
* **evaluate** the completions found: the best is the incumbent, LB;
* **prune** what cannot beat the incumbent: certainly not, if its bound U is not above LB, and probably not, if its f is
  below LB by more than a margin;
* **widen** when a round is through, in the same tree, so that what earlier rounds paid for is not paid for again.

Two numbers rank an edge. f may use a learned Q, and decides the order. U may not, and decides what is proven: UB is the
largest U of everything open *or pruned*. When UB meets LB the incumbent is certified to be optimal. Pruning by f is a
bet; once nothing else is left it is called off, so that the search is complete in the limit for any heuristic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..envs import Finish, Prompt
from ..errors import ConfigurationError, check_integer, check_number
from .heuristics import BoundHeuristic, Heuristic
from .planning import EPSILON, Decoder, Edges, IntArray, Scope, Score, Search, Status, Values

__all__ = ["AStarPlanner"]

_UNBUDGETED_WIDTH = 16


class AStarPlanner(Decoder):
    """Level-synchronised A* that prunes by the incumbent and widens in rounds.

    Zhou & Hansen (2005, beam-stack search) and Vadlamudi et al. (2012, anytime pack search) widen in the same spirit;
    the pruning is branch and bound. With the bound as heuristic the two pruning rules coincide and the search is exact.
    """

    def __init__(
        self,
        env: Any,
        *,
        heuristic: Heuristic | None = None,
        weight: float = 1.0,
        margin: float = 0.1,
        width: int | None = None,
        growth: float = 2.0,
        taper: float = 2.0,
        pathmax: bool = False,
        scope: Scope = "top-k tree",
        score: Score = "reward",
    ) -> None:
        """Plan in the MDP of ``env``.

        Args:
            env: An environment or a :class:`DecodingMDP`.
            heuristic: Orders the search; :class:`BoundHeuristic` by default, with which it needs no training.
            weight: w in f = g + w · h.
            margin: An edge whose f is more than this (in units of J) below the incumbent is put off. Q underestimates
                too, so 0 prunes a little too much.
            width: Edges followed per depth in the first round. None for as many as a budget of LM tokens pays for, and
                16 without one.
            growth: By what factor each round is wider than the one before.
            taper: How a budget of LM tokens is spread over the depths: in proportion to the number of tokens still to
                come, to this power. 0 spreads it evenly, as a beam does.
            pathmax: Whether an edge's f is at most that of the edge which led to it (Mérő 1984; in terms of returns, a
                minimum): no continuation is better than the best one. A text must then look good at every step.
            scope: See :class:`Decoder`.
            score: See :class:`Decoder`.

        Raises:
            ConfigurationError: An argument is out of range.
        """
        if heuristic is None and score == "reward":
            heuristic = BoundHeuristic()
        super().__init__(env, heuristic=heuristic, scope=scope, score=score)
        self.pathmax = pathmax
        self.weight = check_number("weight", weight, low=0)
        if not margin >= 0:
            raise ConfigurationError(f"margin is a number >= 0, got {margin!r}")
        if not growth > 1:
            raise ConfigurationError(f"growth is a number > 1, got {growth!r}")
        self.margin, self.growth = margin, growth
        self.width = None if width is None else check_integer("width", width)
        self.taper = check_number("taper", taper, low=0)

    def evaluate(self, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return w · h; see :meth:`Decoder.evaluate`."""
        h = super().evaluate(prompts, nodes)
        return self.weight * h if self.weight else np.zeros_like(h)

    def search(self, search: Search) -> Iterator[Edges]:
        """Yield the edges to follow, round by round; see the module's docstring."""
        horizon, margin = search.mdp.max_new_tokens, self.margin
        width = float(self.width or (_UNBUDGETED_WIDTH if math.isinf(search.room) else math.inf))
        while not search.is_certified and has_hope(search):
            before = len(search.completions) + search.size
            for depth in range(horizon):
                edges = ration(search, prune(search, select(search, depth, width), margin), depth, self.taper)
                if len(edges.rows):
                    yield edges
            if len(search.completions) + search.size == before and width >= widest(search):
                margin = math.inf  # every edge that promised anything has been followed: stop betting
            width = math.ceil(width * self.growth) if math.isfinite(width) else width
        if not search.is_certified and not has_hope(search):
            search.stop_reason = "exhausted"


def has_hope(search: Search) -> bool:
    """Tell whether any edge that can be followed could still beat the incumbent."""
    rows = slice(0, search.size)
    return bool(((search.status[rows] == Status.OPEN) & (search.bound[rows] > search.lower_bound + EPSILON)).any())


def widest(search: Search) -> int:
    """Return the largest number of edges at any depth."""
    return int(np.bincount(search.depth[: search.size]).max()) * search.mdp.top_k


def select(search: Search, depth: int, width: float) -> Edges:
    """Return the ``width`` edges of highest f among all at this depth, followed or not, best first."""
    rows = search.at_depth(depth)
    legal_row, action = np.nonzero(search.status[rows] != Status.MASKED)
    row: IntArray = rows[legal_row]
    # Stable: ties go to what was found first, then to the likelier token, on every machine.
    best = np.argsort(-search.f[row, action], kind="stable")
    best = best[: None if math.isinf(width) else int(width)]
    return Edges(row[best], action[best])


def prune(search: Search, edges: Edges, margin: float) -> Edges:
    """Return the edges that are still to be followed and may beat the incumbent.

    No bet is made on an edge that ends the text: to know what it is worth costs no forward of the language model.
    """
    is_open = search.status[edges] == Status.OPEN
    can_win = search.bound[edges] > search.lower_bound + EPSILON
    may_win = search.f[edges] >= search.incumbent - margin  # all of them once the margin is infinite
    ends = search.finish[edges] != Finish.NO
    keep = is_open & can_win & (may_win | ends)
    return Edges(edges.rows[keep], edges.actions[keep])


def ration(search: Search, edges: Edges, depth: int, taper: float) -> Edges:
    """Return the leading edges that this depth's share of the budget pays for, and all that end the text.

    With n tokens still to come, a depth gets n**taper parts of what is left once every later depth has a token.
    """
    still_to_come = search.mdp.max_new_tokens - 1 - depth
    if math.isinf(search.room) or not still_to_come:
        return edges
    shares = np.arange(1, still_to_come + 1, dtype=np.float64) ** taper
    most = 1 + max(int((search.room - still_to_come) * shares[-1] / shares.sum()), 0)
    going_on = search.finish[edges] == Finish.NO
    keep = ~going_on | (np.cumsum(going_on) <= most)
    return Edges(edges.rows[keep], edges.actions[keep])
