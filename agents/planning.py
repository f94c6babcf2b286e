"""What every decoder shares: budgets, plans, and the account of one search.

A decoder is a generator: it looks at its :class:`Search`, yields the edges it wants to follow, and finds them followed
when it goes on. :func:`run` drives many such searches in lock-step, so that all prompts share one forward of the
language model, one evaluation of the heuristic and one call of the reward per step, whatever the decoders are.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from ..envs import Completion, DecodingMDP, Finish, Prompt, load_prompts
from ..envs.prompts import as_prompt
from ..errors import ConfigurationError, HeuristicError
from .search_tree import SearchTree

if TYPE_CHECKING:
    from .heuristics import Heuristic

__all__ = ["Budget", "Decoder", "Edges", "Plan", "Search", "Status", "TracePoint", "Usage", "run"]

Scope = Literal["top-k tree", "full vocabulary"]
Score = Literal["reward", "q"]
IntArray = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

# Sums of float32 log-probabilities taken in another order differ by about this much.
EPSILON = 1e-9


class Edges(NamedTuple):
    """A set of edges of one search.

    Attributes:
        rows: int64 [m], rows of the search's table, one per expanded node.
        actions: int64 [m].
    """

    rows: IntArray
    actions: IntArray


@dataclass(frozen=True)
class Budget:
    """When a search must stop; None is without limit.

    Attributes:
        lm_tokens: Prefixes that the language model may process. Every distinct prefix that the search asks for counts
            once, whether or not an earlier search left it in the token tree, and so do those it prunes later; the
            prompt itself does not count. A budget therefore means the same for every decoder and in every order.
        reward_calls: Completions that the reward model may score.
        seconds: Wall-clock time, looked at between steps.
    """

    lm_tokens: int | None = None
    reward_calls: int | None = None
    seconds: float | None = None

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


@dataclass(frozen=True)
class Usage:
    """What a search used.

    Attributes:
        lm_tokens: Distinct prefixes processed beyond the prompt.
        lm_forwards: Forwards of the language model that it took part in.
        reward_calls: Completions scored.
        seconds: Wall-clock time from the start of the search to its end. Searches run together share it.
        kv_bytes: Key-value memory that the whole token tree held at the end.
        prompt_tokens: Tokens of the prompt; not part of any budget.
    """

    lm_tokens: int
    lm_forwards: int
    reward_calls: int
    seconds: float
    kv_bytes: int
    prompt_tokens: int


class TracePoint(NamedTuple):
    """The bounds at one moment of a search; tokens and seconds count from its start."""

    lm_tokens: int
    seconds: float
    lower_bound: float
    upper_bound: float


@dataclass(frozen=True)
class Plan:
    """What a decoder found for one prompt.

    Attributes:
        prompt: The prompt's text.
        text: The best completion; where the budget did not pay for one, the most promising unfinished one.
        token_ids: Its tokens, an end-of-sequence token included.
        objective: Its J = α · logprob + reward; NaN if it is unfinished. With ``score="q"`` its estimate f = g + h.
        reward: Its reward; NaN if it is unfinished, or was not asked for (``score="q"``).
        logprob: Its log-probability, nats.
        stop: How it ended: ``"eos"``, ``"stop"``, ``"length"``, or ``"partial"`` if it is unfinished.
        lower_bound: LB, the best J found; -inf if none.
        upper_bound: UB, which no completion of the scope can exceed, whatever the heuristic; inf where the reward has
            no upper bound.
        certified: Whether the gap is at most epsilon, that is: this completion is the best there is.
        scope: What the upper bound speaks of: ``"top-k tree"`` or ``"full vocabulary"``.
        usage: What it took.
        stop_reason: ``"certified"``, ``"budget"``, ``"exhausted"`` (nothing left that could be better in this
            scope, without a certificate) or ``"finished"`` (the decoder had nothing more to try).
        completions: Every completion that was scored, the best first.
        trace: LB and UB after each step.
        tree: What the search saw.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    objective: float
    reward: float
    logprob: float
    stop: str
    lower_bound: float
    upper_bound: float
    certified: bool
    scope: Scope
    usage: Usage
    stop_reason: str
    completions: list[Completion]
    trace: list[TracePoint]
    tree: SearchTree = field(repr=False)

    @property
    def gap(self) -> float:
        """UB - LB: by how much at most a better completion could exceed this one."""
        return self.upper_bound - self.lower_bound if math.isfinite(self.upper_bound) else math.inf


