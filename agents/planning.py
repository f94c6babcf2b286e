"""What every decoder shares: plans, and the loop that drives many searches in lock-step.

A decoder is a generator: it looks at its :class:`Search`, yields the edges it wants to follow, and finds them followed
when it goes on. :func:`drive` advances many such searches together, so that all prompts share one forward of the
language model, one evaluation of the heuristic and one call of the reward per step, whatever the decoders are.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ..envs import Completion, DecodingMDP, Finish, Prompt, load_prompts
from ..envs.prompts import as_prompt
from ..errors import ConfigurationError, ConstraintError, HeuristicError, QStarError, check_integer, check_number
from .search import Budget, Edges, IntArray, Pool, Scope, Score, Search, Status, TracePoint, Usage, Values
from .search_tree import SearchTree

if TYPE_CHECKING:
    from .heuristics import Heuristic

__all__ = ["Decoder", "Plan", "Stream", "drive", "mdp_of", "run", "run_searches", "score_completions"]


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
        stop_reason: ``"certified"``, ``"budget"``, ``"interrupted"`` (Ctrl-C), ``"exhausted"`` (nothing left that could
            be better in this scope, without a certificate) or ``"finished"`` (the decoder had nothing more to try).
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
    _search: Search | None = field(default=None, repr=False, compare=False)

    @property
    def gap(self) -> float:
        """UB - LB: by how much at most a better completion could exceed this one."""
        return self.upper_bound - self.lower_bound if math.isfinite(self.upper_bound) else math.inf

    def best(self, n: int, *, diversity: float = 0.0) -> list[Completion]:
        """Return up to ``n`` of the completions found, no two with the same text, the best first.

        With a diversity penalty each one after the first is the best of J - diversity · (share of its word pairs that
        the ones before it have): maximal marginal relevance (Carbonell & Goldstein 1998).

        Args:
            n: How many. Give the planner the same ``n``, so that it searches for them.
            diversity: What a text that only repeats earlier ones loses, in units of J.
        """
        check_integer("n", n)
        check_number("diversity", diversity, low=0)
        left = list({completion.text.strip(): completion for completion in reversed(self.completions)}.values())[::-1]
        left.sort(key=lambda completion: -completion.objective)
        chosen: list[Completion] = []
        seen: set[tuple[str, str]] = set()
        while left and len(chosen) < n:
            worth = [c.objective - diversity * _overlap(c.text, seen) for c in left]
            chosen.append(left.pop(int(np.argmax(worth))))
            seen |= _word_pairs(chosen[-1].text)
        return chosen

    def sample(self, n: int = 1, *, temperature: float, seed: int | None = None) -> list[Completion]:
        """Draw ``n`` of the completions found, with replacement, in proportion to exp(J / temperature).

        Args:
            n: How many.
            temperature: τ, in units of J: near 0 always the best, large ones any.
            seed: Of the draw.

        Raises:
            ConfigurationError: An argument is out of range, or nothing was finished.
        """
        check_integer("n", n)
        check_number("temperature", temperature, low=0, open_low=True)
        if not self.completions:
            raise ConfigurationError("no completion was finished, so there is none to draw; plan with a larger budget")
        logits = np.array([completion.objective for completion in self.completions]) / temperature
        weights = np.exp(logits - logits.max())
        drawn = np.random.default_rng(seed).choice(len(weights), size=n, p=weights / weights.sum())
        return [self.completions[i] for i in drawn]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything but the search itself, which is tied to this process's token tree."""
        return {**vars(self), "_search": None}


