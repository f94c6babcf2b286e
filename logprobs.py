"""Log-probabilities: sums of probabilities, what they leave, and Gumbel noise below a given maximum."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["gumbel_below", "log_sum_exp", "logprob_left"]

Values = npt.NDArray[np.float64]

# Unit round-offs, relative: of float32, in which log-probabilities come, and of float64, in which they are summed.
_FLOAT32, _FLOAT64 = 2.0**-24, 2.0**-53


def log_sum_exp(values: Values) -> Values:
    """Return the logarithm of the sum of exp over the last axis; -inf where there is nothing else."""
    most = values.max(axis=-1)
    safe = np.where(np.isfinite(most), most, 0.0)
    with np.errstate(divide="ignore"):
        result: Values = safe + np.log(np.exp(values - safe[..., None]).sum(axis=-1))
    return result


def logprob_left(logprobs: Values, error: float) -> Values:
    """Return log(1 - Σ exp(logprobs [n, k])), float64 [n], rounded up by what the terms may be too large.

    Args:
        logprobs: float64 [n, k], nats, of continuations of which none begins with another.
        error: Of each of them, beside its rounding to float32; see :attr:`LanguageModel.logprob_error`.
    """
    listed = np.where(np.isneginf(logprobs), 0.0, logprobs)  # a probability of 0 has no error
    inside = np.exp(logprobs - error - _FLOAT32 * np.abs(listed)).sum(axis=1)
    with np.errstate(divide="ignore"):
        left = np.log(np.maximum(1 - inside * (1 - logprobs.shape[1] * _FLOAT64), 0.0))
    rounded: Values = left + error + _FLOAT32 * np.abs(np.where(np.isneginf(left), 0.0, left))
    return rounded


def gumbel_below(noisy: Values, most: float) -> Values:
    """Return perturbed log-probabilities moved so that the largest is ``most``; Kool et al. 2019, appendix B.3.

    Args:
        noisy: float64 [n], log-probabilities plus Gumbel noise.
        most: The perturbed log-probability of the prefix that they continue.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        v = most - noisy + np.log1p(-np.exp(noisy - noisy.max()))
        moved: Values = most - np.maximum(v, 0.0) - np.log1p(np.exp(-np.abs(v)))
    return moved