class Status(IntEnum):
    """What became of an edge."""

    OPEN = 0  # not followed; what lies below it is bounded by U
    EXPANDED = 1
    FINISHED = 2
    MASKED = 3  # not an action; outside the top-k tree, inside the full vocabulary


class Search:
    """The account of one prompt's search: which nodes it has expanded, and what is known of their edges.

    Row i of every table belongs to the i-th node expanded; row 0 is the prompt.

    Attributes:
        node: int64 [rows], the node of the token tree.
        parent: int64 [rows], the row it was reached from, -1 at the prompt.
        depth: int64 [rows], tokens since the prompt.
        g: float64 [rows], α · Σ log π so far.
        f: float64 [rows, k], the priority g + h of each edge.
        bound: float64 [rows, k], U = g + α · log π(a | s) + r_max; no learned value enters.
        omitted: float64 [rows], U of everything that is not an action there.
        finish: int8 [rows, k], how each edge ends the text (:class:`Finish`).
        status: int8 [rows, k] (:class:`Status`).
        child: int64 [rows, k], the row that an expanded edge leads to, else -1.
        best: The best completion so far, the incumbent.
        score: What ranks completions: ``"reward"``, their J, or ``"q"``, their f.
        pathmax: Whether an edge's f is at most that of the edge which led to it.
    """

    _TABLES = ("node", "parent", "depth", "g", "f", "bound", "omitted", "finish", "status", "child")

    def __init__(
        self,
        mdp: DecodingMDP,
        prompt: Prompt,
        budget: Budget,
        scope: Scope = "top-k tree",
        score: Score = "reward",
        pathmax: bool = False,
    ) -> None:
        """Start with nothing expanded."""
        self.mdp, self.prompt, self.budget = mdp, prompt, budget
        self.scope, self.score, self.pathmax = scope, score, pathmax
        self.size = 0
        k = mdp.top_k
        self.node, self.parent, self.depth = (np.empty(0, dtype=np.int64) for _ in range(3))
        self.g, self.omitted = np.empty(0), np.empty(0)
        self.f, self.bound = np.empty((0, k)), np.empty((0, k))
        self.finish, self.status = np.empty((0, k), dtype=np.int8), np.empty((0, k), dtype=np.int8)
        self.child = np.empty((0, k), dtype=np.int64)
        self.completions: dict[tuple[int, int], Completion] = {}
        self.best: Completion | None = None
        self.trace: list[TracePoint] = []
        self.lm_forwards = self.reward_calls = 0
        self.started = time.perf_counter()
        self.stop_reason = ""

    # -- what a decoder asks ------------------------------------------------------------------------------------------

    @property
    def incumbent(self) -> float:
        """The best completion's J, or what stands in for it where the reward is not asked; -inf if there is none."""
        return self.best.objective if self.best else -math.inf

    @property
    def lower_bound(self) -> float:
        """LB, the incumbent's J; -inf where the reward is not asked, since an estimate proves nothing."""
        return self.incumbent if self.score == "reward" else -math.inf

    @property
    def upper_bound(self) -> float:
        """UB, the largest U of everything not explored, pruned edges included, or LB."""
        rows = slice(0, self.size)
        open_edges = self.status[rows] == Status.OPEN
        bounds = [self.lower_bound, self.bound[rows].max(initial=-math.inf, where=open_edges)]
        if self.scope == "full vocabulary":
            bounds.append(self.omitted[rows].max(initial=-math.inf))
        return float(max(bounds))

    @property
    def is_certified(self) -> bool:
        """Whether nothing in the scope can be better than the incumbent."""
        return self.best is not None and self.upper_bound - self.lower_bound <= EPSILON

    @property
    def lm_tokens(self) -> int:
        """LM tokens used; the prompt's row is free."""
        return max(self.size - 1, 0)

    @property
    def room(self) -> float:
        """LM tokens that the budget still allows."""
        return math.inf if self.budget.lm_tokens is None else self.budget.lm_tokens - self.lm_tokens

    def at_depth(self, depth: int) -> IntArray:
        """Return the rows of the nodes at this depth."""
        return np.flatnonzero(self.depth[: self.size] == depth)

    # -- what the driver does -----------------------------------------------------------------------------------------

    def add(self, nodes: IntArray, h: Values, came_by: Edges | None) -> None:
        """Enter newly expanded nodes [n] with their edges' heuristic values [n, k]."""
        mdp, rows = self.mdp, np.arange(self.size, self.size + len(nodes))
        self._reserve(self.size + len(nodes))
        edge, mask = mdp.edge_returns(nodes), mdp.action_mask(nodes)
        self.node[rows], self.depth[rows], self.g[rows] = nodes, mdp.tree.depth[nodes], mdp.path_return(nodes)
        self.f[rows] = self.g[rows, None] + h
        if self.pathmax and came_by is not None:
            self.f[rows] = np.minimum(self.f[rows], self.f[came_by][:, None])
        self.bound[rows] = self.g[rows, None] + edge + mdp.reward.upper
        self.omitted[rows] = self.g[rows] + _omitted_bound(mdp, nodes, mask)
        self.finish[rows] = mdp.finishes(nodes)
        self.status[rows] = np.where(mask, Status.OPEN, Status.MASKED)
        self.child[rows] = -1
        if came_by is None:
            self.parent[rows] = -1
        else:
            self.parent[rows] = came_by.rows
            self.child[came_by] = rows
            self.status[came_by] = Status.EXPANDED
        self.size += len(nodes)

    def finish_edges(self, edges: Edges, completions: Sequence[Completion]) -> None:
        """Enter scored completions."""
        self.status[edges] = Status.FINISHED
        self.reward_calls += len(completions) if self.score == "reward" else 0
        for row, action, completion in zip(*edges, completions, strict=True):
            self.completions[int(row), int(action)] = completion
            if completion.objective > self.incumbent:  # False for NaN: what cannot be scored is no candidate
                self.best = completion

    def record(self) -> None:
        """Add a point to the trace."""
        seconds = time.perf_counter() - self.started
        self.trace.append(TracePoint(self.lm_tokens, seconds, self.lower_bound, self.upper_bound))

    def affordable(self, edges: Edges) -> Edges:
        """Return the leading part of ``edges`` that the budget pays for, and note it if that is not all."""
        going_on = self.finish[edges] == Finish.NO
        limit = self.budget.reward_calls if self.score == "reward" else None
        calls = math.inf if limit is None else limit - self.reward_calls
        fits = (np.cumsum(going_on) <= self.room) & (np.cumsum(~going_on) <= calls)
        late = self.budget.seconds is not None and time.perf_counter() - self.started >= self.budget.seconds
        if late or not fits.all():
            self.stop_reason = "budget"
        # Everything after the first edge that does not fit waits, so that the order of the decoder is kept.
        count = 0 if late else int(np.cumprod(fits).sum())
        return Edges(edges.rows[:count], edges.actions[:count])

    def plan(self) -> Plan:
        """Return the result."""
        found = sorted(
            (c for c in self.completions.values() if not math.isnan(c.objective)), key=lambda c: -c.objective
        )
        best = found[0] if found else self._partial()
        usage = Usage(
            lm_tokens=self.lm_tokens,
            lm_forwards=self.lm_forwards,
            reward_calls=self.reward_calls,
            seconds=time.perf_counter() - self.started,
            kv_bytes=self.mdp.tree.kv_bytes,
            prompt_tokens=len(self.mdp.encode(self.prompt)),
        )
        return Plan(
            prompt=self.prompt.text,
            **best._asdict(),
            lower_bound=self.lower_bound,
            upper_bound=self.upper_bound,
            certified=self.is_certified,
            scope=self.scope,
            usage=usage,
            stop_reason=self.stop_reason,
            completions=found,
            trace=self.trace,
            tree=SearchTree.from_search(self),
        )

    # -----------------------------------------------------------------------------------------------------------------

    def _partial(self) -> Completion:
        """Return the deepest prefix of highest priority, for when nothing was finished."""
        deepest = self.at_depth(int(self.depth[: self.size].max()))
        row = deepest[np.argmax(self.f[deepest].max(axis=1))]
        node = int(self.node[row])
        ids = tuple(self.mdp.tree.completion_ids(node))
        logprob = float(self.mdp.tree.path_logprob[node])
        return Completion(self.mdp.text(node), ids, logprob, math.nan, math.nan, "partial")

    def _reserve(self, rows: int) -> None:
        if rows > len(self.node):
            capacity = max(2 * len(self.node), rows, 64)
            for name in self._TABLES:
                old = getattr(self, name)
                new = np.empty((capacity, *old.shape[1:]), dtype=old.dtype)
                new[: self.size] = old[: self.size]
                setattr(self, name, new)