class Decoder(ABC):
    """Something that chooses tokens: A* and every baseline answer the same ``plan``."""

    pathmax = False  # see AStarPlanner
    wanted = 1  # see AStarPlanner's n

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

    def choose(self, search: Search) -> Completion | None:
        """Return the completion that the plan proposes: the incumbent, unless a decoder knows another rule."""
        return search.best

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

    def plan(
        self, prompt: Any, budget: Budget | int | None = None, *, progress: Callable[[Search], None] | None = None
    ) -> Plan:
        """Find the best completion of one prompt.

        Ctrl-C ends the search with ``stop_reason="interrupted"`` and what was found so far.

        Args:
            prompt: A string, chat messages, or a dict with the key ``prompt``.
            budget: When to stop; an integer means LM tokens.
            progress: Called after every step.

        Raises:
            PromptError: The prompt is empty or too long.
        """
        return run(self, [as_prompt(prompt)], Budget.of(budget), progress)[0]

    def plan_many(
        self,
        prompts: Any,
        budget: Budget | int | None = None,
        *,
        shared: bool = False,
        progress: Callable[[Search], None] | None = None,
    ) -> list[Plan]:
        """Find the best completion of each prompt, in one batch of forwards.

        Args:
            prompts: See :func:`~qstar_decoding.envs.load_prompts`.
            budget: Of each prompt; an integer means LM tokens.
            shared: Whether the LM tokens are for all prompts together: what one does not need is there for the others.
                Plans of a shared budget cannot be resumed.
            progress: Called after every step of a search.

        Raises:
            ConfigurationError: ``shared``, and no budget of LM tokens.
        """
        return run(self, load_prompts(prompts), Budget.of(budget), progress, shared=shared)

    def resume(
        self, plan: Plan, budget: Budget | int | None = None, *, progress: Callable[[Search], None] | None = None
    ) -> Plan:
        """Go on with a search that this decoder began, paying only for what is new.

        A search that does not look at its budget continues as if it had been given both budgets at once. One that does
        - the default search with ``width=None``, which shares a budget out over the depths; a beam or a number of
        samples chosen to fit - shares out what is new.

        Args:
            plan: What ``plan``, ``plan_many`` or ``resume`` returned last for the prompt, in this process.
            budget: How much further; what was not used before is added to it. None is without limit.
            progress: Called after every step.

        Raises:
            ConfigurationError: The plan is another decoder's, was resumed before, or comes from another process.
        """
        search = plan._search
        if search is None:
            raise ConfigurationError(
                "this plan cannot be resumed: it was resumed already (go on with the newer plan), shared its budget, "
                "or was copied from another process"
            )
        if search.decoder is not self:
            raise ConfigurationError("this plan is another decoder's; resume it with the one that made it")
        object.__setattr__(plan, "_search", None)
        self.mdp.make_room()
        search.resume(Budget.of(budget))
        _drive_to_the_end(self, [search], progress)
        return _plan(self, search)

    def stream(self, prompt: Any, budget: Budget | int | None = None) -> Stream:
        """Yield each completion that is better than all before it, as soon as it is found.

        Works in ``for`` and in ``async for``, where the language model runs in a thread; the iterator's ``plan`` is
        the plan so far.
        """
        return Stream(self, as_prompt(prompt), Budget.of(budget))


class Stream:
    """Ever better completions of one prompt; see :meth:`Decoder.stream`."""

    def __init__(self, decoder: Decoder, prompt: Prompt, budget: Budget) -> None:
        """Prepare the search; nothing runs until the first completion is asked for."""
        self._decoder, self._prompt, self._budget = decoder, prompt, budget
        self._search: Search | None = None
        self._found = self._run()

    def _run(self) -> Iterator[Completion]:
        [search] = start(self._decoder, [self._prompt], self._budget)
        self._search, best = search, None
        for _ in drive(self._decoder, [search]):
            if search.best is not best:
                best = search.best
                assert best is not None
                yield best

    @property
    def plan(self) -> Plan:
        """The plan so far; ``resume`` goes on from it once the iterator is exhausted.

        Raises:
            ConfigurationError: Nothing was asked for yet.
        """
        if self._search is None:
            raise ConfigurationError("the search has not begun; take the first completion from the iterator")
        return _plan(self._decoder, self._search)

    def __iter__(self) -> Iterator[Completion]:
        """Return the iterator itself."""
        return self

    def __next__(self) -> Completion:
        """Search until a better completion is found."""
        return next(self._found)

    def __aiter__(self) -> AsyncIterator[Completion]:
        """Return the iterator itself."""
        return self

    async def __anext__(self) -> Completion:
        """Search, in a thread, until a better completion is found."""
        found = await asyncio.to_thread(next, self._found, None)
        if found is None:
            raise StopAsyncIteration
        return found


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


# -- the loop ---------------------------------------------------------------------------------------------------------


def run(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    budget: Budget,
    progress: Callable[[Search], None] | None = None,
    *,
    shared: bool = False,
) -> list[Plan]:
    """Search all prompts in lock-step: one forward, one heuristic and one reward call per step for all together."""
    searches = start(decoder, prompts, budget, shared=shared)
    _drive_to_the_end(decoder, searches, progress)
    return [_plan(decoder, search) for search in searches]


def run_searches(decoder: Decoder, prompts: Sequence[Prompt], budget: Budget) -> list[Search]:
    """Like :func:`run`, but return the searches themselves, and let Ctrl-C through."""
    searches = start(decoder, prompts, budget)
    for _ in drive(decoder, searches):
        pass
    return searches


