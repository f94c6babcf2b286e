"""Heuristics: estimates of the best return still to come through an edge, that edge included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..envs import DecodingMDP, Finish, Prompt
from ..errors import CheckpointError, ConfigurationError, check_integer, check_number
from .search import IntArray, Values

if TYPE_CHECKING:
    from .q_function import QFunction, ValueFunction

__all__ = [
    "BoundHeuristic",
    "CombinedHeuristic",
    "Heuristic",
    "LookAheadHeuristic",
    "OracleHeuristic",
    "QHeuristic",
    "SoftValueHeuristic",
    "ValueHeuristic",
    "ZeroHeuristic",
    "maximum",
    "mean",
    "shipped_heuristic",
]

_MIN_LOGPROB = -50.0  # nats; a token that the policy finds less likely is as good as impossible


class Heuristic(Protocol):
    """Anything that can be called like this; a plain function will do."""

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return h(s, a), float64 [n, k], for all edges of ``n`` nodes.

        Args:
            mdp: The process; its tree holds the nodes' hidden states, tokens and log-probabilities.
            prompts: The prompt of each node.
            nodes: int64 [n].
        """


class Composable:
    """Arithmetic of heuristics: ``2 * h``, ``h + 0.1``, ``h1 + h2``; see also :func:`maximum`."""

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`."""
        raise NotImplementedError

    def __add__(self, other: Heuristic | float) -> CombinedHeuristic:
        """Add another heuristic, or a margin in units of J: what optimism an inadmissible one needs."""
        terms: list[Heuristic] = [self]
        if callable(other):
            return CombinedHeuristic(_add, [*terms, other], "({} + {})")
        check_number("the margin added to a heuristic", other)
        return CombinedHeuristic(lambda values: values[0] + other, terms, f"({{}} + {other:g})")

    def __mul__(self, weight: float) -> CombinedHeuristic:
        """Weigh the heuristic, as it stands: see :class:`AStarPlanner` for a weight that has a guarantee."""
        check_number("the weight of a heuristic", weight)
        return CombinedHeuristic(lambda values: weight * values[0], [self], f"{weight:g} * {{}}")

    __radd__, __rmul__ = __add__, __mul__


class CombinedHeuristic(Composable):
    """What becomes of several heuristics' values under a function."""

    def __init__(self, combine: Callable[[Values], Values], terms: Sequence[Heuristic], description: str) -> None:
        """Combine heuristics.

        Args:
            combine: Takes their values, float64 [terms, n, k], and returns float64 [n, k].
            terms: The heuristics; plain functions will do.
            description: What it is called, with one ``{}`` for each term.
        """
        if not terms:
            raise ConfigurationError("at least one heuristic is needed to combine")
        self.combine, self.terms, self.description = combine, list(terms), description

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`."""
        return self.combine(np.stack([np.asarray(term(mdp, prompts, nodes), np.float64) for term in self.terms]))

    @property
    def lm_tokens(self) -> IntArray | int:
        """LM tokens that the terms' last calls took, int64 [n]; see :class:`LookAheadHeuristic`."""
        total: IntArray | int = sum(getattr(term, "lm_tokens", 0) for term in self.terms)
        return total

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return self.description.format(*self.terms)


def maximum(*heuristics: Heuristic) -> CombinedHeuristic:
    """Return max(h1, h2, …): the optimist of an ensemble. If one of them never underestimates, nor does it.

    The minimum of admissible heuristics is admissible and tighter: ``CombinedHeuristic(lambda h: h.min(0), …)``.
    """
    return CombinedHeuristic(lambda values: values.max(axis=0), heuristics, f"maximum({_slots(heuristics)})")


def mean(*heuristics: Heuristic, optimism: float = 0.0) -> CombinedHeuristic:
    """Return the mean of an ensemble plus ``optimism`` times its standard deviation: an upper confidence bound."""
    check_number("optimism", optimism)
    extra = f", optimism={optimism:g}" if optimism else ""
    return CombinedHeuristic(
        lambda values: values.mean(axis=0) + optimism * values.std(axis=0),
        heuristics,
        f"mean({_slots(heuristics)}{extra})",
    )


class ZeroHeuristic(Composable):
    """h = α · log π(a | s): nothing is expected beyond the edge itself. A* is then uniform-cost search on fluency."""

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`."""
        del prompts
        return mdp.edge_returns(nodes)

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"{type(self).__name__}()"


class BoundHeuristic(ZeroHeuristic):
    """h = α · log π(a | s) + r_max: admissible, as later log-probabilities are at most 0. Needs no training.

    For a reward without an upper bound the potential φ(s) stands in for r_max: that orders the search, proving nothing.
    """

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`."""
        best = mdp.reward.upper
        if not np.isfinite(best):
            return mdp.edge_returns(nodes) + mdp.potential(prompts, nodes)[:, None]
        return mdp.edge_returns(nodes) + best


class QHeuristic(Composable):
    """h = Q(s, a), learned.

    For a Q learned with reward shaping, which estimates the return less φ(s), φ(s) is added back.
    """

    def __init__(self, q: Any) -> None:
        """Use a Q-function.

        Args:
            q: An agent (QStar, or a DQN or QR-DQN of stable-baselines3 or sb3-contrib trained on
                ``TokenDecoding-v0``, masked or not), a :class:`QFunction`, the folder of a saved one, the name of a
                task that the package ships one for, or a repository ``"user/name"`` on the Hugging Face hub.

        Raises:
            CheckpointError: A checkpoint is broken, or cannot be downloaded.
            ConfigurationError: The agent has no Q-network of this environment.
            UnknownNameError: There is no such folder or task.
        """
        from .q_function import as_q_function

        self.q: QFunction = as_q_function(q)

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`.

        Raises:
            CheckpointError: Q was trained for another model, k or observation layout than ``mdp`` has.
        """
        return self.q.values(mdp, prompts, nodes)

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"QHeuristic({self.q!r})"


