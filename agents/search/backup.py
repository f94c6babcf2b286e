"""Values of completions, backed up through the tree of a search."""

from __future__ import annotations

import numpy as np

from .state import IntArray, Search, Status, Values

__all__ = ["backup", "best_found", "sources"]


def best_found(search: Search) -> Values:
    """Return J of the best completion found through each edge, float64 [rows, k], NaN where there is none.

    The process is deterministic, so this is a lower bound of the optimal value, tight where the search found the best
    continuation.
    """
    return _backed_up(search, _found(search))[0]


def backup(search: Search, estimate: Values) -> Values:
    """Return the target for each followed edge: J of the best completion through it, float64 [rows, k], NaN if none.

    Where the search broke off before the end, the largest estimate at the border stands in for the unknown: without
    it, nothing would ever correct a Q that lures the search into beginnings that it then drops.

    Args:
        search: A finished search.
        estimate: float64 [rows, k], g + Q of every edge.
    """
    return sources(search, estimate)[0]


def sources(search: Search, estimate: Values) -> tuple[Values, IntArray]:
    """Return the targets of :func:`backup`, and the edge that each comes from, by its flat index, int64 [rows, k].

    That edge finishes the completion, or is open and has the estimate; where there is no target it means nothing.
    """
    known, finished = _backed_up(search, _found(search))
    status = search.status[: search.size]
    reached, border = _backed_up(search, np.where(status == Status.OPEN, estimate, np.nan))
    # An edge of which a completion is known says no more than that; only beyond the known does the border speak.
    value = np.where(np.isnan(known), reached, known)
    value = np.where(np.isin(status, (Status.EXPANDED, Status.FINISHED)), value, np.nan)
    return value, np.where(np.isnan(known), border, finished)


def _found(search: Search) -> Values:
    """Return J of the completion that each edge finishes, float64 [rows, k], NaN where there is none."""
    found = np.full((search.size, search.mdp.top_k), np.nan)
    for edge, completion in search.completions.items():
        found[edge] = completion.objective
    return found


def _backed_up(search: Search, values: Values) -> tuple[Values, IntArray]:
    """Return the largest value at or below each edge, and the flat index of its edge; NaN counts as none."""
    best = np.where(np.isnan(values), -np.inf, values)
    source = np.arange(best.size).reshape(best.shape)
    for row in range(search.size - 1, 0, -1):  # children are always younger than their parents
        parent_edges = search.parent[row], np.flatnonzero(search.child[search.parent[row]] == row)
        largest = best[row].argmax()
        best[parent_edges], source[parent_edges] = best[row, largest], source[row, largest]
    return np.where(np.isneginf(best), np.nan, best), source