def start(decoder: Decoder, prompts: Sequence[Prompt], budget: Budget, *, shared: bool = False) -> list[Search]:
    """Return a new search for each prompt, with the prompt expanded."""
    mdp, pool = decoder.mdp, None
    if shared:
        if budget.lm_tokens is None:
            raise ConfigurationError("a shared budget needs a number of LM tokens, as in plan_many(prompts, 1000, …)")
        pool, budget = Pool(budget.lm_tokens), replace(budget, lm_tokens=None)
    mdp.make_room()
    searches = [Search(decoder, prompt, budget, pool) for prompt in prompts]
    roots = mdp.roots(prompts)
    h = decoder.evaluate(prompts, roots)
    for i, search in enumerate(searches):
        search.add(roots[i : i + 1], h[i : i + 1], came_by=None)
        _charge(decoder, search, slice(i, i + 1), len(searches))
        search.record()
    return searches


def drive(decoder: Decoder, searches: Sequence[Search]) -> Iterator[list[Search]]:
    """Advance the searches in lock-step until all are over; yield, after every step, those that took it."""
    active = list(searches)
    while active:
        wishes = [(search, search.next_edges()) for search in active]
        batch = [(search, edges) for search, edges in wishes if edges is not None]
        active = [search for search, _ in batch]
        _follow(decoder, [(search, edges) for search, edges in batch if len(edges.rows)])
        for search in active:
            search.record()
        if active:
            yield active


def _drive_to_the_end(
    decoder: Decoder, searches: Sequence[Search], progress: Callable[[Search], None] | None = None
) -> None:
    """Run the searches, and tell ``progress`` of every step; an interrupt ends them all."""
    try:
        for active in drive(decoder, searches):
            for search in active if progress is not None else ():
                progress(search)  # type: ignore[misc]
    except KeyboardInterrupt:
        for search in searches:
            search.stop_reason = search.stop_reason or "interrupted"


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
        begin = 0
        for search, edges in going_on:
            part = slice(begin, begin := begin + len(edges.rows))
            search.add(children[part], h[part], came_by=edges)
            _charge(decoder, search, part, len(children))
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


def _charge(decoder: Decoder, search: Search, part: slice, count: int) -> None:
    """Put what the heuristic's last call, for ``count`` nodes, cost for some of them on a search's account."""
    spent = getattr(decoder.heuristic, "lm_tokens", None)
    if spent is not None:
        used = int(np.broadcast_to(spent, count)[part].sum())
        search.heuristic_tokens += used
        if search.pool is not None:
            search.pool.left -= used


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


# -- plans ------------------------------------------------------------------------------------------------------------


def _plan(decoder: Decoder, search: Search) -> Plan:
    """Return the result of a search."""
    scored = [completion for completion in search.completions.values() if not math.isnan(completion.objective)]
    if not search.completions and not search.has_hope:
        raise ConstraintError(_dead_end(search))
    proposed = decoder.choose(search) or _partial(search)
    return Plan(
        prompt=search.prompt.text,
        **proposed._asdict(),
        lower_bound=search.lower_bound,
        upper_bound=search.upper_bound,
        certified=search.is_certified and proposed is search.best,
        scope=search.scope,
        usage=search.usage,
        stop_reason=search.stop_reason,
        completions=sorted(scored, key=lambda completion: -completion.objective),
        trace=list(search.trace),
        tree=SearchTree.from_search(search, None if proposed.stop == "partial" else proposed.token_ids),
        _search=search if search.pool is None else None,
    )


def _dead_end(search: Search) -> str:
    """Say where a constraint left nothing to write."""
    dead = np.flatnonzero((search.status[: search.size] == Status.MASKED).all(axis=1))
    row = dead[search.depth[dead].argmin()]
    return (
        f"no text of the searched tree after {search.prompt.text!r} satisfies the constraint: no token is left at "
        f"position {search.depth[row]}, after {search.mdp.text(int(search.node[row]))!r}, and every other branch ends "
        "so too; allow more, or raise top_k or max_new_tokens"
    )


def _partial(search: Search) -> Completion:
    """Return the deepest prefix of highest priority, for when nothing was finished."""
    mdp, deepest = search.mdp, search.at_depth(int(search.depth[: search.size].max()))
    node = int(search.node[deepest[np.argmax(search.f[deepest].max(axis=1))]])
    ids = tuple(mdp.tree.completion_ids(node))
    return Completion(mdp.text(node), ids, float(mdp.tree.path_logprob[node]), math.nan, math.nan, "partial")


def _word_pairs(text: str) -> set[tuple[str, str]]:
    words = text.lower().split()
    return set(itertools.pairwise(words)) or {(word, "") for word in words}


def _overlap(text: str, seen: set[tuple[str, str]]) -> float:
    pairs = _word_pairs(text)
    return len(pairs & seen) / len(pairs) if pairs else 0.0
