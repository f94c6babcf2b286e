"""Monte Carlo tree search with PUCT."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...checks import check_integer, check_number
from ..search.state import Edges, IntArray, Search, Status, Values
from .decoder import Decoder

__all__ = ["MCTS"]

Path = list[tuple[int, int]]  # the rows and actions of a simulation, from the root on

_UNBUDGETED_SIMULATIONS = 8
_MOST_FRUITLESS = 1280  # simulations without an edge to expand, after which a search ends


class NodeStats:
    """Statistics of the edges of one row, from the simulations that passed it.

    Attributes:
        mean: float64 [k], mean value; of an edge that was not visited yet, the heuristic's f.
        weighted_prior: float64 [k], c · prior.
        closed: float64 [k], 0, or -inf where an edge is masked.
        visits: float64 [k], simulations by way of the edge.
        totals: float64 [k], sum of their values.
        simulations: Visits of all edges.
    """

    __slots__ = ("closed", "mean", "simulations", "totals", "visits", "weighted_prior")

    def __init__(self, mean: Values, weighted_prior: Values, closed: Values) -> None:
        """Start without any simulation."""
        self.mean, self.weighted_prior, self.closed = mean, weighted_prior, closed
        self.visits, self.totals, self.simulations = np.zeros(len(mean)), np.zeros(len(mean)), 0

    def add(self, action: int, value: float) -> None:
        """Enter the value of a simulation by way of this edge."""
        self.visits[action] += 1
        self.totals[action] += value
        self.simulations += 1
        self.mean[action] = self.totals[action] / self.visits[action]


class Simulations:
    """The simulations of one search, in the four phases of MCTS (Browne et al. 2012, section 3.1).

    Attributes:
        search: The search that they explore.
        low: The smallest value seen.
        high: The largest; values are normalised to [0, 1] between them (Schrittwieser et al. 2020, appendix B).
    """

    def __init__(self, search: Search, exploration: float, temperature: float) -> None:
        """Start without any; see :class:`MCTS` for the arguments."""
        self.search, self._exploration, self._temperature = search, exploration, temperature
        self._stats: list[NodeStats] = []  # by row
        known = search.f[0][(search.status[0] != Status.MASKED) & np.isfinite(search.f[0])]
        self.low, self.high = float(known.min(initial=math.inf)), float(known.max(initial=-math.inf))

    def select(self, root: int) -> Path:
        """Follow the edges of largest PUCT score from a row, until one is not expanded yet."""
        self._enter_new_rows()
        row, path = root, []
        while True:
            action = self._best(self._stats[row])
            path.append((row, action))
            if self.search.status[row, action] != Status.EXPANDED:
                return path
            row = int(self.search.child[row, action])

    def expand(self, path: Path) -> Edges | None:
        """Return the last edge, if it is still to be followed."""
        row, action = path[-1]
        if self.search.status[row, action] != Status.OPEN:
            return None
        return Edges(np.array([row]), np.array([action]))

    def evaluate(self, path: Path) -> float:
        """Return J where the text ended, else the largest f behind the last edge; -inf where nothing may follow."""
        edge, search = path[-1], self.search
        if edge in search.completions:
            return search.completions[edge].objective
        child = search.child[edge]
        return float(search.f[child].max(where=search.status[child] != Status.MASKED, initial=-np.inf))

    def backup(self, path: Path, value: float) -> None:
        """Add the value to the mean of every edge on the way; what cannot be scored counts as the worst."""
        if math.isfinite(value):
            self.low, self.high = min(self.low, value), max(self.high, value)
        for row, action in path:
            self._stats[row].add(action, value if math.isfinite(value) else self.low)

    def most_visited(self, row: int) -> int:
        """Return the row behind the most visited edge; -1 where the text ended."""
        return int(self.search.child[row, int(self._stats[row].visits.argmax())])

    def _best(self, stats: NodeStats) -> int:
        low, spread = self.low, self.high - self.low
        value = np.minimum(np.maximum((stats.mean - low) / spread, 0.0), 1.0) if spread > 0 else 0.5
        score = value + stats.weighted_prior * math.sqrt(stats.simulations + 1) / (1 + stats.visits) + stats.closed
        return int(score.argmax())

    def _enter_new_rows(self) -> None:
        """Enter what was expanded since the last simulation; late in a search that is mostly nothing."""
        search = self.search
        if len(self._stats) == search.size:
            return
        rows: IntArray = np.arange(len(self._stats), search.size)
        legal = search.status[rows] != Status.MASKED
        logprobs = search.mdp.logprobs(search.node[rows]) / self._temperature
        most = logprobs.max(axis=1, where=legal, initial=-np.inf, keepdims=True)
        with np.errstate(invalid="ignore"):  # a constraint may leave nothing to take
            prior = np.where(legal, np.exp(logprobs - most), 0.0)
        prior *= self._exploration / np.maximum(prior.sum(axis=1, keepdims=True), 1e-300)
        closed = np.where(legal, 0, -np.inf)
        self._stats += [NodeStats(*columns) for columns in zip(search.f[rows].copy(), prior, closed, strict=True)]


class MCTS(Decoder):
    """Monte Carlo tree search by PUCT, with the language model as prior and the heuristic as value.

    Silver et al. 2017; for texts Feng et al. 2023 (TS-LLM) and Liu et al. 2023 (PPO-MCTS). A simulation follows the
    edges of largest value + c · prior · √visits / (1 + own visits) to one that is not expanded, expands it, and adds
    its value (the largest f there, or J where the text ended) to the mean of every edge on its way. After some
    simulations the most visited edge is taken for good, and its subtree is kept. At the end of a text the search begins
    again at the prompt, with all statistics kept.
    """

    def __init__(
        self,
        env: Any,
        *,
        exploration: float = 1.0,
        simulations: int | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Search with PUCT.

        Args:
            env: An environment or a :class:`DecodingMDP`.
            exploration: c, for values normalised to [0, 1] over the tree (Schrittwieser et al. 2020).
            simulations: How many before a token is taken for good; by default the budget over the horizon.
            temperature: Of the prior.
            kwargs: See :class:`Decoder`.

        Raises:
            ConfigurationError: An argument is out of range.
        """
        super().__init__(env, **kwargs)
        self.exploration = check_number("exploration", exploration, low=0)
        self.temperature = check_number("temperature", temperature, low=0, open_low=True)
        self.simulations = None if simulations is None else check_integer("simulations", simulations)

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the edge that each simulation ends with."""
        horizon = search.actions_to_come(0)
        affordable = search.affordable_rows(horizon * _UNBUDGETED_SIMULATIONS)
        unlimited = math.isinf(affordable)
        budgeted = _UNBUDGETED_SIMULATIONS if unlimited else int(affordable) // horizon
        per_token = self.simulations or max(budgeted, 1)
        simulations = Simulations(search, self.exploration, self.temperature)
        # A tree smaller than the budget ends the search by simulations that find nothing to expand.
        patience = min(20 * per_token, _MOST_FRUITLESS)
        root = fruitless = 0
        while search.can_improve and not (unlimited and root < 0):
            root = max(root, 0)
            for _ in range(per_token):
                path, before = simulations.select(root), search.pops
                edge = simulations.expand(path)
                if edge is not None:
                    yield edge
                simulations.backup(path, simulations.evaluate(path))
                fruitless = fruitless + 1 if search.pops == before else 0
                if fruitless == patience:
                    return
            root = simulations.most_visited(root)  # -1 where the text ended: begin again
