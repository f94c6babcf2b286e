"""Observations of a state: a Dict of small, bounded arrays, each declared once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from ..checks import check_integer
from ..columns import Layout
from ..deprecated import with_old_names
from ..models.base import FloatArray, IntArray, LanguageModel
from ..rewards.composition import Term, terms_of
from .mdp import DecodingMDP, Values
from .prompts import Prompt, columns_of

__all__ = ["FEATURES", "Feature", "Observer", "observation_table", "token_features"]

_MIN_LOGPROB = -50.0  # nats; below it a token is as good as impossible
_ROWS = 1024  # of embeddings that are projected at once
_NO_NODES = np.zeros(0, dtype=np.int64)
_MAX_POTENTIAL = 1e4  # a reward without bounds could otherwise leave the observation space

Observation = dict[str, npt.NDArray[np.generic]]


class States(NamedTuple):
    """A batch of n states, as the features read it.

    Attributes:
        observer: Their observer.
        tokens: int64 [n, k], the candidates' token ids; [n, k, m] of candidates of up to m tokens, -1 for none.
        context: int64 [n, w], the ids of the last w tokens, -1 where there are fewer.
        nodes: int64 [n]; not given where a feature is made again from the token ids.
        potential: float64 [n], φ; likewise.
        term_potentials: float64 [n, r], φ of each term; likewise.
    """

    observer: Observer
    tokens: IntArray
    context: IntArray
    nodes: IntArray = np.zeros(0, dtype=np.int64)
    potential: Values = np.zeros(0)
    term_potentials: Values = np.zeros((0, 0))


@dataclass(frozen=True)
class Feature:
    """One entry of the observation. Space, experience, policies and documentation derive from it.

    Attributes:
        name: Its key.
        axes: Shape of one state's entry: ``"d"`` (hidden size), ``"k"`` (actions), ``"k·e"`` (all candidates' numbers,
            flat: stable-baselines3 takes 2-D boxes for images), ``"w·e"`` (likewise, of the last tokens), ``"r"`` (the
            reward's terms), ``"1+r"`` or ``"1"``. An entry without numbers, w = 0 or r = 0, is left out.
        meaning: One phrase.
        values: From n states to an array [n, …].
        bounds: From an observer to the least and the greatest value; None for 0 or 1 (``MultiBinary``).
        stored: Dtype in the experience of ``QStar``. None: it depends on ``States.tokens`` and ``States.context`` alone
            and is not stored.
        end: Value after the end of an episode, where there is no state.
    """

    name: str
    axes: str
    meaning: str
    values: Callable[[States], npt.NDArray[Any]]
    bounds: Callable[[Observer], tuple[float, float]] | None
    stored: npt.DTypeLike | None
    end: int = 0

    @property
    def is_optional(self) -> bool:
        """Whether it is left out unless an argument of the environment asks for it."""
        return self.axes in ("w·e", "r", "1+r")

    @property
    def dtype(self) -> type[np.generic]:
        """The dtype in the observation."""
        return np.int8 if self.bounds is None else np.float32

    def space(self, observer: Observer) -> spaces.Space[Any]:
        """Return the space of one state's entry."""
        shape = observer.shape(self)
        if self.bounds is None:
            return spaces.MultiBinary(shape[0])
        return spaces.Box(*self.bounds(observer), shape, np.float32)


def _hidden(states: States) -> FloatArray:
    hidden = states.observer.mdp.tree.hidden[states.nodes]
    scale = np.sqrt(np.mean(np.square(hidden), axis=1, keepdims=True))
    return np.asarray(hidden / np.maximum(scale, 1e-6), np.float32)


def _hidden_bounds(observer: Observer) -> tuple[float, float]:
    high = float(np.sqrt(observer.mdp.model.hidden_size)) * 1.001
    return -high, high


def _candidates(states: States) -> FloatArray:
    (n, k, *_), features = states.tokens.shape, states.observer.features[states.tokens]
    if states.tokens.ndim == 3:
        inside = states.tokens >= 0
        features = (features * inside[..., None]).sum(axis=2) / np.maximum(inside.sum(axis=2), 1)[..., None]
    return np.asarray(features.reshape(n, k * states.observer.candidate_dims), np.float32)


def _context(states: States) -> FloatArray:
    n, w = states.context.shape
    rows = np.where(states.context[..., None] < 0, 0.0, states.observer.features[states.context])
    return np.asarray(rows.reshape(n, w * states.observer.candidate_dims), np.float32)


def _candidate_bounds(observer: Observer) -> tuple[float, float]:
    high = float(np.abs(observer.features).max())
    return -high, high


def _potential_bounds(observer: Observer) -> tuple[float, float]:
    return _within_reach(observer.mdp.reward.lower, observer.mdp.reward.upper)


def _within_reach(lower: float, upper: float) -> tuple[float, float]:
    # float32 does not reach beyond 3e38; a bound out there is as good as none.
    return min(lower, 0.0) if lower > -1e30 else -_MAX_POTENTIAL, max(upper, 0.0) if upper < 1e30 else _MAX_POTENTIAL


def _term_potential_bounds(observer: Observer) -> tuple[float, float]:
    terms = [term.reward for term in observer.terms.values() if term is not None]
    lows, highs = zip((0.0, 0.0), *(_within_reach(reward.lower, reward.upper) for reward in terms), strict=True)
    return min(lows), max(highs)


def _weight_bounds(observer: Observer) -> tuple[float, float]:
    high = float(np.abs(observer.weights).max()) * 1.001
    return -high, high


FEATURES = (
    Feature(
        "hidden",
        "d",
        "the LM's last hidden state, scaled to a root mean square of 1",
        _hidden,
        _hidden_bounds,
        stored=np.float16,
    ),
    Feature(
        "candidates",
        "k·e",
        "the candidates' mean token embeddings, reduced to e numbers each; ``reshape(k, e)`` gives rows",
        _candidates,
        _candidate_bounds,
        stored=None,
    ),
    Feature(
        "context",
        "w·e",
        "the last w tokens' embeddings, reduced likewise, the latest last; only where ``context_tokens`` = w > 0",
        _context,
        _candidate_bounds,
        stored=None,
    ),
    Feature(
        "logprobs",
        "k",
        "the candidates' log-probabilities, nats, cut off at -50",
        lambda states: np.clip(states.observer.mdp.logprobs(states.nodes), _MIN_LOGPROB, 0.0),
        lambda _: (_MIN_LOGPROB, 0.0),
        stored=np.float32,
    ),
    Feature(
        "potential",
        "1",
        "φ(s), the reward of the unfinished prefix",
        lambda states: np.clip(states.potential, *_potential_bounds(states.observer))[:, None],
        _potential_bounds,
        stored=np.float32,
    ),
    Feature(
        "term_potentials",
        "r",
        "φ of each term of the reward; only with ``components``",
        lambda states: np.clip(states.term_potentials, -_MAX_POTENTIAL, _MAX_POTENTIAL),
        _term_potential_bounds,
        stored=np.float32,
    ),
    Feature(
        "weights",
        "1+r",
        "α, and the weight of each term of the reward; only with ``components``",
        lambda states: np.tile(states.observer.weights, (len(states.nodes), 1)),
        _weight_bounds,
        stored=np.float32,
    ),
    Feature(
        "remaining",
        "1",
        "share of the horizon that is left, 1 at the prompt",
        lambda states: (states.observer.mdp.remaining(states.nodes) / states.observer.mdp.max_new_tokens)[:, None],
        lambda _: (0.0, 1.0),
        stored=np.float32,
    ),
    Feature(
        "action_mask",
        "k",
        "1 = the action may be taken",
        lambda states: states.observer.mdp.action_mask(states.nodes),
        bounds=None,
        stored=np.int8,
        end=1,  # so that a masked maximum stays finite
    ),
)


def observation_table() -> str:
    """Return the observation as a Markdown table."""
    rows = [f"| ``{f.name}`` | {np.dtype(f.dtype).name} [{f.axes}] | {f.meaning} |" for f in FEATURES]
    return "\n".join(["| key | dtype, shape | meaning |", "|---|---|---|", *rows])


@with_old_names(after_the_end="terminal_observation")
class Observer:
    """Observations of states, as :data:`FEATURES` declares them.

    k is the number of actions, d the width of the LM's hidden state, e is ``candidate_dims``, w is ``context_tokens``,
    r the number of ``terms``. After the end there is no state: everything is 0 but the mask, which is 1.

    Attributes:
        mdp: The states' MDP.
        features: float32 [V, e], every token's reduced embedding.
        declared: The features that have numbers here.
        candidate_dims: e.
        context_tokens: w.
        terms: The terms by name; None where the process's reward has none of that name.
        weights: float64 [1+r], α and the terms' weights.
    """

    mdp: DecodingMDP
    features: FloatArray
    candidate_dims: int
    context_tokens: int
    terms: dict[str, Term | None]
    weights: Values

    def __init__(
        self,
        mdp: DecodingMDP,
        candidate_dims: int = 32,
        context_tokens: int = 0,
        terms: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Describe the states of ``mdp``.

        Args:
            mdp: The process.
            candidate_dims: Numbers per token, of the candidates and of the last tokens.
            context_tokens: How many of the last tokens are observed.
            terms: The terms of the reward whose potentials and weights are observed, by name. One that the reward of
                ``mdp`` lacks has the weight 0. If it lacks all of them, they have the weights given here.

        Raises:
            ConfigurationError: ``candidate_dims`` is not a positive integer, or ``context_tokens`` a negative one.
        """
        self.context_tokens = check_integer("context_tokens", context_tokens, low=0)
        self.mdp, self.candidate_dims = mdp, check_integer("candidate_dims", candidate_dims)
        self.features = token_features(mdp.model, candidate_dims)
        here = terms_of(mdp.reward) if terms else {}
        self.terms = {name: here.get(name) for name in terms}
        found = {name: term.weight if term else 0.0 for name, term in self.terms.items()}
        weights = found if any(self.terms.values()) else terms
        self.weights = np.array([mdp.logprob_weight, *weights.values()] if terms else [], dtype=np.float64)
        self.declared = tuple(feature for feature in FEATURES if self.shape(feature) != (0,))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments."""
        terms = dict(zip(self.terms, self.weights[1:].tolist(), strict=True))
        return type(self), (self.mdp, self.candidate_dims, self.context_tokens, terms)

    @cached_property
    def space(self) -> spaces.Dict:
        """The observation space."""
        return spaces.Dict({feature.name: feature.space(self) for feature in self.declared})

    def shape(self, feature: Feature) -> tuple[int]:
        """Return the shape of one state's entry."""
        k = self.mdp.top_k
        sizes = {"1": 1, "d": self.mdp.model.hidden_size, "k": k}
        sizes |= {"k·e": k * self.candidate_dims, "w·e": self.context_tokens * self.candidate_dims}
        sizes |= {"r": len(self.terms), "1+r": len(self.weights)}
        return (sizes[feature.axes],)

    def stored(self) -> Layout:
        """Return shape and dtype of the features that an experience stores, by name."""
        return {f.name: (self.shape(f), f.stored) for f in self.declared if f.stored is not None}

    def token_ids(self) -> Layout:
        """Return shape and dtype of the token ids that the other features are made from, by name."""
        context: Layout = {"context_ids": ((self.context_tokens,), np.int32)} if self.context_tokens else {}
        return {"tokens": (self.mdp.edge_tokens(_NO_NODES).shape[1:], np.int32), **context}

    def token_ids_of(self, nodes: IntArray) -> dict[str, IntArray]:
        """Return these token ids of ``n`` states, by name."""
        ids = {"tokens": self.mdp.edge_tokens(nodes), "context_ids": self.mdp.tree.recent(nodes, self.context_tokens)}
        return {name: ids[name] for name in self.token_ids()}

    def term_potentials(self, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return φ of each term for ``n`` states, float64 [n, r]; 0 for a term that the reward lacks."""
        potentials = np.zeros((len(nodes), len(self.terms)))
        if self.terms and len(nodes):
            ids, texts = self.mdp.tree.completions(nodes), self.mdp.texts(nodes)
            for column, term in enumerate(self.terms.values()):
                if term is not None and term.reward.has_potential:
                    asked = [prompt.text for prompt in prompts], texts, ids
                    potentials[:, column] = term.reward.potential(*asked, **columns_of(prompts))
        return potentials

    def observe(self, potential: Values, nodes: IntArray, term_potentials: Values | None = None) -> Observation:
        """Return the observations of ``n`` states, every array with a leading axis n and memory of its own.

        Args:
            potential: float64 [n], φ of the states, as :meth:`DecodingMDP.potential` gives it.
            nodes: int64 [n].
            term_potentials: float64 [n, r], as :meth:`term_potentials` gives it; None where r = 0.
        """
        if term_potentials is None:
            term_potentials = np.zeros((len(nodes), 0))
        context = self.mdp.tree.recent(nodes, self.context_tokens)
        states = States(self, self.mdp.edge_tokens(nodes), context, nodes, potential, term_potentials)
        return {feature.name: np.asarray(feature.values(states), feature.dtype) for feature in self.declared}

    def from_tokens(self, tokens: IntArray, context_ids: IntArray | None = None) -> Observation:
        """Return the features that depend on the ids of candidates [n, k, …] and last tokens [n, w] alone, by name."""
        states = States(self, tokens, np.zeros((len(tokens), 0), np.int64) if context_ids is None else context_ids)
        return {f.name: np.asarray(f.values(states), f.dtype) for f in self.declared if f.stored is None}

    def terminal_observation(self, count: int) -> Observation:
        """Return ``count`` observations of what follows an episode's end."""
        return {f.name: np.full((count, *self.shape(f)), f.end, f.dtype) for f in self.declared}


Observer.__doc__ = f"{Observer.__doc__}\n\n{observation_table()}\n"


@lru_cache(maxsize=8)
def token_features(model: LanguageModel, dims: int) -> FloatArray:
    """Return float32 [V, dims]: the model's token embeddings, centred, randomly projected, root mean square 1.

    A seeded Gaussian projection keeps distances (Johnson & Lindenstrauss 1984) and, unlike principal components, is the
    same on every machine, which checkpoints rely on.
    """
    embeddings = model.token_embeddings()
    # A model with another vocabulary than its reader's has the reader's features: its centre, projection and scale.
    known = embeddings if model.reader is model else model.reader.token_embeddings()
    centre = known.mean(axis=0)
    projection = np.random.default_rng(0).standard_normal((known.shape[1], dims)).astype(np.float32)

    def projected(rows: FloatArray) -> FloatArray:  # in parts, so that no second matrix of embeddings is in memory
        parts = [(rows[i : i + _ROWS] - centre) @ projection for i in range(0, len(rows), _ROWS)]
        return np.concatenate(parts)

    features = projected(embeddings)
    scale = features if known is embeddings else projected(known)
    features = np.asarray(features / max(float(np.sqrt(np.mean(scale**2))), 1e-6), dtype=np.float32)
    features.flags.writeable = False  # shared by all callers
    return features
