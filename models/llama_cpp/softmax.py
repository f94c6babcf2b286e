"""Log-probabilities of logits, whole or the likeliest, in numpy: a process without torch is 200 MB smaller."""

from __future__ import annotations

import numpy as np

from ..base import BoolArray, FloatArray, IntArray

__all__ = ["log_softmax", "top_logprobs"]


def log_softmax(logits: FloatArray) -> FloatArray:
    """Return the log-probabilities float32 [n, V] of logits [n, V]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def top_logprobs(logits: FloatArray, k: int, allowed: BoolArray | None = None) -> tuple[IntArray, FloatArray]:
    """Return the ``k`` likeliest tokens [n, k], and their log-probabilities by the full softmax of ``logits`` [n, V].

    They are the likeliest of those ``allowed`` [n, V], if that is given. ``logits`` is overwritten.
    """
    largest = logits.max(axis=1, keepdims=True)
    tokens = _top(logits if allowed is None else np.where(allowed, logits, -np.inf), k)
    top = np.take_along_axis(logits, tokens, axis=1)
    if allowed is not None:
        top = np.where(np.take_along_axis(allowed, tokens, axis=1), top, -np.inf)
    np.subtract(logits, largest, out=logits)
    np.exp(logits, out=logits)
    logprobs = top - largest - np.log(logits.sum(axis=1, keepdims=True))
    return tokens, logprobs.astype(np.float32, copy=False)


def _top(values: FloatArray, k: int, width: int = 128) -> IntArray:
    """Return the columns of the ``k`` largest values of each row, largest first.

    They lie in the k blocks of columns with the largest maxima, or in the columns that fill no block.
    """
    n, size = values.shape
    blocks = size // width
    if blocks > 2 * k:
        maxima = values[:, : blocks * width].reshape(n, blocks, width).max(axis=2)
        best = np.sort(np.argpartition(maxima, -k, axis=1)[:, -k:], axis=1)
        columns = (best[:, :, None] * width + np.arange(width)).reshape(n, k * width)
        columns = np.concatenate((columns, np.tile(np.arange(blocks * width, size), (n, 1))), axis=1)
    else:
        columns = np.tile(np.arange(size), (n, 1))
    candidates = np.take_along_axis(values, columns, axis=1)
    order = np.argsort(-candidates, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(columns, order, axis=1)
