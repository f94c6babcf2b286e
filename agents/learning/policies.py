"""Policies for DQN and QR-DQN with one network that scores every candidate token with the same weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from gymnasium import spaces
from sb3_contrib.qrdqn.policies import QRDQNPolicy
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor

from ...envs.observations import FEATURES
from ...errors import ConfigurationError
from .scorer import ScorerConfig, TokenScorer

__all__ = ["ScorerConfig", "TokenQNetwork", "TokenQPolicy", "TokenQuantilePolicy", "TokenScorer"]


class TokenQNetwork(BasePolicy):
    """Network of the policies below: observations in, Q-values [B, k] or quantiles out.

    Attributes:
        scorer: The network.
    """

    action_space: spaces.Discrete

    def __init__(self, observation_space: spaces.Dict, action_space: spaces.Discrete, **scorer_kwargs: Any) -> None:
        """Build the scorer that fits the observation space of ``TokenDecoding-v0``.

        Args:
            observation_space: Of the environment.
            action_space: Of the environment.
            scorer_kwargs: ``width``, ``dropout``, ``dueling``, ``heads``, ``n_quantiles``; see :class:`ScorerConfig`.

        Raises:
            ConfigurationError: The spaces are another environment's.
        """
        super().__init__(observation_space, action_space)
        keys = set(getattr(observation_space, "spaces", ()))
        missing = {feature.name for feature in FEATURES if not feature.is_optional} - keys
        if missing:
            raise ConfigurationError(
                f"TokenQPolicy needs the observations of TokenDecoding-v0; {sorted(missing)} are not in them"
            )
        sizes = {name: int(space.shape[0]) for name, space in observation_space.spaces.items()}  # type: ignore[index]
        dims = sizes["candidates"] // int(action_space.n)
        context_tokens, terms = sizes.get("context", 0) // dims, sizes.get("term_potentials", 0)
        self.scorer = TokenScorer(sizes["hidden"], dims, context_tokens=context_tokens, terms=terms, **scorer_kwargs)

    @property
    def scorer_kwargs(self) -> dict[str, Any]:
        """The scorer's arguments as JSON values."""
        return asdict(self.scorer.config)

    def forward(self, obs: PyTorchObs) -> Tensor:
        """Return Q-values, float [B, k], or quantiles [B, n_quantiles, k]; masked actions have them too."""
        q: Tensor = self.scorer(obs)
        return q

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> Tensor:
        assert isinstance(observation, dict)
        q = self.forward(observation)
        if q.ndim > 2:
            q = q.mean(dim=1)
        return q.masked_fill(observation["action_mask"] == 0, -torch.inf).argmax(dim=1)


class _TokenPolicy(BasePolicy):
    """Base of the two policies: makes the network, and keeps the arguments that make it again."""

    def __init__(
        self,
        *args: Any,
        width: int = 256,
        dropout: float = 0.1,
        dueling: bool = False,
        heads: int = 1,
        **kwargs: Any,
    ) -> None:
        """Build the policy.

        Args:
            args: The parent class's.
            width: See :class:`ScorerConfig`.
            dropout: See :class:`ScorerConfig`.
            dueling: See :class:`ScorerConfig`.
            heads: See :class:`ScorerConfig`.
            kwargs: The parent class's; those that describe its own networks change nothing.

        Raises:
            ConfigurationError: The spaces are not those of ``TokenDecoding-v0``.
        """
        self._scorer_kwargs: dict[str, Any] = {"width": width, "dropout": dropout, "dueling": dueling, "heads": heads}
        super().__init__(*args, **kwargs)

    def _make_network(self, n_quantiles: int | None = None) -> TokenQNetwork:
        spaces_of_env: Any = self.observation_space, self.action_space  # checked there
        return TokenQNetwork(*spaces_of_env, n_quantiles=n_quantiles, **self._scorer_kwargs).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **self._scorer_kwargs}


class TokenQPolicy(_TokenPolicy, DQNPolicy):
    """``DQN(TokenQPolicy, env)``: the scorer as Q-network; the greedy action honours the observation's mask.

    ``MaskableDQN``, ``MaskableQRDQN`` and ``QStar`` take it too. ``policy_kwargs``: ``width``, ``dropout``,
    ``dueling`` and ``heads``, as in :class:`ScorerConfig`. Only ``QStar`` trains several heads apart, and the heads of
    the reward's terms, which an environment with ``components=True`` asks for.
    """

    def make_q_net(self) -> TokenQNetwork:  # type: ignore[override]
        """Return a new Q-network."""
        return self._make_network()


class TokenQuantilePolicy(_TokenPolicy, QRDQNPolicy):
    """``QRDQN(TokenQuantilePolicy, env)``: the same with ``n_quantiles`` outputs per candidate."""

    def make_quantile_net(self) -> TokenQNetwork:  # type: ignore[override]
        """Return a new quantile network."""
        return self._make_network(self.n_quantiles)
