"""The token tree in llama.cpp's memory: one decode for any mix of prompts and branches.

A cell of llama.cpp's memory holds the keys and values of one token, at a position, and belongs to a set of sequences. A
token sees the cells of its own sequence at positions up to its own. There are 256 sequences, far fewer than branches.

So a *shelf* is a sequence that holds at most one token of the tree at each position. A token is found by shelf and
position, and a path from the root is a list of runs on shelves. A *lane* is a sequence that holds one whole path, in
order to compute what follows. It shares the cells of the shelves, so that nothing is copied. A lane keeps its path
after a decode: the next token of that path costs no call beside the decode.

Tokens that several lanes need, such as a new prompt under two branches, belong to all of these lanes at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from ...errors import LanguageModelError
from ..base import BoolArray, FloatArray, IntArray, Outputs
from ..token_trie import NO_SLOT, TrieEngine, concatenate, kv_budget_or_default
from .library import Context, Settings
from .softmax import top_logprobs

__all__ = ["FEW", "LlamaEngine", "tree_error"]

FEW = 8  # tokens that nobody asked for: cheaper with outputs than in a decode of their own
_NOBODY = -1  # the path without tokens
# Nats, root mean square, that a small random tree may differ from whole sequences. llama.cpp rounds the inputs of
# quantised weights to 8 bits, so the last bit of a sum may move an output by .4 (gemma3-270m); a wrong mask: 1.3.
_TRIAL_ERROR, _QUANTISED_TRIAL_ERROR = 5e-2, 0.75
_FLOAT_FILES = (0, 1, 32)  # llama.cpp's numbers of files in float32, float16 and bfloat16


class LlamaTreeModel(Settings, Protocol):
    """The part of a language model that the engine needs."""

    name: str
    kv_token_bytes: int | None
    eos_token_ids: frozenset[int]
    lock: AbstractContextManager[Any]

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """See :attr:`LanguageModel.special_tokens`."""

    def forward(self, sequences: Sequence[Sequence[int]]) -> tuple[FloatArray, FloatArray]:
        """See :meth:`LanguageModel.forward`."""

    def plain_context(self, tokens: int) -> Context:
        """Return an empty context for one sequence of so many tokens."""


class Cells:
    """The memory of an engine: a context of llama.cpp, replaced by a larger one as it grows."""

    def __init__(self, lm: LlamaTreeModel, budget: int, spare: int) -> None:
        """Start without a context; ``spare`` cells are beside those that the budget pays for."""
        self.budget, self.token_bytes = budget, lm.kv_token_bytes
        self.capacity = 0
        self.context: Context | None = None
        self._lm, self._spare = lm, spare

    @property
    def max_slots(self) -> int:
        """Tokens that the budget pays for."""
        return self.budget // (self.token_bytes or 1)

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated now, beside the spare cells."""
        return self.capacity * (self.token_bytes or 0)

    def grow(self, slots: int) -> None:
        """Make place for ``slots`` tokens; what is in memory stays."""
        larger = Context(self._lm, slots + self._spare)
        if self.context is not None:
            larger.take_over(self.context)
        self.context, self.capacity = larger, slots


