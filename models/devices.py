"""Names of devices and dtypes, and what they mean on this machine."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError

if TYPE_CHECKING:
    import torch

__all__ = ["one_blas_thread", "one_compute_thread", "resolve_device", "resolve_dtype"]


@contextlib.contextmanager
def one_compute_thread() -> Iterator[None]:
    """Let torch compute in the calling thread alone while the context lasts.

    Every thread that computes in parallel keeps OpenMP workers of its own. Where a process has more of them than cores,
    they sleep between operations instead of waiting actively, and small forwards take half as long again. So a thread
    that only loads a model must not keep any.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_blas_lock = threading.Lock()


@functools.cache
def _blas_libraries() -> list[Any]:
    from threadpoolctl import ThreadpoolController

    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let numpy compute products in the calling thread alone while the context lasts; other threads wait to enter it.

    After a product, the workers of OpenBLAS wait actively for some 25 ms. Small products gain nothing from them, and
    the forward that follows loses their cores.
    """
    libraries = _blas_libraries()
    with _blas_lock:
        before = [library.get_num_threads() for library in libraries]
        try:
            for library in libraries:
                library.set_num_threads(1)
            yield
        finally:
            for library, threads in zip(libraries, before, strict=True):
                library.set_num_threads(threads)


def resolve_device(device: str) -> torch.device:
    """Return the device of torch that a name means, ``"auto"`` among them.

    Raises:
        ConfigurationError: This machine does not have it.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(f"device {device!r} is not one: use 'auto', 'cpu', 'cuda', 'cuda:N', 'mps'") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device {device!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    try:
        # A tensor's device has the number that the model will tell: who unpickles the model asks for it by that.
        return torch.empty(0, device=resolved).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {device!r} asked for, but torch cannot use it: {error}") from error


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of torch that a name means; ``"auto"`` depends on the device.

    Raises:
        ConfigurationError: There is no such floating-point dtype.
    """
    import torch

    if dtype == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # Emulated bfloat16 is several times slower than float32, so ask the CPU, not torch.
            native = device.type == "cpu" and bool(
                torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            )
        return torch.bfloat16 if native else torch.float32
    resolved = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ConfigurationError(f"dtype {dtype!r} is not a floating-point one: use 'auto', 'float32', 'bfloat16'")
    return resolved