def _omitted_bound(mdp: DecodingMDP, nodes: IntArray, mask: npt.NDArray[np.bool_]) -> Values:
    """Bound what the tokens that are no actions could bring from here on: α · log π + r_max, float64 [n].

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
        bound = mdp.logprob_weight * best + mdp.reward.upper
    return np.where(np.isneginf(best), -np.inf, bound)


class Decoder(ABC):
    """Something that chooses tokens: A* and every baseline answer the same ``plan``."""

    pathmax = False  # see AStarPlanner

    def __init__(
        self,
        env: Any,
        *,
        heuristic: Heuristic | None = None,
        scope: Scope = "top-k tree",
        score: Score = "reward",
    ) -> None:
        """Decode in the MDP of ``env``.

        Args:
            env: An environment (wrapped or not) or a :class:`DecodingMDP`; its token tree is shared.
            heuristic: Estimates what each edge will bring; the decoder's docstring says what it does without one.
            scope: What upper bounds speak of, ``"top-k tree"`` or ``"full vocabulary"``.
            score: What ranks finished texts: ``"reward"``, the reward model, or ``"q"``, the heuristic alone: f = g + h
                of their last edge, as when a verifier knows the answer only at training time. The reward model is then
                never called, and nothing is certified.

        Raises:
            ConfigurationError: ``env`` has no decoding MDP, ``scope`` or ``score`` is none of its two values, or
                ``score="q"`` is asked for without a heuristic.
        """
        for name, value, values in (("scope", scope, get_args(Scope)), ("score", score, get_args(Score))):
            if value not in values:
                raise ConfigurationError(f"{name} is one of {values}, got {value!r}")
        if score == "q" and heuristic is None:
            raise ConfigurationError('score="q" ranks texts by the heuristic; give one, e.g. QHeuristic(agent)')
        self.mdp, self.heuristic, self.scope, self.score = mdp_of(env), heuristic, scope, score

    @abstractmethod
    def search(self, search: Search) -> Iterator[Edges]:
        """Yield the edges to follow next, best first, until there is nothing more to try."""

    def evaluate(self, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return h, the estimated best return through each edge, that edge included, float64 [n, k].

        Raises:
            HeuristicError: The heuristic returned another shape, or NaN.
        """
        if self.heuristic is None:
            return self.mdp.edge_returns(nodes)
        h = np.asarray(self.heuristic(self.mdp, prompts, nodes), dtype=np.float64)
        if h.shape != (len(nodes), self.mdp.top_k):
            raise HeuristicError(
                f"{self.heuristic!r} returned shape {h.shape}, expected {(len(nodes), self.mdp.top_k)}"
            )
        if np.isnan(h).any():
            text = self.mdp.text(int(nodes[np.isnan(h).any(axis=1).argmax()]))
            raise HeuristicError(f"{self.heuristic!r} returned NaN for an action after the text {text!r}")
        return h

    def plan(
        self, prompt: Any, budget: Budget | int | None = None, *, progress: Callable[[Search], None] | None = None
    ) -> Plan:
        """Find the best completion of one prompt.

        Args:
            prompt: A string, chat messages, or a dict with the key ``prompt``.
            budget: When to stop; an integer means LM tokens.
            progress: Called after every step.

        Raises:
            PromptError: The prompt is empty or too long.
        """
        return run(self, [as_prompt(prompt)], Budget.of(budget), progress)[0]

    def plan_many(
        self, prompts: Any, budget: Budget | int | None = None, *, progress: Callable[[Search], None] | None = None
    ) -> list[Plan]:
        """Find the best completion of each prompt, with a budget for each, in one batch of forwards."""
        return run(self, load_prompts(prompts), Budget.of(budget), progress)


