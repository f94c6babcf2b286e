"""The account of one prompt's search: what it has expanded, what is known of every edge, and what that proves."""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..envs import Completion, DecodingMDP, Finish, Prompt
from ..errors import ConfigurationError, RewardError

if TYPE_CHECKING:
    from .planning import Decoder

__all__ = ["Budget", "Edges", "Scope", "Score", "Search", "Status", "TracePoint", "Usage"]

Scope = Literal["top-k tree", "full vocabulary"]
Score = Literal["reward", "q"]
IntArray = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

# Sums of float32 log-probabilities taken in another order differ by about this much.
EPSILON = 1e-9
# By how much a completion may exceed its bound before the bound is called broken: rewards round.
_TOLERANCE = 1e-6


class Edges(NamedTuple):
    """A set of edges of one search.

    Attributes:
        rows: int64 [m], rows of the search's table, one per expanded node.
        actions: int64 [m].
    """

    rows: IntArray
    actions: IntArray


NO_EDGES = Edges(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class Budget:
    """When a search must stop; None is without limit.

    Attributes:
        lm_tokens: Prefixes that the language model may process. Every distinct prefix that the search asks for counts
            once, whether or not an earlier search left it in the token tree, and so do those it prunes later; the
            prompt itself does not count. A budget therefore means the same for every decoder and in every order.
        reward_calls: Completions that the reward model may score.
        seconds: Wall-clock time, looked at between steps.
        kv_bytes: Bytes of keys and values of the prefixes processed, the prompt's included.
        pops: Edges followed, those that end a text included.
    """

    lm_tokens: int | None = None
    reward_calls: int | None = None
    seconds: float | None = None
    kv_bytes: int | None = None
    pops: int | None = None

    def __post_init__(self) -> None:
        """Check the limits.

        Raises:
            ConfigurationError: A limit is not a positive number.
        """
        for name, value in vars(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
                raise ConfigurationError(f"Budget({name}=…) is a number > 0 or None, got {value!r}")

    @classmethod
    def of(cls, value: Budget | int | None) -> Budget:
        """Return ``value`` as a budget; a plain integer means LM tokens."""
        return value if isinstance(value, Budget) else cls(lm_tokens=value)

    def extended(self, by: Budget, usage: Usage) -> Budget:
        """Return the budget of a search that has used ``usage`` of this one and may use ``by`` more.

        What was not used of this budget is not lost; a limit that ``by`` does not set is lifted.
        """
        more: dict[str, float | None] = {}
        for limit in (f.name for f in fields(self)):
            had, extra = getattr(self, limit), getattr(by, limit)
            more[limit] = None if extra is None else extra + (getattr(usage, limit) if had is None else had)
        return Budget(**more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Usage:
    """What a search used.

    Attributes:
        lm_tokens: Distinct prefixes processed beyond the prompt, and those that the heuristic looked at.
        lm_forwards: Forwards of the language model that it took part in.
        reward_calls: Completions scored.
        seconds: Wall-clock time from the start of the search to its end. Searches run together share it.
        kv_bytes: Key-value memory of the prefixes processed, the prompt's included.
        pops: Edges followed, those that end a text included.
        prompt_tokens: Tokens of the prompt; not part of any budget.
    """

    lm_tokens: int
    lm_forwards: int
    reward_calls: int
    seconds: float
    kv_bytes: int
    pops: int
    prompt_tokens: int


class TracePoint(NamedTuple):
    """The bounds at one moment of a search; tokens and seconds count from its start."""

    lm_tokens: int
    seconds: float
    lower_bound: float
    upper_bound: float


class Status(IntEnum):
    """What became of an edge."""

    OPEN = 0  # not followed; what lies below it is bounded by U
    EXPANDED = 1
    FINISHED = 2
    MASKED = 3  # not an action; outside the top-k tree, inside the full vocabulary


class Pool:
    """One budget of LM tokens for several searches, each of which may spend an equal share of what is left.

    A search that has followed everything that promised anything goes idle, and leaves its share to the others.

    Attributes:
        left: LM tokens that nobody has spent yet.
        searches: Those that share them.
    """

    def __init__(self, lm_tokens: int) -> None:
        """Share ``lm_tokens`` among the searches that will be entered."""
        self.left = lm_tokens
        self.searches: list[Search] = []

    @property
    def all_idle(self) -> bool:
        """Whether no search that goes on has anything left that promises something."""
        return all(search.is_idle or search.is_over for search in self.searches)

    def share(self, search: Search) -> int:
        """Return how many LM tokens a search may spend now."""
        if self.all_idle:
            return self.left // max(sum(not other.is_over for other in self.searches), 1)
        busy = sum(not (other.is_idle or other.is_over) for other in self.searches)
        return 0 if search.is_idle else -(-self.left // busy)


class Search:
    """The account of one prompt's search: which nodes it has expanded, and what is known of their edges.

    Row i of every table belongs to the i-th node expanded; row 0 is the prompt.

    Attributes:
        node: int64 [rows], the node of the token tree.
        parent: int64 [rows], the row it was reached from, -1 at the prompt.
        depth: int64 [rows], tokens since the prompt.
        g: float64 [rows], α · Σ log π so far.
        f: float64 [rows, k], the estimate g + h of each edge.
        bound: float64 [rows, k], U = g + α · log π(a | s) + r_max(s); no learned value enters.
        open_bound: float64 [rows], the largest U of the edges that are still open, -inf if none is.
        omitted: float64 [rows], U of everything that is not an action there.
        finish: int8 [rows, k], how each edge ends the text (:class:`Finish`).
        status: int8 [rows, k] (:class:`Status`).
        child: int64 [rows, k], the row that an expanded edge leads to, else -1.
        best: The best completion so far, the incumbent.
        completions: What was finished, by row and action.
        draws: How often a sampler drew each finishing edge.
        heuristic_tokens: LM tokens that the heuristic has used; see :class:`LookAheadHeuristic`.
        pool: What it shares with other searches instead of a budget of LM tokens of its own; usually None.
        is_idle: Whether it has followed everything that promised anything; see :class:`Pool`.
        stop_reason: Why it is over; empty while it is not. See :class:`~qstar_decoding.agents.planning.Plan`.
    """

    _TABLES = ("node", "parent", "depth", "g", "f", "bound", "open_bound", "omitted", "finish", "status", "child")

    def __init__(self, decoder: Decoder, prompt: Prompt, budget: Budget, pool: Pool | None = None) -> None:
        """Start with nothing expanded; ``decoder`` says what is searched for, and how."""
        self.pool, self.is_idle = pool, False
        if pool is not None:
            pool.searches.append(self)
        self.decoder, self.mdp, self.prompt, self.budget = decoder, decoder.mdp, prompt, budget
        self.scope, self.score = decoder.scope, decoder.score
        mdp = self.mdp
        self.size = 0
        k = mdp.top_k
        self.node, self.parent, self.depth = (np.empty(0, dtype=np.int64) for _ in range(3))
        self.g, self.open_bound, self.omitted = np.empty(0), np.empty(0), np.empty(0)
        self.f, self.bound = np.empty((0, k)), np.empty((0, k))
        self.finish, self.status = np.empty((0, k), dtype=np.int8), np.empty((0, k), dtype=np.int8)
        self.child = np.empty((0, k), dtype=np.int64)
        self.completions: dict[tuple[int, int], Completion] = {}
        self.best: Completion | None = None
        self._leaders: list[float] = []  # a heap of the best few objectives
        self._unscored = -math.inf  # the largest U of what was finished without asking the reward
        self._strategy = decoder.search(self)
        self._wish = NO_EDGES  # what it asked for last
        self.draws: Counter[tuple[int, int]] = Counter()
        self.trace: list[TracePoint] = []
        self.lm_forwards = self.reward_calls = self.heuristic_tokens = 0
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self.stop_reason = ""

    # -- what a decoder asks ------------------------------------------------------------------------------------------

    @property
    def incumbent(self) -> float:
        """The best completion's J, or what stands in for it where the reward is not asked; -inf if there is none."""
        return self.best.objective if self.best else -math.inf

    @property
    def to_beat(self) -> float:
        """What a text must exceed to be among the best that the decoder wants; -inf while there are fewer."""
        return self._leaders[0] if len(self._leaders) == self.decoder.wanted else -math.inf

    @property
    def lower_bound(self) -> float:
        """LB, the incumbent's J; -inf where the reward is not asked, since an estimate proves nothing."""
        return self.incumbent if self.score == "reward" else -math.inf

    @property
    def upper_bound(self) -> float:
        """UB, the largest U of everything not explored, pruned edges included, or LB."""
        rows = slice(0, self.size)
        bounds = [self.lower_bound, self._unscored, self.open_bound[rows].max(initial=-math.inf)]
        if self.scope == "full vocabulary":
            bounds.append(self.omitted[rows].max(initial=-math.inf))
        return float(max(bounds))

    @property
    def is_certified(self) -> bool:
        """Whether nothing in the scope can be better than the incumbent."""
        return self.best is not None and self.upper_bound - self.lower_bound <= EPSILON

    @property
    def bar(self) -> float:
        """What an edge's U must exceed for the edge to matter; -inf where the reward is not asked."""
        return self.to_beat + EPSILON if self.score == "reward" else -math.inf

    @property
    def has_hope(self) -> bool:
        """Whether any edge that can be followed could still bring a text that matters."""
        return bool(self.open_bound[: self.size].max(initial=-math.inf) > self.bar)

    @property
    def lm_tokens(self) -> int:
        """LM tokens used, those of the heuristic included; the prompt's row is free."""
        return max(self.size - 1, 0) + self.heuristic_tokens

    @property
    def pops(self) -> int:
        """Edges followed."""
        return max(self.size - 1, 0) + len(self.completions)

    @property
    def room(self) -> float:
        """LM tokens that the budget still allows, as far as its other limits say so in tokens."""
        room = math.inf if self.budget.lm_tokens is None else self.budget.lm_tokens - self.lm_tokens
        if self.pool is not None:
            room = min(room, self.pool.share(self))
        if self.budget.kv_bytes is not None and (size := self.mdp.model.kv_token_bytes):
            room = min(room, self.budget.kv_bytes // size - len(self.mdp.encode(self.prompt)) - self.lm_tokens)
        return room

    @property
    def seconds(self) -> float:
        """Wall-clock time that this search has run."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be followed any more, unless the search is resumed."""
        return bool(self.stop_reason)

    def at_depth(self, depth: int) -> IntArray:
        """Return the rows of the nodes at this depth."""
        return np.flatnonzero(self.depth[: self.size] == depth)

    def edge_logprob(self, rows: IntArray) -> Values:
        """Return log π of the prefixes that the edges of these rows lead to, float64 [n, k], nats."""
        tree, nodes = self.mdp.tree, self.node[rows]
        values: Values = tree.path_logprob[nodes][:, None] + tree.logprobs[nodes]
        return values

    # -- what the driver does -----------------------------------------------------------------------------------------

    def add(self, nodes: IntArray, h: Values, came_by: Edges | None) -> None:
        """Enter newly expanded nodes [n] with their edges' heuristic values [n, k]."""
        mdp, rows = self.mdp, np.arange(self.size, self.size + len(nodes))
        self._reserve(self.size + len(nodes))
        edge, mask = mdp.edge_returns(nodes), mdp.action_mask(nodes)
        most = mdp.reward_bound([self.prompt] * len(nodes), nodes)
        self.node[rows], self.depth[rows], self.g[rows] = nodes, mdp.tree.depth[nodes], mdp.path_return(nodes)
        self.f[rows] = self.g[rows, None] + h
        self.bound[rows] = self.g[rows, None] + edge + most[:, None]
        self.omitted[rows] = self.g[rows] + _omitted_bound(mdp, nodes, mask, most)
        if came_by is not None:
            # What bounded the edge bounds everything below it.
            self.bound[rows] = np.minimum(self.bound[rows], self.bound[came_by][:, None])
            self.omitted[rows] = np.minimum(self.omitted[rows], self.bound[came_by])
            if self.decoder.pathmax:
                self.f[rows] = np.minimum(self.f[rows], self.f[came_by][:, None])
        self.finish[rows] = mdp.finishes(nodes)
        self.status[rows] = np.where(mask, Status.OPEN, Status.MASKED)
        self.child[rows] = -1
        self.parent[rows] = -1 if came_by is None else came_by.rows
        self.size += len(nodes)
        self._close(rows)
        # The edges leave the bound last, so that whatever interrupts this, UB holds.
        if came_by is not None:
            self.child[came_by] = rows
            self.status[came_by] = Status.EXPANDED
            self._close(came_by.rows)

    def finish_edges(self, edges: Edges, completions: Sequence[Completion]) -> None:
        """Enter scored completions.

        Raises:
            RewardError: One exceeds its upper bound: the reward's stated bounds do not hold.
        """
        self.reward_calls += len(completions) if self.score == "reward" else 0
        for row, action, completion in zip(*edges, completions, strict=True):
            if self.score == "reward" and completion.objective > self.bound[row, action] + _TOLERANCE:
                most = self.bound[row, action] - self.mdp.logprob_weight * completion.logprob
                raise RewardError(
                    f"reward {self.mdp.reward.name!r} gave {completion.reward:.6g} to {completion.text!r}, though it "
                    f"had stated that no continuation of a prefix of it exceeds {most:.6g}: no certificate could be "
                    "trusted. Correct the reward's `upper` or its `bound_prefixes`."
                )
            self.completions[int(row), int(action)] = completion
            if completion.objective > self.incumbent:  # False for NaN: what cannot be scored is no candidate
                self.best = completion
            if not math.isnan(completion.objective):
                enter = heapq.heappush if len(self._leaders) < self.decoder.wanted else heapq.heappushpop
                enter(self._leaders, completion.objective)
        if self.score == "q":
            self._unscored = max(self._unscored, float(self.bound[edges].max(initial=-math.inf)))
        self.status[edges] = Status.FINISHED
        self._close(edges.rows)

    def record(self) -> None:
        """Add a point to the trace."""
        self.trace.append(TracePoint(self.lm_tokens, self.seconds, self.lower_bound, self.upper_bound))

    def next_edges(self) -> Edges | None:
        """Return what the decoder wants followed next, as far as the budget pays for it; None when the search is over.

        What was asked for and not followed, for want of budget, comes first when the search is resumed.
        """
        if self.is_over:
            return None
        left = self.status[self._wish] == Status.OPEN
        wish = Edges(self._wish.rows[left], self._wish.actions[left]) if left.any() else next(self._strategy, None)
        if wish is None:
            self.stop_reason = self.stop_reason or ("certified" if self.is_certified else "finished")
            return None
        self._wish = wish
        count = self._affordable(wish)
        if self.pool is not None:
            self.pool.left -= int((self.finish[wish][:count] == Finish.NO).sum())
        return Edges(wish.rows[:count], wish.actions[:count])

    def resume(self, budget: Budget) -> None:
        """Let the search go on with a further budget; its nodes, maybe forgotten, are looked up again."""
        self.budget = self.budget.extended(budget, self.usage)
        self.stop_reason = ""
        self._seconds_before, self._started = self.usage.seconds, time.perf_counter()
        self.node[:1] = self.mdp.roots([self.prompt])
        row, action = np.nonzero(self.child[: self.size] >= 0)
        depth = self.depth[row]
        for level in range(int(depth.max(initial=-1)) + 1):
            rows, actions = row[depth == level], action[depth == level]
            self.node[self.child[rows, actions]] = self.mdp.tree.expand(self.node[rows], actions)

    @property
    def usage(self) -> Usage:
        """What the search has used so far."""
        prompt_tokens = len(self.mdp.encode(self.prompt))
        return Usage(
            lm_tokens=self.lm_tokens,
            lm_forwards=self.lm_forwards,
            reward_calls=self.reward_calls,
            seconds=self.trace[-1].seconds if self.stop_reason and self.trace else self.seconds,
            kv_bytes=(prompt_tokens + self.lm_tokens) * (self.mdp.model.kv_token_bytes or 0),
            pops=self.pops,
            prompt_tokens=prompt_tokens,
        )

    # -----------------------------------------------------------------------------------------------------------------

    def _affordable(self, edges: Edges) -> int:
        """Return how many leading edges the budget pays for, and note it if that is not all."""
        budget, going_on = self.budget, self.finish[edges] == Finish.NO
        calls = math.inf
        if budget.reward_calls is not None and self.score == "reward":
            calls = budget.reward_calls - self.reward_calls
        pops = math.inf if budget.pops is None else budget.pops - self.pops
        fits = (np.cumsum(going_on) <= self.room) & (np.cumsum(~going_on) <= calls) & (np.arange(len(going_on)) < pops)
        late = budget.seconds is not None and self.seconds >= budget.seconds
        if late or not fits.all():
            self.stop_reason = "budget"
        # Everything after the first edge that does not fit waits, so that the order of the decoder is kept.
        return 0 if late else int(np.cumprod(fits).sum())

    def _close(self, rows: IntArray) -> None:
        """Take stock of what is open at these rows."""
        is_open = self.status[rows] == Status.OPEN
        self.open_bound[rows] = self.bound[rows].max(axis=1, initial=-math.inf, where=is_open)

    def _reserve(self, rows: int) -> None:
        if rows > len(self.node):
            capacity = max(2 * len(self.node), rows, 64)
            for name in self._TABLES:
                old = getattr(self, name)
                new = np.empty((capacity, *old.shape[1:]), dtype=old.dtype)
                new[: self.size] = old[: self.size]
                setattr(self, name, new)


def _omitted_bound(mdp: DecodingMDP, nodes: IntArray, mask: npt.NDArray[np.bool_], most: Values) -> Values:
    """Bound what the tokens that are no actions could bring from here on: α · log π + r_max(s), float64 [n].

    A token outside the top k is at most as likely as the k-th, and as all of them together.
    """
    logprobs = mdp.tree.logprobs[nodes].astype(np.float64)
    outside = np.full(len(nodes), -np.inf)
    if mdp.top_k < mdp.model.vocab_size:
        # Rounding may leave a sum slightly above 1; 1e-7 keeps the bound an upper one.
        left = np.log(np.maximum(1 - np.exp(logprobs).sum(axis=1), 0) + 1e-7)
        outside = np.minimum(logprobs[:, -1], left)
    masked = np.where(mask, -np.inf, logprobs).max(axis=1)
    best = np.maximum(outside, masked)
    with np.errstate(invalid="ignore"):  # 0 · -inf, -inf + inf
        bound = mdp.logprob_weight * best + most
    return np.where(np.isneginf(best), -np.inf, bound)
