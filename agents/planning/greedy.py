"""Greedy decoders: the best edge at each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...checks import check_number
from ...errors import ConfigurationError
from ..search.state import NO_EDGES, Edges, Search, Status, Values
from .decoder import Decoder

__all__ = ["ARGSDecoder", "GreedyDecoder"]


class GreedyDecoder(Decoder):
    """Take the most likely token each time; with a heuristic, the one with the largest h: arg max Q.

    Attributes:
        calls_per_candidate: Reward calls that choosing among the candidates of a step costs, for each of them.
    """

    calls_per_candidate = 0

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield one edge per step, until the text is finished."""
        row = 0
        while row >= 0 and (search.status[row] != Status.MASKED).any():  # a constraint may leave nothing to take
            legal = np.flatnonzero(search.status[row] != Status.MASKED)
            calls, allowed = self.calls_per_candidate * len(legal), search.budget.reward_calls
            if allowed is not None and search.reward_calls + calls > allowed:
                search.stop_reason = "budget"  # until it is resumed with a larger one
                yield NO_EDGES
                continue
            search.reward_calls += calls
            edge = Edges(np.array([row]), legal[[self.preferences(search, row)[legal].argmax()]])
            if search.status[edge][0] == Status.OPEN:
                yield edge
            row = int(search.child[edge][0])

    def preferences(self, search: Search, row: int) -> Values:
        """Return the values that the actions of a row are chosen by, float64 [k]."""
        values: Values = search.f[row]
        return values


class ARGSDecoder(GreedyDecoder):
    """Take the token with the largest log π(a | s) + w · φ(s·a) each time, φ being the reward of the prefix it makes.

    ARGS (Khanov, Burapacheep & Li 2024), greedy version. Every candidate's prefix is scored, k reward calls a token; it
    needs no further token of the language model for that, as the text is known.
    """

    calls_per_candidate = 1

    def __init__(self, env: Any, *, reward_weight: float = 1.0, **kwargs: Any) -> None:
        """Weigh the prefix's reward by ``reward_weight``, in nats per unit of reward.

        Raises:
            ConfigurationError: The reward has no potential, so it cannot score prefixes; or ``score="q"``.
        """
        super().__init__(env, **kwargs)
        if self.score == "q":
            raise ConfigurationError(
                'ARGS asks the reward at every step, which score="q" rules out; use score="reward"'
            )
        self.reward_weight = check_number("reward_weight", reward_weight)
        self.check()

    def check(self) -> None:
        """Check that the reward can score prefixes.

        Raises:
            ConfigurationError: It has no potential.
        """
        if not self.mdp.reward.has_potential:
            raise ConfigurationError(
                f"ARGS scores prefixes, and the reward {self.mdp.reward.name!r} has no potential that could"
            )

    def preferences(self, search: Search, row: int) -> Values:
        """See :class:`GreedyDecoder`."""
        mdp, node = search.mdp, search.node[row]
        legal = np.flatnonzero(search.status[row] != Status.MASKED)
        values = np.full(mdp.top_k, -np.inf)
        values[legal] = mdp.logprobs(np.array([node]))[0, legal] + self.reward_weight * mdp.edge_potentials(
            search.prompt, int(node), legal
        )
        return values
