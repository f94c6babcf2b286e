"""What Q-learning from searches remembers: states, and what the search found beyond their edges."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...envs import Observer, Prompt
from ...envs.mdp import DecodingMDP
from ...errors import ConfigurationError
from ..search.backup import backup, best_found
from ..search.state import Search, Values

__all__ = ["SearchExperience", "Transitions", "extract_targets"]

Transitions = dict[str, npt.NDArray[Any]]


def extract_targets(search: Search, observer: Observer, q: Values) -> Transitions:
    """Return the states of a search whose edges were followed, with their targets: what there is to learn from it.

    Nothing of it refers to the token tree, so it can be stored or sent.

    Args:
        search: A finished search.
        observer: Of the search's MDP.
        q: float64 [rows, k], the current Q of every edge, φ(s) added back.

    Returns:
        By name, [states, …].
    """
    value = backup(search, search.g[: search.size, None] + q)
    rows = np.flatnonzero(np.isfinite(value).any(axis=1))
    nodes, prompts = search.node[rows], [search.prompt] * len(rows)
    potential = search.mdp.potential(prompts, nodes)
    seen = observer.observe(potential, nodes)
    return {
        **{name: seen[name] for name in ("hidden", "logprobs", "potential", "remaining", "action_mask")},
        "tokens": search.mdp.tree.tokens[nodes],
        # What is learnt is the return from here on, less the potential: Q of the shaped process.
        "target": value[rows] - search.g[rows, None] - potential[:, None],
        "found": np.isfinite(best_found(search)[rows]),
        "key": _keys(search.prompt, search.mdp.tree.completions(nodes)),
    }


class Batch(NamedTuple):
    """States drawn from the experience.

    Attributes:
        rows: int64 [batch], where they are kept.
        observation: By name, [batch, …].
        target: float32 [batch, k], NaN where there is none.
        found: bool [batch, k], whether the target is what a completion was worth, not an estimate at the border.
    """

    rows: npt.NDArray[np.int64]
    observation: dict[str, npt.NDArray[Any]]
    target: npt.NDArray[np.float32]
    found: npt.NDArray[np.bool_]


class SearchExperience:
    """A ring buffer of states with targets, independent of the token tree they came from.

    A state is stored once, however often searches come by, with all its edges, the hidden state in half precision and
    the candidates as token ids: some 1.4 kB for the embedded model with k = 8, against 7 kB for a transition in SB3's
    dict replay buffer. What an earlier search found beyond an edge stays true when a later one finds less, so of all
    values found the best is kept; estimates at the border are replaced by newer ones.
    """

    def __init__(self, mdp: DecodingMDP, observer: Observer, buffer_bytes: int) -> None:
        """Make room for ``buffer_bytes`` of states.

        Raises:
            ConfigurationError: That is less than a thousand states.
        """
        d, k = mdp.model.hidden_size, mdp.top_k
        self._features = observer.features
        self._layout: dict[str, tuple[tuple[int, ...], Any]] = {
            "hidden": ((d,), np.float16),
            "tokens": ((k,), np.int32),
            "logprobs": ((k,), np.float32),
            "potential": ((1,), np.float32),
            "remaining": ((1,), np.float32),
            "action_mask": ((k,), np.int8),
            "target": ((k,), np.float32),
            "found": ((k,), np.bool_),  # whether the target was found, not estimated
            "key": ((), np.uint64),
            "priority": ((), np.float32),
        }
        row_bytes = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self._layout.values())
        self.capacity = buffer_bytes // row_bytes
        if self.capacity < 1000:
            raise ConfigurationError(
                f"buffer_bytes={buffer_bytes} holds {self.capacity} states; give {1000 * row_bytes}"
            )
        self._columns = {name: np.empty((0, *shape), dtype) for name, (shape, dtype) in self._layout.items()}
        self.size = self.position = 0
        self._row_of: dict[int, int] = {}  # by key

    def add(self, states: Transitions) -> int:
        """Store what :func:`extract_targets` made of a search; return how many followed edges that has."""
        if not len(states["key"]):
            return 0
        # As urgent as any other: Q has not seen them yet.
        urgent = self._columns["priority"][: self.size].max(initial=1.0)
        self._write({**states, "priority": np.full(len(states["key"]), urgent)})
        return int(np.isfinite(states["target"]).sum())

    def sample(self, batch_size: int, rng: np.random.Generator, exponent: float = 0.0) -> Batch:
        """Draw ``batch_size`` states with probabilities in proportion to priority ** exponent."""
        if exponent:
            heap = np.cumsum(self._columns["priority"][: self.size].astype(np.float64) ** exponent)
            rows = np.searchsorted(heap, rng.random(batch_size) * heap[-1], side="right")
        else:
            rows = rng.integers(self.size, size=batch_size)
        drawn = {name: column[rows] for name, column in self._columns.items() if name not in ("priority", "key")}
        target, found, tokens = (drawn.pop(name) for name in ("target", "found", "tokens"))
        drawn["candidates"] = self._features[tokens].reshape(batch_size, -1)
        return Batch(rows, drawn, target, found)

    def prioritize(self, rows: npt.NDArray[np.int64], errors: npt.NDArray[np.float32]) -> None:
        """Remember how far off Q was in these states: |error| [batch] is their priority from now on."""
        # A state that Q got right keeps a small chance, lest nobody notices when that changes.
        self._columns["priority"][rows] = np.abs(errors) + 0.01

    @property
    def hidden(self) -> npt.NDArray[np.float16]:
        """The hidden states remembered, float16 [size, d]."""
        return self._columns["hidden"][: self.size]

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return the content as arrays, for a checkpoint."""
        return {name: column[: self.size] for name, column in self._columns.items()}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]], position: int) -> None:
        """Take the content back."""
        self._columns = {name: np.array(arrays[name]) for name in self._layout}
        self.size, self.position = len(self._columns["target"]), position
        self._row_of = {key: row for row, key in enumerate(self._columns["key"].tolist())}

    def _write(self, values: dict[str, npt.NDArray[Any]]) -> None:
        known = np.array([self._row_of.get(key, -1) for key in values["key"].tolist()])
        again = known >= 0
        rows = known.copy()
        rows[~again] = (self.position + np.arange(np.count_nonzero(~again))) % self.capacity
        # Where the ring comes round to a state of this very search, the new one takes its place.
        kept = ~again | ~np.isin(rows, rows[~again])
        rows, known, again = rows[kept], known[kept], again[kept]
        values = {name: value[kept] for name, value in values.items()}
        self._reserve(min(self.position + np.count_nonzero(~again), self.capacity))
        old = {name: self._columns[name][known[again]] for name in ("target", "found")}
        best = np.fmax(_where_found(old), _where_found({name: values[name][again] for name in old}))
        newest = np.where(np.isnan(values["target"][again]), old["target"], values["target"][again])
        values["target"][again] = np.where(np.isnan(best), newest, best)
        values["found"][again] = ~np.isnan(best)
        for gone in self._columns["key"][rows[~again][rows[~again] < self.size]].tolist():
            self._row_of.pop(gone, None)
        for name, value in values.items():
            self._columns[name][rows] = value
        self._row_of.update(zip(values["key"].tolist(), rows.tolist(), strict=True))
        self.size = max(self.size, int(rows.max()) + 1)
        self.position = int(self.position + np.count_nonzero(~again)) % self.capacity

    def _reserve(self, needed: int) -> None:
        if needed > len(self._columns["target"]):
            length = min(max(needed, 2 * len(self._columns["target"]), 4096), self.capacity)
            for name, column in self._columns.items():
                bigger = np.empty((length, *column.shape[1:]), column.dtype)
                bigger[: self.size] = column[: self.size]
                self._columns[name] = bigger


def _where_found(values: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.where(values["found"], values["target"], np.nan)


def _keys(prompt: Prompt, completions: Sequence[Sequence[int]]) -> npt.NDArray[np.uint64]:
    """Return a number for each prefix that is the same whenever and wherever the prefix is met."""
    start = hashlib.blake2b(repr((prompt.content, sorted(prompt.columns.items()))).encode(), digest_size=8)
    keys = []
    for completion in completions:
        state = start.copy()
        state.update(np.asarray(completion, dtype=np.int64).tobytes())
        keys.append(int.from_bytes(state.digest(), "little"))
    return np.array(keys, dtype=np.uint64)
