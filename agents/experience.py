"""What Q-learning from searches remembers: states, and what the search found beyond their edges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..envs import Observer
from ..envs.mdp import DecodingMDP
from ..errors import ConfigurationError
from .planning import Search, Status, Values

__all__ = ["SearchExperience", "backup", "best_found"]


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
        came_by = search.parent[row], np.flatnonzero(search.child[search.parent[row]] == row)
        best[came_by] = best[row].max()
    return np.where(np.isneginf(best), np.nan, best)


class SearchExperience:
    """A ring buffer of states with targets, independent of the token tree they came from.

    A state is stored once with all its edges, the hidden state in half precision and the candidates as token ids:
    some 1.3 kB for the embedded model with k = 8, against 7 kB for a transition in SB3's dict replay buffer.
    """

    def __init__(self, mdp: DecodingMDP, observer: Observer, buffer_bytes: int) -> None:
        """Make room for ``buffer_bytes`` of states.

        Raises:
            ConfigurationError: That is less than a thousand states.
        """
        d, k = mdp.model.hidden_size, mdp.top_k
        self._features = observer.features
        self._layout: dict[str, tuple[tuple[int, ...], Any]] = {
            "hidden": ((d,), np.float16),
            "tokens": ((k,), np.int32),
            "logprobs": ((k,), np.float32),
            "potential": ((1,), np.float32),
            "remaining": ((1,), np.float32),
            "action_mask": ((k,), np.int8),
            "target": ((k,), np.float32),
        }
        row_bytes = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self._layout.values())
        self.capacity = buffer_bytes // row_bytes
        if self.capacity < 1000:
            raise ConfigurationError(
                f"buffer_bytes={buffer_bytes} holds {self.capacity} states; give {1000 * row_bytes}"
            )
        self._columns = {name: np.empty((0, *shape), dtype) for name, (shape, dtype) in self._layout.items()}
        self.size = self.position = 0

    def add(self, search: Search, observer: Observer, q: Values) -> int:
        """Store the states of a search whose edges were followed; return how many edges that makes.

        Args:
            search: A finished search.
            observer: Of the search's MDP.
            q: float64 [rows, k], the current Q of every edge, φ(s) added back.
        """
        value = backup(search, search.g[: search.size, None] + q)
        rows = np.flatnonzero(np.isfinite(value).any(axis=1))
        if not len(rows):
            return 0
        nodes, prompts = search.node[rows], [search.prompt] * len(rows)
        potential = search.mdp.potential(prompts, nodes)
        seen = observer.observe(potential, nodes)
        # What is learnt is the return from here on, less the potential: Q of the shaped process.
        target = value[rows] - search.g[rows, None] - potential[:, None]
        self._write(
            {
                **{name: seen[name] for name in ("hidden", "logprobs", "potential", "remaining", "action_mask")},
                "tokens": search.mdp.tree.tokens[nodes],
                "target": target,
            }
        )
        return int(np.isfinite(target).sum())

    def sample(
        self, batch_size: int, rng: np.random.Generator
    ) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.float32]]:
        """Return observations of ``batch_size`` states and targets float32 [batch, k], NaN where there is none."""
        rows = rng.integers(self.size, size=batch_size)
        batch = {name: column[rows] for name, column in self._columns.items()}
        target, tokens = batch.pop("target"), batch.pop("tokens")
        batch["candidates"] = self._features[tokens].reshape(batch_size, -1)
        return batch, target

    @property
    def hidden(self) -> npt.NDArray[np.float16]:
        """The hidden states remembered, float16 [size, d]."""
        return self._columns["hidden"][: self.size]

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return the content as arrays, for a checkpoint."""
        return {name: column[: self.size] for name, column in self._columns.items()}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]], position: int) -> None:
        """Take the content back."""
        self._columns = {name: np.array(arrays[name]) for name in self._layout}
        self.size, self.position = len(self._columns["target"]), position

    def _write(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        rows = (self.position + np.arange(len(values["target"]))) % self.capacity
        needed = min(self.position + len(rows), self.capacity)
        if needed > len(self._columns["target"]):
            length = min(max(needed, 2 * len(self._columns["target"]), 4096), self.capacity)
            for name, column in self._columns.items():
                bigger = np.empty((length, *column.shape[1:]), column.dtype)
                bigger[: self.size] = column[: self.size]
                self._columns[name] = bigger
        for name, value in values.items():
            self._columns[name][rows] = value
        self.size = max(self.size, needed)
        self.position = int(rows[-1] + 1) % self.capacity
