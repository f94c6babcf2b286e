"""REBASE: reward-balanced search."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...checks import check_integer, check_number
from ..search.state import Edges, IntArray, Search, Status
from .beam import affordable_width
from .decoder import Decoder
from .sampling import generator

__all__ = ["RebaseSearch"]


_LARGE = 1e30  # stands in for infinite estimates, whose differences are no numbers


class RebaseSearch(Decoder):
    """Level by level, each prefix gets children in proportion to exp(value / τ), drawn from the language model.

    REBASE (Wu et al. 2024), with f = max h as the value of a prefix, in the place of a process reward model.
    """

    def __init__(
        self, env: Any, *, width: int | None = None, balance: float = 0.1, seed: int = 0, **kwargs: Any
    ) -> None:
        """Keep ``width`` prefixes of each length in all, by default what the budget surely pays for.

        Args:
            env: An environment or a :class:`DecodingMDP`.
            width: Number of prefixes of each length.
            balance: τ, in units of J; small ones favour the best prefix.
            seed: Draws depend on the seed and the prompt only.
            kwargs: See :class:`Decoder`.

        Raises:
            ConfigurationError: An argument is out of range.
        """
        super().__init__(env, **kwargs)
        self.width = None if width is None else check_integer("width", width)
        self.balance, self.seed = check_number("balance", balance, low=0, open_low=True), seed

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the edges of one level at a time."""
        rng, width = generator(self.seed, search), self.width or affordable_width(search)
        rows: IntArray = np.zeros(1, dtype=np.int64)
        while len(rows) and width > 0:
            legal = search.status[rows] != Status.MASKED
            rows, legal = rows[legal.any(axis=1)], legal[legal.any(axis=1)]
            if not len(rows):
                return
            value = np.clip(search.f[rows].max(axis=1), -_LARGE, _LARGE)
            share = np.exp((value - value.max()) / self.balance)
            # The best prefixes first, as in the paper: each takes its rounded share of what is left.
            edges: list[tuple[int, int]] = []
            left, weight = width, share.sum()
            for i in np.argsort(-value, kind="stable"):
                count = min(max(round(left * share[i] / weight), 0), int(legal[i].sum())) if weight > 0 else 0
                left, weight = left - count, weight - share[i]
                logprobs = search.mdp.tree.logprobs[search.node[rows[i]]].astype(np.float64)
                noisy = np.where(legal[i], logprobs + rng.gumbel(size=logprobs.shape), -np.inf)
                edges += [(int(rows[i]), int(action)) for action in np.argsort(-noisy)[:count]]
            if not edges:
                return
            followed = Edges(*np.array(edges, dtype=np.int64).T)
            is_open = search.status[followed] == Status.OPEN
            yield Edges(followed.rows[is_open], followed.actions[is_open])
            children = search.child[followed]
            width -= int((children < 0).sum())  # a finished text gives up its place
            rows = children[children >= 0]
