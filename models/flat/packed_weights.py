"""Weights laid out for batches of a known size: the matrix products of small batches, 10 to 20 % faster on CPUs.

The BLAS library that PyTorch brings for x86 (MKL) can rearrange a weight matrix once for products with a given number
of rows. It is worth it for a decoder, which multiplies the same weights by a few rows for ever; it costs memory: a copy
of the weights for each size. docs/performance.md has the measured gain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["WORTHWHILE", "PackedWeights"]

# Rows that a forward is filled up to, and from how many rows on that gains more than the filling costs (measured).
_SIZES = {16: 7, 32: 17, 64: 45}
# Making a layout costs as much as some 100 forwards gain, and a copy of the weights. A few plans are done without.
WORTHWHILE = 1000


class PackedWeights:
    """A model's linear layers with rearranged weights, swapped in for the length of a forward.

    The layouts are made when they are first needed, and anew when somebody has changed the model's weights.
    """

    def __init__(self, model: torch.nn.Module, available_bytes: float = float("inf"), *, worthwhile: int = 0) -> None:
        """Prepare for ``model``.

        Args:
            model: The model.
            available_bytes: Bytes that the layouts may take together.
            worthwhile: A layout is made for the forward of its size with this number, from 0.
        """
        self._linears = [m for m in model.modules() if type(m) is torch.nn.Linear and "forward" not in vars(m)]
        self._weights = [m.weight for m in self._linears]
        self._forwards: dict[int, list[Callable[[Tensor], Tensor]]] = {}
        self._forwards_of_size = dict.fromkeys(_SIZES, -1)
        self._worthwhile = worthwhile
        self._versions = self._weight_versions()
        bytes_each = sum(m.weight.numel() * m.weight.element_size() for m in self._linears)
        self._most = available_bytes // max(bytes_each, 1)
        self._usable = _usable(self._linears)

    def size_for(self, rows: int) -> int | None:
        """Return how many rows a forward of ``rows`` should be filled up to; None where it should stay as it is."""
        size = next((size for size in _SIZES if rows <= size), None)
        if not self._usable or size is None or rows < _SIZES[size]:
            return None
        self._forwards_of_size[size] += 1
        is_worthwhile = self._forwards_of_size[size] >= self._worthwhile and len(self._forwards) < self._most
        return size if size in self._forwards or is_worthwhile else None

    @contextlib.contextmanager
    def swapped_in(self, size: int) -> Iterator[None]:
        """Use the layout for ``size`` rows while the context lasts."""
        if self._versions != (versions := self._weight_versions()):
            self._forwards, self._versions = {}, versions
        if size not in self._forwards:
            self._forwards[size] = [_packed(m, size) for m in self._linears]
        try:
            for linear, forward in zip(self._linears, self._forwards[size], strict=True):
                vars(linear)["forward"] = forward  # not setattr, which torch.nn.Module makes slow
            yield
        finally:
            for linear in self._linears:
                vars(linear).pop("forward", None)

    def _weight_versions(self) -> int:
        return sum(weight._version for weight in self._weights if not weight.is_inference())


def _usable(linears: list[torch.nn.Linear]) -> bool:
    """Return whether this build of PyTorch can do it for these layers."""
    plain = all(m.weight.device.type == "cpu" and m.weight.dtype == torch.float32 for m in linears)
    return bool(linears) and plain and hasattr(torch.ops.mkl, "_mkl_linear")


def _packed(linear: torch.nn.Linear, size: int) -> Callable[[Tensor], Tensor]:
    weight, bias = linear.weight.detach(), cast("Tensor | None", linear.bias)
    bias = None if bias is None else bias.detach()
    operators: Any = torch.ops.mkl
    packed = operators._mkl_reorder_linear_weight(weight, size)
    # Where the rows are not that many, the operator falls back to the plain weight by itself.
    return lambda rows: operators._mkl_linear(rows, packed, weight, bias, size)
