"""The trie of tokens that engines with a memory share: what is known, what is in memory, and what to evict."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from ..checks import check_kv_budget
from ..columns import GrowableColumns
from ..errors import ConfigurationError
from .base import BoolArray, HandleHolder, IntArray, Outputs, free_memory

if TYPE_CHECKING:
    import torch

__all__ = ["NO_SLOT", "Memory", "TokenTable", "TrieEngine", "concatenate", "kv_budget_or_default"]

logger = logging.getLogger(__name__)

NO_SLOT = -1  # the slot of a token whose keys and values are not in memory
_NO_ROWS = np.empty(0, dtype=np.int64)

# Memory grows to the first number of tokens as they come. It grows further, up to the budget, where eviction costs:
# where more than one token in so many was computed before and evicted.
_FIRST_TOKENS = 4096
_ONE_AGAIN_IN = 16


class LockedModel(Protocol):
    """The part of a language model that the trie needs."""

    lock: AbstractContextManager[Any]


class Memory(Protocol):
    """Places for the keys and values of tokens, up to a budget of bytes."""

    budget: int
    token_bytes: int | None
    capacity: int

    @property
    def max_slots(self) -> int:
        """Tokens that the budget pays for."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated now."""

    def grow(self, slots: int) -> None:
        """Make place for ``slots`` tokens; may run out of memory."""


class TokenTable:
    """The tokens of all prefixes as a trie, one row a token; rows keep their numbers until they are removed.

    Attributes:
        token: int64 [rows].
        parent: int64 [rows], the row of the token before it, -1 at a prompt's first token.
        position: int64 [rows], tokens before it; -1 for an unused row.
        prompt_id: int64 [rows], the prompt that the row belongs to or continues.
        branch_point: int64 [rows], its last ancestor that belongs to a prompt; a prompt's row is its own.
        slot: int64 [rows], the place of its key and value in the pool, or NO_SLOT.
        last_used: int64 [rows], the last batch that needed it; never older than its descendants' values.
    """

    token: IntArray
    parent: IntArray
    position: IntArray
    prompt_id: IntArray
    branch_point: IntArray
    slot: IntArray
    last_used: IntArray

    def __init__(self) -> None:
        """Start empty."""
        names = ("token", "parent", "position", "prompt_id", "branch_point", "slot", "last_used")
        self._columns = GrowableColumns(dict.fromkeys(names, ((), np.int64)), minimum=1024)
        self._unused: list[int] = []
        self._publish()

    @property
    def size(self) -> int:
        """Rows, the unused ones among them included."""
        return self._columns.size

    def add(self, token: IntArray, parent: IntArray, position: IntArray, prompt_id: IntArray) -> IntArray:
        """Add tokens that belong to prompts, without memory for their keys and values, and return their rows."""
        count = len(token)
        reused = self._unused[len(self._unused) - min(count, len(self._unused)) :]
        del self._unused[len(self._unused) - len(reused) :]
        added = self._columns.append(count - len(reused))
        if added.stop > len(self.token):
            self._publish()
        rows: IntArray = np.concatenate((np.array(reused, dtype=np.int64), np.arange(added.start, added.stop)))
        self.token[rows], self.parent[rows], self.position[rows] = token, parent, position
        self.prompt_id[rows] = prompt_id
        self.branch_point[rows], self.slot[rows], self.last_used[rows] = rows, NO_SLOT, 0
        return rows

    def remove(self, rows: IntArray) -> None:
        """Make rows unused; they are taken again before the table grows."""
        self.position[rows] = -1
        self._unused.extend(rows.tolist())

    def in_use(self) -> IntArray:
        """Return the rows that are in use, ascending."""
        return np.arange(self.size)[self.position[: self.size] >= 0]

    def _publish(self) -> None:
        """Make the arrays, which growing replaces, attributes."""
        for name in self._columns:
            setattr(self, name, self._columns[name])


