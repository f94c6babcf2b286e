"""Level-synchronous search, of which beam search is the plain case, and diverse beam search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...checks import check_flag, check_integer, check_number
from ...envs import Finish
from ..search.state import Edges, IntArray, Search, Status, Values
from .decoder import Decoder

__all__ = ["BeamSearch", "DiverseBeamSearch", "LevelSearch"]

MOST_AT_ONCE = 4096  # texts that one forward may continue, however large the budget: each needs memory


class LevelSearch(Decoder):
    r"""Level-synchronous search: at each depth the edges of highest priority, in rounds of growing width.

    Beam search is this and no more; A\* also prunes, remembers open edges, and certifies. Both have the same settings.

    Attributes:
        unbudgeted_width: The width, where neither ``width`` nor a budget of LM tokens gives one.
    """

    unbudgeted_width = 8  # transformers' documentation uses 4 to 10

    def __init__(
        self,
        env: Any,
        *,
        width: int | None = None,
        growth: float | None = None,
        taper: float | None = None,
        prior: float = 0.0,
        pathmax: bool = False,
        all_endings: bool = False,
        **kwargs: Any,
    ) -> None:
        """Search in the MDP of ``env``.

        Args:
            env: An environment or a :class:`DecodingMDP`.
            width: Edges a depth in the first round; None for as many as the budget pays for.
            growth: By what factor each round is wider than the one before; None for a single round.
            taper: How a budget of LM tokens is spread over the depths: in proportion to the number of tokens still to
                come, to this power. 0 spreads it evenly. None does not look at the budget.
            prior: What a nat of the language model's log-probability counts in the order, in units of J: edges are
                ranked by f + prior · log π(prefix), as sampling on π · exp(f / prior) prefers them. It holds back a Q
                that promises most where it has seen least.
            pathmax: Whether an edge's f is at most that of the edge which led to it (Mérő 1984; in terms of returns, a
                minimum): no continuation is better than the best one. A text must then look good at every step.
            all_endings: Whether edges that end a text take no place of others; they cost no forward of the model.
            kwargs: See :class:`Decoder`.

        Raises:
            ConfigurationError: An argument is out of range.
        """
        super().__init__(env, **kwargs)
        self.width = None if width is None else check_integer("width", width)
        if growth is not None and growth != math.inf:
            growth = check_number("growth", growth, low=1, open_low=True)
        self.growth = growth
        self.pathmax, self.all_endings = check_flag("pathmax", pathmax), check_flag("all_endings", all_endings)
        self.taper = None if taper is None else check_number("taper", taper, low=0, high=100)
        self.prior = check_number("prior", prior, low=0)

    def priority(self, search: Search, rows: IntArray) -> Values:
        """Return what the edges of these rows are ranked by, float64 [n, k]: f, with a prior also prior · log π."""
        values = search.f[rows]
        return values + self.prior * search.edge_logprob(rows) if self.prior else values

    def first_width(self, search: Search) -> float:
        """Return the width of the first round; infinite where the taper rations a budget."""
        unlimited = self.taper is None or math.isinf(search.affordable_rows(search.actions_to_come(0)))
        return float(self.width or (self.unbudgeted_width if unlimited else math.inf))

    def wider(self, width: float) -> float:
        """Return the width of the next round."""
        grown = width * (self.growth or 1.0)
        return math.ceil(grown) if math.isfinite(grown) else grown

    def round(self, search: Search, width: float, keep: Callable[[Edges], Edges]) -> Iterator[Edges]:
        """Go through the depths once, and yield of the ``width`` best edges of each those that ``keep`` keeps.

        Edges that were followed before count among the best: a round is as wide as it would be in a new tree.
        """
        share = 1
        for depth in range(search.mdp.max_new_tokens):
            edges = self._best(search, depth, width)
            is_open = search.status[edges] == Status.OPEN
            edges = keep(Edges(edges.rows[is_open], edges.actions[is_open]))
            if self.taper is not None:
                edges, share = self._ration(search, edges, depth, share)
            if len(edges.rows):
                yield edges

    def _best(self, search: Search, depth: int, width: float) -> Edges:
        """Return the ``width`` edges of highest priority among all at this depth, followed or not, best first."""
        rows = search.at_depth(depth)
        legal_row, action = np.nonzero(search.status[rows] != Status.MASKED)
        row: IntArray = rows[legal_row]
        # Stable: ties go to what was found first, then to the likelier token, on every machine.
        best = np.argsort(-self.priority(search, rows)[legal_row, action], kind="stable")
        if math.isfinite(width):
            best = best[: int(width)]
        return Edges(row[best], action[best])

    def _ration(self, search: Search, edges: Edges, depth: int, before: int) -> tuple[Edges, int]:
        """Return the leading edges that this depth's share of the budget pays for, endings as ``all_endings`` says.

        With n tokens still to come, a depth gets n**taper parts of what is left once every later depth has a token. The
        last depth costs nothing: where endings take places, it has as many as the depth ``before``, or more.

        Returns:
            The edges, and the share.
        """
        assert self.taper is not None
        still_to_come = max(search.actions_to_come(depth) - 1, 0)
        room = search.affordable_rows(still_to_come + 1)
        if math.isinf(room) or (self.all_endings and not still_to_come):
            return edges, before
        if still_to_come:
            shares = np.arange(1, still_to_come + 1, dtype=np.float64) ** self.taper
            share = 1 + max(int((room - still_to_come) * shares[-1] / shares.sum()), 0)
        else:
            share = max(before, int(room))
        if search.budget.seconds is not None:
            # The time of a step is known from smaller ones: it may grow fourfold before it is measured again.
            share = min(share, 4 * search.largest_step)
        counted = (search.finish[edges] == Finish.NO) | (not self.all_endings)
        keep = ~counted | (np.cumsum(counted) <= share)
        if search.budget.pops is not None:  # which edges that end a text use up too
            keep &= np.cumsum(keep) <= share
        return Edges(edges.rows[keep], edges.actions[keep]), share


def widest(search: Search) -> int:
    """Return the largest number of edges at any depth."""
    return int(np.bincount(search.depth[: search.size]).max()) * search.mdp.top_k


class BeamSearch(LevelSearch):
    """Keep the ``width`` likeliest prefixes of each length; the texts they end in are reranked by J.

    With a heuristic prefixes are kept by f = g + h instead. By default edges that finish take places of the beam, and
    the beam is as wide at every depth as the rest of the budget pays for: what texts that end early do not need makes
    it wider. With a ``growth``, what is left after a round pays for a wider one in the same tree.
    """

    def __init__(
        self, env: Any, *, width: int | None = None, taper: float | None = None, rerank: bool = True, **kwargs: Any
    ) -> None:
        """Decode with a beam.

        Args:
            env: An environment or a :class:`DecodingMDP`.
            width: See :class:`LevelSearch`; None for 8 without a budget of LM tokens.
            taper: See :class:`LevelSearch`. None for 0, or with a ``width`` for no look at the budget.
            rerank: Whether the reward is asked to choose among the finished texts; if not, the one of highest f is
                proposed, without a heuristic the likeliest.
            kwargs: Further settings: see :class:`LevelSearch` and :class:`Decoder`.

        Raises:
            ConfigurationError: An argument is out of range.
        """
        super().__init__(env, width=width, taper=0.0 if taper is None and width is None else taper, **kwargs)
        if not check_flag("rerank", rerank):
            self.score = "q"

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the edges of one level at a time."""
        width = self.first_width(search)
        while True:
            before = search.pops
            yield from self.round(search, width, lambda edges: edges)
            if self.growth is None or (search.pops == before and width >= widest(search)):
                return
            width = self.wider(width)


