"""Beam search and diverse beam search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...checks import check_integer, check_number
from ...errors import ConfigurationError
from ..heuristics import Heuristic
from ..search.state import Edges, IntArray, Search, Status
from .decoder import Decoder

__all__ = ["BeamSearch", "DiverseBeamSearch"]

_UNBUDGETED_BEAM = 8  # transformers' documentation uses 4 to 10


class BeamSearch(Decoder):
    """Keep the ``width`` likeliest prefixes of each length; the texts they end in are reranked by J.

    With a heuristic prefixes are kept by f = g + h instead. Edges that finish leave the beam with a completion.
    """

    def __init__(
        self,
        env: Any,
        *,
        width: int | None = None,
        rerank: bool = True,
        heuristic: Heuristic | None = None,
        **kwargs: Any,
    ) -> None:
        """Decode with a beam.

        Args:
            env: An environment or a :class:`DecodingMDP`.
            width: Prefixes of each length, by default as many as what is left of the budget surely pays for: what texts
                that end early do not need makes the rest of the beam wider.
            rerank: Whether the reward is asked to choose among the finished texts; if not, the one of highest f is
                proposed, without a heuristic the likeliest.
            heuristic: See the class.
            kwargs: See :class:`Decoder`.

        Raises:
            ConfigurationError: An argument is out of range.
        """
        super().__init__(env, heuristic=heuristic, **kwargs)
        if width is not None and width < 1:
            raise ConfigurationError(f"width is an integer >= 1 or None, got {width!r}")
        self.width = width
        if not rerank:
            self.score = "q"

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the edges of one level at a time."""
        width = self.width or 1
        for depth in range(search.mdp.max_new_tokens):
            width = self.width or max(width, affordable_width(search, depth))
            rows = search.at_depth(depth)
            row, action = np.nonzero(search.status[rows] == Status.OPEN)
            best = np.argsort(-search.f[rows[row], action], kind="stable")[:width]
            if not len(best):
                return
            yield Edges(rows[row[best]], action[best])


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
            said: Counter[int] = Counter()
            taken: set[tuple[int, int]] = set()
            for rows, size in zip(members, sizes, strict=True):
                row, action = np.nonzero(search.status[rows] == Status.OPEN)
                row = rows[row]
                tokens = search.mdp.tree.tokens[search.node[row], action]
                worth = search.f[row, action] - self.diversity * np.array([said[t] for t in tokens.tolist()])
                ranked = [i for i in np.argsort(-worth, kind="stable") if (row[i], action[i]) not in taken][:size]
                chosen.append(Edges(row[ranked], action[ranked]))
                said.update(tokens[ranked].tolist())
                taken.update(zip(row[ranked], action[ranked], strict=True))
            if not taken:
                return
            yield Edges(*(np.concatenate(part) for part in zip(*chosen, strict=True)))
            members = [search.child[edges] for edges in chosen]
            members = [children[children >= 0] for children in members]


def affordable_width(search: Search, depth: int = 0) -> int:
    """Return how many prefixes of each length, from this depth on, the rest of the budget surely pays for."""
    steps = max(search.mdp.max_new_tokens - 1 - depth, 1)
    affordable = search.affordable_tokens(steps)
    return _UNBUDGETED_BEAM if math.isinf(affordable) else max(int(affordable) // steps, 1)
