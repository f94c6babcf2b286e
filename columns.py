"""Growable columns: parallel arrays that grow together, one row per item."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["GrowableColumns", "Layout"]

# By name: the shape of one row, and its dtype.
Layout = Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]


class GrowableColumns:
    """Parallel arrays ``[capacity, ...]`` of which the first ``size`` rows are in use.

    Growing doubles the capacity, so appending one row at a time costs amortised constant time. ``columns[name]`` is the
    whole array, spare rows included; growing replaces it.

    Attributes:
        layout: By name, the shape and dtype of one row.
        size: Rows in use.
    """

    def __init__(self, layout: Layout, *, minimum: int = 64, maximum: int | None = None) -> None:
        """Start empty.

        Args:
            layout: By name, the shape and dtype of one row.
            minimum: Capacity, in rows, after the first growth.
            maximum: Capacity that is never exceeded; None for no limit.
        """
        self.layout = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in layout.items()}
        self.size = 0
        self._minimum, self._maximum = minimum, maximum
        self._arrays = {name: np.empty((0, *shape), dtype) for name, (shape, dtype) in self.layout.items()}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Return a column, spare rows included."""
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._arrays)

    @property
    def capacity(self) -> int:
        """Rows that fit without growing."""
        return min(len(array) for array in self._arrays.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all columns."""
        return sum(dtype.itemsize * math.prod(shape) for shape, dtype in self.layout.values())

    def used(self) -> dict[str, npt.NDArray[Any]]:
        """Return views of the rows in use, by name."""
        return {name: array[: self.size] for name, array in self._arrays.items()}

    def reserve(self, rows: int) -> bool:
        """Make room for ``rows`` rows in all; return whether the arrays were replaced."""
        if rows <= self.capacity:
            return False
        capacity = max(2 * self.capacity, rows, self._minimum)
        if self._maximum is not None:
            capacity = min(capacity, self._maximum)
        for name, old in self._arrays.items():
            new = np.empty((capacity, *old.shape[1:]), old.dtype)
            new[: self.size] = old[: self.size]
            self._arrays[name] = new
        return True

    def append(self, count: int) -> slice:
        """Add ``count`` rows with undefined content; return where they are."""
        rows = slice(self.size, self.size + count)
        self.reserve(rows.stop)
        self.size = rows.stop
        return rows

    def keep(self, rows: npt.NDArray[np.int64]) -> None:
        """Keep these rows only, in this order."""
        self.replace({name: array[rows] for name, array in self._arrays.items()})

    def replace(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take other content: by name, arrays of one length."""
        self._arrays = {name: np.array(arrays[name], dtype) for name, (_, dtype) in self.layout.items()}
        self.size = self.capacity
