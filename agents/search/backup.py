"""Values of completions, backed up through the tree of a search."""

from __future__ import annotations

import numpy as np

from .state import Search, Status, Values

__all__ = ["backup", "best_found"]


def best_found(search: Search) -> Values:
    """Return J of the best completion found through each edge, float64 [rows, k], NaN where there is none.

    The process is deterministic, so this is a lower bound of the optimal value, tight where the search found the best
    continuation.
    """
    found = np.full((search.size, search.mdp.top_k), np.nan)
    for edge, completion in search.completions.items():
        found[edge] = completion.objective
    return _backed_up(search, found)


def backup(search: Search, estimate: Values) -> Values:
    """Return the target for each followed edge: J of the best completion through it, float64 [rows, k], NaN if none.

    Where the search broke off before the end, the largest estimate at the border stands in for the unknown: without
    it, nothing would ever correct a Q that lures the search into beginnings that it then drops.

    Args:
        search: A finished search.
        estimate: float64 [rows, k], g + Q of every edge.
    """
    found = best_found(search)
    status = search.status[: search.size]
    reached = _backed_up(search, np.where(status == Status.OPEN, estimate, np.nan))
    # An edge of which a completion is known says no more than that; only beyond the known does the border speak.
    value = np.where(np.isnan(found), reached, found)
    return np.where(np.isin(status, (Status.EXPANDED, Status.FINISHED)), value, np.nan)


def _backed_up(search: Search, values: Values) -> Values:
    """Return the largest value at or below each edge; NaN counts as none."""
    best = np.where(np.isnan(values), -np.inf, values)
    for row in range(search.size - 1, 0, -1):  # children are always younger than their parents
        parent_edges = search.parent[row], np.flatnonzero(search.child[search.parent[row]] == row)
        best[parent_edges] = best[row].max()
    return np.where(np.isneginf(best), np.nan, best)
