"""The tree engine: one memory of keys and values for every branch of every prompt.

A transformer's keys and values at a token depend only on that token and its ancestors. So a tree of prefixes needs one
slot per *token*, and all continuations of a prefix share its slots. :class:`TreeEngine` keeps the slots in one pool. It
computes any mix of new tokens in one packed forward without padding: prompts, continuations at any depth, and tokens
that were evicted. In the attention each token sees its own ancestors only, so the outputs are those of an uncached
forward. Only the ancestors of the batch are read, never the whole pool.

The model itself stays untouched: during a forward its attention implementation is swapped for that of
:mod:`~qstar_decoding.models.tree_attention`, registered with transformers' own ``AttentionInterface``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import LanguageModelError
from .base import BoolArray, FloatArray, IntArray, Outputs, top_logprobs
from .flat.packed_weights import PackedWeights
from .token_trie import TrieEngine, concatenate, kv_budget_or_default
from .tree_attention import ForwardState, KeyValuePool, group_queries, to_device, tree_attention_in

__all__ = ["TreeEngine", "TreeModel"]

logger = logging.getLogger(__name__)

_POSITIONS_PER_FORWARD = 1024


class TreeModel(Protocol):
    """The part of a language model that the tree engine needs."""

    name: str
    model: Any  # the module that computes; its attention goes through transformers' ``AttentionInterface``
    vocab_size: int
    context_length: int
    kv_token_bytes: int | None
    packed_weights: PackedWeights | None
    lock: AbstractContextManager[Any]

    @property
    def device(self) -> torch.device:
        """The place of the model's input."""

    def hidden_and_logits(self, positions: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Return hidden states [n, d] and logits [n, V] at ``positions`` [n] of one packed sequence."""

    def forward(self, sequences: Sequence[Sequence[int]]) -> tuple[FloatArray, FloatArray]:
        """See :meth:`LanguageModel.forward`."""


class TreeEngine(TrieEngine):
    """The fast engine: every token of every prefix is computed once, in one packed forward per call."""

    def __init__(self, model: TreeModel, *, kv_budget: int | None = None) -> None:
        """Compute with ``model`` and keep at most ``kv_budget`` bytes of keys and values.

        Args:
            model: The language model, shared and left as it is.
            kv_budget: In bytes; None takes a quarter of the free memory, at most 4 GiB.

        Raises:
            ConfigurationError: ``kv_budget`` is not positive.
        """
        budget = kv_budget_or_default(kv_budget, model.device)
        super().__init__(model, KeyValuePool(budget, model.kv_token_bytes))
        config = model.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self._window: int | None = window or getattr(config, "attention_chunk_size", None)
        self._windows: set[int] = set()
        self._positions = 1 << 30  # at most so many in a forward; fewer once memory has run out

    @property
    def missed_window(self) -> int | None:
        """Tokens that the model's attention looks back without a word to the attention function; None without such.

        A short trial does not notice it by its outputs: Llama 4 attends in chunks, by its mask, which is not used here.
        """
        seen = bool(self._windows) or not self._window or self._window >= self._lm.context_length
        return None if seen else self._window

    def _compute(
        self,
        asked: IntArray,
        compute: IntArray,
        continuations: IntArray,
        top_k: int,
        allowed: Sequence[BoolArray | None] | None,
    ) -> Outputs:
        """Process the tokens ``compute``, ancestors first, in as few forwards as memory allows."""
        limit = min(self._positions, _POSITIONS_PER_FORWARD)
        # Within a forward the order does not matter: a layer writes all keys and values before it reads any.
        by_age = np.argsort(self._table.position[compute], kind="stable")
        parts: list[Outputs] = []
        order: list[IntArray] = []
        start = 0
        while start < len(compute):
            now = by_age[start : start + limit]
            chunk = compute[now]
            # The outputs that this forward brings, in the order of the chunk.
            sorter = np.argsort(chunk)
            which = np.flatnonzero(np.isin(asked, chunk))
            places = sorter[np.searchsorted(chunk, asked[which], sorter=sorter)]
            by_place = np.argsort(places, kind="stable")
            which, places = which[by_place], places[by_place]
            masks = None if allowed is None else [allowed[i] for i in which.tolist()]
            try:
                parts.append(self._forward(chunk, continuations[now], places, top_k, masks))
            except RuntimeError as error:
                if not self._is_out_of_memory(error) or len(chunk) == 1:
                    raise
                self._positions = limit = len(chunk) // 2
                logger.warning("out of memory: from now on at most %d tokens at a time", limit)
                continue
            order.append(which)
            start += len(chunk)
        together, back = concatenate(parts), np.argsort(np.concatenate(order))
        return Outputs(together.hidden[back], together.tokens[back], together.logprobs[back])

    def _forward(
        self,
        rows: IntArray,
        continuations: IntArray,
        places: IntArray,
        top_k: int,
        allowed: Sequence[BoolArray | None] | None,
    ) -> Outputs:
        """Run the model over ``rows`` packed into one sequence; return the outputs at ``places`` [m], ascending."""
        lm, device, table = self._lm, self._lm.device, self._table

        def tensor(array: NDArray[Any]) -> Tensor:
            return to_device(array, device)

        blocks = group_queries(table, self._prompts, rows, continuations, self._window, device)
        forward = ForwardState(self._pool, tensor(table.slot[rows]), blocks, self._windows)
        distinct, back = np.unique(places, return_inverse=True)
        count, weights = len(distinct), lm.packed_weights
        size = weights.size_for(len(rows)) if weights else None
        with torch.inference_mode(), tree_attention_in(lm.model, forward), contextlib.ExitStack() as stack:
            if weights and size:
                # Filled up with the first token again; no query sees the filling, and its outputs are thrown away.
                rows, distinct = (np.concatenate((a, a[:1].repeat(size - len(a)))) for a in (rows, distinct))
                stack.enter_context(weights.swapped_in(size))
            hidden, logits = lm.hidden_and_logits(
                tensor(distinct),
                input_ids=tensor(table.token[rows]).unsqueeze(0),
                position_ids=tensor(table.position[rows]).unsqueeze(0),
                past_key_values=forward,
                use_cache=True,
            )
            hidden, logits = hidden[:count].float(), logits[:count].float()
            if count < len(places):
                again = tensor(back)
                hidden, logits = hidden[again], logits[again]
            mask = None
            if allowed is not None and any(one is not None for one in allowed):
                everything = np.ones(logits.shape[1], dtype=bool)
                stacked = np.stack([everything if one is None else one for one in allowed])
                mask = tensor(stacked)
            logprobs, tokens = top_logprobs(logits, top_k, mask)
            outputs = _on_host(hidden, tokens, logprobs)
        if np.isnan(outputs.logprobs).any():
            raise LanguageModelError(
                f"language model {lm.name!r} computed NaN after a prefix; load it with another dtype (dtype='float32')"
            )
        return outputs

    def _is_out_of_memory(self, error: RuntimeError) -> bool:
        # On CPUs PyTorch raises no more than a RuntimeError, which can mean anything.
        return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _on_host(hidden: Tensor, tokens: Tensor, logprobs: Tensor) -> Outputs:
    """Return outputs as arrays; from a GPU in one copy, the only place of a step at which the host waits."""
    if hidden.device.type == "cpu":
        return Outputs(hidden.numpy(), tokens.numpy(), logprobs.numpy())
    return unpack_outputs(torch.cat((hidden, tokens.float(), logprobs), dim=1).cpu().numpy(), tokens.shape[1])


def unpack_outputs(rows: FloatArray, k: int) -> Outputs:
    """Take apart float32 [n, d + 2 k]: hidden states, tokens (float32 is exact below 2^24) and log-probabilities."""
    hidden, tokens, logprobs = np.split(rows, [rows.shape[1] - 2 * k, rows.shape[1] - k], axis=1)
    return Outputs(np.ascontiguousarray(hidden), tokens.astype(np.int64), np.ascontiguousarray(logprobs))