def shipped_heuristic(task: str, mdp: DecodingMDP) -> tuple[Heuristic, str]:
    """Return the Q-function that the package ships for a task, or the bound where there is none that fits ``mdp``.

    Returns:
        The heuristic, and why the shipped Q-function does not fit; empty if it does, or if there is none.
    """
    from .q_function import pretrained_names

    if task not in pretrained_names():
        return BoundHeuristic(), ""
    heuristic = QHeuristic(task)
    try:
        heuristic.q.check(mdp)
    except CheckpointError as error:
        return BoundHeuristic(), str(error)
    return heuristic, ""


class ValueHeuristic(Composable):
    """h(s, a) = V(s) + β · (log π_θ(a | s) - max over a' of log π_θ(a' | s)), from an actor-critic such as PPO.

    A state-value says nothing of the edges, and asking it of every child would cost a forward of the language model
    each. Instead the evaluation is deferred: every edge gets the value of the state that it leaves (Richter & Helmert
    2009, "Preferred operators and deferred evaluation in satisficing planning"), less what the policy holds against it,
    so that the policy's favourite comes first. For the optimal policy under an entropy bonus of weight β that is exact:
    there Q(s, a) - max Q = β · (log π - max log π). PPO never gets there and normalises its advantages, so β is a
    matter of trial. Measured with PPO of 5,000 and 20,000 steps on three random tabular tasks (rewards in [0, 1],
    horizon 12, 40 prompts, budgets of 12 to 96 LM tokens): any β from 0.03 to 0.3 came within 0.02 of the best J, 0.1
    within 0.004; β = 0 fell short by up to 0.16, the more the smaller the budget.

    V is the mean return of the agent's own policy, hence *below* the best return to go, which is what h should not fall
    below: the heuristic is inadmissible, good texts may be put off or pruned, and only the search's own bound U, in
    which no learned value enters, proves anything. Train with ``gamma=1``: a discounted V is in other units than J.
    """

    def __init__(self, agent: Any, *, preference: float = 0.1) -> None:
        """Use an agent's critic and policy.

        Args:
            agent: PPO, A2C or MaskablePPO trained on ``TokenDecoding-v0``, with any policy that has
                ``predict_values`` and ``get_distribution``.
            preference: β, in units of J per nat; 0 leaves the edges of a node in the language model's order.

        Raises:
            ConfigurationError: The agent has no such policy, or was trained on something else; β is not a number >= 0.
        """
        from .q_function import as_value_function

        self.preference = check_number("preference", preference, low=0)
        self.function: ValueFunction = as_value_function(agent)

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`; masked actions get no more than the least preferred legal one.

        Raises:
            CheckpointError: The agent was trained for another model, k or observation layout than ``mdp`` has.
        """
        v, logprobs = self.function.values(mdp, prompts, nodes)
        # The best *legal* action is preferred by 0: that is what renormalising over the mask would give.
        legal = np.where(mdp.action_mask(nodes), np.maximum(logprobs, _MIN_LOGPROB), _MIN_LOGPROB)
        against: Values = legal - legal.max(axis=1, keepdims=True)
        return v[:, None] + self.preference * against

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"ValueHeuristic({self.function!r}, preference={self.preference})"


class LookAheadHeuristic(Composable):
    """h from greedy roll-outs: what the text is worth a few tokens further on, fluency and potential together.

    NeuroLogic A*esque (Lu et al. 2022) for any reward with a potential φ. From the ``width`` likeliest edges of a
    node the language model's favourite tokens are followed until ``length`` tokens are there or the text ends; h is α
    times the log-probability of all of them, plus φ at the end. Other edges get α · log π + φ(s). It needs no training
    and costs up to width · length LM tokens a node, which count against the search's budget.

    Attributes:
        lm_tokens: int64 [n], prefixes that the last call looked at, by node. Where a heuristic has this, it is counted.
    """

    def __init__(self, length: int = 4, *, width: int = 3) -> None:
        """Roll out ``length`` tokens from each of ``width`` edges of a node.

        Raises:
            ConfigurationError: One is not a positive integer.
        """
        self.length, self.width = check_integer("length", length), check_integer("width", width)
        self.lm_tokens: IntArray = np.zeros(0, dtype=np.int64)

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`."""
        values = mdp.edge_returns(nodes) + mdp.potential(prompts, nodes)[:, None]
        self.lm_tokens = np.zeros(len(nodes), dtype=np.int64)
        going_on = mdp.action_mask(nodes) & (mdp.finishes(nodes) == Finish.NO)
        row, action = np.nonzero(going_on & (going_on.cumsum(axis=1) <= self.width))
        if not len(row):
            return values
        here = mdp.tree.expand(nodes[row], action)
        np.add.at(self.lm_tokens, row, 1)
        for _ in range(self.length - 1):
            favourite = mdp.action_mask(here).argmax(axis=1)  # the likeliest that may be taken
            moving = np.flatnonzero(mdp.finishes(here)[np.arange(len(here)), favourite] == Finish.NO)
            if not len(moving):
                break
            here[moving] = mdp.tree.expand(here[moving], favourite[moving])
            np.add.at(self.lm_tokens, row[moving], 1)
        fluency = mdp.path_return(here) - mdp.path_return(nodes[row])
        values[row, action] = fluency + mdp.potential([prompts[i] for i in row.tolist()], here)
        return values

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"LookAheadHeuristic({self.length}, width={self.width})"


class OracleHeuristic(Composable):
    """h = h*, the best return there is through each edge, by looking at every text below it. For small trees.

    With it A* expands the prefixes of an optimal text and nothing else. What it looks at is on nobody's account.
    """

    def __init__(self, *, limit: int = 100_000) -> None:
        """Look at no more than ``limit`` prefixes a prompt."""
        self.limit = check_integer("limit", limit)
        self._values: dict[int, tuple[Prompt, dict[tuple[int, ...], Values]]] = {}

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`; masked actions, and texts that cannot be scored, get -inf.

        Raises:
            ConfigurationError: The tree below a prompt is larger than the limit.
        """
        values = np.empty((len(nodes), mdp.top_k))
        ids = mdp.tree.completions(nodes)
        for row, (prompt, node) in enumerate(zip(prompts, nodes.tolist(), strict=True)):
            # By prompt and tokens, not by node: nodes are renumbered when the tree forgets.
            _, known = self._values.setdefault(id(prompt), (prompt, {}))
            if tuple(ids[row]) not in known:
                self._look_below(mdp, prompt, node, known)
            values[row] = known[tuple(ids[row])]
        return values

    def back_up(self, mdp: DecodingMDP, values: Values) -> float:
        """Return what a state is worth whose edges are worth ``values`` [legal actions]."""
        del mdp
        return float(values.max())

    def _look_below(self, mdp: DecodingMDP, prompt: Prompt, node: int, known: dict[tuple[int, ...], Values]) -> Values:
        if len(known) >= self.limit:
            raise ConfigurationError(
                f"{self!r} looks at every text, and there are more than {self.limit} prefixes after {prompt.text!r}; "
                "it is for small trees: reduce top_k or max_new_tokens"
            )
        here = np.array([node])
        legal, ends = mdp.action_mask(here)[0], mdp.finishes(here)[0] != Finish.NO
        values = np.where(legal, mdp.edge_returns(here)[0], -np.inf)
        finishing, going_on = np.flatnonzero(legal & ends), np.flatnonzero(legal & ~ends)
        completions = mdp.complete([prompt] * len(finishing), np.repeat(here, len(finishing)), finishing)
        rewards = np.array([completion.reward for completion in completions])
        values[finishing] += np.where(np.isnan(rewards), -np.inf, rewards)
        for action, child in zip(going_on, mdp.tree.expand(np.repeat(here, len(going_on)), going_on), strict=True):
            below = self._look_below(mdp, prompt, int(child), known)
            values[action] += self.back_up(mdp, below[mdp.action_mask(np.array([child]))[0]])
        known[tuple(mdp.tree.completion_ids(node))] = values
        return values

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"{type(self).__name__}()"


class SoftValueHeuristic(OracleHeuristic):
    """h(s, a) = α · log π(a | s) + V(s'), V(s) = α · log Σ_y π(y | s) · exp(r(y) / α): the value under maximum entropy.

    V is what the language model tilted by the reward is normalised by (Levine 2018, section 2.3). It is at least the
    best return, since a sum is at least its largest term, and it is consistent: A* with it needs at most T / p*(y*)
    expansions, p*(y*) being the tilted model's probability of the optimal text. With α = 0 it is the oracle. Exact, by
    looking at every text of the top-k tree.
    """

    def back_up(self, mdp: DecodingMDP, values: Values) -> float:
        """Return α · log Σ exp(values / α)."""
        best = float(values.max())
        if not mdp.logprob_weight or not np.isfinite(best):
            return best
        total = np.exp((values - best) / mdp.logprob_weight).sum()
        return best + mdp.logprob_weight * float(np.log(total))


def _add(values: Values) -> Values:
    total: Values = values.sum(axis=0)
    return total


def _slots(heuristics: Sequence[Heuristic]) -> str:
    return ", ".join(["{}"] * len(heuristics))
