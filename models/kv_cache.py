"""The memory of keys and values that all branches of all prompts share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .base import IntArray

if TYPE_CHECKING:
    pass

_FREE = -1  # the slot of an entry whose key-value memory was given up


class _Pool:
    """Keys and values of every layer, ``[slots, H_kv, D + D_v]`` each, growing up to a budget of bytes."""

    def __init__(self, budget: int, token_bytes: int | None) -> None:
        self.budget = budget
        self.token_bytes = token_bytes  # over all layers; None while it is still to be found out
        self.capacity = 0
        self._layers: dict[int, Tensor] = {}

    def layer(self, index: int, keys: Tensor, values: Tensor) -> Tensor:
        """Return a layer's memory, made at its first use in the shape that the model turns out to need."""
        if index not in self._layers:
            self._layers[index] = keys.new_empty(self.capacity, keys.shape[1], keys.shape[3] + values.shape[3])
        return self._layers[index]

    @property
    def max_slots(self) -> int:
        """How many tokens the budget pays for."""
        return self.budget // self.token_bytes if self.token_bytes else 1 << 20

    @property
    def held_bytes(self) -> int:
        """Bytes allocated now."""
        return sum(t.numel() * t.element_size() for t in self._layers.values())

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` tokens, layer by layer, so that only one layer is ever held twice."""
        for index, old in self._layers.items():
            new = old.new_empty((slots, *old.shape[1:]))
            new[: self.capacity] = old[: self.capacity]  # longer, if memory ran out half-way through an earlier growth
            self._layers[index] = new
        self.capacity = slots


class _Table:
    """Growable parallel int64 columns, one row per token of the tree."""

    def __init__(self) -> None:
        self.size = 0
        self.token, self.parent, self.position, self.chain, self.stem, self.slot, self.used = (
            np.zeros(1024, dtype=np.int64) for _ in range(7)
        )
        # chain: the prompt whose tokens this row is one of, or hangs from.
        # stem: the last row that is a prompt's token on the way here; the row itself within a prompt.
        # slot: where in the pool its key and value are, or _FREE.
        # used: the last batch it was needed in; never older than its descendants', so branches are given up leaf first.

    def append(self, token: IntArray, parent: IntArray, position: IntArray, chain: IntArray) -> IntArray:
        """Add rows and return their indices; each is its own stem until told otherwise."""
        rows = np.arange(self.size, self.size + len(token))
        self.size += len(token)
        if self.size > len(self.token):
            for name, column in list(vars(self).items()):
                if name != "size":
                    setattr(self, name, np.resize(column, max(2 * len(column), self.size)))
        self.token[rows], self.parent[rows], self.position[rows], self.chain[rows] = token, parent, position, chain
        self.stem[rows], self.slot[rows], self.used[rows] = rows, _FREE, 0
        return rows

    def keep(self, rows: IntArray, new: IntArray) -> None:
        """Keep only ``rows``; ``new`` [size + 1] tells the new index of each, and -1 of -1."""
        self.parent[rows], self.stem[rows] = new[self.parent[rows]], new[self.stem[rows]]
        self.size = len(rows)
        for name, column in list(vars(self).items()):
            if name != "size":
                setattr(self, name, np.resize(column[rows], max(1024, len(rows))))
