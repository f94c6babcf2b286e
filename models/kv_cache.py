"""The memory of keys and values that all branches of all prompts share, and the table of its tokens."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..columns import GrowableColumns
from .base import IntArray

__all__ = ["NO_SLOT", "KeyValuePool", "TokenTable"]

NO_SLOT = -1  # the slot of a token whose keys and values are not in memory


class KeyValuePool:
    """Keys and values of every layer, ``[slots, H_kv, D + D_v]`` each, growing up to a budget of bytes."""

    def __init__(self, budget: int, token_bytes: int | None) -> None:
        """Start with no slots.

        Args:
            budget: Bytes over all layers.
            token_bytes: Bytes of one token over all layers; None while they are not known.
        """
        self.budget = budget
        self.token_bytes = token_bytes
        self.capacity = 0
        self._layers: dict[int, Tensor] = {}

    def layer(self, index: int, keys: Tensor, values: Tensor) -> Tensor:
        """Return a layer's memory; its first use makes it, in the shape of the model's keys and values."""
        if index not in self._layers:
            self._layers[index] = keys.new_empty(self.capacity, keys.shape[1], keys.shape[3] + values.shape[3])
        return self._layers[index]

    @property
    def max_slots(self) -> int:
        """Tokens that the budget pays for."""
        return self.budget // self.token_bytes if self.token_bytes else 1 << 20

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated now."""
        return sum(t.numel() * t.element_size() for t in self._layers.values())

    def grow(self, slots: int) -> None:
        """Make place for ``slots`` tokens, layer by layer, so that at most one layer is in memory twice."""
        for index, old in self._layers.items():
            new = old.new_empty((slots, *old.shape[1:]))
            new[: self.capacity] = old[: self.capacity]  # longer, if memory ran out half-way through an earlier growth
            self._layers[index] = new
        self.capacity = slots


class TokenTable:
    """The tokens of all prefixes as a trie, one row a token; rows keep their numbers until they are removed.

    Attributes:
        token: int64 [rows].
        parent: int64 [rows], the row of the token before it, -1 at a prompt's first token.
        position: int64 [rows], tokens before it; -1 for an unused row.
        prompt_id: int64 [rows], the prompt that the row belongs to or continues.
        branch_point: int64 [rows], its last ancestor that belongs to a prompt; a prompt's row is its own.
        slot: int64 [rows], the place of its key and value in the pool, or NO_SLOT.
        last_used: int64 [rows], the last batch that needed it; never older than its descendants' values.
    """

    token: IntArray
    parent: IntArray
    position: IntArray
    prompt_id: IntArray
    branch_point: IntArray
    slot: IntArray
    last_used: IntArray

    def __init__(self) -> None:
        """Start empty."""
        names = ("token", "parent", "position", "prompt_id", "branch_point", "slot", "last_used")
        self._columns = GrowableColumns(dict.fromkeys(names, ((), np.int64)), minimum=1024)
        self._unused: list[int] = []
        self._publish()

    @property
    def size(self) -> int:
        """Rows, the unused ones among them included."""
        return self._columns.size

    def add(self, token: IntArray, parent: IntArray, position: IntArray, prompt_id: IntArray) -> IntArray:
        """Add tokens that belong to prompts, without memory for their keys and values, and return their rows."""
        count = len(token)
        reused = self._unused[len(self._unused) - min(count, len(self._unused)) :]
        del self._unused[len(self._unused) - len(reused) :]
        added = self._columns.append(count - len(reused))
        if added.stop > len(self.token):
            self._publish()
        rows: IntArray = np.concatenate((np.array(reused, dtype=np.int64), np.arange(added.start, added.stop)))
        self.token[rows], self.parent[rows], self.position[rows] = token, parent, position
        self.prompt_id[rows] = prompt_id
        self.branch_point[rows], self.slot[rows], self.last_used[rows] = rows, NO_SLOT, 0
        return rows

    def remove(self, rows: IntArray) -> None:
        """Make rows unused; they are taken again before the table grows."""
        self.position[rows] = -1
        self._unused.extend(rows.tolist())

    def in_use(self) -> IntArray:
        """Return the rows that are in use, ascending."""
        return np.arange(self.size)[self.position[: self.size] >= 0]

    def _publish(self) -> None:
        """Make the arrays, which growing replaces, attributes."""
        for name in self._columns:
            setattr(self, name, self._columns[name])
