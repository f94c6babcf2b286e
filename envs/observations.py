"""What an agent sees of a state: a Dict of small, bounded arrays."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from ..checks import check_integer
from ..deprecated import with_old_names
from ..models.base import FloatArray, IntArray, LanguageModel
from .mdp import DecodingMDP, Values

__all__ = ["Observer", "token_features"]

_MIN_LOGPROB = -50.0  # nats; below it a token is as good as impossible
_MAX_POTENTIAL = 1e4  # a reward without bounds could otherwise leave the observation space

Observation = dict[str, npt.NDArray[np.generic]]


@with_old_names(after_the_end="terminal_observation")
class Observer:
    """Turns states into observations.

    | key | shape, dtype | meaning |
    |---|---|---|
    | ``hidden``      | [d] float32   | the LM's last hidden state, scaled to a root mean square of 1 |
    | ``candidates``  | [k·e] float32 | the k candidate tokens' embeddings, reduced to e dimensions each |
    | ``logprobs``    | [k] float32   | their log-probabilities, nats, cut off at -50 |
    | ``potential``   | [1] float32   | φ(s), the reward of the unfinished prefix |
    | ``remaining``   | [1] float32   | share of the horizon that is left, 1 at the prompt |
    | ``action_mask`` | [k] int8      | 1 = the action may be taken |

    ``candidates`` is flat because stable-baselines3 takes 2-D boxes for broken images; ``reshape(k, e)`` gives rows.
    After the end there is no state: everything is 0 but the mask, which is 1, so that a masked maximum stays finite.

    Attributes:
        space: The observation space.
        features: float32 [V, e], every token's reduced embedding.
        candidate_dims: e.
    """

    def __init__(self, mdp: DecodingMDP, candidate_dims: int = 32) -> None:
        """Describe the states of ``mdp``, each candidate token by ``candidate_dims`` numbers."""
        self._mdp, self.candidate_dims = mdp, check_integer("candidate_dims", candidate_dims)
        self.features = token_features(mdp.model, candidate_dims)
        k, d, e = mdp.top_k, mdp.model.hidden_size, candidate_dims
        # float32 does not reach beyond 3e38; a bound out there is as good as none.
        low = min(mdp.reward.lower, 0.0) if mdp.reward.lower > -1e30 else -_MAX_POTENTIAL
        high = max(mdp.reward.upper, 0.0) if mdp.reward.upper < 1e30 else _MAX_POTENTIAL
        self._potential_range = low, high
        hidden, candidate = float(np.sqrt(d)) * 1.001, float(np.abs(self.features).max())
        self.space = spaces.Dict(
            {
                "hidden": spaces.Box(-hidden, hidden, (d,), np.float32),
                "candidates": spaces.Box(-candidate, candidate, (k * e,), np.float32),
                "logprobs": spaces.Box(_MIN_LOGPROB, 0.0, (k,), np.float32),
                "potential": spaces.Box(low, high, (1,), np.float32),
                "remaining": spaces.Box(0.0, 1.0, (1,), np.float32),
                "action_mask": spaces.MultiBinary(k),
            }
        )

    def observe(self, potential: Values, nodes: IntArray) -> Observation:
        """Return the observations of ``n`` states, every array with a leading axis n and memory of its own.

        Args:
            potential: float64 [n], φ of the states, as :meth:`DecodingMDP.potential` gives it.
            nodes: int64 [n].
        """
        mdp, tree, n = self._mdp, self._mdp.tree, len(nodes)
        hidden = tree.hidden[nodes]
        scale = np.sqrt(np.mean(np.square(hidden), axis=1, keepdims=True))
        return {
            "hidden": hidden / np.maximum(scale, 1e-6),
            "candidates": self.features[tree.tokens[nodes]].reshape(n, mdp.top_k * self.candidate_dims),
            "logprobs": np.clip(tree.logprobs[nodes], _MIN_LOGPROB, 0.0),
            "potential": np.clip(potential, *self._potential_range).astype(np.float32)[:, None],
            "remaining": (mdp.remaining(nodes) / mdp.max_new_tokens).astype(np.float32)[:, None],
            "action_mask": mdp.action_mask(nodes).astype(np.int8),
        }

    def terminal_observation(self, count: int) -> Observation:
        """Return ``count`` observations of what follows an episode's end."""
        shapes = {key: (space.dtype, space.shape or ()) for key, space in self.space.spaces.items()}
        empty = {key: np.zeros((count, *shape), dtype) for key, (dtype, shape) in shapes.items()}
        return {**empty, "action_mask": np.ones((count, self._mdp.top_k), dtype=np.int8)}


@lru_cache(maxsize=8)
def token_features(model: LanguageModel, dims: int) -> FloatArray:
    """Return float32 [V, dims]: the model's token embeddings, centred, randomly projected, root mean square 1.

    A seeded Gaussian projection keeps distances (Johnson & Lindenstrauss 1984) and, unlike principal components, is the
    same on every machine, which checkpoints rely on.
    """
    embeddings = model.token_embeddings()
    embeddings = embeddings - embeddings.mean(axis=0)
    projection = np.random.default_rng(0).standard_normal((embeddings.shape[1], dims))
    features = embeddings @ projection.astype(np.float32)
    features = np.asarray(features / max(float(np.sqrt(np.mean(features**2))), 1e-6), dtype=np.float32)
    features.flags.writeable = False  # shared by everyone who asks
    return features
