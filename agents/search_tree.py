"""What a search saw, as plain arrays that outlive the search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .search import Search

__all__ = ["SearchTree"]


@dataclass(frozen=True)
class SearchTree:
    """The edges of all expanded nodes, one row per edge, in the order in which their nodes were expanded.

    Attributes:
        parent: int64 [m], index of the node the edge leaves; node 0 is the prompt.
        child: int64 [m], index of the node it leads to, -1 if it was not expanded.
        action: int64 [m], rank among the node's candidates.
        token: int64 [m].
        token_text: The tokens' text.
        logprob: float32 [m], nats.
        g: float64 [m], α · Σ log π up to the node the edge leaves.
        f: float64 [m], the edge's priority g + h.
        bound: float64 [m], U.
        status: ``"open"``, ``"expanded"``, ``"finished"`` or ``"masked"``.
        objective: float64 [m], J of a finished edge, else NaN.
    """

    parent: npt.NDArray[np.int64]
    child: npt.NDArray[np.int64]
    action: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    token_text: list[str]
    logprob: npt.NDArray[np.float32]
    g: npt.NDArray[np.float64]
    f: npt.NDArray[np.float64]
    bound: npt.NDArray[np.float64]
    status: list[str]
    objective: npt.NDArray[np.float64]

    @classmethod
    def from_search(cls, search: Search) -> SearchTree:
        """Copy what ``search`` holds."""
        from .search import Status

        mdp, rows, k = search.mdp, slice(0, search.size), search.mdp.top_k
        nodes = search.node[rows]
        tokens = mdp.tree.tokens[nodes].ravel()
        distinct, inverse = np.unique(tokens, return_inverse=True)
        texts = [mdp.token_text(token) for token in distinct.tolist()]
        objective = np.full((search.size, k), np.nan)
        for edge, completion in search.completions.items():
            objective[edge] = completion.objective
        return cls(
            parent=np.repeat(np.arange(search.size), k),
            child=search.child[rows].ravel(),
            action=np.tile(np.arange(k), search.size),
            token=tokens,
            token_text=[texts[i] for i in inverse],
            logprob=mdp.tree.logprobs[nodes].ravel(),
            g=np.repeat(search.g[rows], k),
            f=search.f[rows].ravel(),
            bound=search.bound[rows].ravel(),
            status=[Status(int(s)).name.lower() for s in search.status[rows].ravel()],
            objective=objective.ravel(),
        )

    def __len__(self) -> int:
        """Return the number of edges."""
        return len(self.action)

    def edges(self) -> Iterator[dict[str, Any]]:
        """Yield each edge as a dict of plain values."""
        columns = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))