class DiverseBeamSearch(Decoder):
    """Beam search in groups, each of which is kept from repeating the tokens that those before it chose at this step.

    Vijayakumar et al. 2018, with Hamming diversity; the penalty is in units of J.
    """

    def __init__(
        self, env: Any, *, width: int | None = None, groups: int = 4, diversity: float = 0.05, **kwargs: Any
    ) -> None:
        """Decode with ``width`` prefixes of each length, by default as for :class:`BeamSearch`, in ``groups``."""
        super().__init__(env, **kwargs)
        self.width = None if width is None else check_integer("width", width)
        self.groups = check_integer("groups", groups)
        self.diversity = check_number("diversity", diversity, low=0)

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the edges of one level at a time, of all groups together."""
        width = self.width or affordable_width(search)
        groups = min(self.groups, width)
        members: list[IntArray] = [np.zeros(1, dtype=np.int64)] * groups
        for depth in range(search.mdp.max_new_tokens):
            width = self.width or max(width, affordable_width(search, depth))
            sizes = [len(part) for part in np.array_split(np.arange(width), groups)]
            chosen: list[Edges] = []
            said: Counter[bytes] = Counter()
            taken: set[tuple[int, int]] = set()
            for rows, size in zip(members, sizes, strict=True):
                row, action = np.nonzero(search.status[rows] == Status.OPEN)
                row = rows[row]
                every = search.mdp.edge_tokens(search.node[row])
                tokens = [own.tobytes() for own in every[np.arange(len(row)), action]]
                worth = search.f[row, action] - self.diversity * np.array([said[own] for own in tokens])
                ranked = [i for i in np.argsort(-worth, kind="stable") if (row[i], action[i]) not in taken][:size]
                chosen.append(Edges(row[ranked], action[ranked]))
                said.update(tokens[i] for i in ranked)
                taken.update(zip(row[ranked], action[ranked], strict=True))
            if not taken:
                return
            yield Edges(*(np.concatenate(part) for part in zip(*chosen, strict=True)))
            members = [search.child[edges] for edges in chosen]
            members = [children[children >= 0] for children in members]


def affordable_width(search: Search, depth: int = 0) -> int:
    """Return how many prefixes of each length, from this depth on, the rest of the budget surely pays for.

    At most :data:`MOST_AT_ONCE`.
    """
    steps = max(search.actions_to_come(depth) - 1, 1)
    affordable = search.affordable_rows(steps)
    if math.isinf(affordable):
        return LevelSearch.unbudgeted_width
    return min(max(int(affordable) // steps, 1), MOST_AT_ONCE)
