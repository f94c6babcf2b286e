"""The problem of a search: what is maximised, where, and what estimates the way there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ...envs.mdp import DecodingMDP, Values
from ...envs.prompts import Prompt
from ...errors import HeuristicError, QStarError
from ...models.base import IntArray

__all__ = ["Heuristic", "Problem", "Scope", "Score"]

Scope = Literal["top-k tree", "full vocabulary"]
Score = Literal["reward", "q"]


class Heuristic(Protocol):
    """A callable that estimates returns; a plain function will do."""

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return h(s, a), float64 [n, k], for all edges of ``n`` nodes.

        Args:
            mdp: The process; its tree holds the nodes' hidden states, tokens and log-probabilities.
            prompts: The prompt of each node.
            nodes: int64 [n].
        """


@dataclass(frozen=True)
class Problem:
    """What a search maximises, and where.

    Attributes:
        mdp: The process whose J is maximised.
        heuristic: Estimates the best return through each edge; None estimates the edge's own return only.
        scope: What upper bounds speak of, ``"top-k tree"`` or ``"full vocabulary"``.
        score: What ranks finished texts: ``"reward"``, the reward model, or ``"q"``, the heuristic's f = g + h of the
            last edge. With ``"q"`` the reward model is never called, and nothing is certified.
        n_best: How many of the best texts are wanted; an edge is pruned by the n-th best.
        pathmax: Whether an edge's f is at most that of the edge that led to it (Mérő 1984).
    """

    mdp: DecodingMDP
    heuristic: Heuristic | None = None
    scope: Scope = "top-k tree"
    score: Score = "reward"
    n_best: int = 1
    pathmax: bool = False

    def evaluate(self, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return h, the estimated best return through each edge, that edge included, float64 [n, k].

        Raises:
            HeuristicError: The heuristic raised, or returned another shape, or NaN.
        """
        if self.heuristic is None:
            return self.mdp.edge_returns(nodes)
        try:
            h = np.asarray(self.heuristic(self.mdp, prompts, nodes), dtype=np.float64)
        except QStarError:
            raise  # says what is wrong by itself
        except Exception as error:
            raise HeuristicError(
                f"{self.heuristic!r} raised {type(error).__name__} for {len(nodes)} nodes, the first after the text "
                f"{self.mdp.text(int(nodes[0]))!r}: {error}"
            ) from error
        if h.shape != (len(nodes), self.mdp.top_k):
            raise HeuristicError(
                f"{self.heuristic!r} returned shape {h.shape}, expected {(len(nodes), self.mdp.top_k)}"
            )
        if np.isnan(h).any():
            text = self.mdp.text(int(nodes[np.isnan(h).any(axis=1).argmax()]))
            raise HeuristicError(f"{self.heuristic!r} returned NaN for an action after the text {text!r}")
        return h
