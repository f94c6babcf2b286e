"""Decoders that move a set of prefixes level by level: particle filters, and REBASE, reward-balanced search."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from ...checks import check_integer, check_number
from ...errors import ConfigurationError
from ...logprobs import log_sum_exp
from ..search.state import NO_EDGES, Edges, IntArray, Search, Status, Values
from .beam import affordable_width
from .decoder import Decoder
from .sampling import generator

__all__ = ["ParticleFilter", "RebaseSearch"]


_LARGE = 1e30  # stands in for infinite estimates, whose differences are no numbers


class RebaseSearch(Decoder):
    """Level by level, each prefix gets children in proportion to exp(value / τ), drawn from the language model.

    REBASE (Wu et al. 2024), with f = max h as the value of a prefix, in the place of a process reward model.
    """

    def __init__(
        self,
        env: Any,
        *,
        width: int | None = None,
        balance: float = 0.1,
        temperature: float = 1.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Keep ``width`` prefixes of each length in all, by default what the budget surely pays for.

        Args:
            env: An environment or a :class:`DecodingMDP`.
            width: Number of prefixes of each length.
            balance: τ, in units of J; small ones favour the best prefix.
            temperature: Of the language model that children are drawn from.
            seed: Draws depend on the seed and the prompt only.
            kwargs: See :class:`Decoder`.

        Raises:
            ConfigurationError: An argument is out of range.
        """
        super().__init__(env, **kwargs)
        self.width = None if width is None else check_integer("width", width)
        self.balance = check_number("balance", balance, low=0, open_low=True)
        self.seed = check_integer("seed", seed, low=0)
        self.temperature = check_number("temperature", temperature, low=0, open_low=True)

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the edges of one level at a time."""
        rng, width = generator(self.seed, search), self.width or affordable_width(search)
        rows: IntArray = np.zeros(1, dtype=np.int64)
        while len(rows) and width > 0:
            legal = search.status[rows] != Status.MASKED
            rows, legal = rows[legal.any(axis=1)], legal[legal.any(axis=1)]
            if not len(rows):
                return
            value = np.clip(search.f[rows].max(axis=1), -_LARGE, _LARGE)
            share = np.exp((value - value.max()) / self.balance)
            # The best prefixes first, as in the paper: each takes its rounded share of what is left.
            edges: list[tuple[int, int]] = []
            left, weight = width, share.sum()
            for i in np.argsort(-value, kind="stable"):
                count = min(max(round(left * share[i] / weight), 0), int(legal[i].sum())) if weight > 0 else 0
                left, weight = left - count, weight - share[i]
                logprobs = search.mdp.logprobs(search.node[rows[i : i + 1]])[0]
                noisy = np.where(legal[i], logprobs / self.temperature + rng.gumbel(size=logprobs.shape), -np.inf)
                edges += [(int(rows[i]), int(action)) for action in np.argsort(-noisy)[:count]]
            if not edges:
                return
            followed = Edges(*np.array(edges, dtype=np.int64).T)
            is_open = search.status[followed] == Status.OPEN
            yield Edges(followed.rows[is_open], followed.actions[is_open])
            children = search.child[followed]
            width -= int((children < 0).sum())  # a finished text gives up its place
            rows = children[children >= 0]


class ParticleFilter(Decoder):
    """Draw texts in proportion to π(text) · exp(J / β) by sequential Monte Carlo with a twist.

    Particles are prefixes. Each takes a token from π(a | s) · ψ(s, a) and gets a weight, so that the weighted particles
    follow the target; where the weights are uneven, particles are drawn anew in proportion to them. The twist ψ(s, a)
    is exp(f / β): what Q expects of J, as in twisted SMC (Zhao et al. 2024), or J so far and the reward's score of the
    prefix, as in SMC steering (Lew et al. 2023) and particle filtering with a process reward (Puri et al. 2025). π is
    the language model over the k candidates that may be taken, with their probabilities normalised.

    The mean weight estimates the normaliser Σ π(text) · exp(J / β) without bias; ``search.log_normalizer`` has the
    logarithm of the mean over all particle sets of a search. With ``score="q"``, f of the last edge stands for J.
    """

    def __init__(
        self,
        env: Any,
        *,
        particles: int | None = None,
        beta: float = 0.1,
        twist: str = "heuristic",
        threshold: float = 0.5,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Move ``particles`` prefixes at a time, by default as many as the budget surely pays for.

        Where the budget is not used up by then, another set follows.

        Args:
            env: An environment or a :class:`DecodingMDP`.
            particles: Number of particles.
            beta: β, in units of J; small ones favour the best texts.
            twist: ``"heuristic"`` for f = g + h, which without a heuristic is α · log π so far; ``"potential"`` for the
                reward's score of the prefix, k reward calls a particle and token.
            threshold: Particles are drawn anew where their effective number falls below this share of them.
            seed: Draws depend on the seed and the prompt only.
            kwargs: See :class:`Decoder`.

        Raises:
            ConfigurationError: An argument is out of range, or the reward cannot score prefixes and is to.
        """
        super().__init__(env, **kwargs)
        self.particles = None if particles is None else check_integer("particles", particles)
        self.beta = check_number("beta", beta, low=0, open_low=True)
        self.threshold = check_number("threshold", threshold, low=0, high=1)
        self.seed = check_integer("seed", seed, low=0)
        if twist not in ("heuristic", "potential"):
            raise ConfigurationError(f"twist is 'heuristic' or 'potential', got {twist!r}")
        if twist == "potential" and (self.score == "q" or not self.mdp.reward.has_potential):
            why = 'score="q" rules out' if self.score == "q" else f"the reward {self.mdp.reward.name!r} cannot give"
            raise ConfigurationError(f"twist='potential' asks for the reward of prefixes, which {why}")
        self.twist = twist

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the next token of each particle."""
        rng, cost = generator(self.seed, search), max(search.actions_to_come(0) - 1, 1)
        estimates: list[float] = []
        fruitless = 0  # a small tree may be known long before the budget is used up
        while fruitless < 20:
            affordable = search.affordable_rows(cost)
            if estimates and affordable < cost:
                search.stop_reason = "budget"  # until it is resumed with a larger one
                yield NO_EDGES
                continue
            before = search.lm_tokens
            estimates.append((yield from self._one_set(search, self.particles or affordable_width(search), rng)))
            search.log_normalizer = _log_mean_exp(np.array(estimates))
            if math.isinf(affordable):
                return
            fruitless = fruitless + 1 if search.lm_tokens == before else 0

    def _one_set(self, search: Search, count: int, rng: np.random.Generator) -> Generator[Edges, None, float]:
        """Move one set of particles to its end; return the logarithm of its estimate of the normaliser."""
        rows: IntArray = np.zeros(count, dtype=np.int64)  # -1 where a particle has ended
        weights, psi, total = np.zeros(count), np.zeros(count), 0.0  # logarithms
        while len(going := np.flatnonzero(rows >= 0)):
            legal = search.status[rows[going]] != Status.MASKED
            twist = np.clip(self._twists(search, rows[going]), -_LARGE, _LARGE) / self.beta
            logprobs = search.mdp.logprobs(search.node[rows[going]])
            logprobs = np.where(legal, logprobs, -np.inf)
            logprobs -= log_sum_exp(logprobs)[:, None]
            proposal = np.where(legal, logprobs + twist, -np.inf)
            norm = log_sum_exp(proposal)
            actions = (proposal + rng.gumbel(size=proposal.shape)).argmax(axis=1)
            chosen, at = Edges(rows[going], actions), np.arange(len(going))
            weights[going] += np.where(legal.any(axis=1), norm - psi[going], -np.inf)
            psi[going] = np.where(legal[at, actions], twist[at, actions], 0.0)
            new = np.unique(np.stack(chosen)[:, search.status[chosen] == Status.OPEN], axis=1)
            if new.size:
                yield Edges(*new)
            for particle, row, action in zip(going.tolist(), *chosen, strict=True):
                completion = search.completions.get((int(row), int(action)))
                rows[particle] = search.child[row, action]
                if completion is not None:
                    value = np.clip(np.nan_to_num(completion.objective, nan=-np.inf), -_LARGE, _LARGE)
                    weights[particle] += value / self.beta - psi[particle]
                elif rows[particle] < 0:  # it was not paid for, or nothing may follow
                    weights[particle] = -np.inf
            most = weights.max()
            if most == -np.inf:
                return -math.inf
            share = np.exp(weights - most)
            if share.sum() ** 2 < self.threshold * count * (share**2).sum():
                total += _log_mean_exp(weights)
                # Systematic: one draw places count equidistant marks on the shares.
                marks = (rng.random() + np.arange(count)) / count
                kept = np.minimum(np.searchsorted(np.cumsum(share) / share.sum(), marks), count - 1)
                rows, psi, weights = rows[kept], psi[kept], np.zeros(count)
        return total + _log_mean_exp(weights)

    def _twists(self, search: Search, rows: IntArray) -> Values:
        """Return what each edge of these rows promises of J, float64 [n, k]."""
        if self.twist == "heuristic":
            f: Values = search.f[rows]
            return f
        mdp, found = search.mdp, np.full((len(rows), search.mdp.top_k), -np.inf)
        for row in np.unique(rows).tolist():
            legal = np.flatnonzero(search.status[row] != Status.MASKED)
            node = int(search.node[row])
            search.reward_calls += len(legal)
            scores = mdp.edge_potentials(search.prompt, node, legal)
            values = search.g[row] + mdp.logprob_weight * mdp.logprobs(np.array([node]))[0, legal] + scores
            found[np.ix_(rows == row, legal)] = values
        return found


def _log_mean_exp(values: Values) -> float:
    return float(log_sum_exp(values)) - math.log(len(values))
