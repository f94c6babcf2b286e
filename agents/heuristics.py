"""Heuristics: estimates of the best return still to come through an edge, that edge included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..checks import check_integer, check_number
from ..deprecated import find_moved_name
from ..envs import DecodingMDP, Finish, Prompt
from ..errors import ConfigurationError
from .search.problem import Heuristic
from .search.state import IntArray, Values

__all__ = [
    "BoundHeuristic",
    "CombinedHeuristic",
    "Heuristic",
    "LookAheadHeuristic",
    "OracleHeuristic",
    "SoftValueHeuristic",
    "ZeroHeuristic",
    "maximum",
    "mean",
]


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

    def check(self, mdp: DecodingMDP) -> None:
        """Check that every term that can tell fits a process.

        Raises:
            CheckpointError: One was trained for another.
        """
        for term in self.terms:
            if callable(check := getattr(term, "check", None)):
                check(mdp)

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
        continuing = mdp.action_mask(nodes) & (mdp.finishes(nodes) == Finish.NO)
        row, action = np.nonzero(continuing & (continuing.cumsum(axis=1) <= self.width))
        if not len(row):
            return values
        here = mdp.expand(nodes[row], action)
        np.add.at(self.lm_tokens, row, mdp.lm_tokens(here))
        for _ in range(self.length - 1):
            legal = mdp.action_mask(here)
            favourite = legal.argmax(axis=1)  # the likeliest that may be taken
            goes_on = mdp.finishes(here)[np.arange(len(here)), favourite] == Finish.NO
            moving = np.flatnonzero(goes_on & legal.any(axis=1))
            if not len(moving):
                break
            here[moving] = mdp.expand(here[moving], favourite[moving])
            np.add.at(self.lm_tokens, row[moving], mdp.lm_tokens(here[moving]))
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
        return float(values.max(initial=-np.inf))  # a constraint may leave nothing to write

    def _look_below(self, mdp: DecodingMDP, prompt: Prompt, node: int, known: dict[tuple[int, ...], Values]) -> Values:
        if len(known) >= self.limit:
            raise ConfigurationError(
                f"{self!r} looks at every text, and there are more than {self.limit} prefixes after {prompt.text!r}; "
                "it is for small trees: reduce top_k or max_new_tokens"
            )
        here = np.array([node])
        legal, ends = mdp.action_mask(here)[0], mdp.finishes(here)[0] != Finish.NO
        values = np.where(legal, mdp.edge_returns(here)[0], -np.inf)
        finishing, continuing = np.flatnonzero(legal & ends), np.flatnonzero(legal & ~ends)
        completions = mdp.complete([prompt] * len(finishing), np.repeat(here, len(finishing)), finishing)
        rewards = np.array([completion.reward for completion in completions])
        values[finishing] += np.where(np.isnan(rewards), -np.inf, rewards)
        children = mdp.expand(np.repeat(here, len(continuing)), continuing)
        for action, child in zip(continuing, children, strict=True):
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
        best = float(values.max(initial=-np.inf))
        if not mdp.logprob_weight or not np.isfinite(best):
            return best
        total = np.exp((values - best) / mdp.logprob_weight).sum()
        return best + mdp.logprob_weight * float(np.log(total))


def _add(values: Values) -> Values:
    total: Values = values.sum(axis=0)
    return total


def _slots(heuristics: Sequence[Heuristic]) -> str:
    return ", ".join(["{}"] * len(heuristics))


def __getattr__(name: str) -> Any:
    return find_moved_name(__name__, name)
