"""A DQN policy whose network scores every candidate token with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor, nn

from ..errors import ConfigurationError

__all__ = ["TokenQNetwork", "TokenQPolicy", "TokenScorer"]

_NATS = 0.2  # brings log-probabilities to the scale of the other inputs


class TokenScorer(nn.Module):
    """Q(s, a) for every candidate a, from the state and that candidate alone, with the same weights for all.

    The order of the candidates does not matter (the scorer is equivariant), nor does their number, and what is learnt
    about a token holds wherever in the list it stands. State and token meet in a sum and in a product of projections.
    The output starts from a linear function of log-prob, potential and remaining budget: fluency to go is mostly that.
    """

    def __init__(
        self,
        hidden_size: int,
        candidate_dims: int,
        *,
        width: int = 256,
        dropout: float = 0.1,
        logprob_weight: float = 0.02,
    ) -> None:
        """Build the network.

        Args:
            hidden_size: Width d of the language model's hidden state.
            candidate_dims: Numbers e per candidate token.
            width: Width of the scorer's own layers.
            dropout: On the hidden state; 576 numbers are easy to overfit.
            logprob_weight: The untrained Q is this times the log-prob, the one term of the return that is known.
        """
        super().__init__()
        self.candidate_dims = candidate_dims
        self.dropout = nn.Dropout(dropout)
        self.state = nn.Linear(hidden_size, width)
        self.token = nn.Linear(candidate_dims + 3, width)
        self.state_gate = nn.Linear(hidden_size, width)
        self.token_gate = nn.Linear(candidate_dims, width, bias=False)
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU()
        )
        self.head = nn.Linear(width, 1)
        self.direct = nn.Linear(3, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.direct.weight)
        with torch.no_grad():
            self.direct.weight[0, 0] = logprob_weight / _NATS

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Return Q, float [B, k], for a batch of ``TokenDecoding-v0``'s observations; masked actions get one too."""
        logprobs = observation["logprobs"].float()
        batch, k = logprobs.shape
        of_state = torch.cat((observation["potential"].float(), observation["remaining"].float()), dim=1)
        scalars = torch.cat((logprobs.unsqueeze(-1) * _NATS, of_state.unsqueeze(1).expand(batch, k, 2)), dim=-1)
        hidden = self.dropout(observation["hidden"].float())
        candidates = observation["candidates"].float().view(batch, k, -1)
        x = self.state(hidden).unsqueeze(1) + self.token(torch.cat((candidates, scalars), dim=-1))
        x = x + self.state_gate(hidden).unsqueeze(1) * self.token_gate(candidates)
        q: Tensor = (self.head(self.body(x)) + self.direct(scalars)).squeeze(-1)
        return q


class TokenQNetwork(BasePolicy):
    """The Q-network that :class:`TokenQPolicy` gives to DQN: observations in, Q-values [B, k] out."""

    action_space: spaces.Discrete

    def __init__(
        self, observation_space: spaces.Dict, action_space: spaces.Discrete, *, width: int = 256, dropout: float = 0.1
    ) -> None:
        """Build the scorer that fits the observation space of ``TokenDecoding-v0``.

        Raises:
            ConfigurationError: The spaces are another environment's.
        """
        super().__init__(observation_space, action_space)
        keys = set(getattr(observation_space, "spaces", ()))
        missing = {"hidden", "candidates", "logprobs", "potential", "remaining"} - keys
        if missing:
            raise ConfigurationError(
                f"TokenQPolicy needs the observations of TokenDecoding-v0; {sorted(missing)} are not in them"
            )
        self.scorer_kwargs: dict[str, Any] = {
            "hidden_size": observation_space["hidden"].shape[0],  # type: ignore[index]
            "candidate_dims": observation_space["candidates"].shape[0] // int(action_space.n),  # type: ignore[index]
            "width": width,
            "dropout": dropout,
        }
        self.scorer = TokenScorer(**self.scorer_kwargs)

    def forward(self, obs: PyTorchObs) -> Tensor:
        """Return Q-values, float [B, k]; masked actions have one too."""
        q: Tensor = self.scorer(obs)
        return q

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> Tensor:
        assert isinstance(observation, dict)
        masked = observation["action_mask"] == 0
        return self.forward(observation).masked_fill(masked, -torch.inf).argmax(dim=1)


class TokenQPolicy(DQNPolicy):
    """``DQN(TokenQPolicy, env)``: the scorer as Q-network; the greedy action honours the observation's mask."""

    def __init__(self, *args: Any, width: int = 256, dropout: float = 0.1, **kwargs: Any) -> None:
        """See ``stable_baselines3.dqn.policies.DQNPolicy``; ``width`` and ``dropout`` as in :class:`TokenScorer`."""
        self._scorer_kwargs: dict[str, Any] = {"width": width, "dropout": dropout}
        super().__init__(*args, **kwargs)

    def make_q_net(self) -> TokenQNetwork:  # type: ignore[override]
        """Return a new Q-network."""
        spaces_of_env: Any = self.observation_space, self.action_space  # checked there
        return TokenQNetwork(*spaces_of_env, **self._scorer_kwargs).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **self._scorer_kwargs}
