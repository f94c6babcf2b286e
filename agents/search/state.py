"""The state of one search: what it has expanded, what is known of every edge, and what that proves."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...columns import GrowableColumns
from ...envs.mdp import Completion, DecodingMDP, Finish, Values
from ...envs.prompts import Prompt
from ...errors import RewardError
from ...models.base import IntArray
from .budget import Budget, SharedBudget, TracePoint, Usage
from .problem import Problem

__all__ = ["NO_EDGES", "Edges", "IntArray", "Search", "Status", "Values"]

# J and U that differ by less count as equal: sums of the same float64 numbers in another order differ by about 1e-15.
EPSILON = 1e-9
_GRACE = 2  # times its deadline, for a search that has no text yet
_MEASURED_STEPS = 24  # from which the speed of a search with a deadline is estimated
_FLOAT64 = 2.0**-53  # unit round-off, relative
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


class Status(IntEnum):
    """What became of an edge."""

    OPEN = 0  # not followed; what lies below it is bounded by U
    EXPANDED = 1
    FINISHED = 2
    MASKED = 3  # not an action; outside the top-k tree, inside the full vocabulary


class Search:
    """The state of one prompt's search: which nodes it has expanded, and what is known of their edges.

    Row i of every table belongs to the i-th node expanded; row 0 is the prompt. Tables have spare rows beyond ``size``.

    Attributes:
        problem: What is maximised, and where.
        prompt: The prompt.
        budget: When to stop.
        shared: The budget that it shares with other searches instead of LM tokens of its own; usually None.
        node: int64 [rows], the node of the token tree.
        parent: int64 [rows], the row it was reached from, -1 at the prompt.
        depth: int64 [rows], actions since the prompt.
        g: float64 [rows], α · Σ log π so far.
        f: float64 [rows, k], the estimate g + h of each edge, -inf where it is masked.
        bound: float64 [rows, k], U = g + α · log π(a | s) + r_max(s); no learned value enters.
        open_bound: float64 [rows], the largest U of the edges that are still open, -inf if none is.
        omitted: float64 [rows], U of everything that is not an action there.
        finish: int8 [rows, k], how each edge ends the text (:class:`Finish`).
        status: int8 [rows, k] (:class:`Status`).
        child: int64 [rows, k], the row that an expanded edge leads to, else -1.
        best: The best completion so far, the incumbent.
        completions: What was finished, by row and action.
        draws: How often a sampler drew each finishing edge.
        log_normalizer: What a particle filter estimates, NaN elsewhere; see :class:`ParticleFilter`.
        further_tokens: LM tokens beside one a row: of :class:`StepMDP`, of :class:`LookAheadHeuristic`.
        busy_seconds: Wall-clock time of its steps; of steps taken together with others, its share.
        is_exhausted: Whether it has followed everything promising; see :class:`SharedBudget`.
        stop_reason: Why it is over; empty while it is not. See :class:`Plan`.
        largest_step: LM tokens of the largest step so far, at least 1.
    """

    node: IntArray
    parent: IntArray
    depth: IntArray
    g: Values
    f: Values
    bound: Values
    open_bound: Values
    omitted: Values
    finish: npt.NDArray[np.int8]
    status: npt.NDArray[np.int8]
    child: IntArray

    def __init__(
        self,
        problem: Problem,
        prompt: Prompt,
        budget: Budget,
        shared: SharedBudget | None = None,
        *,
        started: float | None = None,
    ) -> None:
        """Start with nothing expanded; seconds count from ``started``, a ``time.perf_counter()``, or from now."""
        self.problem, self.prompt, self.budget, self.shared = problem, prompt, budget, shared
        self.mdp, self.scope, self.score = problem.mdp, problem.scope, problem.score
        self.is_exhausted, self.stop_reason = False, ""
        if shared is not None:
            shared.members.append(self)
        per_edge = (self.mdp.top_k,)
        self._tables = GrowableColumns(
            {
                "node": ((), np.int64),
                "parent": ((), np.int64),
                "depth": ((), np.int64),
                "g": ((), np.float64),
                "f": (per_edge, np.float64),
                "bound": (per_edge, np.float64),
                "open_bound": ((), np.float64),
                "omitted": ((), np.float64),
                "finish": (per_edge, np.int8),
                "status": (per_edge, np.int8),
                "child": (per_edge, np.int64),
            }
        )
        self._publish()
        self.completions: dict[tuple[int, int], Completion] = {}
        self.best: Completion | None = None
        self._leaders: dict[str, float] = {}  # the n best texts, with the best J of each
        self._unscored = -math.inf  # the largest U of what was finished without asking the reward
        self.draws: Counter[tuple[int, int]] = Counter()
        self.trace: list[TracePoint] = []
        self.largest_step = 1
        self.lm_forwards = self.reward_calls = self.further_tokens = 0
        self.busy_seconds, self.log_normalizer = 0.0, math.nan
        self._improved_at = 0  # LM tokens when the best text was found
        self._started, self._seconds_before = time.perf_counter() if started is None else started, 0.0

    # -- what a strategy asks -----------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Rows in use: the prompt, and the nodes expanded."""
        return self._tables.size

    @property
    def incumbent(self) -> float:
        """The best completion's J, or what stands in for it where the reward is not asked; -inf if there is none."""
        return self.best.objective if self.best else -math.inf

    @property
    def nth_best(self) -> float:
        """J that a text must exceed to be among the n best; -inf while there are fewer.

        Completions of the same text by other tokens count once.
        """
        return min(self._leaders.values()) if len(self._leaders) == self.problem.n_best else -math.inf

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
    def pruning_threshold(self) -> float:
        """U that an edge must exceed to matter; -inf where the reward is not asked."""
        return self.nth_best + EPSILON if self.score == "reward" else -math.inf

    @property
    def can_improve(self) -> bool:
        """Whether any edge that can be followed could still bring a text that matters."""
        return bool(self.open_bound[: self.size].max(initial=-math.inf) > self.pruning_threshold)

    @property
    def lm_tokens(self) -> int:
        """LM tokens used, those of the heuristic included; the prompt's row is free."""
        return max(self.size - 1, 0) + self.further_tokens

    @property
    def pops(self) -> int:
        """Edges followed."""
        return max(self.size - 1, 0) + len(self.completions)

    @property
    def remaining_tokens(self) -> float:
        """LM tokens that the budget still allows, as far as its other limits say so in tokens."""
        remaining = math.inf if self.budget.lm_tokens is None else self.budget.lm_tokens - self.lm_tokens
        if self.shared is not None:
            remaining = min(remaining, self.shared.share(self))
        if self.budget.pops is not None:  # less one to end the first text
            remaining = min(remaining, (self.budget.pops - self.pops - (not self.completions)) * self.price)
        if self.budget.kv_bytes is not None and (size := self.mdp.model.kv_token_bytes):
            prompt_tokens = len(self.mdp.encode(self.prompt))
            remaining = min(remaining, self.budget.kv_bytes // size - prompt_tokens - self.lm_tokens)
        return remaining

    @property
    def price(self) -> float:
        """LM tokens a row, the mean so far; 1 unless actions are drawn or the heuristic looks ahead."""
        return (self.size + self.further_tokens) / max(self.size, 1)

    def actions_to_come(self, depth: int) -> int:
        """Return how many actions a text takes beyond this depth; see :meth:`DecodingMDP.actions_left`."""
        return self.mdp.actions_left(self.node[self.at_depth(depth)])

    def affordable_rows(self, steps: int) -> float:
        """Return how many rows the budget, its deadline included, pays for at the price so far, in so many steps.

        The time of a step is taken for a + b · tokens, fitted to the last steps. While all of them had one size, b is
        taken for an eighth of the time per token, as measured on CPUs for steps of 1 to 16 tokens.
        """
        remaining, recent = self.remaining_tokens, self.trace[-_MEASURED_STEPS:]
        if self.budget.seconds is None or len(recent) < 2:
            return remaining / self.price
        tokens, seconds = np.diff([point[:2] for point in recent], axis=0).T
        sizes = tokens - tokens.mean()
        per_token = seconds.sum() / max(tokens.sum(), 1) / 8
        if sizes.any():
            per_token = max(float(sizes @ seconds / (sizes @ sizes)), per_token)
        per_step = max(float(seconds.mean() - per_token * tokens.mean()), 0.0)
        left = self.budget.seconds - self.seconds - steps * per_step
        return max(min(remaining, float(left / max(per_token, 1e-9))), 0.0) / self.price

    @property
    def seconds(self) -> float:
        """Wall-clock time that this search has run."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def is_late(self) -> bool:
        """Whether its deadline has passed; a search that has no text yet may take as long again to finish one."""
        seconds = self.budget.seconds
        return seconds is not None and self.seconds >= seconds * (_GRACE if self.best is None else 1)

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be followed any more, unless the search is resumed."""
        return bool(self.stop_reason)

    def at_depth(self, depth: int) -> IntArray:
        """Return the rows of the nodes at this depth."""
        return np.flatnonzero(self.depth[: self.size] == depth)

    def edge_logprob(self, rows: IntArray) -> Values:
        """Return log π of the prefixes that the edges of these rows lead to, float64 [n, k], nats."""
        nodes = self.node[rows]
        return self.mdp.tree.path_logprob[nodes][:, None] + self.mdp.logprobs(nodes)

    # -- what the loop does -------------------------------------------------------------------------------------------

    def add(self, nodes: IntArray, h: Values, parent_edges: Edges | None) -> None:
        """Enter newly expanded nodes [n] with their edges' heuristic values [n, k].

        Args:
            nodes: int64 [n].
            h: float64 [n, k].
            parent_edges: The ``n`` edges that led to them; None at the prompt.
        """
        mdp = self.mdp
        edge, mask = mdp.edge_returns(nodes), mdp.action_mask(nodes)
        prompts = [self.prompt] * len(nodes)
        most = mdp.reward_bound(prompts, nodes)
        most_beyond = np.minimum(most[:, None], mdp.edge_bounds(prompts, nodes))
        finish, omitted = mdp.finishes(nodes), _omitted_bound(mdp, nodes, mask, most)
        rows = np.arange(self.size, self.size + len(nodes))
        if self._tables.reserve(self.size + len(nodes)):
            self._publish()
        self.node[rows], self.g[rows] = nodes, mdp.path_return(nodes)
        self.depth[rows] = 0 if parent_edges is None else self.depth[parent_edges.rows] + 1
        self.f[rows] = np.where(mask, self.g[rows, None] + h, -np.inf)
        self.bound[rows] = _sum_outward(self.g[rows, None], edge, most_beyond)
        self.omitted[rows] = _sum_outward(self.g[rows], omitted)
        if parent_edges is not None:
            # What bounded the edge bounds everything below it.
            self.bound[rows] = np.minimum(self.bound[rows], self.bound[parent_edges][:, None])
            self.omitted[rows] = np.minimum(self.omitted[rows], self.bound[parent_edges])
            if self.problem.pathmax:
                self.f[rows] = np.minimum(self.f[rows], self.f[parent_edges][:, None])
        if self.score == "reward" and mdp.reward.has_prefix_bounds:  # an estimate above a bound is wrong
            self.f[rows] = np.minimum(self.f[rows], self.bound[rows])
        self.finish[rows] = finish
        self.status[rows] = np.where(mask, Status.OPEN, Status.MASKED)
        self.child[rows] = -1
        self.parent[rows] = -1 if parent_edges is None else parent_edges.rows
        self._tables.size += len(nodes)
        self._update_open_bound(rows)
        # The edges leave the bound last, so that whatever interrupts this, UB holds.
        if parent_edges is not None:
            self.child[parent_edges] = rows
            self.status[parent_edges] = Status.EXPANDED
            self._update_open_bound(parent_edges.rows)

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
            if math.isnan(completion.objective):
                continue  # a text that cannot be scored is no candidate
            if self.best is None or completion.objective > self.best.objective:
                self.best, self._improved_at = completion, self.lm_tokens
            self._enter_leader(completion)
        if self.score == "q":
            self._unscored = max(self._unscored, float(self.bound[edges].max(initial=-math.inf)))
        self.status[edges] = Status.FINISHED
        self._update_open_bound(edges.rows)

    def record(self) -> None:
        """Add a point to the trace."""
        tokens = self.lm_tokens
        if self.trace:
            self.largest_step = max(self.largest_step, tokens - self.trace[-1].lm_tokens)
        self.trace.append(TracePoint(tokens, self.seconds, self.lower_bound, self.upper_bound))

    def stop_if_good_enough(self) -> None:
        """End the search where the budget's gap, target or patience says so."""
        budget = self.budget
        if budget.gap is not None and self.best is not None and self.upper_bound - self.lower_bound <= budget.gap:
            self.stop_reason = "gap"
        elif budget.target is not None and self.best is not None and self.incumbent >= budget.target:
            self.stop_reason = "target"
        elif budget.patience is not None and self.best and self.lm_tokens - self._improved_at >= budget.patience:
            self.stop_reason = "patience"

    def affordable(self, edges: Edges) -> Edges:
        """Return the leading edges that the budget pays for; the search is over if it pays for no more.

        Where actions are drawn, what an edge takes is known afterwards. As many are returned as are paid for in any
        case, the others with the next call; in the end one, at the mean price. One drawing may exceed the budget.
        Ends of texts, which take nothing, do not wait there.
        """
        budget, continuing = self.budget, self.finish[edges] == Finish.NO
        most, remaining = self.mdp.most_lm_tokens, self.remaining_tokens
        allowed = budget.reward_calls if self.score == "reward" else None
        calls = math.inf if allowed is None else allowed - self.reward_calls
        pops = math.inf if budget.pops is None else budget.pops - self.pops
        rows = np.cumsum(continuing)
        fits = (np.cumsum(~continuing) <= calls) & (np.arange(len(continuing)) < pops) & (not self.is_late)
        if most == 1:
            # Everything after the first edge that does not fit waits, so that the order of the strategy is kept.
            taken = np.cumprod(fits & (rows <= remaining), dtype=bool)
            is_last = not taken.all()
        else:
            taken = fits & (~continuing | (rows * most <= remaining) | ((rows <= 1) & (self.price <= remaining)))
            is_last = not (taken.all() or (taken & continuing).any())
        self.stop_reason = "budget" if is_last else self.stop_reason
        if self.shared is not None:
            self.shared.remaining_tokens -= int((taken & continuing).sum())
        return Edges(edges.rows[taken], edges.actions[taken])

    def charge(self, tokens: int) -> None:
        """Count LM tokens that a step took beside one a row."""
        self.further_tokens += tokens
        if self.shared is not None:
            self.shared.remaining_tokens -= tokens

    def resume(self, budget: Budget) -> None:
        """Let the search go on with a further budget; its nodes, maybe evicted, are looked up again."""
        self._seconds_before, self._started = self.trace[-1].seconds if self.trace else 0.0, time.perf_counter()
        self.budget = self.budget.extended(budget, replace(self.usage, seconds=self._seconds_before))
        self.stop_reason, self._improved_at = "", self.lm_tokens
        self.node[:1] = self.mdp.roots([self.prompt])
        row, action = np.nonzero(self.child[: self.size] >= 0)
        depth = self.depth[row]
        for level in range(int(depth.max(initial=-1)) + 1):
            rows, actions = row[depth == level], action[depth == level]
            self.node[self.child[rows, actions]] = self.mdp.expand(self.node[rows], actions)

    @property
    def usage(self) -> Usage:
        """What the search has used so far."""
        prompt_tokens = len(self.mdp.encode(self.prompt))
        return Usage(
            lm_tokens=self.lm_tokens,
            lm_forwards=self.lm_forwards,
            reward_calls=self.reward_calls,
            seconds=self.busy_seconds,
            kv_bytes=(prompt_tokens + self.lm_tokens) * (self.mdp.model.kv_token_bytes or 0),
            pops=self.pops,
            prompt_tokens=prompt_tokens,
        )

    # -----------------------------------------------------------------------------------------------------------------

    def _enter_leader(self, completion: Completion) -> None:
        """Note the best J of a text, if it is among the n best."""
        leaders, text = self._leaders, completion.text.strip()
        leaders[text] = max(leaders.get(text, -math.inf), completion.objective)
        if len(leaders) > self.problem.n_best:
            del leaders[min(leaders, key=leaders.__getitem__)]

    def _update_open_bound(self, rows: IntArray) -> None:
        is_open = self.status[rows] == Status.OPEN
        self.open_bound[rows] = self.bound[rows].max(axis=1, initial=-math.inf, where=is_open)

    def _publish(self) -> None:
        """Make the tables' arrays, which growing replaces, attributes of the search."""
        for name in self._tables:
            setattr(self, name, self._tables[name])
        self.node[self.size :] = -1  # no node, as the token tree that renumbers them reads it


def _sum_outward(*terms: Values) -> Values:
    """Return the sum of the terms, rounded up by more than the error of summing them in any order."""
    total: Values = sum(terms[1:], start=terms[0])
    with np.errstate(invalid="ignore"):  # infinite terms have no error
        error = 2 * len(terms) * _FLOAT64 * sum(np.abs(term) for term in terms)
    return total + np.where(np.isfinite(error), error, 0.0)


def _omitted_bound(mdp: DecodingMDP, nodes: IntArray, mask: npt.NDArray[np.bool_], most: Values) -> Values:
    """Bound what continuations that are no actions could bring from here on: α · log π + r_max(s), float64 [n]."""
    masked = np.where(mask, -np.inf, mdp.logprobs(nodes)).max(axis=1)
    best = np.maximum(mdp.omitted_logprobs(nodes), masked)
    with np.errstate(invalid="ignore"):  # 0 · -inf, -inf + inf
        bound = mdp.logprob_weight * best + most
    return np.where(np.isneginf(best), -np.inf, bound)
