"""The scorer's outputs in numpy: a process that only searches needs no torch, which takes 200 MB and over a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ...models.base import FloatArray
from ...models.devices import one_blas_thread

__all__ = ["LOGPROB_SCALE", "NATS_PER_UNIT", "NumpyScorer", "ScorerConfig"]

LOGPROB_SCALE = 0.2  # brings log-probabilities to the scale of the other inputs
NATS_PER_UNIT = 50.0  # brings the head of the log-probability to come to the scale of the other heads
_LAYER_NORM_EPSILON = 1e-5  # torch's

_Size = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class ScorerConfig:
    """Arguments of a :class:`TokenScorer`, as a checkpoint states them.

    Attributes:
        hidden_size: Width d of the language model's hidden state.
        candidate_dims: Numbers e per candidate token.
        width: Width of the scorer's own layers.
        dropout: Probability, on the hidden state; its 576 numbers are easily learnt by heart.
        dueling: Learn the state's value on its own; the untrained Q then has the log-prob's differences only.
        heads: Size of the ensemble.
        n_quantiles: Return so many quantiles of the return instead of its mean; one head only.
        context_tokens: Number w of last tokens that are read, with as many numbers each as a candidate. 0 for none.
        terms: Number r of the reward's terms, each with a head of its own beside that of the log-probability; 0 for one
            output, the return as a whole. One head and no quantiles only.
    """

    hidden_size: _Size
    candidate_dims: _Size
    width: _Size = 256
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    dueling: bool = False
    heads: _Size = 1
    n_quantiles: _Size | None = None
    context_tokens: Annotated[int, Field(ge=0)] = 0
    terms: Annotated[int, Field(ge=0)] = 0

    @property
    def outputs(self) -> int:
        """Number of outputs for each candidate."""
        return 1 + self.terms if self.terms else self.n_quantiles or self.heads

    @property
    def state_numbers(self) -> int:
        """How many numbers describe a state beside its vectors: potentials, and what remains."""
        return 1 + (self.terms or 1)

    @property
    def state_features(self) -> tuple[str, ...]:
        """The entries of an observation that hold these numbers."""
        return ("term_potentials" if self.terms else "potential", "remaining")

    def policy_kwargs(self) -> dict[str, Any]:
        """Return the arguments of a TokenQPolicy with such a network."""
        names = ("width", "dropout", "dueling", "heads")
        return {name: getattr(self, name) for name in names}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the network's weights and constants, by their names in a checkpoint."""
        d, e, width, numbers = self.hidden_size, self.candidate_dims, self.width, self.state_numbers

        def linear(name: str, into: int, out: int) -> dict[str, tuple[int, ...]]:
            return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

        def norm(name: str) -> dict[str, tuple[int, ...]]:
            return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

        shapes: dict[str, tuple[int, ...]] = {
            "hidden_mean": (d,), "hidden_scale": (d,), "token_gate.weight": (width, e),
            **linear("state", d, width), **linear("token", e + 1 + numbers, width), **linear("state_gate", d, width),
            **norm("body.0"), **linear("body.2", width, width), **norm("body.3"),
            **linear("head", width, self.outputs), **linear("direct", 1 + numbers, self.outputs if self.terms else 1),
        }  # fmt: skip
        if self.context_tokens:
            shapes |= {
                **linear("context.0", self.context_tokens * e, width), **norm("context.1"),
                **linear("context.3", width, width), **norm("context.4"), **linear("context.6", width, 2 * width),
            }  # fmt: skip
        if self.dueling:
            shapes |= {
                **linear("value.0", d + numbers, width),
                **norm("value.1"),
                **linear("value.3", width, self.outputs),
            }
        return shapes


