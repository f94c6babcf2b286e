"""The network that scores every candidate token with the same weights; it needs no stable-baselines3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Self

import torch
from torch import Tensor, nn

from ...checks import check_integer
from ...deprecated import with_old_names
from ...errors import ConfigurationError
from .inference import LOGPROB_SCALE, NATS_PER_UNIT, NumpyScorer, ScorerConfig

__all__ = ["QuantileMean", "ScorerConfig", "TokenScorer"]


@with_old_names(answers="head_outputs")
class TokenScorer(nn.Module):
    """Q(s, a) for every candidate a, from the state and that candidate alone, with the same weights for all.

    Neither the order (the scorer is equivariant) nor the number of the candidates matters, so values learnt for a token
    hold at every rank. State and token meet in a sum and in a product of projections. A linear function
    of log-prob, potential and remaining budget is added: it explains most of the fluency to come.

    With ``context_tokens``, two layers read the last tokens by their places, and their output meets the token as the
    state does. Such a network can compute what the language model's state does not tell, such as a digit of a sum.

    With ``dueling``, Q(s, a) = V(s) + A(s, a) - the mean of A over the legal actions (Wang et al. 2016, eq. 9, which
    has no masks): V learns from every action taken in a state, A from their differences. With ``n_quantiles``, the
    output is quantiles of the return (Dabney et al. 2018). With several ``heads`` on one body (Osband et al. 2016),
    which an agent trains on different samples, Q is their maximum: optimistic where they disagree.

    With ``terms``, the return is learned in parts: the log-probability to come, and each term of the reward. Their sum
    with any weights w is a Q (successor features: Barreto et al. 2017, eq. 3). It is exact for the texts that training
    preferred, with its own weights.
    """

    def __init__(
        self,
        hidden_size: int,
        candidate_dims: int,
        *,
        width: int = 256,
        dropout: float = 0.1,
        dueling: bool = False,
        heads: int = 1,
        n_quantiles: int | None = None,
        context_tokens: int = 0,
        terms: int = 0,
        logprob_weight: float = 0.02,
    ) -> None:
        """Build the network.

        Args:
            hidden_size: See :class:`ScorerConfig`, as for all but the last argument.
            candidate_dims: See there.
            width: See there.
            dropout: See there.
            dueling: See there.
            heads: See there.
            n_quantiles: See there.
            context_tokens: See there.
            terms: See there.
            logprob_weight: The untrained Q is this times the log-prob, the one term of the return that is known. With
                ``terms`` the weight is an input, and this means nothing.

        Raises:
            ConfigurationError: There are several of heads, quantiles and terms, or none.
        """
        super().__init__()
        check_integer("heads", heads, high=None if n_quantiles is None else 1)
        if terms and heads > 1:
            raise ConfigurationError(
                f"heads={heads} estimate the whole return; leave them out, or components=True of the environment"
            )
        if terms and n_quantiles is not None:
            raise ConfigurationError("quantiles are of the whole return; leave out components=True of the environment")
        self.config = ScorerConfig(
            hidden_size, candidate_dims, width, dropout, dueling, heads, n_quantiles, context_tokens, terms
        )
        self.heads, self.n_quantiles = heads, n_quantiles
        outputs, numbers = self.config.outputs, self.config.state_numbers
        self.register_buffer("hidden_mean", torch.zeros(hidden_size))
        self.register_buffer("hidden_scale", torch.ones(hidden_size))
        self.dropout = nn.Dropout(dropout)
        self.state = nn.Linear(hidden_size, width)
        self.token = nn.Linear(candidate_dims + 1 + numbers, width)
        self.state_gate = nn.Linear(hidden_size, width)
        self.token_gate = nn.Linear(candidate_dims, width, bias=False)
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU()
        )
        self.head = nn.Linear(width, outputs)
        self.direct = nn.Linear(1 + numbers, outputs if terms else 1)
        # The untrained Q is known; random weights serve only to make several heads differ.
        nn.init.normal_(self.head.weight, std=0.01 if heads > 1 else 0.0)
        nn.init.zeros_(self.direct.weight)
        with torch.no_grad():
            self.direct.weight[0, 0] = (1 / NATS_PER_UNIT if terms else logprob_weight) / LOGPROB_SCALE
        self.context: nn.Sequential | None = None
        if context_tokens:
            self.context = nn.Sequential(
                nn.Linear(context_tokens * candidate_dims, width), nn.LayerNorm(width), nn.SiLU(),
                nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, 2 * width),
            )  # fmt: skip
        self.value: nn.Sequential | None = None
        if dueling:
            self.value = nn.Sequential(
                nn.Linear(hidden_size + numbers, width), nn.LayerNorm(width), nn.SiLU(),
                last := nn.Linear(width, outputs),
            )  # fmt: skip
            nn.init.zeros_(last.weight)

    hidden_mean: Tensor
    hidden_scale: Tensor

    @classmethod
    def of(cls, scorer: NumpyScorer) -> Self:
        """Return a network with the weights of ``scorer``; torch's random generator stays as it is."""
        with torch.random.fork_rng(devices=[]):
            made = cls(**asdict(scorer.config))
        made.load_state_dict({name: torch.from_numpy(array) for name, array in scorer.weights.items()})
        return made

    def to_numpy(self) -> NumpyScorer:
        """Return the network in numpy; on a CPU, it shares the weights."""
        return NumpyScorer(self.config, {name: tensor.cpu().numpy() for name, tensor in self.state_dict().items()})

    def standardize(self, hidden: Tensor) -> None:
        """Standardise hidden states by mean and standard deviation of ``hidden`` [n, d] from now on.

        A few of a language model's hidden dimensions are far larger than the others (Timkey & van Schijndel 2021) and
        would hide them from the first layer. Until this is called, hidden states enter as they are.
        """
        self.hidden_mean = hidden.float().mean(dim=0)
        deviation = hidden.float().std(dim=0)
        # A dimension that is constant here may vary later, by its own scale.
        self.hidden_scale = torch.where(deviation > 1e-3, 1 / deviation, 1.0)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Return Q, float [B, k], for a batch of ``TokenDecoding-v0``'s observations; masked actions get one too.

        With ``n_quantiles``, quantiles [B, n_quantiles, k], as sb3-contrib's networks do.
        """
        outputs = self.head_outputs(observation)
        if self.config.terms:
            return (outputs * observation["weights"].float().unsqueeze(1)).sum(dim=2)
        return outputs.amax(dim=2) if self.n_quantiles is None else outputs.transpose(1, 2)

    def head_outputs(self, observation: Mapping[str, Tensor], only: Tensor | None = None) -> Tensor:
        """Return the outputs of all heads, float [B, k, heads], or all quantiles, [B, k, n_quantiles].

        With ``terms``, [B, k, 1+r]: the log-probability to come, nats, and each term's return, unweighted.

        Args:
            observation: A batch of observations.
            only: The edges that are wanted, bool [B, k]; others may have 0 and cost next to nothing. None for all.
        """
        logprobs = observation["logprobs"].float()
        batch, k = logprobs.shape
        of_state = torch.cat([observation[name].float() for name in self.config.state_features], dim=1)
        scalars = torch.cat(
            (logprobs.unsqueeze(-1) * LOGPROB_SCALE, of_state.unsqueeze(1).expand(batch, k, -1)), dim=-1
        )
        hidden = self.dropout((observation["hidden"].float() - self.hidden_mean) * self.hidden_scale)
        candidates = observation["candidates"].float().view(batch, k, -1)
        state, gate = self.state(hidden), self.state_gate(hidden)
        if self.context is not None:
            of_context, context_gate = self.context(observation["context"].float()).chunk(2, dim=1)
            state, gate = state + of_context, gate + context_gate
        if only is None or self.value is not None:
            state, gate = state.unsqueeze(1), gate.unsqueeze(1)
        else:  # [m, …], edge by edge
            state, gate = (values[only.nonzero()[:, 0]] for values in (state, gate))
            candidates, scalars = candidates[only], scalars[only]
        x = state + self.token(torch.cat((candidates, scalars), dim=-1)) + gate * self.token_gate(candidates)
        q: Tensor = self.head(self.body(x)) + self.direct(scalars)  # [B, k, outputs]
        if q.ndim == 2 and only is not None:
            q = q.new_zeros(batch, k, q.shape[1]).index_put(only.nonzero(as_tuple=True), q)
        if self.value is not None:
            allowed = observation["action_mask"].float().unsqueeze(-1)
            mean = (q * allowed).sum(dim=1, keepdim=True) / allowed.sum(dim=1, keepdim=True).clamp(min=1)
            q = self.value(torch.cat((hidden, of_state), dim=1)).unsqueeze(1) + q - mean
        return torch.cat((q[..., :1] * NATS_PER_UNIT, q[..., 1:]), dim=-1) if self.config.terms else q


class QuantileMean(nn.Module):
    """Q-values [n, k] out of a quantile network: the means of its quantiles [n, quantiles, k]."""

    def __init__(self, network: nn.Module) -> None:
        """Wrap ``network``."""
        super().__init__()
        self.network = network

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        """Return Q-values, float [n, k]."""
        mean: Tensor = self.network(observation).mean(dim=1)
        return mean
