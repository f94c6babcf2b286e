"""Experience of Q-learning: searches that collect it, their states with targets, and the buffer that keeps them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...columns import GrowableColumns
from ...envs import Completion, DecodingMDP, Observer, Prompt
from ...envs.prompts import columns_of
from ...errors import ConfigurationError
from ..planning.astar import AStarPlanner
from ..search.backup import best_found, sources
from ..search.budget import Budget
from ..search.loop import score_completions
from ..search.request import Request
from ..search.state import Edges, IntArray, Search, Status, Values
from .config import CollectConfig, Regression
from .q_function import QFunction

__all__ = [
    "Collected",
    "SearchExperience",
    "Searcher",
    "Transitions",
    "asymmetric_loss",
    "collect",
    "extract_targets",
    "states_of",
]

Transitions = dict[str, npt.NDArray[Any]]

_FRUITLESS_EPISODES = 20  # in a row, after which a small tree counts as explored
_MIN_ROWS = 1000  # less experience is no use
_MIN_PRIORITY = 0.01  # a state that Q fits keeps a small chance, so that a later error there is noticed


def extract_targets(
    search: Search,
    observer: Observer,
    q: Values,
    bound_targets: bool = False,
    term_potentials: Values | None = None,
) -> Transitions:
    """Return a finished search's states with targets, and the targets of their edges.

    Nothing in it refers to the token tree, so it can be stored or sent.

    Args:
        search: A finished search.
        observer: Of the search's MDP.
        q: float64 [rows, k], the current Q of every edge, φ(s) added back. Where the observer has terms, float64
            [rows, k, 1+r]: see :meth:`QFunction.returns`.
        bound_targets: Whether a reward's prefix bounds are targets too: they cut estimates, and stand for edges that
            were not followed.
        term_potentials: float64 [rows, r], as :meth:`Observer.term_potentials` gives it; None to compute it.

    Returns:
        By name, [states, …]: the stored features of :data:`~qstar_decoding.envs.observations.FEATURES`, the token ids
        of the others, ``target`` [k] (NaN where there is none), ``found`` [k] (whether a completion attained the
        target; else Q or a bound estimated it) and ``key``. With terms, ``target`` is [k, 1+r]: the log-probability to
        come, nats, and each term's return, of the completion whose J is the best.
    """
    nodes, prompts = search.node[: search.size], [search.prompt] * search.size
    if term_potentials is None:
        term_potentials = observer.term_potentials(prompts, nodes)
    if observer.terms:
        value, target = _term_targets(search, observer, q)
        target[..., 0] -= search.mdp.tree.path_logprob[nodes, None]
        target[..., 1:] -= term_potentials[:, None]
    else:
        value, _ = sources(search, search.g[: search.size, None] + q)
    if bound_targets and search.mdp.reward.has_prefix_bounds:
        legal = search.status[: search.size] != Status.MASKED
        bound = search.bound[: search.size]
        value = np.where(legal & np.isfinite(bound), np.fmin(value, bound), value)
    rows = np.flatnonzero(np.isfinite(value).any(axis=1))
    nodes, prompts = nodes[rows], prompts[: len(rows)]
    potential = search.mdp.potential(prompts, nodes)
    observation = observer.observe(potential, nodes, term_potentials[rows])
    return {
        **{name: observation[name] for name in observer.stored()},
        **observer.token_ids_of(nodes),
        # The return from here on, less the potential: Q of the shaped process.
        "target": target[rows] if observer.terms else value[rows] - search.g[rows, None] - potential[:, None],
        "found": np.isfinite(best_found(search)[rows]),
        "key": _keys(search.prompt, search.mdp.tree.completions(nodes), observer.weights.tobytes()),
    }


def _term_targets(search: Search, observer: Observer, returns: Values) -> tuple[Values, Values]:
    """Return the largest J at or below each edge, [rows, k], and log-probability and terms of what has it, [.., 1+r].

    Args:
        search: A finished search.
        observer: Of the search's MDP.
        returns: float64 [rows, k, 1+r], estimates from each state on.
    """
    whole = returns.copy()
    whole[..., 0] += search.mdp.tree.path_logprob[search.node[: search.size], None]
    if search.completions:
        ends, completions = [*search.completions], [*search.completions.values()]
        texts, ids = [c.text for c in completions], [c.token_ids for c in completions]
        prompts = [search.prompt] * len(texts)
        parts = [np.array([c.logprob for c in completions])]
        for term in observer.terms.values():
            asked = [prompt.text for prompt in prompts], texts, ids
            parts.append(np.zeros(len(texts)) if term is None else term.reward(*asked, **columns_of(prompts)))
        whole[tuple(np.array(ends).T)] = np.stack(parts, axis=1)
    value, source = sources(search, whole @ observer.weights)
    target = whole.reshape(-1, whole.shape[-1])[source]
    return value, np.where(np.isnan(value)[..., None], np.nan, target)


def states_of(search: Search, q: QFunction, bound_targets: bool = False) -> Transitions:
    """Return a finished search's states with targets; Q's own estimates are the targets where it broke off.

    Args:
        search: A finished search, whose prefixes are still in the token tree.
        q: The newest Q.
        bound_targets: See :func:`extract_targets`.
    """
    observer = q.observer(search.mdp)
    asked = search.mdp, [search.prompt] * search.size, search.node[: search.size]
    of_terms = observer.term_potentials(*asked[1:])
    estimate = q.returns(*asked, of_terms) if observer.terms else q.values(*asked)
    return extract_targets(search, observer, estimate, bound_targets, of_terms)


class Batch(NamedTuple):
    """States drawn from the experience.

    Attributes:
        rows: int64 [batch], their rows in the experience.
        observation: By name, [batch, …].
        targets: float32 [batch, k], NaN where there is none; with terms [batch, k, 1+r].
        found: bool [batch, k], whether a completion attained the target; else Q estimated it at the border.
    """

    rows: npt.NDArray[np.int64]
    observation: dict[str, npt.NDArray[Any]]
    targets: npt.NDArray[np.float32]
    found: npt.NDArray[np.bool_]


class SearchExperience:
    """A ring buffer of states with targets, independent of the token tree they came from.

    A state is stored once, however many searches meet it. Features are stored in the dtypes that they declare, and the
    candidates as token ids: about 1.4 kB a state for the embedded model with k = 8, against 7 kB for a transition in
    SB3's dict replay buffer. The process is deterministic, so the best value found beyond an edge is kept for good;
    an estimate at the border is replaced by a newer one.

    Attributes:
        capacity: States that fit.
        position: Row that the next new state takes.
    """

    def __init__(self, mdp: DecodingMDP, observer: Observer, buffer_bytes: int) -> None:
        """Allow ``buffer_bytes`` of states; memory is taken as they come.

        Raises:
            ConfigurationError: That is less than a thousand states.
        """
        k, terms = mdp.top_k, len(observer.terms)
        layout: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
            **observer.stored(),
            **observer.token_ids(),
            "target": ((k, 1 + terms) if terms else (k,), np.float32),
            "found": ((k,), np.bool_),
            "key": ((), np.uint64),
            "priority": ((), np.float32),
        }
        row_bytes = GrowableColumns(layout).row_bytes
        self.capacity = buffer_bytes // row_bytes
        if self.capacity < _MIN_ROWS:
            raise ConfigurationError(
                f"buffer_bytes={buffer_bytes} holds {self.capacity} states; give {_MIN_ROWS * row_bytes}"
            )
        self._observer = observer
        self._columns = GrowableColumns(layout, minimum=4096, maximum=self.capacity)
        self._row_of: dict[int, int] = {}  # by key
        self.position = 0

    @property
    def size(self) -> int:
        """States stored."""
        return self._columns.size

    @property
    def hidden(self) -> npt.NDArray[np.float16]:
        """The hidden states stored, float16 [size, d]."""
        return self._columns.used()["hidden"]

    def add(self, states: Transitions) -> int:
        """Store the result of :func:`extract_targets`; return its number of targets."""
        if not len(states["key"]):
            return 0
        # The highest priority there is: Q has not seen them yet.
        highest = self._columns.used()["priority"].max(initial=1.0)
        self._write({**states, "priority": np.full(len(states["key"]), highest)})
        return int(np.isfinite(_total(states)).sum())

    def sample(self, batch_size: int, rng: np.random.Generator, exponent: float = 0.0) -> Batch:
        """Draw ``batch_size`` states with probabilities in proportion to priority ** exponent."""
        if exponent:
            heap = np.cumsum(self._columns.used()["priority"].astype(np.float64) ** exponent)
            rows = np.searchsorted(heap, rng.random(batch_size) * heap[-1], side="right")
        else:
            rows = rng.integers(self.size, size=batch_size)
        observation = {name: self._columns[name][rows] for name in self._observer.stored()}
        observation |= self._observer.from_tokens(*(self._columns[name][rows] for name in self._observer.token_ids()))
        return Batch(rows, observation, self._columns["target"][rows], self._columns["found"][rows])

    def prioritize(self, rows: npt.NDArray[np.int64], errors: npt.NDArray[np.float32]) -> None:
        """Set the priorities of states to their last errors, |error| [batch]."""
        self._columns["priority"][rows] = np.abs(errors) + _MIN_PRIORITY

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return the content as arrays, for a checkpoint."""
        return self._columns.used()

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]], position: int) -> None:
        """Take the content back.

        Raises:
            ValueError: The arrays are not those of :meth:`state` of such an experience.
        """
        size = len(arrays["key"])
        expected = {name: (size, *shape) for name, (shape, _) in self._columns.layout.items()}
        if {name: arrays[name].shape for name in expected} != expected:
            raise ValueError("the experience has other shapes than this environment's")
        if size > self.capacity or not 0 <= position <= size:
            raise ValueError(f"the experience of {size} states, at {position}, does not fit {self.capacity}")
        least_token = -1 if len(self._columns.layout["tokens"][0]) > 1 else 0  # steps are filled up with -1
        for name, least in {"tokens": least_token, "context_ids": -1}.items():
            ids = arrays.get(name, np.zeros(0))
            if np.any(ids >= len(self._observer.features)) or np.any(ids < least):
                raise ValueError("the experience has token ids beyond the vocabulary")
        self._columns.replace(arrays)
        self.position = position
        self._row_of = {key: row for row, key in enumerate(self._columns["key"].tolist())}

    def _write(self, values: dict[str, npt.NDArray[Any]]) -> None:
        known = np.array([self._row_of.get(key, -1) for key in values["key"].tolist()])
        again = known >= 0
        rows = known.copy()
        rows[~again] = (self.position + np.arange(np.count_nonzero(~again))) % self.capacity
        # If the ring reaches a known state of the same search, the new state takes its place.
        kept = ~again | ~np.isin(rows, rows[~again])
        rows, known, again = rows[kept], known[kept], again[kept]
        values = {name: value[kept] for name, value in values.items()}
        new = int(np.count_nonzero(~again))
        names = ("target", "found", *(["weights"] if "weights" in values else []))
        old = {name: self._columns[name][known[again]] for name in names}
        now = {name: values[name][again] for name in names}
        # The better one that was found; else the newer estimate.
        is_worse = np.where(now["found"], _total(now) < _total(old), np.isnan(_total(now)))
        stays = np.where(old["found"], ~now["found"] | is_worse, ~now["found"] & is_worse)
        stays = stays.reshape(*stays.shape, *[1] * (now["target"].ndim - 2))
        values["target"][again] = np.where(stays, old["target"], now["target"])
        values["found"][again] = old["found"] | now["found"]
        for gone in self._columns["key"][rows[~again][rows[~again] < self.size]].tolist():
            self._row_of.pop(gone, None)
        self._columns.append(max(int(rows.max()) + 1 - self.size, 0))
        for name, value in values.items():
            self._columns[name][rows] = value
        self._row_of.update(zip(values["key"].tolist(), rows.tolist(), strict=True))
        self.position = (self.position + new) % self.capacity


