"""Levin tree search."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..search.state import IntArray, Search, Values
from .astar import AStarPlanner

__all__ = ["LevinTreeSearch"]


class LevinTreeSearch(AStarPlanner):
    """Best-first in the order of depth / π(prefix): Levin tree search (Orseau et al. 2018), guided by the LM alone.

    It finishes a text of probability p and length T after at most T / p expansions.
    """

    def __init__(self, env: Any, **kwargs: Any) -> None:
        """See :class:`AStarPlanner`, whose core it uses."""
        super().__init__(env, search="anytime", weight=1.0, margin=math.inf, **kwargs)

    def priority(self, search: Search, rows: IntArray) -> Values:
        """Return log π - log depth of what each edge leads to, float64 [n, k]."""
        values: Values = search.edge_logprob(rows) - np.log(search.depth[rows] + 1.0)[:, None]
        return values
