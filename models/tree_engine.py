"""One key-value memory shared by every branch of every prompt, and tree attention over it.

A transformer's keys and values at a token depend only on that token and its ancestors, so a tree of prefixes needs one
slot per *token*, however many continuations share it. :class:`TreeEngine` keeps those slots in one pool and computes
any mix of new tokens (prompts, continuations at any depth, tokens whose memory was given up) in one packed forward
without padding. In the attention each token sees its own ancestors only, so the outputs are those of an uncached
forward; what is read is the ancestors of the batch, never the whole pool.

The model itself stays untouched: for the length of a forward its attention implementation is swapped for
:func:`_tree_attention`, registered with transformers' own ``AttentionInterface``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigurationError
from .base import IntArray, Outputs, free_memory

if TYPE_CHECKING:
    from .transformers_lm import TransformersLM
from .kv_cache import _FREE, _Pool, _Table
from .tree_attention import _Block, _Forward, _tree_attention_in

__all__ = ["TreeEngine", "tree_mask_error"]

logger = logging.getLogger(__name__)


# Queries of one prompt are attended together over the union of their ancestors: few copies of the prompt's memory,
# but the union grows with the group. 16 kept both the copies and the masked products small.
_QUERIES_PER_GROUP = 16


_PROMPT_TOKENS_PER_GROUP = 256


_POSITIONS_PER_FORWARD = 1024


class TreeEngine:
    """The fast engine: every token of every prefix is computed once, in one packed forward per call."""

    def __init__(self, model: TransformersLM, top_k: int, kv_budget: int | None = None) -> None:
        """Compute with ``model``, keep ``top_k`` next tokens, hold at most ``kv_budget`` bytes of keys and values.

        Args:
            model: The language model, shared and left as it is.
            top_k: How many next tokens to return.
            kv_budget: In bytes; None takes a quarter of the free memory, at most 4 GiB.
        """
        if kv_budget is not None and kv_budget <= 0:
            raise ConfigurationError(f"kv_budget is a number of bytes > 0 (or None), got {kv_budget!r}")
        self._lm, self._top_k = model, top_k
        self._allowed: dict[int, npt.NDArray[np.bool_]] | None = None  # by row, in the step under way
        self._pool = _Pool(kv_budget or min(free_memory(model.device) // 4, 4 << 30), model.kv_token_bytes)
        self._table = _Table()
        self._free: list[int] = []
        self._row_in_slot = np.empty(0, dtype=np.int64)
        self._chains: list[IntArray] = []  # per prompt, the rows of its tokens
        self._chain_of: dict[tuple[int, ...], int] = {}
        self._trie: dict[tuple[int, int], int] = {}  # (row or -1, token) -> row, over the prompts' tokens
        self._clock = 0
        self._positions = 1 << 30  # at most so many in a forward; fewer once memory has run out
        config = model.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self._window: int | None = window or getattr(config, "attention_chunk_size", None)
        self._windows: set[int] = set()

    @property
    def kv_bytes(self) -> int:
        """Bytes of key-value memory held now."""
        return self._pool.held_bytes

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of key-value memory per token, over all layers; 0 before the first forward."""
        return self.kv_bytes // max(self._pool.capacity, 1)

    def compute(
        self,
        prompts: Sequence[Sequence[int]],
        parents: IntArray,
        tokens: IntArray,
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[IntArray, Outputs]:
        """See :meth:`Engine.compute`; prompts with a common beginning share it."""
        ends = np.array([self._chain(tuple(prompt))[-1] for prompt in prompts], dtype=np.int64)
        table, size = self._table, self._table.size
        new = table.append(tokens, parents, table.position[parents] + 1, table.chain[parents])
        table.stem[new] = table.stem[parents]
        rows = np.concatenate((ends, new))
        self._allowed = None if allowed is None else dict(zip(rows.tolist(), allowed, strict=True))
        try:
            return rows, self._run(rows)
        except BaseException:
            self._release(new)
            table.size = size  # the step did not happen; what is known of the prompts' tokens does no harm
            raise

    def evict(self, kept: IntArray) -> IntArray:
        """See :meth:`Engine.evict`."""
        table = self._table
        needed = np.zeros(table.size, dtype=bool)
        frontier = kept
        while len(frontier):
            needed[frontier] = True
            frontier = np.unique(table.parent[frontier])
            frontier = frontier[(frontier >= 0) & ~needed[frontier]]
        rows = np.flatnonzero(needed)
        self._release(np.flatnonzero(~needed))
        new = np.full(table.size + 1, -1, dtype=np.int64)  # the last is for the parent of a prompt's first token, -1
        new[rows] = np.arange(len(rows))
        chains, table.chain[rows] = np.unique(table.chain[rows], return_inverse=True)
        # A chain may have tokens beyond the last one that is needed.
        self._chains = [new[chain[new[chain] >= 0]] for chain in (self._chains[c] for c in chains)]
        table.keep(rows, new)
        resident = np.flatnonzero(table.slot[: table.size] != _FREE)
        self._row_in_slot[table.slot[resident]] = resident
        self._chain_of = {tuple(table.token[chain].tolist()): i for i, chain in enumerate(self._chains)}
        prompt_rows = np.flatnonzero(table.stem[: table.size] == np.arange(table.size))
        edges = zip(table.parent[prompt_rows].tolist(), table.token[prompt_rows].tolist(), strict=True)
        self._trie = dict(zip(edges, prompt_rows.tolist(), strict=True))
        kept_rows: IntArray = new[kept]
        return kept_rows

    # -----------------------------------------------------------------------------------------------------------------
    # Bookkeeping

    def _chain(self, prompt: tuple[int, ...]) -> IntArray:
        """Return the rows of a prompt's tokens; what it shares with earlier prompts are the same rows."""
        if prompt not in self._chain_of:
            shared: list[int] = []
            while len(shared) < len(prompt) and (edge := ((shared or [-1])[-1], prompt[len(shared)])) in self._trie:
                shared.append(self._trie[edge])
            positions = np.arange(len(shared), len(prompt))
            parents = np.r_[(shared or [-1])[-1], self._table.size + np.arange(len(positions))][: len(positions)]
            tokens = np.array(prompt[len(shared) :], dtype=np.int64)
            rows = self._table.append(tokens, parents, positions, np.full_like(positions, len(self._chains)))
            self._trie.update(zip(zip(parents.tolist(), tokens.tolist(), strict=True), rows.tolist(), strict=True))
            self._chain_of[prompt] = len(self._chains)
            self._chains.append(np.concatenate((np.array(shared, dtype=np.int64), rows)))
        return self._chains[self._chain_of[prompt]]

    def _continuations(self, rows: IntArray) -> IntArray:
        """Return int64 [n, T]: each row and its ancestors back to its prompt, padded with -1; prompt rows have none."""
        table = self._table
        depth = table.position[rows] - table.position[table.stem[rows]]
        columns = np.empty((int(depth.max(initial=0)), len(rows)), dtype=np.int64)
        for column in columns:
            column[:] = rows
            rows = np.maximum(table.parent[rows], 0)  # those that have arrived run idle
        return np.where(np.arange(len(columns)) < depth[:, None], columns.T, -1)

    def _lineage(self, rows: IntArray, continuations: IntArray) -> IntArray:
        """Return all rows that ``rows`` need to be resident: themselves and every ancestor, each once, sorted."""
        table = self._table
        stems = np.unique(table.stem[rows])
        prompts = [
            self._chains[chain][: length + 1]
            for chain, length in zip(table.chain[stems].tolist(), table.position[stems].tolist(), strict=True)
        ]
        return np.unique(np.concatenate([continuations[continuations >= 0], *prompts]))

    def _allocate(self, rows: IntArray, keep: IntArray) -> None:
        """Give ``rows`` slots: free ones, then new ones up to the budget, then those least recently used.

        ``keep`` are rows whose memory must stay.
        """
        pool, table = self._pool, self._table
        if not len(rows):
            return
        missing = len(rows) - len(self._free)
        if missing > 0 and pool.capacity < pool.max_slots:
            capacity = min(max(2 * pool.capacity, pool.capacity + missing, 256), pool.max_slots)
            added = range(pool.capacity, capacity)
            pool.grow(capacity)  # first, since it may run out of memory
            self._free.extend(reversed(added))
            self._row_in_slot = np.concatenate((self._row_in_slot, np.full(len(added), -1)))
            missing = len(rows) - len(self._free)
        if missing > 0:
            resident = self._row_in_slot[self._row_in_slot >= 0]
            old = resident[~np.isin(resident, keep)]
            # Children before parents where both were last used together; some more than needed, so that this is rare.
            order = np.lexsort((-table.position[old], table.used[old]))
            self._release(old[order[: max(missing, pool.capacity // 8)]])
        slots = np.array([self._free.pop() for _ in rows], dtype=np.int64)
        table.slot[rows] = slots
        self._row_in_slot[slots] = rows

    def _release(self, rows: IntArray) -> None:
        rows = rows[self._table.slot[rows] != _FREE]
        slots = self._table.slot[rows]
        self._row_in_slot[slots] = -1
        self._free.extend(slots.tolist())
        self._table.slot[rows] = _FREE

    # -----------------------------------------------------------------------------------------------------------------
    # Computation

    def _run(self, rows: IntArray) -> Outputs:
        """Return the outputs at ``rows``, computing what they need and is not resident."""
        continuations = self._continuations(rows)
        lineage = self._lineage(rows, continuations)
        if len(lineage) > self._pool.max_slots:
            if len(rows) == 1:
                raise ConfigurationError(
                    f"kv_budget of {self._pool.budget:,} bytes holds {self._pool.max_slots} tokens, but this prompt "
                    f"and its continuation are {len(lineage)} tokens of {self._pool.token_bytes:,} bytes; "
                    f"give at least {len(lineage) * (self._pool.token_bytes or 0):,}"
                )
            half = len(rows) // 2
            return _concatenate([self._run(rows[:half]), self._run(rows[half:])])
        self._clock += 1
        table = self._table
        table.used[lineage] = self._clock
        missing = lineage[table.slot[lineage] == _FREE]
        # A row asked for is computed even where it is resident: its output is what was asked for.
        only_rows = np.count_nonzero(table.slot[rows] == _FREE) == len(missing)
        compute = rows if only_rows else np.union1d(missing, rows)
        try:
            self._allocate(missing, keep=lineage)
        except RuntimeError as error:
            if not _is_out_of_memory(error) or (len(rows) == 1 and len(lineage) > self._pool.capacity):
                raise
            self._pool.budget = self._pool.capacity * (self._pool.token_bytes or 1)
            logger.warning("no memory for more keys and values: going on with %d tokens", self._pool.capacity)
            return self._run(rows)
        try:
            return self._compute(rows, compute, continuations if only_rows else self._continuations(compute))
        except BaseException:
            self._release(missing)
            raise

    def _compute(self, rows: IntArray, compute: IntArray, continuations: IntArray) -> Outputs:
        """Process the tokens ``compute``, ancestors first, in as few forwards as memory allows; return those asked."""
        limit = min(self._positions, _POSITIONS_PER_FORWARD)
        # Within a forward the order does not matter: a layer writes all keys and values before it reads any.
        by_age = np.argsort(self._table.position[compute], kind="stable")
        parts: list[Outputs] = []
        order: list[IntArray] = []
        start = 0
        while start < len(compute):
            now = by_age[start : start + limit]
            chunk = compute[now]
            asked = np.flatnonzero(np.isin(chunk, rows))
            try:
                parts.append(self._forward(chunk, asked, continuations[now]))
            except RuntimeError as error:
                if not _is_out_of_memory(error) or len(chunk) == 1:
                    raise
                self._positions = limit = len(chunk) // 2
                logger.warning("out of memory: from now on at most %d tokens at a time", limit)
                continue
            order.append(chunk[asked])
            start += len(chunk)
        done, together = np.concatenate(order), _concatenate(parts)
        by_row = np.argsort(done)
        place = by_row[np.searchsorted(done, rows, sorter=by_row)]
        return Outputs(together.hidden[place], together.tokens[place], together.logprobs[place])

    def _forward(self, rows: IntArray, asked: IntArray, continuations: IntArray) -> Outputs:
        """Run the model over ``rows`` packed into one sequence; return the outputs at the indices ``asked``."""
        model, device = self._lm.model, self._lm.device

        def tensor(array: IntArray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        forward = _Forward(
            self._pool, tensor(self._table.slot[rows]), self._blocks(rows, continuations, tensor), self._windows
        )
        count, weights = len(asked), self._lm.packed_weights
        size = weights.size_for(len(rows)) if weights else None
        with torch.inference_mode(), _tree_attention_in(model, forward), contextlib.ExitStack() as stack:
            if weights and size:
                # Filled up with the first token again; nobody sees the filling, and its outputs are thrown away.
                rows, asked = (np.concatenate((a, a[:1].repeat(size - len(a)))) for a in (rows, asked))
                stack.enter_context(weights.swapped_in(size))
            hidden, logits = self._lm.hidden_and_logits(
                tensor(asked),
                input_ids=tensor(self._table.token[rows]).unsqueeze(0),
                position_ids=tensor(self._table.position[rows]).unsqueeze(0),
                past_key_values=forward,
                use_cache=True,
            )
            hidden, logits = hidden[:count], logits[:count]
            allowed = None
            if self._allowed is not None:
                masks = np.stack([self._allowed[row] for row in rows[asked[:count]].tolist()])
                allowed = torch.from_numpy(masks).to(device)
            logprobs, tokens = _top_logprobs(logits.float(), self._top_k, allowed)
            return Outputs(hidden.float().cpu().numpy(), tokens.cpu().numpy(), logprobs.cpu().numpy())

    def _blocks(self, rows: IntArray, continuations: IntArray, tensor: Any) -> list[_Block]:
        """Group the queries: tokens of prompts, and tokens of continuations, which see far more than their number."""
        within_prompt = self._table.stem[rows] == rows
        kinds = ((within_prompt, _PROMPT_TOKENS_PER_GROUP), (~within_prompt, _QUERIES_PER_GROUP))
        return [
            self._block(rows, np.flatnonzero(kind), continuations, limit, tensor) for kind, limit in kinds if kind.any()
        ]

    def _block(self, rows: IntArray, members: IntArray, continuations: IntArray, limit: int, tensor: Any) -> _Block:
        """Group the queries ``rows[members]``: up to ``limit`` of one prompt make a piece, and pieces share groups."""
        table = self._table
        # Sorted by prompt, then by age, which keeps the branches of one search together.
        members = members[np.lexsort((rows[members], table.chain[rows[members]]))]
        queries = rows[members]
        chain = table.chain[queries]
        new_chain = np.r_[True, chain[1:] != chain[:-1]]
        rank = np.arange(len(queries)) - np.flatnonzero(new_chain)[np.cumsum(new_chain) - 1]
        starts = np.flatnonzero(rank % limit == 0)
        piece = np.cumsum(rank % limit == 0) - 1

        # A piece sees its prompt's tokens, and every continuation token that one of its queries sees.
        seen_of_prompt = table.position[table.stem[queries]] + 1
        prompt_length = np.maximum.reduceat(seen_of_prompt, starts)
        ancestors = continuations[members]
        query, step = np.nonzero(ancestors >= 0)
        distinct, inverse = np.unique(piece[query] * table.size + ancestors[query, step], return_inverse=True)
        owner, row = distinct // table.size, distinct % table.size
        widths = prompt_length + np.bincount(owner, minlength=len(starts))
        group_of_piece, offset, place_of_piece, width = _pack(widths, np.diff(np.r_[starts, len(queries)]))
        group, place = group_of_piece[piece], place_of_piece[piece] + rank % limit
        column = offset[owner] + prompt_length[owner] + np.arange(len(distinct)) - np.searchsorted(owner, owner)

        shape = (int(group.max()) + 1, int(place.max()) + 1, width)
        seen = np.full((shape[0], width), -1, dtype=np.int64)
        for p, start in enumerate(starts):
            length = prompt_length[p]
            seen[group_of_piece[p], offset[p] : offset[p] + length] = self._chains[chain[start]][:length]
        seen[group_of_piece[owner], column] = row
        visible = np.zeros(shape, dtype=bool)
        visible[:, :, 0] = True  # a padded query must see something, or its softmax is NaN
        first, columns = offset[piece][:, None], np.arange(width)
        visible[group, place] = (columns >= first) & (columns < first + seen_of_prompt[:, None])
        visible[group[query], place[query], column[inverse]] = True
        index = np.zeros(shape[:2], dtype=np.int64)
        index[group, place] = members
        distance = None
        if self._window:
            distance = tensor(table.position[rows[index]][:, :, None] - table.position[seen][:, None, :])
        slots = np.where(seen >= 0, table.slot[seen], 0).ravel()
        in_place = shape[0] == 1 and bool((np.diff(slots) == 1).all())
        return _Block(
            shape=shape[:2],
            queries=tensor(index.ravel()),
            slots=tensor(slots),
            span=slice(int(slots[0]), int(slots[-1]) + 1) if in_place else None,
            visible=torch.from_numpy(visible).to(self._lm.device),
            distance=distance,
            packed=tensor(group * shape[1] + place),
            members=tensor(members),
            in_order=index.size == len(rows) and bool((index.flatten() == np.arange(len(rows))).all()),
            sees_all=bool(visible.all()),
        )


def _pack(widths: IntArray, sizes: IntArray) -> tuple[IntArray, IntArray, IntArray, int]:
    """Share groups as wide as the widest piece among all pieces, so that little of a group is padding.

    Args:
        widths: int64 [pieces], how many slots each sees.
        sizes: int64 [pieces], how many queries each has.

    Returns:
        For each piece its group, its first slot in it and its first query in it, and the width of the groups.
    """
    capacity, order = int(widths.max()), np.argsort(-widths, kind="stable").tolist()
    group, offset, place = (np.zeros(len(widths), dtype=np.int64) for _ in range(3))
    groups = 0
    while order:
        piece, used, queries = order.pop(0), 0, 0  # the widest that is left, with the narrowest while they fit
        while True:
            group[piece], offset[piece], place[piece] = groups, used, queries
            used, queries = used + int(widths[piece]), queries + int(sizes[piece])
            if not order or used + widths[order[-1]] > capacity:
                break
            piece = order.pop()
        groups += 1
    return group, offset, place, capacity


def _top_logprobs(logits: Tensor, k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest log-probabilities [n, k] of the full softmax of ``logits`` [n, V], and their tokens.

    They are the largest of those ``allowed`` [n, V], if that is given.
    """
    if allowed is not None:
        top, tokens = _top(logits.masked_fill(~allowed, -torch.inf), k)
        return top - logits.logsumexp(-1, keepdim=True), tokens
    top, tokens = _top(logits, k)
    # Only k of the V log-probabilities are needed: no second [n, V] array, and logits is ours to overwrite.
    normaliser = top[:, :1] + logits.sub_(top[:, :1]).exp_().sum(-1, keepdim=True).log_()
    return top - normaliser, tokens


def _top(values: Tensor, k: int, width: int = 128) -> tuple[Tensor, Tensor]:
    """Return what ``values.topk(k)`` does; on a CPU five times faster for the vocabulary of a language model.

    The k largest lie in the k blocks of columns with the largest maxima, or in the columns that fill no block.
    """
    n, blocks = len(values), values.shape[1] // width
    if values.device.type != "cpu" or blocks <= 2 * k:
        return values.topk(k, dim=-1)
    best = values[:, : blocks * width].view(n, blocks, width).amax(-1).topk(k, dim=-1).indices
    columns = (best.unsqueeze(-1) * width + torch.arange(width)).view(n, k * width)
    columns = torch.cat((columns, torch.arange(blocks * width, values.shape[1]).expand(n, -1)), dim=-1)
    top, place = values.gather(1, columns).topk(k, dim=-1)
    return top, columns.gather(1, place)


def _concatenate(parts: Sequence[Outputs]) -> Outputs:
    if len(parts) == 1:
        return parts[0]
    return Outputs(
        np.concatenate([part.hidden for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On CPUs PyTorch raises no more than a RuntimeError, which can mean anything.
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def tree_mask_error(model: TransformersLM, tolerance: float = 2e-3) -> str | None:
    """Compare the tree engine with uncached forwards on a small random tree; return what is wrong, None if nothing.

    Args:
        model: The model to try.
        tolerance: Largest difference of a log-probability (nats) in float32; half precision gets more.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.integers(model.vocab_size, size=n).tolist() for n in (3, 5)]
    if model.model.dtype != torch.float32:
        tolerance = 1.0
    try:
        engine, none = TreeEngine(model, top_k=min(4, model.vocab_size)), np.empty(0, dtype=np.int64)
        rows, _ = engine.compute(prompts, none, none)
        tokens = rng.integers(model.vocab_size, size=(3, 4))
        parents, sequences = rows[[0, 0, 1, 1]], [prompts[i] for i in (0, 0, 1, 1)]
        for level in tokens:  # four branches, two of each prompt
            parents, outputs = engine.compute([], parents, level)
            sequences = [[*s, int(t)] for s, t in zip(sequences, level, strict=True)]
        reference = np.take_along_axis(model.forward(sequences)[1], outputs.tokens, axis=1)
        error = float(np.abs(outputs.logprobs - reference).max())
    except Exception as problem:
        return f"a tree mask does not work with it ({type(problem).__name__}: {str(problem).splitlines()[0][:120]})"
    if not error <= tolerance:
        return f"with a tree mask its log-probabilities are off by {error:.2g} nats"
    # Too short a trial to notice by its outputs: Llama 4 attends in chunks and leaves it to the mask, which is ours.
    if engine._window and engine._window < model.context_length and not engine._windows:
        return f"its attention has a window of {engine._window} tokens that a tree mask does not learn of"
    model.kv_token_bytes = engine.kv_token_bytes
    return None
