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


class NodeStats:
    """What simulations found out about the edges of one row.

    Attributes:
        mean: float64 [k]; of an edge that was not visited yet, what the heuristic says it will be.
        weighted_prior: c · prior, float64 [k].
        closed: 0, or -inf where an edge is masked, float64 [k].
        visits: float64 [k].
        totals: float64 [k].
        simulations: Visits of all edges.
    """

    __slots__ = ("closed", "mean", "simulations", "totals", "visits", "weighted_prior")

    def __init__(self, mean: Values, weighted_prior: Values, closed: Values) -> None:
        """Start without any."""
        self.mean, self.weighted_prior, self.closed = mean, weighted_prior, closed
        self.visits, self.totals, self.simulations = np.zeros(len(mean)), np.zeros(len(mean)), 0

    def add(self, action: int, value: float) -> None:
        """Enter what a simulation by way of this edge came to."""
        self.visits[action] += 1
        self.totals[action] += value
        self.simulations += 1
        self.mean[action] = self.totals[action] / self.visits[action]


class MCTS(Decoder):
    """Monte Carlo tree search by PUCT, with the language model as prior and the heuristic as value.

    Silver et al. 2017; for texts Feng et al. 2023 (TS-LLM) and Liu et al. 2023 (PPO-MCTS). A simulation follows the
    edges of largest value + c · prior · √visits / (1 + own visits) until it leaves what is expanded, expands
    that edge, and adds f = max h there, or J where the text ended, to the mean of every edge on its way. After some
    simulations the most visited edge is taken for good and its subtree is kept; at the end of a text the search begins
    again at the prompt with everything it knows.
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
        horizon = search.mdp.max_new_tokens
        unlimited = math.isinf(search.remaining_tokens)
        most = self.simulations or (8 if unlimited else max(int(search.remaining_tokens) // horizon, 1))
        seen: list[NodeStats] = []
        known = search.f[0][(search.status[0] != Status.MASKED) & np.isfinite(search.f[0])]
        low, high = float(known.min(initial=math.inf)), float(known.max(initial=-math.inf))
        root = fruitless = 0
        while fruitless < 20 * most and search.can_improve and not (unlimited and root < 0):
            root, before = max(root, 0), search.size + len(search.completions)
            for _ in range(most):
                if len(seen) < search.size:  # most simulations late in a search expand nothing
                    seen += self._unvisited(search, np.arange(len(seen), search.size))
                row, path = root, []
                while True:
                    action = self._pick(seen[row], low, high)
                    path.append((row, action))
                    if search.status[row, action] != Status.EXPANDED:
                        break
                    row = int(search.child[row, action])
                if search.status[row, action] == Status.OPEN:
                    yield Edges(np.array([row]), np.array([action]))
                value = self._value(search, row, action)
                if math.isfinite(value):
                    low, high = min(low, value), max(high, value)
                for row, action in path:
                    seen[row].add(action, value if math.isfinite(value) else low)
            taken = int(seen[root].visits.argmax())
            root = int(search.child[root, taken])  # -1 where the text ended: begin again
            fruitless = fruitless + most if search.size + len(search.completions) == before else 0

    def _unvisited(self, search: Search, rows: IntArray) -> Iterator[NodeStats]:
        """Yield what is known of each of these rows before any simulation has come by."""
        legal = search.status[rows] != Status.MASKED
        logprobs = search.mdp.tree.logprobs[search.node[rows]].astype(np.float64) / self.temperature
        most = logprobs.max(axis=1, where=legal, initial=-np.inf, keepdims=True)
        with np.errstate(invalid="ignore"):  # a constraint may leave nothing to take
            prior = np.where(legal, np.exp(logprobs - most), 0.0)
        prior /= np.maximum(prior.sum(axis=1, keepdims=True), 1e-300)
        for f, weighted_prior, closed in zip(
            search.f[rows], self.exploration * prior, np.where(legal, 0, -np.inf), strict=True
        ):
            yield NodeStats(f.copy(), weighted_prior, closed)

    @staticmethod
    def _pick(edges: NodeStats, low: float, high: float) -> int:
        value = np.minimum(np.maximum((edges.mean - low) / (high - low), 0.0), 1.0) if high > low else 0.5
        score = value + edges.weighted_prior * math.sqrt(edges.simulations + 1) / (1 + edges.visits) + edges.closed
        return int(score.argmax())

    @staticmethod
    def _value(search: Search, row: int, action: int) -> float:
        if (row, action) in search.completions:
            return search.completions[row, action].objective
        child = search.child[row, action]
        legal = search.status[child] != Status.MASKED
        return float(search.f[child].max(where=legal, initial=-np.inf))
