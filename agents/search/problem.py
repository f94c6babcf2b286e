"""The problem of a search: what is maximised, where, and what estimates the way there."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ...envs.mdp import DecodingMDP, Values
from ...envs.prompts import Prompt
from ...errors import HeuristicError, QStarError
from ...models.base import IntArray
from ...rewards import Reward, as_reward

__all__ = ["Heuristic", "Learner", "Problem", "Processes", "Scope", "Score"]

_CACHED_SCORES = 8192  # of each reward that requests name; a server meets ever new rewards

Scope = Literal["top-k tree", "full vocabulary"]
Score = Literal["reward", "q"]


class Heuristic(Protocol):
    """A callable that estimates returns; a plain function will do."""

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return h(s, a), float64 [n, k], for all edges of ``n`` nodes.

        Args:
            mdp: The process; its tree holds the nodes' hidden states, tokens and log-probabilities.
            prompts: The prompt of each node.
            nodes: int64 [n].
        """


class Learner(Protocol):
    """Chooses the heuristics of searches and learns from their results; see :class:`OnlineLearner`.

    Attributes:
        group: How many prompts of ``plan_many`` are searched together.
    """

    group: int

    def fits(self, mdp: DecodingMDP) -> bool:
        """Return whether searches in ``mdp`` are its business."""

    def choose(self, given: Heuristic | None) -> tuple[str, Heuristic]:
        """Return the name of the next search's heuristic, and the heuristic; ``given`` is the decoder's own."""

    def begin(self, search: Any, name: str) -> None:
        """Take note of a search that begins with the heuristic of this name."""

    def finish(self, searches: Sequence[Any]) -> None:
        """Take lessons from searches that ended."""

    def learn(self, seconds: float | None = None) -> bool:
        """Learn from the lessons for about so long, or to the end; return whether something is left to be learned."""


@dataclass(frozen=True)
class Problem:
    """What a search maximises, and where.

    Attributes:
        mdp: The process whose J is maximised.
        heuristic: Estimates the best return through each edge; None estimates the edge's own return only.
        scope: What upper bounds speak of, ``"top-k tree"`` or ``"full vocabulary"``.
        score: What ranks finished texts: ``"reward"``, the reward model, or ``"q"``, the heuristic's f = g + h of the
            last edge. With ``"q"`` the reward model is never called, and nothing is certified.
        n_best: How many of the best texts are wanted; an edge is pruned by the n-th best.
        pathmax: Whether an edge's f is at most that of the edge that led to it (Mérő 1984).
    """

    mdp: DecodingMDP
    heuristic: Heuristic | None = None
    scope: Scope = "top-k tree"
    score: Score = "reward"
    n_best: int = 1
    pathmax: bool = False

    def evaluate(self, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return h, the estimated best return through each edge, that edge included, float64 [n, k].

        Raises:
            HeuristicError: The heuristic raised, or returned another shape, or NaN.
        """
        if self.heuristic is None:
            return self.mdp.edge_returns(nodes)
        try:
            h = np.asarray(self.heuristic(self.mdp, prompts, nodes), dtype=np.float64)
        except QStarError:
            raise  # says what is wrong by itself
        except Exception as error:
            raise HeuristicError(
                f"{self.heuristic!r} raised {type(error).__name__} for {len(nodes)} nodes, the first after the text "
                f"{self.mdp.text(int(nodes[0]))!r}: {error}"
            ) from error
        if h.shape != (len(nodes), self.mdp.top_k):
            raise HeuristicError(
                f"{self.heuristic!r} returned shape {h.shape}, expected {(len(nodes), self.mdp.top_k)}"
            )
        if np.isnan(h).any():
            text = self.mdp.text(int(nodes[np.isnan(h).any(axis=1).argmax()]))
            raise HeuristicError(f"{self.heuristic!r} returned NaN for an action after the text {text!r}")
        return h


def keep_few_scores(reward: Reward) -> None:
    """Let a reward and its parts cache no more scores than searches that follow one another have use for."""
    reward.cache_size = min(reward.cache_size, _CACHED_SCORES)
    for part in getattr(reward, "parts", ()):
        keep_few_scores(part)


class Processes:
    """Processes that differ from one in their settings, the recently used ones; equal settings share a token tree.

    Attributes:
        mdp: The one that they differ from.
    """

    def __init__(self, mdp: DecodingMDP, *, most: int = 64) -> None:
        """Keep at most ``most`` processes, and no more prefixes in all of them than ``mdp`` may keep."""
        self.mdp, self._most = mdp, most
        self._made: OrderedDict[Any, DecodingMDP] = OrderedDict()
        self._rewards: OrderedDict[Any, Reward] = OrderedDict()
        self._lock, self._making = threading.Lock(), threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the process that they differ from."""
        return functools.partial(type(self), most=self._most), (self.mdp,)

    def get(self, **changes: Any) -> DecodingMDP:
        """Return the process with these settings; see :meth:`DecodingMDP.with_changes`.

        Raises:
            ConfigurationError: There is no such setting, or a value is out of range.
        """
        if not changes:
            return self.mdp
        key = tuple((name, _Key(changes[name])) for name in sorted(changes))
        if (made := self._kept(key)) is not None:
            return made
        with self._making:  # which can take long, and holds up nobody whose process is there
            if (made := self._kept(key)) is not None:
                return made
            if "reward" in changes:
                changes["reward"] = self._reward(changes["reward"])
            made = self.mdp.with_changes(**changes)
            with self._lock:
                self._made[key] = made
        return made

    def _kept(self, key: Any) -> DecodingMDP | None:
        """Return a process that is there, noting that it was used; drop the processes that are too many."""
        with self._lock:
            if (made := self._made.pop(key, None)) is not None:
                self._made[key] = made
            # Room for one more, which comes next where this one is not there.
            most = self._most - (made is None)
            while len(self._made) > most or (len(self._made) > 1 and self._prefixes > self.mdp.max_prefixes):
                self._made.popitem(last=False)
            return made

    def _reward(self, source: Any) -> Reward:
        """Return a reward, made once however many processes have it: it may be a model, and caches its scores."""
        key = _Key(source)
        reward = self._rewards[key] = self._rewards.pop(key) if key in self._rewards else as_reward(source)
        if isinstance(source, str):  # made here, and used here alone
            keep_few_scores(reward)
        while len(self._rewards) > self._most:
            self._rewards.popitem(last=False)
        return reward

    @property
    def _prefixes(self) -> int:
        return sum(len(mdp.tree) for mdp in self._made.values())


class _Key:
    """A value of a setting: equal to those of its type that are equal to it, or to itself alone if it has no hash."""

    def __init__(self, value: Any) -> None:
        self._value = tuple(map(_Key, value)) if isinstance(value, (list, tuple)) else value
        self._hash: int | None = None
        with contextlib.suppress(TypeError):
            self._hash = hash(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Key) or type(other._value) is not type(self._value):
            return False
        return other._value is self._value if self._hash is None else bool(other._value == self._value)

    def __hash__(self) -> int:
        return id(self._value) if self._hash is None else self._hash