def _total(states: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return the targets as a whole, [states, k], NaN where there is none."""
    target: npt.NDArray[Any] = states["target"]
    return target if target.ndim == 2 else np.einsum("ske,se->sk", target, states["weights"])


def _keys(prompt: Prompt, completions: Sequence[Sequence[int]], weights: bytes = b"") -> npt.NDArray[np.uint64]:
    """Return a number for each prefix and weights of the terms, the same in every search and process."""
    start = hashlib.blake2b(repr((prompt.content, sorted(prompt.columns.items()))).encode() + weights, digest_size=8)
    keys = []
    for completion in completions:
        state = start.copy()
        state.update(np.asarray(completion, dtype=np.int64).tobytes())
        keys.append(int.from_bytes(state.digest(), "little"))
    return np.array(keys, dtype=np.uint64)


def asymmetric_loss(
    errors: Tensor,
    found: Tensor,
    *,
    optimism: float,
    estimate_weight: float,
    regression: Regression = "expectile",
    parts: Tensor | None = None,
) -> Tensor:
    """Return the loss of each error u = target - Q, of the errors' shape.

    Where the target was found: |τ - 1[u < 0]| · u², an expectile (IQL: Kostrikov, Nair & Levine 2022, eq. 5), or
    |τ - 1[u < 0]| · |u|, a quantile (Koenker & Bassett 1978). Where it is Q's own estimate at the border of a search:
    w · 1[u < 0] · u² (or |u|). An estimate may lower Q, never raise it: a Q that raises itself soon prefers untried
    edges to the best ones found.

    Args:
        errors: float, u; 0 where there is no target.
        found: bool, broadcast to the errors.
        optimism: τ in (0, 1).
        estimate_weight: w >= 0.
        regression: ``"expectile"`` or ``"quantile"``.
        parts: float, of one dimension more, the errors of the parts that u is made of. The sign of u weighs the sum of
            their squares, or of their absolute values: a term of its own would be learned too high.
    """
    down = torch.where(found, 1 - optimism, estimate_weight)
    weight = torch.where(errors > 0, optimism * found, down)
    sizes = errors if parts is None else parts
    sizes = sizes.square() if regression == "expectile" else sizes.abs()
    return weight * (sizes if parts is None else sizes.sum(dim=-1))


class Collected(NamedTuple):
    """Results of searches.

    Attributes:
        states: Per search, its states with targets.
        tokens: LM tokens used.
        texts: Number of finished texts.
        best: The best text of each search that finished one.
    """

    states: list[Transitions]
    tokens: int
    texts: int
    best: list[Completion]


def collect(
    mdp: DecodingMDP, q: QFunction, config: CollectConfig, prompts: Sequence[Prompt], rng: np.random.Generator
) -> Collected:
    """Search the prompts with a Q-function, in a tree of their own, and return the experience."""
    mdp, budget = mdp.with_empty_tree(), Budget(config.tokens_per_search)
    by_bound = rng.random(len(prompts)) < config.bound_share if config.bound_share else np.zeros(len(prompts), bool)
    requests = [Request(prompt, budget) for prompt in prompts]
    led, free = ([r for r, led in zip(requests, by_bound.tolist(), strict=True) if led == on] for on in (True, False))
    searches = AStarPlanner(mdp, width=config.width, margin=config.margin).run_requests(led) if led else []
    if free:
        searches += _Collector(mdp, q, config, [request.prompt for request in free], rng).run_requests(free)
    score_completions([search for search in searches if search.score == "q"])
    return Collected(
        [states_of(search, q, config.bound_targets) for search in searches],
        sum(search.lm_tokens for search in searches),
        sum(len(search.completions) for search in searches),
        [max(search.completions.values(), key=_objective) for search in searches if search.completions],
    )


class Searcher:
    """A worker's object that searches for :class:`QStar`, with an MDP of its own and the agent's Q."""

    def __init__(self, make: Callable[[], DecodingMDP]) -> None:
        """Search in the MDP that ``make`` returns, which equals the learning environment's."""
        self.mdp = make()
        self.q: QFunction | None = None

    def receive(self, q: QFunction) -> None:
        """Search with this Q from now on.

        Raises:
            CheckpointError: It was made for another model, k or observation layout.
        """
        q.check(self.mdp)
        self.q = q

    def search(self, prompts: Sequence[Prompt], config: CollectConfig, seed: int) -> Collected:
        """See :func:`collect`; the outcome depends on Q and the arguments only."""
        assert self.q is not None
        return collect(self.mdp, self.q, config, prompts, np.random.default_rng(seed))


class _Collector(AStarPlanner):
    """The planner while learning: with noise on Q, without Q, or in ε-greedy episodes, drawn per prompt."""

    def __init__(
        self, mdp: DecodingMDP, q: QFunction, config: CollectConfig, prompts: Sequence[Prompt], rng: np.random.Generator
    ) -> None:
        super().__init__(mdp, heuristic=self._explore, width=config.width, margin=config.margin, score=config.score)
        self.q, self.rng, self.epsilon = q, rng, config.epsilon
        free = self.rng.random(len(prompts)) < config.q_free_share
        noise = np.where(self.rng.random(len(prompts)) < 0.5, config.noise, 0.0)
        self.modes = {id(p): (bool(f), float(scale)) for p, f, scale in zip(prompts, free, noise, strict=True)}
        in_episodes = self.rng.random(len(prompts)) < config.episode_share if config.episode_share else free & False
        self.in_episodes = {id(p) for p, chosen in zip(prompts, in_episodes, strict=True) if chosen}

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the edges of a search, or of episodes until the budget is used up."""
        return self._play(search) if id(search.prompt) in self.in_episodes else super().select(search)

    def _explore(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        values = self.q.values(mdp, prompts, nodes)
        free, noise = (np.array(column) for column in zip(*(self.modes[id(p)] for p in prompts), strict=True))
        if free.any():
            potential = mdp.potential(prompts, nodes)[:, None]
            values[free] = (mdp.edge_returns(nodes) + potential)[free]
        return values + noise[:, None] * self.rng.gumbel(size=values.shape)

    def _play(self, search: Search) -> Iterator[Edges]:
        fruitless = 0  # a small tree may be explored long before the budget is used up
        while fruitless < _FRUITLESS_EPISODES:
            row, before = 0, search.size + len(search.completions)
            while row >= 0:
                legal = np.flatnonzero(search.status[row] != Status.MASKED)
                random = self.rng.random() < self.epsilon
                action = self.rng.choice(legal) if random else legal[search.f[row, legal].argmax()]
                edge = Edges(np.array([row]), np.array([action]))
                if search.status[edge][0] == Status.OPEN:
                    yield edge
                row = int(search.child[edge][0])
            fruitless = fruitless + 1 if search.size + len(search.completions) == before else 0


def _objective(completion: Completion) -> float:
    return -math.inf if math.isnan(completion.objective) else completion.objective
