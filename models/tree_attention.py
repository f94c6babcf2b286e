"""Attention over a tree of prefixes, and the memory that it reads: each token sees its own ancestors only."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .base import IntArray
from .token_trie import TokenTable

__all__ = [
    "ForwardState",
    "KeyValuePool",
    "QueryBlock",
    "group_queries",
    "to_device",
    "tree_attention",
    "tree_attention_in",
]

_IMPLEMENTATION = "qstar_tree"

# Queries of one prompt are attended together over the union of their ancestors: few copies of the prompt's memory,
# but the union grows with the group. 16 kept both the copies and the masked products small.
_QUERIES_PER_GROUP = 16
_PROMPT_TOKENS_PER_GROUP = 256


class KeyValuePool:
    """Keys and values of every layer, ``[slots, H_kv, D + D_v]`` each, growing up to a budget of bytes."""

    def __init__(self, budget: int, token_bytes: int | None) -> None:
        """Start with no slots.

        Args:
            budget: Bytes over all layers.
            token_bytes: Bytes of one token over all layers; None while they are not known.
        """
        self.budget = budget
        self.token_bytes = token_bytes
        self.capacity = 0
        self._layers: dict[int, Tensor] = {}

    def layer(self, index: int, keys: Tensor, values: Tensor) -> Tensor:
        """Return a layer's memory; its first use makes it, in the shape of the model's keys and values."""
        if index not in self._layers:
            self._layers[index] = _memory_like(keys, (self.capacity, keys.shape[1], keys.shape[3] + values.shape[3]))
        return self._layers[index]

    @property
    def max_slots(self) -> int:
        """Tokens that the budget pays for."""
        return self.budget // self.token_bytes if self.token_bytes else 1 << 20

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated now."""
        return sum(t.numel() * t.element_size() for t in self._layers.values())

    def grow(self, slots: int) -> None:
        """Make place for ``slots`` tokens, layer by layer, so that at most one layer is in memory twice."""
        for index, old in self._layers.items():
            new = _memory_like(old, (slots, *old.shape[1:]))
            new[: self.capacity] = old[: self.capacity]  # longer, if memory ran out half-way through an earlier growth
            self._layers[index] = new
        self.capacity = slots


def _memory_like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return memory of this shape with a tensor's dtype and device; on a CPU it is mapped.

    Mapped pages take no memory until they are written, and all of them go back to the system when they are freed. The
    C library would keep the smaller memory of a pool that has grown, for tensors that never come.

    Raises:
        RuntimeError: There is no memory for it.
    """
    count = math.prod(shape)
    if tensor.device.type != "cpu" or not count:
        return tensor.new_empty(shape)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        pages = mmap.mmap(-1, count * tensor.element_size(), **private)
    except OSError as error:
        raise RuntimeError(f"cannot allocate memory for {count} numbers of keys and values: {error}") from error
    return torch.frombuffer(pages, dtype=tensor.dtype).view(shape)


@dataclass
class QueryBlock:
    """A set of queries, attended group by group; groups are padded to a common size *inside the attention only*.

    Attributes:
        shape: G and Q.
        queries: int64 [G · Q], indices into the packed tokens, 0 where padded.
        slots: int64 [G · U], the pool slots that at least one of the group's queries may see, 0 where padded.
        visible: bool [G, Q, U], which of them each query sees: its ancestors and itself.
        distance: int64 [G, Q, U], how many positions back each slot lies; only for models with a sliding window.
        packed: int64 [m], the places of the m real queries in the flattened [G, Q].
        members: int64 [m], the packed tokens that these are.
        span: The slots of a single group that follow one another in the pool, read in place; else None.
        in_order: The queries are the packed tokens, all of them and in their order.
        sees_all: Every query sees every slot of its group.
    """

    shape: tuple[int, int]
    queries: Tensor
    slots: Tensor
    visible: Tensor
    distance: Tensor | None
    packed: Tensor
    members: Tensor
    span: slice | None
    in_order: bool
    sees_all: bool
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, repeats: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Return the additive mask [G, 1, repeats * Q, U]; layers of the same kind share it."""
        if self.sees_all and not window:
            return None
        if (repeats, window) not in self._masks:
            visible = self.visible if self.distance is None or not window else self.visible & (self.distance < window)
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
            self._masks[repeats, window] = mask.repeat(1, repeats, 1).unsqueeze(1)
        return self._masks[repeats, window]