def mdp_of(env: Any) -> DecodingMDP:
    """Return the decoding MDP of an environment, a vector environment, or the MDP itself.

    Raises:
        ConfigurationError: There is none.
    """
    if isinstance(env, DecodingMDP):
        return env
    for candidate in (env, getattr(env, "unwrapped", None)):
        if isinstance(mdp := getattr(candidate, "mdp", None), DecodingMDP):
            return mdp
    if hasattr(env, "get_attr"):  # a vector environment of stable-baselines3 or Gymnasium
        mdp = env.get_attr("mdp")[0]
        if isinstance(mdp, DecodingMDP):
            return mdp
    raise ConfigurationError(f"a TokenDecoding environment or a DecodingMDP is needed, got {type(env).__name__}")


def run(
    decoder: Decoder, prompts: Sequence[Prompt], budget: Budget, progress: Callable[[Search], None] | None = None
) -> list[Plan]:
    """Search all prompts in lock-step: one forward, one heuristic and one reward call per step for all together."""
    return [search.plan() for search in run_searches(decoder, prompts, budget, progress)]


def run_searches(
    decoder: Decoder, prompts: Sequence[Prompt], budget: Budget, progress: Callable[[Search], None] | None = None
) -> list[Search]:
    """Like :func:`run`, but return the searches themselves."""
    mdp = decoder.mdp
    mdp.make_room()
    searches = [Search(mdp, prompt, budget, decoder.scope, decoder.score, decoder.pathmax) for prompt in prompts]
    roots = mdp.roots(prompts)
    h = decoder.evaluate(prompts, roots)
    for i, search in enumerate(searches):
        search.add(roots[i : i + 1], h[i : i + 1], came_by=None)
        search.record()
    wishes = {search: decoder.search(search) for search in searches}
    while wishes:
        batch: list[tuple[Search, Edges]] = []
        for search, generator in list(wishes.items()):
            edges = None if search.stop_reason else next(generator, None)
            if edges is not None:
                batch.append((search, search.affordable(edges)))
                continue
            search.stop_reason = search.stop_reason or ("certified" if search.is_certified else "finished")
            del wishes[search]
        _follow(decoder, [(search, edges) for search, edges in batch if len(edges.rows)])
        for search, _ in batch:
            search.record()
            if progress is not None:
                progress(search)
    return searches


