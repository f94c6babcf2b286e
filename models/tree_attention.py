"""Attention over a tree of prefixes: each token sees its own ancestors only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface

if TYPE_CHECKING:
    pass
from .kv_cache import _Pool

_IMPLEMENTATION = "qstar_tree"


@dataclass
class _Block:
    """A set of queries, attended group by group; groups are padded to a common size *inside the attention only*.

    Attributes:
        shape: G and Q.
        queries: int64 [G · Q], indices into the packed tokens, 0 where padded.
        slots: int64 [G · U], the pool slots that the group's queries may see between them, 0 where padded.
        visible: bool [G, Q, U], which of them each query sees: its ancestors and itself.
        distance: int64 [G, Q, U], how many positions back each slot lies; only for models with a sliding window.
        packed: int64 [m], where the m real queries stand in the flattened [G, Q].
        members: int64 [m], which packed tokens these are.
        span: The slots of a single group, where they follow one another in the pool: read in place.
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
class _Forward:
    """What the attention needs to know about the forward in progress."""

    pool: _Pool
    slots: Tensor  # int64 [N], where the packed tokens' own keys and values go; what follows them is filling
    blocks: list[_Block]
    windows: set[int]  # where the attention puts down the sliding windows that it is told of

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


_active: _Forward | None = None


def _tree_attention(
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
    assert _active is not None
    if sliding_window:
        _active.windows.add(sliding_window)
    pool, value_width = key, value.shape[-1]
    heads, kv_heads, key_width = query.shape[1], pool.shape[1], query.shape[-1]
    repeats = heads // kv_heads
    count, filled = _active.slots.shape[0], query.shape[2]
    packed_queries = query[0].transpose(0, 1)  # [N, H, D], and filling
    output = None
    for block in _active.blocks:
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


AttentionInterface.register(_IMPLEMENTATION, _tree_attention)


@contextlib.contextmanager
def _tree_attention_in(model: Any, forward: _Forward) -> Iterator[None]:
    """Swap the model's attention implementation for the length of one forward."""
    global _active
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation = _IMPLEMENTATION
    _active = forward
    try:
        yield
    finally:
        _active = None
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
