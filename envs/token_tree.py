"""The prefixes seen so far, and what the language model said at each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from ..checks import check_integer
from ..deprecated import with_old_names
from ..models.base import FloatArray, IntArray, LanguageModel

__all__ = ["GrowRequest", "Holder", "TokenTree", "grow_together"]

_MISSING = -1
_NOTHING = np.empty(0, dtype=np.int64)


class Holder(Protocol):
    """Whoever keeps nodes from one call to the next: they are never forgotten, and renumbered where others are."""

    node: IntArray  # -1 for none


@with_old_names(hold="pin", forget="evict")
class TokenTree:
    """A cache of prefixes: each is computed once, whoever asks, and known by a node number from then on.

    The columns below have one row per node; they are read-only views that a later ``grow`` or ``evict`` may replace.

    Attributes:
        top_k: Number k of next tokens kept at a node.
        hidden: float32 [nodes, d], the language model's last hidden state.
        tokens: int64 [nodes, k], the most likely next tokens, most likely first.
        logprobs: float32 [nodes, k], nats, of the full-vocabulary softmax.
        parent: int64 [nodes], -1 at a prompt.
        root: int64 [nodes], the node of the prompt.
        action: int64 [nodes], the rank of this node's token at its parent, -1 at a prompt.
        depth: int64 [nodes], tokens since the prompt.
        path_logprob: float64 [nodes], nats, summed since the prompt.
        children: int64 [nodes, k], the node that each action leads to, -1 where not yet computed.
    """

    def __init__(
        self,
        model: LanguageModel,
        top_k: int,
        kv_budget: int | None = None,
        allowed: Callable[[Sequence[int]], npt.NDArray[np.bool_]] | None = None,
    ) -> None:
        """Start an empty tree.

        Args:
            model: The language model.
            top_k: Next tokens kept at each node, 1 to the vocabulary's size.
            kv_budget: Bytes of key-value memory; None for a share of the free memory.
            allowed: Given a completion's tokens so far, returns which tokens may follow, bool [V]; the candidates are
                the likeliest of those, with log-probability -inf where there are fewer than k. None allows all.

        Raises:
            ConfigurationError: ``top_k`` is out of range.
        """
        self.model = model
        self.top_k = check_integer("top_k", top_k, high=model.vocab_size, meaning="at most the vocabulary")
        self._engine, self._allowed = model.engine(self.top_k, kv_budget), allowed
        self._roots: dict[tuple[int, ...], int] = {}
        self._holders: WeakSet[Holder] = WeakSet()
        self._size = self._clock = 0
        self._columns: dict[str, npt.NDArray[np.generic]] = {
            "hidden": np.empty((0, model.hidden_size), dtype=np.float32),
            "tokens": np.empty((0, self.top_k), dtype=np.int64),
            "logprobs": np.empty((0, self.top_k), dtype=np.float32),
            "parent": np.empty(0, dtype=np.int64),
            "root": np.empty(0, dtype=np.int64),
            "action": np.empty(0, dtype=np.int64),
            "depth": np.empty(0, dtype=np.int64),
            "path_logprob": np.empty(0, dtype=np.float64),
            "children": np.empty((0, self.top_k), dtype=np.int64),
            "handle": np.empty(0, dtype=np.int64),
            "used": np.empty(0, dtype=np.int64),  # the last call that a node was asked for or continued in
        }
        self._publish()

    hidden: FloatArray
    tokens: IntArray
    logprobs: FloatArray
    parent: IntArray
    root: IntArray
    action: IntArray
    depth: IntArray
    path_logprob: npt.NDArray[np.float64]
    children: IntArray
    handle: IntArray
    used: IntArray

    def __len__(self) -> int:
        """Return the number of nodes."""
        return self._size

    @property
    def kv_bytes(self) -> int:
        """Bytes of key-value memory held now."""
        return self._engine.kv_bytes

    @property
    def node_bytes(self) -> int:
        """Bytes that a node takes here, beside its key-value memory."""
        return sum(column.dtype.itemsize * math.prod(column.shape[1:]) for column in self._columns.values())

    def roots(self, prompts: Sequence[Sequence[int]]) -> IntArray:
        """Return the nodes of ``n`` prompts (token ids), int64 [n]; the unseen ones are processed in one batch."""
        return self.grow(prompts, _NOTHING, _NOTHING)[0]

    def expand(self, nodes: IntArray, actions: IntArray) -> IntArray:
        """Follow ``n`` edges and return the nodes they lead to, int64 [n]; unseen ones cost one forward together.

        Args:
            nodes: int64 [n].
            actions: int64 [n], ranks in the nodes' top-k lists.
        """
        return self.grow([], nodes, actions)[1]

    def grow(self, prompts: Sequence[Sequence[int]], nodes: IntArray, actions: IntArray) -> tuple[IntArray, IntArray]:
        """Do what ``roots`` and ``expand`` do, in one forward together; on an error the tree stays as it was."""
        keys = [tuple(prompt) for prompt in prompts]
        new = [key for key in dict.fromkeys(keys) if key not in self._roots]
        missing = self.children[nodes, actions] == _MISSING
        if new or missing.any():
            edges = np.unique(nodes[missing] * self.top_k + actions[missing])
            parents, ranks = edges // self.top_k, edges % self.top_k
            tokens, allowed = self.tokens[parents, ranks], None
            if self._allowed is not None:
                written = [[*c, t] for c, t in zip(self.completions(parents), tokens.tolist(), strict=True)]
                allowed = np.stack([self._allowed(ids) for ids in [*([] for _ in new), *written]])
            handles, outputs = self._engine.compute(new, self.handle[parents], tokens, allowed)
            added = np.arange(self._size, self._size + len(handles))
            start = np.full(len(new), _MISSING)
            logprob = self.path_logprob[parents] + self.logprobs[parents, ranks]
            self._append(
                **outputs._asdict(),
                parent=np.concatenate((start, parents)),
                root=np.concatenate((added[: len(new)], self.root[parents])),
                action=np.concatenate((start, ranks)),
                depth=np.concatenate((start + 1, self.depth[parents] + 1)),
                path_logprob=np.concatenate((np.zeros(len(new)), logprob)),
                handle=handles,
            )
            self._columns["children"][parents, ranks] = added[len(new) :]
            self._roots.update(zip(new, added.tolist(), strict=False))
        roots = np.array([self._roots[key] for key in keys], dtype=np.int64)
        children = self.children[nodes, actions]
        self._clock += 1
        for asked in (roots, nodes, children):
            self._columns["used"][asked] = self._clock
        return roots, children

    def pin(self, holder: Holder) -> None:
        """Let no ``evict`` forget the nodes in ``holder.node``, and renumber them there, for as long as it lives."""
        self._holders.add(holder)

    def unpin(self, holder: Holder) -> None:
        """Let the nodes in ``holder.node`` be evicted again."""
        self._holders.discard(holder)

    def evict(self, most: int) -> IntArray:
        """Forget nodes that were not asked for lately, so that at most ``most`` others stay beside those held.

        Returns:
            The new number of each node, int64 [old nodes], -1 where it was forgotten.
        """
        keep = np.zeros(self._size, dtype=bool)
        keep[np.argsort(self.used)[max(self._size - most, 0) :]] = True
        for holder in self._holders:
            keep[holder.node[holder.node != _MISSING]] = True
        frontier = np.flatnonzero(keep)
        while len(frontier):  # what leads to a node that stays, stays
            frontier = self.parent[frontier]
            frontier = frontier[(frontier != _MISSING) & ~keep[frontier]]
            keep[frontier] = True
        kept = np.flatnonzero(keep)
        new = np.full(self._size + 1, _MISSING, dtype=np.int64)  # the last is for -1, no node
        new[kept] = np.arange(len(kept))
        self._columns["handle"][kept] = self._engine.evict(self.handle[kept])
        for name in ("parent", "root", "children"):
            self._columns[name][kept] = new[self._columns[name][kept]]
        self._columns = {name: column[kept] for name, column in self._columns.items()}
        self._size = len(kept)
        self._roots = {key: int(new[root]) for key, root in self._roots.items() if new[root] != _MISSING}
        for holder in self._holders:
            holder.node[:] = new[holder.node]
        self._publish()
        return new[:-1]

    def completion_ids(self, node: int) -> list[int]:
        """Return the token ids from the prompt's end to ``node``."""
        return self.completions(np.array([node]))[0]

    def completions(self, nodes: IntArray) -> list[list[int]]:
        """Return the token ids from the prompt's end to each of ``n`` nodes."""
        depths = self.depth[nodes]
        tokens = np.empty((len(nodes), int(depths.max(initial=0))), dtype=np.int64)
        for column in reversed(range(tokens.shape[1])):
            parents = self.parent[nodes]
            inside = parents != _MISSING
            tokens[:, column] = self.tokens[parents, self.action[nodes]]  # of the last node, where not inside
            nodes = np.where(inside, parents, nodes)
        return [row[len(row) - depth :] for row, depth in zip(tokens.tolist(), depths.tolist(), strict=True)]

    def _append(self, **values: npt.NDArray[np.generic]) -> None:
        nodes = slice(self._size, self._size + len(values["handle"]))
        self._size = nodes.stop
        if self._size > len(self._columns["parent"]):
            capacity = max(2 * len(self._columns["parent"]), self._size, 1024)
            for name, column in self._columns.items():
                bigger = np.empty((capacity, *column.shape[1:]), dtype=column.dtype)
                bigger[: len(column)] = column
                self._columns[name] = bigger
        self._columns["children"][nodes] = _MISSING
        for name, value in values.items():
            self._columns[name][nodes] = value
        self._publish()

    def _publish(self) -> None:
        for name, column in self._columns.items():
            view = column[: self._size]
            view.flags.writeable = False
            setattr(self, name, view)


class GrowRequest(NamedTuple):
    """What one caller asks of one tree; see :meth:`TokenTree.grow`."""

    tree: TokenTree
    prompts: Sequence[Sequence[int]]
    nodes: IntArray
    actions: IntArray


def grow_together(requests: Sequence[GrowRequest]) -> list[tuple[IntArray, IntArray]]:
    """Do what :meth:`TokenTree.grow` does for several callers, in one forward of each language model.

    Returns:
        For each request, the nodes of its prompts, int64 [m], and those that its edges lead to, int64 [n].
    """
    results: list[tuple[IntArray, IntArray]] = [(_NOTHING, _NOTHING)] * len(requests)
    trees: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        trees.setdefault(id(request.tree), []).append(i)
    for members in trees.values():
        asked = [requests[i] for i in members]
        roots, children = asked[0].tree.grow(
            [prompt for request in asked for prompt in request.prompts],
            np.concatenate([request.nodes for request in asked]),
            np.concatenate([request.actions for request in asked]),
        )
        for i, request in zip(members, asked, strict=True):
            results[i] = roots[: len(request.prompts)], children[: len(request.nodes)]
            roots, children = roots[len(request.prompts) :], children[len(request.nodes) :]
    return results
