"""Linear layers: plain, in half precision, and side by side."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError

__all__ = ["HalfLinear", "Stacked", "check_half", "half_problem", "linear_of"]

_LARGEST_HALF = 65504.0
# Packing a large matrix whole misses the caches: the output layer of 49,152 rows takes 1.6 s, in pieces .45 s.
_ROWS_PER_PIECE = 2048


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a layer of these weights [out, in] and this bias [out], without a copy."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


class HalfLinear(nn.Module):
    """A linear layer with weights in half precision and arithmetic in single precision (FBGEMM, x86).

    It equals a linear layer of the rounded weights up to rounding errors of single precision.

    Attributes:
        shape: (out, in).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Round and pack weights [out, in].

        Raises:
            ConfigurationError: A weight is beyond half precision.
        """
        super().__init__()
        if not float(weight.abs().max()) <= _LARGEST_HALF:
            raise ConfigurationError(
                f"weights='float16' holds numbers up to {_LARGEST_HALF:g}, and this model has larger weights; "
                "load it with weights='flat'"
            )
        self.shape = tuple(weight.shape)
        self._pack(weight, bias)

    def _pack(self, weight: Tensor, bias: Tensor | None) -> None:
        starts = range(0, len(weight), _ROWS_PER_PIECE)
        slices = [slice(start, start + _ROWS_PER_PIECE) for start in starts]
        pieces = [(weight[piece], None if bias is None else bias[piece]) for piece in slices]
        pack = torch.ops.quantized.linear_prepack_fp16
        self._pieces = [pack(w.float().contiguous(), None if b is None else b.float()) for w, b in pieces]

    def unpacked(self) -> tuple[Tensor, Tensor | None]:
        """Return the rounded weights float32 [out, in] and the bias, new copies."""
        weights, biases = zip(*map(torch.ops.quantized.linear_unpack_fp16, self._pieces), strict=True)
        return torch.cat(weights).float(), None if biases[0] is None else torch.cat(biases)

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply float32 [..., in] to float32 [..., out]."""
        multiply = torch.ops.quantized.linear_dynamic_fp16
        products = [multiply(inputs, piece) for piece in self._pieces]
        return products[0] if len(products) == 1 else torch.cat(products, -1)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the rounded weights; packed ones belong to a process."""
        weight, bias = self.unpacked()
        return {**{k: v for k, v in self.__dict__.items() if k != "_pieces"}, "unpacked": (weight.half(), bias)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the weights again."""
        weight, bias = state.pop("unpacked")
        cast("Any", super()).__setstate__(state)
        self._pack(weight, bias)


class Stacked(nn.Module):
    """Linear layers of the same input, their outputs side by side: one copy of the weights fewer than in one layer."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        """Hold the layers."""
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply [..., in] to [..., sum of out]."""
        return torch.cat([layer.forward(inputs) for layer in self.layers], -1)


@functools.cache
def half_problem() -> str:
    """Return why this build of torch cannot multiply by packed half-precision weights; nothing where it can."""
    try:
        weight = torch.arange(-32.0, 32).view(8, 8) / 16
        packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        product = torch.ops.quantized.linear_dynamic_fp16(torch.eye(8), packed)
    except (RuntimeError, AttributeError) as error:
        return str(error).splitlines()[0]
    return "" if torch.equal(product, weight.t()) else "its products are wrong"


def check_half() -> None:
    """Check that this build of torch multiplies by half-precision weights.

    Raises:
        ConfigurationError: It does not.
    """
    if problem := half_problem():
        raise ConfigurationError(
            "weights='float16' needs a CPU with AVX2 and a build of torch with FBGEMM; use weights='flat' "
            f"(torch says: {problem})"
        )