def _follow(decoder: Decoder, batch: Sequence[tuple[Search, Edges]]) -> None:
    """Follow every search's edges: expand those that go on, score those that finish."""
    mdp = decoder.mdp
    going_on: list[tuple[Search, Edges]] = []
    finishing: list[tuple[Search, Edges]] = []
    for search, edges in batch:
        finishes = search.finish[edges] != Finish.NO
        for selected, work in ((~finishes, going_on), (finishes, finishing)):
            if selected.any():
                work.append((search, Edges(edges.rows[selected], edges.actions[selected])))
    if going_on:
        prompts = [search.prompt for search, edges in going_on for _ in edges.rows]
        nodes = np.concatenate([search.node[edges.rows] for search, edges in going_on])
        actions = np.concatenate([edges.actions for _, edges in going_on])
        children = mdp.tree.expand(nodes, actions)
        h = decoder.evaluate(prompts, children)
        start = 0
        for search, edges in going_on:
            part = slice(start, start := start + len(edges.rows))
            search.add(children[part], h[part], came_by=edges)
            search.lm_forwards += 1
    if finishing:
        prompts = [search.prompt for search, edges in finishing for _ in edges.rows]
        nodes = np.concatenate([search.node[edges.rows] for search, edges in finishing])
        actions = np.concatenate([edges.actions for _, edges in finishing])
        by_reward = decoder.score == "reward"
        completions = iter(mdp.complete(prompts, nodes, actions, score=by_reward))
        for search, edges in finishing:
            done = [next(completions) for _ in edges.rows]
            if not by_reward:
                done = [c._replace(objective=float(f)) for c, f in zip(done, search.f[edges], strict=True)]
            search.finish_edges(edges, done)


def score_completions(searches: Sequence[Search]) -> None:
    """Ask the reward for what searches with ``score="q"`` have finished, all at once; their order stays as it was."""
    found = [(search, edge) for search in searches for edge in search.completions]
    if not found:
        return
    prompts = [search.prompt for search, _ in found]
    nodes = np.array([search.node[row] for search, (row, _) in found])
    actions = np.array([action for _, (_, action) in found])
    for (search, edge), completion in zip(found, found[0][0].mdp.complete(prompts, nodes, actions), strict=True):
        search.completions[edge] = completion