class TrieEngine(ABC):
    """An engine that computes every token of every prefix once, and keeps keys and values up to a budget.

    Handles are rows of one trie of tokens. What prompts and continuations of any holder have in common, they share.
    A subclass owns the memory and computes: :meth:`_compute`.
    """

    def __init__(self, model: LockedModel, memory: Memory) -> None:
        """Start with no tokens.

        Args:
            model: The language model, shared and left as it is.
            memory: The places of keys and values.
        """
        self._lm: Any = model
        self._pool: Any = memory
        self._table = TokenTable()
        self._free: list[int] = []
        self._row_in_slot = np.empty(0, dtype=np.int64)
        self._trie: dict[tuple[int, int], int] = {}  # (row or -1, token) -> row
        self._prompts: dict[int, IntArray] = {}  # by prompt id, the rows of its tokens
        self._prompt_ids: dict[tuple[int, ...], int] = {}
        self._next_prompt_id = 0
        self._known: dict[int, tuple[NDArray[Any], ...]] = {}  # by row, the outputs without a mask, where asked for
        self._holders: WeakSet[HandleHolder] = WeakSet()
        self._registered = self._dead = 0  # holders ever, and those that were dead when unused rows were last removed
        self._in_progress = _NO_ROWS  # what the call in progress asks for
        self._clock = 0
        self._enough = _FIRST_TOKENS  # tokens that the memory grows to, within the budget
        self._computed = self._computed_again = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of key-value memory allocated now."""
        return int(self._pool.allocated_bytes)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of key-value memory per token, over all layers; 0 before the first forward."""
        return int(self.kv_bytes // max(self._pool.capacity, 1))

    def register(self, holder: HandleHolder) -> None:
        """See :meth:`Engine.register`."""
        self._holders.add(holder)
        self._registered += 1

    def compute(
        self,
        prompts: Sequence[Sequence[int]],
        parents: IntArray,
        tokens: IntArray,
        top_k: int,
        allowed: Sequence[BoolArray | None] | None = None,
    ) -> tuple[IntArray, Outputs]:
        """See :meth:`Engine.compute`."""
        with self._lm.lock:
            try:
                ends = [self._prompt_rows(tuple(prompt))[-1] for prompt in prompts]
                rows = np.concatenate((np.array(ends, dtype=np.int64), self._child_rows(parents, tokens)))
                self._in_progress = rows
                return rows, self._outputs(rows, top_k, allowed)
            except BaseException:
                self._dead = -1  # rows that nobody has the handles of are removed when memory is next needed
                raise
            finally:
                self._in_progress = _NO_ROWS

    def release_unused(self) -> None:
        """See :meth:`Engine.release_unused`."""
        table = self._table
        with self._lm.lock:
            needed = np.zeros(table.size, dtype=bool)
            self._dead = self._registered - len(self._holders)
            frontier = np.concatenate([self._in_progress, *(holder.handle for holder in self._holders)])
            while len(frontier):  # up to the prompts
                frontier = np.unique(frontier[~needed[frontier]])
                needed[frontier] = True
                frontier = table.parent[frontier[table.branch_point[frontier] != frontier]]
            ends = np.flatnonzero(needed & (table.branch_point[: table.size] == np.arange(table.size)))
            ends = ends[np.argsort(table.position[ends])]  # the last one of a prompt leads to all
            last = dict(zip(table.prompt_id[ends].tolist(), table.position[ends].tolist(), strict=True))
            for prompt_id, position in last.items():
                needed[self._prompts[prompt_id][: position + 1]] = True
            rows = table.in_use()
            self._remove(rows[~needed[rows]], needed)

    # -----------------------------------------------------------------------------------------------------------------
    # Bookkeeping

    def _prompt_rows(self, prompt: tuple[int, ...]) -> IntArray:
        """Return the rows of a prompt's tokens; those that exist already are shared."""
        if prompt not in self._prompt_ids:
            shared: list[int] = []
            last = -1
            for token in prompt:
                if (row := self._trie.get((last, token))) is None:
                    break
                shared.append(last := row)
            tokens, positions = np.array(prompt[len(shared) :], dtype=np.int64), np.arange(len(shared), len(prompt))
            rows = self._table.add(tokens, positions, positions, np.full_like(positions, self._next_prompt_id))
            parents = np.r_[last, rows][: len(rows)]
            self._table.parent[rows] = parents
            self._trie.update(zip(zip(parents.tolist(), tokens.tolist(), strict=True), rows.tolist(), strict=True))
            self._prompt_ids[prompt] = self._next_prompt_id
            self._prompts[self._next_prompt_id] = np.r_[np.array(shared, dtype=np.int64), rows]
            self._next_prompt_id += 1
        return self._prompts[self._prompt_ids[prompt]]

    def _child_rows(self, parents: IntArray, tokens: IntArray) -> IntArray:
        """Return the rows of continuations; those that exist already are shared."""
        table, edges = self._table, list(zip(parents.tolist(), tokens.tolist(), strict=True))
        new = [edge for edge in dict.fromkeys(edges) if edge not in self._trie]
        if new:
            parent, token = np.array(new, dtype=np.int64).T
            rows = table.add(token, parent, table.position[parent] + 1, table.prompt_id[parent])
            table.branch_point[rows] = table.branch_point[parent]
            self._trie.update(zip(new, rows.tolist(), strict=True))
        return np.array([self._trie[edge] for edge in edges], dtype=np.int64)

    def _continuations(self, rows: IntArray) -> IntArray:
        """Return int64 [n, T]: each row and its ancestors back to its prompt, padded with -1; prompt rows have none."""
        table = self._table
        depth = table.position[rows] - table.position[table.branch_point[rows]]
        columns = np.empty((int(depth.max(initial=0)), len(rows)), dtype=np.int64)
        for column in columns:
            column[:] = rows
            rows = np.maximum(table.parent[rows], 0)  # those that have arrived run idle
        return np.where(np.arange(len(columns)) < depth[:, None], columns.T, -1)

    def _ancestors(self, rows: IntArray, continuations: IntArray) -> IntArray:
        """Return ``rows`` and all rows that lead to them, each once, sorted."""
        table = self._table
        ends = np.unique(table.branch_point[rows])
        prompts = [
            self._prompts[prompt_id][: position + 1]
            for prompt_id, position in zip(table.prompt_id[ends].tolist(), table.position[ends].tolist(), strict=True)
        ]
        return np.unique(np.concatenate([continuations[continuations >= 0], *prompts]))

    def _remove(self, rows: IntArray, needed: BoolArray) -> None:
        """Remove ``rows``, all that are in use and not ``needed`` [size]."""
        if not len(rows):
            return
        table = self._table
        self._release_slots(rows)
        edges = zip(table.parent[rows].tolist(), table.token[rows].tolist(), strict=True)
        for row, edge in zip(rows.tolist(), edges, strict=True):
            del self._trie[edge]
            self._known.pop(row, None)
        table.remove(rows)
        self._prompt_ids = {p: i for p, i in self._prompt_ids.items() if needed[self._prompts[i]].all()}
        alive = {*np.unique(table.prompt_id[table.in_use()]).tolist(), *self._prompt_ids.values()}
        self._prompts = {i: self._prompts[i][needed[self._prompts[i]]] for i in alive}

    def _allocate(self, rows: IntArray, keep: IntArray) -> None:
        """Give slots to ``rows``: free ones, unused ones, new ones within the budget, the least recently used.

        ``keep`` are rows whose memory must stay, ``rows`` among them.
        """
        pool, table = self._pool, self._table
        if not len(rows):
            return
        if len(rows) > len(self._free) and self._registered - len(self._holders) != self._dead:
            self.release_unused()
        missing = len(rows) - len(self._free)
        if missing > 0 and self._computed_again * _ONE_AGAIN_IN > self._computed:
            self._enough = max(self._enough, 2 * pool.capacity)
        most = min(max(self._enough, len(keep)), pool.max_slots)
        if missing > 0 and pool.capacity < most:
            capacity = min(max(2 * pool.capacity, pool.capacity + missing, 256), most)
            added = range(pool.capacity, capacity)
            pool.grow(capacity)  # first, since it may run out of memory
            self._free.extend(reversed(added))
            self._row_in_slot = np.concatenate((self._row_in_slot, np.full(len(added), -1)))
            missing = len(rows) - len(self._free)
        if missing > 0:
            resident = self._row_in_slot[self._row_in_slot >= 0]
            old = resident[~np.isin(resident, keep)]
            # Children before parents where both were last used together; some more than needed, so that this is rare.
            order = np.lexsort((-table.position[old], table.last_used[old]))
            self._release_slots(old[order[: max(missing, pool.capacity // 8)]])
        slots = np.array([self._free.pop() for _ in rows], dtype=np.int64)
        table.slot[rows] = slots
        self._row_in_slot[slots] = rows

    def _release_slots(self, rows: IntArray) -> None:
        rows = rows[self._table.slot[rows] != NO_SLOT]
        slots = self._table.slot[rows]
        self._row_in_slot[slots] = -1
        self._free.extend(slots.tolist())
        self._table.slot[rows] = NO_SLOT

    # -----------------------------------------------------------------------------------------------------------------
    # Computation

    def _outputs(self, rows: IntArray, top_k: int, allowed: Sequence[BoolArray | None] | None) -> Outputs:
        """Return the outputs at ``rows``; those that another holder has asked for are known."""
        masks = [None] * len(rows) if allowed is None else allowed
        new = [
            i
            for i, (row, mask) in enumerate(zip(rows.tolist(), masks, strict=True))
            if mask is not None or row not in self._known or len(self._known[row][1]) < top_k
        ]
        computed = self._run(rows[new], top_k, None if allowed is None else [allowed[i] for i in new]) if new else None
        if computed is not None:
            for i, *values in zip(new, *computed, strict=True):
                if masks[i] is None:
                    self._known[int(rows[i])] = tuple(value.copy() for value in values)
            if len(new) == len(rows):
                return computed
        place = dict(zip(new, range(len(new)), strict=True))
        parts = [
            [column[place[i]] for column in computed] if computed is not None and i in place else self._known[row]
            for i, row in enumerate(rows.tolist())
        ]
        hidden, tokens, logprobs = zip(*parts, strict=True)
        return Outputs(np.stack(hidden), np.stack([t[:top_k] for t in tokens]), np.stack([p[:top_k] for p in logprobs]))

    def _run(self, asked: IntArray, top_k: int, allowed: Sequence[BoolArray | None] | None) -> Outputs:
        """Return the outputs at the rows ``asked``, some maybe twice; compute all they need that is not in memory."""
        rows = np.unique(asked)
        continuations = self._continuations(rows)
        ancestors = self._ancestors(rows, continuations)
        if not self._fits(ancestors):
            if len(rows) == 1:
                raise ConfigurationError(
                    f"kv_budget of {self._pool.budget:,} bytes holds {self._pool.max_slots} tokens, but this prompt "
                    f"and its continuation are {len(ancestors)} tokens of {self._pool.token_bytes:,} bytes; "
                    f"give at least {len(ancestors) * (self._pool.token_bytes or 0):,}"
                )
            half = len(asked) // 2
            masks = (None, None) if allowed is None else (allowed[:half], allowed[half:])
            return concatenate([self._run(asked[:half], top_k, masks[0]), self._run(asked[half:], top_k, masks[1])])
        self._clock += 1
        table = self._table
        missing = ancestors[table.slot[ancestors] == NO_SLOT]
        self._computed += len(missing)
        self._computed_again += int(np.count_nonzero(table.last_used[missing]))
        table.last_used[ancestors] = self._clock
        # A row asked for is computed even if it is in memory: its output is what was asked for.
        only_rows = np.count_nonzero(table.slot[rows] == NO_SLOT) == len(missing)
        compute = rows if only_rows else np.union1d(missing, rows)
        try:
            self._allocate(missing, keep=ancestors)
        except RuntimeError as error:
            if not self._is_out_of_memory(error) or (len(rows) == 1 and len(ancestors) > self._pool.capacity):
                raise
            self._pool.budget = self._pool.capacity * (self._pool.token_bytes or 1)
            logger.warning("no memory for more keys and values: going on with %d tokens", self._pool.capacity)
            return self._run(asked, top_k, allowed)
        try:
            if not only_rows:
                continuations = self._continuations(compute)
            return self._compute(asked, compute, continuations, top_k, allowed)
        except BaseException:
            self._release_slots(missing)
            raise

    @abstractmethod
    def _compute(
        self,
        asked: IntArray,
        compute: IntArray,
        continuations: IntArray,
        top_k: int,
        allowed: Sequence[BoolArray | None] | None,
    ) -> Outputs:
        """Process the tokens ``compute``, ancestors first, and return the outputs at ``asked``, some maybe twice."""

    def _fits(self, rows: IntArray) -> bool:
        """Tell whether ``rows``, with all that lead to them, can be in memory together."""
        return len(rows) <= int(self._pool.max_slots)

    @abstractmethod
    def _is_out_of_memory(self, error: RuntimeError) -> bool:
        """Tell whether an error means that memory ran out."""


def kv_budget_or_default(kv_budget: int | None, device: torch.device | None = None) -> int:
    """Return the most bytes of keys and values: those given, else a quarter of the free memory, at most 4 GiB.

    Raises:
        ConfigurationError: What is given is no positive number.
    """
    return check_kv_budget(kv_budget) or min(free_memory(device) // 4, 4 << 30)


def concatenate(parts: Sequence[Outputs]) -> Outputs:
    """Return the outputs of several forwards as those of one."""
    if len(parts) == 1:
        return parts[0]
    return Outputs(
        np.concatenate([part.hidden for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
    )