class LlamaEngine(TrieEngine):
    """The fast engine of llama.cpp: every token of every prefix is computed once."""

    def __init__(self, lm: LlamaTreeModel, *, kv_budget: int | None = None) -> None:
        """Compute with ``lm`` and keep at most ``kv_budget`` bytes of keys and values.

        Args:
            lm: The language model.
            kv_budget: In bytes; None takes a quarter of the free memory, at most 4 GiB.

        Raises:
            ConfigurationError: ``kv_budget`` is not positive.
        """
        budget = kv_budget_or_default(kv_budget)
        if lm.kv_token_bytes is None:
            lm.kv_token_bytes = _token_bytes(lm)
        total = int(lm.llama.api.llama_max_parallel_sequences())
        # With a sliding window, llama.cpp takes cells that one sequence alone holds and no longer sees. A second
        # sequence for each shelf prevents that.
        self._copies = 2 if lm.llama.api.llama_model_n_swa(lm.llama.pointer) else 1
        self._lanes = 3 * total // 8
        self._shelves = (total - self._lanes) // self._copies
        super().__init__(lm, Cells(lm, budget, total))
        self._tip = np.full(self._lanes, _NOBODY)  # the row at the end of the path that a lane holds
        self._lane_of: dict[int, int] = {}  # by that row
        self._last_decode = np.zeros(self._lanes, dtype=np.int64)
        self._decodes = 0
        self._taken = np.zeros((0, self._shelves), dtype=bool)  # by position and shelf
        # By row: its shelf, whether its cell is there, where its run on the shelf begins, and the row before the run.
        self._shelf = self._run_start = self._before = np.empty(0, dtype=np.int64)
        self._stored = np.empty(0, dtype=bool)

    @property
    def _context(self) -> Context:
        context: Context = self._pool.context
        return context

    def _is_out_of_memory(self, error: RuntimeError) -> bool:
        return "allocate memory" in str(error)

    # -----------------------------------------------------------------------------------------------------------------
    # Memory

    def _fits(self, rows: IntArray) -> bool:
        return super()._fits(rows) and int(np.bincount(self._table.position[rows]).max()) <= self._shelves

    def _allocate(self, rows: IntArray, keep: IntArray) -> None:
        super()._allocate(rows, keep)
        table = self._table
        if (size := len(table.token)) > len(self._shelf):
            more = size - len(self._shelf)
            self._shelf, self._run_start, self._before = (
                np.concatenate((column, np.full(more, -1))) for column in (self._shelf, self._run_start, self._before)
            )
            self._stored = np.concatenate((self._stored, np.zeros(more, dtype=bool)))
        if not len(rows):
            return
        if (top := int(table.position[rows].max()) + 1) > len(self._taken):
            more = max(top, 2 * len(self._taken)) - len(self._taken)
            self._taken = np.concatenate((self._taken, np.zeros((more, self._shelves), dtype=bool)))
        for level in self._levels(rows):
            self._shelve(level, int(table.position[level[0]]), keep)

    def _levels(self, rows: IntArray) -> list[IntArray]:
        """Return ``rows`` by position, ascending."""
        if len(rows) < 2:
            return [rows] if len(rows) else []
        rows = rows[np.argsort(self._table.position[rows], kind="stable")]
        return np.split(rows, np.flatnonzero(np.diff(self._table.position[rows])) + 1)

    def _shelve(self, level: IntArray, position: int, keep: IntArray) -> None:
        """Give a shelf to each of the rows ``level``, all at one position: the parent's shelf where it is free."""
        taken, parents = self._taken[position], self._table.parent[level]
        if (missing := len(level) - int(np.count_nonzero(~taken))) > 0:
            self._evict_at(position, missing, keep)
        of_parents = np.where(parents >= 0, self._shelf[parents], -1)
        first = np.unique(of_parents, return_index=True)[1]
        first = first[(of_parents[first] >= 0) & ~taken[of_parents[first]]]
        chosen = np.full(len(level), -1)
        chosen[first] = of_parents[first]
        taken[chosen[first]] = True
        rest = np.flatnonzero(chosen < 0)
        chosen[rest] = np.flatnonzero(~taken)[: len(rest)]
        taken[chosen] = True
        goes_on = chosen == of_parents
        self._shelf[level] = chosen
        self._run_start[level] = np.where(goes_on, self._run_start[parents], position)
        self._before[level] = np.where(goes_on, self._before[parents], parents)

    def _evict_at(self, position: int, count: int, keep: IntArray) -> None:
        """Evict the ``count`` least recently used rows at a position, or a few more, with all that continue them."""
        table = self._table
        resident = self._row_in_slot[self._row_in_slot >= 0]
        at = resident[(table.position[resident] == position) & ~np.isin(resident, keep)]
        gone = np.zeros(table.size, dtype=bool)
        gone[at[np.argsort(table.last_used[at])][: max(count, self._shelves // 8)]] = True
        for level in self._levels(resident[table.position[resident] > position]):
            gone[level] |= gone[table.parent[level]]
        self._release_slots(np.flatnonzero(gone))

    def _release_slots(self, rows: IntArray) -> None:
        rows = rows[self._table.slot[rows] != NO_SLOT]
        shelved = rows[self._shelf[rows] >= 0] if len(self._shelf) else rows[:0]
        if len(shelved):
            for row in self._tip[np.isin(self._tip, shelved)].tolist():
                for lane in np.flatnonzero(self._tip == row).tolist():
                    self._empty(lane)
            for shelf, start, end in self._runs(shelved, self._shelf[shelved]):
                for copy in range(self._copies):
                    self._context.remove(self._sequence(shelf, copy), start, end)
            self._taken[self._table.position[shelved], self._shelf[shelved]] = False
            self._shelf[shelved], self._stored[shelved] = -1, False
        super()._release_slots(rows)

    def _runs(self, rows: IntArray, groups: IntArray) -> Iterator[tuple[int, int, int]]:
        """Yield group, first position and the position after the last, of rows of one group that lie side by side."""
        if not len(rows):
            return
        positions = self._table.position[rows]
        if len(rows) == 1:
            yield int(groups[0]), int(positions[0]), int(positions[0]) + 1
            return
        order = np.lexsort((positions, groups))
        positions, groups = positions[order], groups[order]
        starts = np.flatnonzero(np.r_[True, (np.diff(groups) != 0) | (np.diff(positions) != 1)])
        ends = np.r_[starts[1:], len(rows)] - 1
        yield from zip(groups[starts].tolist(), positions[starts].tolist(), (positions[ends] + 1).tolist(), strict=True)

    def _sequence(self, shelf: int, copy: int) -> int:
        return self._lanes + copy * self._shelves + shelf

    # -----------------------------------------------------------------------------------------------------------------
    # Lanes

    def _empty(self, lane: int) -> None:
        self._context.remove(lane)
        self._set_tip(lane, _NOBODY)

    def _set_tip(self, lane: int, row: int) -> None:
        old = int(self._tip[lane])
        if self._lane_of.get(old) == lane:
            del self._lane_of[old]
        self._tip[lane] = row
        if row != _NOBODY:
            self._lane_of[row] = lane

    def _lanes_at(self, rows: list[int]) -> list[int]:
        """Return different lanes that hold the paths to ``rows``."""
        self._decodes += 1
        lanes, ready = [_NOBODY] * len(rows), dict[int, int]()
        for i, row in enumerate(rows):
            lane = self._lane_of.get(row, _NOBODY)
            if lane != _NOBODY and row not in ready:
                lanes[i] = ready[row] = lane
                self._last_decode[lane] = self._decodes
        oldest = iter(np.argsort(self._last_decode, kind="stable").tolist())
        for i, row in enumerate(rows):
            if lanes[i] != _NOBODY:
                continue
            lanes[i] = lane = next(oldest)
            self._last_decode[lane] = self._decodes
            if self._tip[lane] != _NOBODY:
                self._empty(lane)
            if row in ready:
                self._context.copy(ready[row], lane)
            elif row != _NOBODY:
                self._walk(row, lane)
                ready[row] = lane
            self._set_tip(lane, row)
        return lanes

    def _walk(self, row: int, lane: int) -> None:
        """Let an empty lane share the path to a row, run by run."""
        while row != _NOBODY:
            shelf, end = int(self._shelf[row]), int(self._table.position[row]) + 1
            self._context.copy(self._sequence(shelf, 0), lane, int(self._run_start[row]), end)
            row = int(self._before[row])

    # -----------------------------------------------------------------------------------------------------------------
    # Computation

    def _compute(
        self,
        asked: IntArray,
        compute: IntArray,
        continuations: IntArray,
        top_k: int,
        allowed: Sequence[BoolArray | None] | None,
    ) -> Outputs:
        """Process the tokens ``compute`` in one decode, or in two if many of them need no outputs."""
        del continuations
        rows = compute[np.argsort(self._table.position[compute], kind="stable")]
        wanted = asked.tolist()
        outputs_at = set(wanted)
        silent = self._needs_no_outputs(rows, np.array([row in outputs_at for row in rows.tolist()]))
        for chunk in self._chunks(rows[silent]):
            self._decode(chunk, outputs=False)
        parts: list[Outputs] = []
        order: list[int] = []
        for chunk in self._chunks(rows[~silent]):
            logits, hidden = self._decode(chunk, outputs=True)
            place = {row: i for i, row in enumerate(chunk.tolist())}
            which = [i for i, row in enumerate(wanted) if row in place]
            places = [place[wanted[i]] for i in which]
            if places != list(range(len(chunk))):
                logits, hidden = logits[places], hidden[places]
            mask = None
            if allowed is not None and any(allowed[i] is not None for i in which):
                everything = np.ones(logits.shape[1], dtype=bool)
                mask = np.stack([everything if (one := allowed[i]) is None else one for i in which])
            tokens, logprobs = top_logprobs(logits, top_k, mask)
            if np.isnan(logprobs).any():
                raise LanguageModelError(f"language model {self._lm.name!r} computed NaN after a prefix")
            parts.append(Outputs(hidden.copy(), tokens, logprobs))
            order += which
        if len(parts) == 1:
            return parts[0]
        together, back = concatenate(parts), np.argsort(order)
        return Outputs(together.hidden[back], together.tokens[back], together.logprobs[back])

    def _needs_no_outputs(self, rows: IntArray, wanted: BoolArray) -> BoolArray:
        """Return bool [n], the rows whose outputs nobody asked for and that follow none that was asked for."""
        nothing = np.zeros(len(rows), dtype=bool)
        if np.count_nonzero(~wanted) <= FEW:
            return nothing
        mark = np.zeros(self._table.size + 1, dtype=bool)  # the last one stands for no row
        mark[rows[wanted]] = True
        for level in self._levels(rows):
            mark[level] |= mark[self._table.parent[level]]
        silent: BoolArray = ~mark[rows]
        return silent if np.count_nonzero(silent) > FEW else nothing

    def _chunks(self, rows: IntArray) -> Iterator[IntArray]:
        """Yield ``rows``, ancestors first, as many at a time as a decode takes."""
        while len(rows):
            chunk = rows[: self._context.batch]
            if len(chunk) > self._lanes and np.count_nonzero(self._continued_in(chunk) < 0) > self._lanes:
                chunk = chunk[: self._lanes]
            yield chunk
            rows = rows[len(chunk) :]

    def _continued_in(self, rows: IntArray) -> IntArray:
        """Return int64 [n]: the last place in ``rows`` of a new token that continues each, or -1."""
        up = self._parent_places(rows)
        continued = np.full(len(rows), -1)
        continued[up[up >= 0]] = np.flatnonzero(up >= 0)
        return continued

    def _parent_places(self, rows: IntArray) -> IntArray:
        """Return int64 [n]: the place in ``rows`` of each one's parent, where both are new; else -1."""
        stored = self._stored[rows].tolist()
        place = {row: i for i, row in enumerate(rows.tolist()) if not stored[i]}
        parents = self._table.parent[rows].tolist()
        return np.array([-1 if stored[i] else place.get(parent, -1) for i, parent in enumerate(parents)])

    def _decode(self, rows: IntArray, *, outputs: bool) -> tuple[FloatArray, FloatArray]:
        """Process ``rows``, ancestors first; rows that are in memory already are computed again and thrown away.

        Each row that no other row continues gets a lane. A row belongs to the lanes of all that continue it.
        """
        table, context = self._table, self._context
        up, fresh = self._parent_places(rows), ~self._stored[rows]
        leaves = np.flatnonzero(self._continued_in(rows) < 0)
        top, numbers, at = leaves.copy(), np.arange(len(leaves)), leaves
        places_of, numbers_of = [at], [numbers]
        while len(at):
            above = up[at]
            at, numbers = above[above >= 0], numbers[above >= 0]
            top[numbers] = at
            places_of.append(at)
            numbers_of.append(numbers)
        places, numbers = np.concatenate(places_of), np.concatenate(numbers_of)
        by_place = np.lexsort((numbers, places))
        places, numbers = places[by_place], numbers[by_place]
        starts = table.parent[rows[top]].tolist()
        lanes = np.array(self._lanes_at(starts), dtype=np.int64)
        try:
            counts = np.bincount(places, minlength=len(rows))
            result = context.decode(table.token[rows], table.position[rows], counts, lanes[numbers], outputs=outputs)
            # The first lane of every new token hands it over to its shelf.
            first = numbers[np.cumsum(counts) - counts][fresh]
            new = rows[fresh]
            for key, start, end in self._runs(new, lanes[first] * self._shelves + self._shelf[new]):
                lane, shelf = divmod(key, self._shelves)
                for copy in range(self._copies):
                    context.copy(lane, self._sequence(shelf, copy), start, end)
            self._stored[new] = True
            for lane, place in zip(lanes.tolist(), leaves.tolist(), strict=True):
                if fresh[place]:
                    self._set_tip(lane, int(rows[place]))
                else:
                    context.remove(lane, int(table.position[rows[place]]))
        except BaseException:
            for lane in lanes.tolist():
                self._empty(lane)
            raise
        return result


def tree_error(lm: LlamaTreeModel) -> str | None:
    """Compare a small random tree with whole sequences, each alone; return what is wrong, None if nothing."""
    rng, none = np.random.default_rng(0), np.empty(0, dtype=np.int64)
    ordinary = np.setdiff1d(np.arange(lm.vocab_size), [*lm.eos_token_ids, *lm.special_tokens.values()])
    prompts = [rng.choice(ordinary, size=n).tolist() for n in (3, 2)]
    levels = rng.choice(ordinary, size=(2, 4))
    try:
        engine = LlamaEngine(lm)
        rows, _ = engine.compute(prompts, none, none, 1)
        rows = rows[[0, 0, 1, 1]]  # four branches, two of each prompt
        for level in levels:
            rows, outputs = engine.compute([], rows, level, lm.vocab_size)
        reference = lm.forward([[*prompts[i], *levels[:, j].tolist()] for j, i in enumerate((0, 0, 1, 1))])[1]
    except (LanguageModelError, RuntimeError) as problem:
        return f"a tree does not work with it ({problem})"
    difference = outputs.logprobs - np.take_along_axis(reference, outputs.tokens, axis=1)
    error = float(np.sqrt(np.mean(difference.astype(np.float64) ** 2)))
    kind = lm.llama.api.llama_model_ftype(lm.llama.pointer) % 1024  # beyond: guessed
    allowed = _TRIAL_ERROR if kind in _FLOAT_FILES else _QUANTISED_TRIAL_ERROR
    return None if error <= allowed else f"in a tree its log-probabilities are off by {error:.2g} nats"


def _token_bytes(lm: LlamaTreeModel) -> int:
    """Return the bytes of keys and values of a token, over all layers, as llama.cpp would save them."""
    context = lm.plain_context(2)
    context.extend(np.zeros(2, dtype=np.int64), 0, 2, outputs=False)
    both = context.state_bytes()
    context.remove(0, 1)
    return max(both - context.state_bytes(), 1)