@dataclass
class ForwardState:
    """The state of the forward in progress, as the attention needs it.

    Attributes:
        pool: The memory of keys and values.
        slots: int64 [N], the places of the packed tokens' own keys and values; tokens after the N-th are filling.
        blocks: The queries.
        windows: Collects the sliding windows that the model's layers tell the attention.
    """

    pool: KeyValuePool
    slots: Tensor
    blocks: list[QueryBlock]
    windows: set[int]

    # The part of transformers' Cache interface that the attention layers use.
    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values [1, H, N, D] of the packed tokens; hand back the layer's pool and the value width."""
        pool = self.pool.layer(layer, keys, values)
        rows = torch.cat((keys, values), dim=-1)[0].transpose(0, 1)
        pool.index_copy_(0, self.slots, rows[: self.slots.shape[0]])
        return pool, values

    def get_seq_length(self, layer: int = 0) -> int:
        """Unused, since positions are given; some models ask all the same."""
        del layer
        return 0


class _Active(threading.local):
    forward: ForwardState | None = None


_active = _Active()  # models in different threads compute at the same time


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend the packed queries [1, H, N, D] over the pool [slots, H_kv, D + D_v]; see ``AttentionInterface``."""
    del module, attention_mask
    forward = _active.forward
    assert forward is not None
    if sliding_window:
        forward.windows.add(sliding_window)
    pool, value_width = key, value.shape[-1]
    heads, kv_heads, key_width = query.shape[1], pool.shape[1], query.shape[-1]
    repeats = heads // kv_heads
    count, filled = forward.slots.shape[0], query.shape[2]
    packed_queries = query[0].transpose(0, 1)  # [N, H, D], and filling
    output = None
    for block in forward.blocks:
        groups, width = block.shape
        # The heads that share a key-value head become further queries of it: no copy of keys or values per head.
        q = packed_queries[:count] if block.in_order else packed_queries.index_select(0, block.queries)
        if width == 1:
            q = q.reshape(groups, kv_heads, repeats, key_width)
        else:
            q = q.view(groups, width, kv_heads, repeats, key_width)
            q = q.permute(0, 2, 3, 1, 4).reshape(groups, kv_heads, repeats * width, key_width)
        seen = pool.index_select(0, block.slots) if block.span is None else pool[block.span]
        seen = seen.view(groups, -1, kv_heads, pool.shape[-1]).transpose(1, 2)
        k, v = torch.split(seen, [key_width, value_width], dim=-1)
        mask = block.mask(repeats, sliding_window, q.dtype)
        if softcap:
            scores = q @ k.transpose(2, 3) * (scaling or key_width**-0.5)
            scores = (scores / softcap).tanh() * softcap
            weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(q.dtype)
            out = weights @ v
        else:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        if width > 1:
            out = out.view(groups, kv_heads, repeats, width, value_width).permute(0, 3, 1, 2, 4)
        out = out.reshape(groups * width, heads, value_width)
        if block.in_order and count == filled:
            return out.unsqueeze(0), None
        if output is None:
            output = out.new_zeros(filled, heads, value_width)
        output.index_copy_(0, block.members, out.index_select(0, block.packed))
    assert output is not None
    return output.unsqueeze(0), None


@functools.cache
def _register() -> None:
    """Make the attention known to transformers, whose modelling code is slow to import."""
    from transformers import AttentionInterface

    AttentionInterface.register(_IMPLEMENTATION, tree_attention)


@contextlib.contextmanager
def tree_attention_in(model: Any, forward: ForwardState) -> Iterator[None]:
    """Swap the model's attention implementation for the length of one forward.

    A configuration without one belongs to a model that calls :func:`tree_attention` itself.
    """
    found = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    if configs := [config for config in found if hasattr(config, "_attn_implementation")]:
        _register()
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation = _IMPLEMENTATION
    _active.forward = forward
    try:
        yield
    finally:
        _active.forward = None
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return a tensor of an array; a copy to a GPU goes through pinned memory and does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def group_queries(
    table: TokenTable,
    prompts: Mapping[int, IntArray],
    rows: IntArray,
    continuations: IntArray,
    window: int | None,
    device: torch.device,
) -> list[QueryBlock]:
    """Group the queries of a forward: tokens of prompts, and tokens of continuations, which see far more per query.

    Args:
        table: The tokens; each of ``rows`` and of their ancestors has a slot.
        prompts: By prompt id, the rows of the prompt's tokens, int64 [length].
        rows: int64 [N], the packed tokens.
        continuations: int64 [N, T], each row and its ancestors back to its prompt, padded with -1.
        window: Tokens that a layer with a sliding window looks back; None for models without.
        device: The place of the tensors.
    """
    within_prompt = table.branch_point[rows] == rows
    kinds = ((within_prompt, _PROMPT_TOKENS_PER_GROUP), (~within_prompt, _QUERIES_PER_GROUP))
    return [
        _block(table, prompts, rows, np.flatnonzero(kind), continuations, limit, window, device)
        for kind, limit in kinds
        if kind.any()
    ]


def _block(
    table: TokenTable,
    prompts: Mapping[int, IntArray],
    rows: IntArray,
    members: IntArray,
    continuations: IntArray,
    limit: int,
    window: int | None,
    device: torch.device,
) -> QueryBlock:
    """Group the queries ``rows[members]``: up to ``limit`` of one prompt make a piece, and pieces share groups."""

    def tensor(array: NDArray[Any]) -> Tensor:
        return to_device(array, device)

    # Sorted by prompt, then by age, which keeps the branches of one search together.
    members = members[np.lexsort((rows[members], table.prompt_id[rows[members]]))]
    queries = rows[members]
    prompt_id = table.prompt_id[queries]
    new_prompt = np.r_[True, prompt_id[1:] != prompt_id[:-1]]
    rank = np.arange(len(queries)) - np.flatnonzero(new_prompt)[np.cumsum(new_prompt) - 1]
    starts = np.flatnonzero(rank % limit == 0)
    piece = np.cumsum(rank % limit == 0) - 1

    # A piece sees its prompt's tokens, and every continuation token that one of its queries sees.
    seen_of_prompt = table.position[table.branch_point[queries]] + 1
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
        seen[group_of_piece[p], offset[p] : offset[p] + length] = prompts[int(prompt_id[start])][:length]
    seen[group_of_piece[owner], column] = row
    visible = np.zeros(shape, dtype=bool)
    visible[:, :, 0] = True  # a padded query must see something, or its softmax is NaN
    first, columns = offset[piece][:, None], np.arange(width)
    visible[group, place] = (columns >= first) & (columns < first + seen_of_prompt[:, None])
    visible[group[query], place[query], column[inverse]] = True
    index = np.zeros(shape[:2], dtype=np.int64)
    index[group, place] = members
    distance = None
    if window:
        distance = tensor(table.position[rows[index]][:, :, None] - table.position[seen][:, None, :])
    slots = np.where(seen >= 0, table.slot[seen], 0).ravel()
    in_place = shape[0] == 1 and bool((np.diff(slots) == 1).all())
    return QueryBlock(
        shape=shape[:2],
        queries=tensor(index.ravel()),
        slots=tensor(slots),
        span=slice(int(slots[0]), int(slots[-1]) + 1) if in_place else None,
        visible=tensor(visible),
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
