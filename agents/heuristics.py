"""Heuristics: estimates of the best return still to come through an edge, that edge included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..envs import DecodingMDP, Prompt
from .planning import IntArray, Values

if TYPE_CHECKING:
    from .q_function import QFunction

__all__ = ["BoundHeuristic", "Heuristic", "QHeuristic", "ZeroHeuristic"]


class Heuristic(Protocol):
    """Anything that can be called like this; a plain function will do."""

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return h(s, a), float64 [n, k], for all edges of ``n`` nodes.

        Args:
            mdp: The process; its tree holds the nodes' hidden states, tokens and log-probabilities.
            prompts: The prompt of each node.
            nodes: int64 [n].
        """


class ZeroHeuristic:
    """h = α · log π(a | s): nothing is expected beyond the edge itself. A* is then uniform-cost search on fluency."""

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`."""
        del prompts
        return mdp.edge_returns(nodes)

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"{type(self).__name__}()"


class BoundHeuristic(ZeroHeuristic):
    """h = α · log π(a | s) + r_max: admissible, as later log-probabilities are at most 0. Needs no training.

    For a reward without an upper bound the potential φ(s) stands in for r_max: that orders the search, proving nothing.
    """

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`."""
        best = mdp.reward.upper
        if not np.isfinite(best):
            return mdp.edge_returns(nodes) + mdp.potential(prompts, nodes)[:, None]
        return mdp.edge_returns(nodes) + best


class QHeuristic:
    """h = Q(s, a), learned.

    For a Q learned with reward shaping, which estimates the return less φ(s), φ(s) is added back.
    """

    def __init__(self, q: Any) -> None:
        """Use a Q-function.

        Args:
            q: An agent (QStar, or a DQN of stable-baselines3 or sb3-contrib trained on ``TokenDecoding-v0``), a
                :class:`QFunction`, the folder of a saved one, or the name of a task that the package ships one for.

        Raises:
            CheckpointError: A checkpoint is broken.
            UnknownNameError: There is no such folder or task.
        """
        from .q_function import as_q_function

        self.q: QFunction = as_q_function(q)

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`.

        Raises:
            CheckpointError: Q was trained for another model, k or observation layout than ``mdp`` has.
        """
        return self.q.values(mdp, prompts, nodes)

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"QHeuristic({self.q!r})"