class NumpyScorer:
    """A trained :class:`TokenScorer` in numpy, float32: observations in, Q-values out, up to rounding the same.

    Attributes:
        config: The network's sizes.
        weights: float32, by their names in a checkpoint.
    """

    def __init__(self, config: ScorerConfig, weights: Mapping[str, FloatArray]) -> None:
        """Take the weights of a network.

        Args:
            config: Its sizes.
            weights: By name; constants that an older checkpoint lacks stay without effect.

        Raises:
            ValueError: Names or shapes are not those of ``config``.
        """
        # The default has as much memory as the file has numbers, so that wrong sizes cannot ask for more.
        known, d = dict(weights), config.hidden_size
        if "state.weight" in known and known["state.weight"].shape == (config.width, d):
            known = {"hidden_mean": np.zeros(d, np.float32), "hidden_scale": np.ones(d, np.float32), **known}
        shapes = config.shapes()
        wrong = sorted(name for name in {*shapes, *known} if name not in known or known[name].shape != shapes.get(name))
        if wrong:
            raise ValueError(f"config and weights differ in {wrong[0]!r}")
        self.config = config
        self.weights = {name: np.asarray(known[name], dtype=np.float32) for name in shapes}

    def __call__(self, observation: Mapping[str, Any]) -> FloatArray:
        """Return Q-values, float32 [B, k], of a batch of observations.

        They are the largest of the heads, the mean of the quantiles, or the weighted sum of the terms.
        """
        outputs = self.head_outputs(observation)
        if self.config.terms:
            weighted: FloatArray = (outputs * observation["weights"][:, None]).sum(axis=2)
            return weighted
        result: FloatArray = outputs.max(axis=2) if self.config.n_quantiles is None else outputs.mean(axis=2)
        return result

    @one_blas_thread()
    def head_outputs(self, observation: Mapping[str, Any]) -> FloatArray:
        """Return the outputs of all heads or quantiles, float32 [B, k, outputs]; see :class:`TokenScorer`."""
        logprobs = np.asarray(observation["logprobs"], dtype=np.float32)
        batch, k = logprobs.shape
        of_state = np.concatenate([observation[name] for name in self.config.state_features], axis=1, dtype=np.float32)
        hidden = (observation["hidden"] - self.weights["hidden_mean"]) * self.weights["hidden_scale"]
        candidates = np.asarray(observation["candidates"], dtype=np.float32).reshape(batch * k, -1)
        state, gate = self._linear("state", hidden), self._linear("state_gate", hidden)
        if self.config.context_tokens:
            x = self._silu("context.1", self._linear("context.0", observation["context"]))
            x = self._linear("context.6", self._silu("context.4", self._linear("context.3", x)))
            state += x[:, : self.config.width]
            gate += x[:, self.config.width :]
        inputs = np.empty((batch * k, self.config.candidate_dims + 1 + self.config.state_numbers), dtype=np.float32)
        dims = self.config.candidate_dims
        inputs[:, :dims], scalars = candidates, inputs[:, dims:]
        scalars[:, 0] = logprobs.ravel() * np.float32(LOGPROB_SCALE)
        scalars[:, 1:] = np.repeat(of_state, k, axis=0)
        x = (candidates @ self.weights["token_gate.weight"].T).reshape(batch, k, -1)
        x *= gate[:, None]
        x += state[:, None]
        x = x.reshape(batch * k, -1)
        x += self._linear("token", inputs)
        x = self._silu("body.3", self._linear("body.2", self._silu("body.0", x)))
        q = (self._linear("head", x) + self._linear("direct", scalars)).reshape(batch, k, -1)
        if self.config.dueling:
            allowed = np.asarray(observation["action_mask"], dtype=np.float32)[..., None]
            mean = (q * allowed).sum(axis=1, keepdims=True) / np.maximum(allowed.sum(axis=1, keepdims=True), 1)
            value = self._silu("value.1", self._linear("value.0", np.concatenate((hidden, of_state), axis=1)))
            q = self._linear("value.3", value)[:, None] + q - mean
        if self.config.terms:
            q[..., 0] *= NATS_PER_UNIT
        return q

    def _linear(self, name: str, x: FloatArray) -> FloatArray:
        y: FloatArray = x @ self.weights[f"{name}.weight"].T
        y += self.weights[f"{name}.bias"]
        return y

    def _silu(self, norm: str, x: FloatArray) -> FloatArray:
        """Return SiLU of the layer norm of ``x`` [n, width], which is overwritten."""
        x -= x.mean(axis=1, keepdims=True)
        variance = np.einsum("ij,ij->i", x, x)[:, None] / np.float32(x.shape[1])
        x *= 1 / np.sqrt(variance + np.float32(_LAYER_NORM_EPSILON))
        x *= self.weights[f"{norm}.weight"]
        x += self.weights[f"{norm}.bias"]
        with np.errstate(over="ignore"):  # exp(-x) may be infinite, and x / inf is 0
            x /= 1 + np.exp(-x)
        return x
