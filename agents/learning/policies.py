"""Policies for DQN and QR-DQN whose network scores every candidate token with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium import spaces
from sb3_contrib.qrdqn.policies import QRDQNPolicy
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor, nn

from ...checks import check_integer
from ...envs.observations import FEATURES
from ...errors import ConfigurationError

__all__ = ["TokenQNetwork", "TokenQPolicy", "TokenQuantilePolicy", "TokenScorer"]

_NATS = 0.2  # brings log-probabilities to the scale of the other inputs


class TokenScorer(nn.Module):
    """Q(s, a) for every candidate a, from the state and that candidate alone, with the same weights for all.

    The order of the candidates does not matter (the scorer is equivariant), nor does their number, and what is learnt
    about a token holds wherever in the list it stands. State and token meet in a sum and in a product of projections.
    The output starts from a linear function of log-prob, potential and remaining budget: fluency to go is mostly that.

    With ``dueling``, Q(s, a) = V(s) + A(s, a) - the mean of A over the actions that may be taken (Wang et al. 2016,
    eq. 9, which knows no masks): one network learns how good the state is, from every action taken in it, and this one
    what sets the candidates apart. With ``n_quantiles``, it answers quantiles of the return (Dabney et al. 2018). With
    several ``heads`` on one body (Osband et al. 2016), which an agent trains on different samples, Q is the largest of
    their answers: optimistic where they disagree.
    """

    def __init__(
        self,
        hidden_size: int,
        candidate_dims: int,
        *,
        width: int = 256,
        dropout: float = 0.1,
        logprob_weight: float = 0.02,
        dueling: bool = False,
        heads: int = 1,
        n_quantiles: int | None = None,
    ) -> None:
        """Build the network.

        Args:
            hidden_size: Width d of the language model's hidden state.
            candidate_dims: Numbers e per candidate token.
            width: Width of the scorer's own layers.
            dropout: On the hidden state; 576 numbers are easy to overfit.
            logprob_weight: The untrained Q is this times the log-prob, the one term of the return that is known.
            dueling: Learn the state's value on its own; the untrained Q then has the log-prob's differences only.
            heads: Size of the ensemble.
            n_quantiles: Answer so many quantiles of the return instead of its mean; by one head.

        Raises:
            ConfigurationError: There are several heads and quantiles, or none.
        """
        super().__init__()
        check_integer("heads", heads, high=None if n_quantiles is None else 1)
        self.candidate_dims, self.heads, self.n_quantiles = candidate_dims, heads, n_quantiles
        outputs = heads if n_quantiles is None else n_quantiles
        self.register_buffer("hidden_mean", torch.zeros(hidden_size))
        self.register_buffer("hidden_scale", torch.ones(hidden_size))
        self.dropout = nn.Dropout(dropout)
        self.state = nn.Linear(hidden_size, width)
        self.token = nn.Linear(candidate_dims + 3, width)
        self.state_gate = nn.Linear(hidden_size, width)
        self.token_gate = nn.Linear(candidate_dims, width, bias=False)
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU()
        )
        self.head = nn.Linear(width, outputs)
        self.direct = nn.Linear(3, 1)
        # The untrained Q is known; only what makes several heads differ must be drawn.
        nn.init.normal_(self.head.weight, std=0.01 if heads > 1 else 0.0)
        nn.init.zeros_(self.direct.weight)
        with torch.no_grad():
            self.direct.weight[0, 0] = logprob_weight / _NATS
        self.value: nn.Sequential | None = None
        if dueling:
            self.value = nn.Sequential(
                nn.Linear(hidden_size + 2, width), nn.LayerNorm(width), nn.SiLU(), last := nn.Linear(width, outputs)
            )
            nn.init.zeros_(last.weight)

    hidden_mean: Tensor
    hidden_scale: Tensor

    def standardize(self, hidden: Tensor) -> None:
        """From now on, see hidden states less the mean of ``hidden`` [n, d], in units of their standard deviation.

        A few of a language model's hidden dimensions are far larger than the others (Timkey & van Schijndel 2021) and
        would hide them from the first layer. Until this is called, hidden states are seen as they are.
        """
        self.hidden_mean = hidden.float().mean(dim=0)
        self.hidden_scale = 1 / hidden.float().std(dim=0).clamp(min=1e-3)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Return Q, float [B, k], for a batch of ``TokenDecoding-v0``'s observations; masked actions get one too.

        With ``n_quantiles``, quantiles [B, n_quantiles, k], as sb3-contrib's networks do.
        """
        answers = self.answers(observation)
        return answers.amax(dim=2) if self.n_quantiles is None else answers.transpose(1, 2)

    def answers(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Return what each head, or each quantile, says: float [B, k, heads] or [B, k, n_quantiles]."""
        logprobs = observation["logprobs"].float()
        batch, k = logprobs.shape
        of_state = torch.cat((observation["potential"].float(), observation["remaining"].float()), dim=1)
        scalars = torch.cat((logprobs.unsqueeze(-1) * _NATS, of_state.unsqueeze(1).expand(batch, k, 2)), dim=-1)
        hidden = self.dropout((observation["hidden"].float() - self.hidden_mean) * self.hidden_scale)
        candidates = observation["candidates"].float().view(batch, k, -1)
        x = self.state(hidden).unsqueeze(1) + self.token(torch.cat((candidates, scalars), dim=-1))
        x = x + self.state_gate(hidden).unsqueeze(1) * self.token_gate(candidates)
        q: Tensor = self.head(self.body(x)) + self.direct(scalars)  # [B, k, outputs]
        if self.value is not None:
            allowed = observation["action_mask"].float().unsqueeze(-1)
            mean = (q * allowed).sum(dim=1, keepdim=True) / allowed.sum(dim=1, keepdim=True).clamp(min=1)
            q = self.value(torch.cat((hidden, of_state), dim=1)).unsqueeze(1) + q - mean
        return q


class TokenQNetwork(BasePolicy):
    """The network that the policies below give to the agents: observations in, Q-values [B, k] or quantiles out.

    Attributes:
        scorer: The network.
        scorer_kwargs: The arguments that it was made with, as JSON values, for a checkpoint.
    """

    action_space: spaces.Discrete

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        *,
        width: int = 256,
        dropout: float = 0.1,
        dueling: bool = False,
        heads: int = 1,
        n_quantiles: int | None = None,
    ) -> None:
        """Build the scorer that fits the observation space of ``TokenDecoding-v0``.

        Args:
            observation_space: Of the environment.
            action_space: Of the environment.
            width: See :class:`TokenScorer`.
            dropout: See :class:`TokenScorer`.
            dueling: See :class:`TokenScorer`.
            heads: See :class:`TokenScorer`.
            n_quantiles: See :class:`TokenScorer`.

        Raises:
            ConfigurationError: The spaces are another environment's.
        """
        super().__init__(observation_space, action_space)
        keys = set(getattr(observation_space, "spaces", ()))
        missing = {feature.name for feature in FEATURES} - keys
        if missing:
            raise ConfigurationError(
                f"TokenQPolicy needs the observations of TokenDecoding-v0; {sorted(missing)} are not in them"
            )
        self.scorer_kwargs: dict[str, Any] = {
            "hidden_size": observation_space["hidden"].shape[0],  # type: ignore[index]
            "candidate_dims": observation_space["candidates"].shape[0] // int(action_space.n),  # type: ignore[index]
            "width": width,
            "dropout": dropout,
            "dueling": dueling,
            "heads": heads,
            "n_quantiles": n_quantiles,
        }
        self.scorer = TokenScorer(**self.scorer_kwargs)

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
    """What the two policies share: how the network is made, and which arguments make it again."""

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
            width: See :class:`TokenScorer`.
            dropout: See :class:`TokenScorer`.
            dueling: See :class:`TokenScorer`.
            heads: See :class:`TokenScorer`.
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
    ``dueling`` and ``heads``, as in :class:`TokenScorer`; only ``QStar`` trains several heads apart.
    """

    def make_q_net(self) -> TokenQNetwork:  # type: ignore[override]
        """Return a new Q-network."""
        return self._make_network()


class TokenQuantilePolicy(_TokenPolicy, QRDQNPolicy):
    """``QRDQN(TokenQuantilePolicy, env)``: the same with ``n_quantiles`` outputs per candidate."""

    def make_quantile_net(self) -> TokenQNetwork:  # type: ignore[override]
        """Return a new quantile network."""
        return self._make_network(self.n_quantiles)
