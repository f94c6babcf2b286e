"""The token tree: the prefixes seen so far, with the language model's outputs at each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from ..checks import check_integer
from ..columns import GrowableColumns
from ..deprecated import with_old_names
from ..models.base import BoolArray, Engine, FloatArray, IntArray, LanguageModel, Outputs

__all__ = ["GrowRequest", "Holder", "TokenTree", "grow_together"]

_MISSING = -1
_NOTHING = np.empty(0, dtype=np.int64)


class Holder(Protocol):
    """An object that keeps nodes from one call to the next; see :meth:`TokenTree.pin`."""

    node: IntArray  # -1 for none


class TokenRules(Protocol):
    """Rules on the completions of one prompt; see :class:`~qstar_decoding.envs.constraints.Rules`."""

    def allowed(self, token_ids: Sequence[int]) -> BoolArray:
        """Return the tokens that may follow a completion's tokens so far, bool [V]."""


@with_old_names(hold="pin", forget="evict")
class TokenTree:
    """A cache of prefixes: each is computed once and has a node number from then on.

    Trees on one language model share its engine, and with it the memory of what they have in common. The columns below
    have one row per node; they are read-only views that a later ``grow`` or ``evict`` may replace.

    Attributes:
        model: The language model.
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
        handle: int64 [nodes], the engine's name for the prefix.
        last_used: int64 [nodes], the last call that asked for the node or continued it.
        rules: By root, the rules of the prompts that have rules of their own.
    """

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
    last_used: IntArray

    def __init__(
        self,
        model: LanguageModel,
        top_k: int,
        kv_budget: int | None = None,
        allowed: Callable[[Sequence[int]], BoolArray] | None = None,
        *,
        engine: Engine | None = None,
    ) -> None:
        """Start an empty tree.

        Args:
            model: The language model.
            top_k: Next tokens kept at each node, 1 to the vocabulary's size.
            kv_budget: Bytes of key-value memory; None for a share of the free memory.
            allowed: Given a completion's tokens so far, returns the tokens that may follow, bool [V]; the candidates
                are the likeliest of those, with log-probability -inf where there are fewer than k. None allows all.
            engine: Computes the prefixes; by default the one that all trees with this model and ``kv_budget`` share.

        Raises:
            ConfigurationError: ``top_k`` is out of range.
        """
        self.model = model
        self.top_k = check_integer("top_k", top_k, high=model.vocab_size, meaning="at most the vocabulary")
        self._engine, self._allowed = engine or model.engine(kv_budget=kv_budget), allowed
        self._roots: dict[_Root, int] = {}
        self._prompts: dict[int, tuple[int, ...]] = {}  # by root, the prompt's tokens
        self.rules: dict[int, TokenRules] = {}
        self._holders: WeakSet[Holder] = WeakSet()
        self._clock = 0
        per_action = (self.top_k,)
        self._columns = GrowableColumns(
            {
                "hidden": ((model.hidden_size,), np.float32),
                "tokens": (per_action, np.int64),
                "logprobs": (per_action, np.float32),
                "parent": ((), np.int64),
                "root": ((), np.int64),
                "action": ((), np.int64),
                "depth": ((), np.int64),
                "path_logprob": ((), np.float64),
                "children": (per_action, np.int64),
                "handle": ((), np.int64),
                "last_used": ((), np.int64),
            },
            minimum=1024,
        )
        self._is_registered = False  # with the engine: once there is a node, and in turn with other threads
        self._publish()

    def __len__(self) -> int:
        """Return the number of nodes."""
        return self._columns.size

    @property
    def engine(self) -> Engine:
        """The engine that computes the prefixes."""
        return self._engine

    @property
    def kv_bytes(self) -> int:
        """Bytes of key-value memory allocated now, by all trees on the same engine together."""
        return self._engine.kv_bytes

    @property
    def node_bytes(self) -> int:
        """Bytes that a node takes here, beside its key-value memory."""
        return self._columns.row_bytes

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
        """Do the work of ``roots`` and ``expand`` in one forward; on an error the tree stays as it was."""
        return grow_together([GrowRequest(self, prompts, nodes, actions)])[0]

    def pin(self, holder: Holder) -> None:
        """Keep the nodes in ``holder.node`` through every ``evict``, which renumbers them there, while it lives."""
        self._holders.add(holder)

    def unpin(self, holder: Holder) -> None:
        """Let the nodes in ``holder.node`` be evicted again."""
        self._holders.discard(holder)

    def pinned(self) -> IntArray:
        """Return the nodes that are pinned, each once, int64 [n]."""
        nodes = np.unique(np.concatenate([_NOTHING, *(holder.node.ravel() for holder in self._holders)]))
        pinned: IntArray = nodes[nodes != _MISSING]
        return pinned

    def evict(self, most: int) -> IntArray:
        """Evict the nodes whose last use is longest ago, so that at most ``most`` stay beside the pinned ones.

        Nodes that lead to one that stays, stay too.

        Returns:
            The new number of each node, int64 [old nodes], -1 where it was evicted.
        """
        size = len(self)
        keep = np.zeros(size, dtype=bool)
        keep[np.argsort(self.last_used)[max(size - most, 0) :]] = True
        keep[self.pinned()] = True
        frontier = np.flatnonzero(keep)
        while len(frontier):
            frontier = self.parent[frontier]
            frontier = frontier[(frontier != _MISSING) & ~keep[frontier]]
            keep[frontier] = True
        kept = np.flatnonzero(keep)
        new = np.full(size + 1, _MISSING, dtype=np.int64)  # the last is for -1, no node
        new[kept] = np.arange(len(kept))
        self._columns.keep(kept)
        for name in ("parent", "root", "children"):
            self._columns[name][:] = new[self._columns[name]]
        self._roots = {key: int(new[root]) for key, root in self._roots.items() if new[root] != _MISSING}
        self._prompts = {root: key.tokens for key, root in self._roots.items()}
        self.rules = {int(new[root]): rules for root, rules in self.rules.items() if new[root] != _MISSING}
        for holder in self._holders:
            holder.node[:] = new[holder.node]
        self._publish()
        self._engine.release_unused()
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

    def sequence(self, node: int) -> list[int]:
        """Return the token ids up to ``node``, the prompt's among them."""
        return [*self._prompts[int(self.root[node])], *self.completion_ids(node)]

    def recent(self, nodes: IntArray, count: int) -> IntArray:
        """Return the last ``count`` token ids up to each of ``n`` nodes, the prompt's among them, int64 [n, count].

        Where there are fewer, -1 fills up from the left.
        """
        ids = np.full((len(nodes), count), _MISSING, dtype=np.int64)
        if count:
            for row, root, written in zip(ids, self.root[nodes].tolist(), self.completions(nodes), strict=True):
                last = [*self._prompts[root][-count:], *written][-count:]
                row[count - len(last) :] = last
        return ids

    def _missing(self, requests: Sequence[GrowRequest]) -> _Missing | None:
        """Return the prompts and edges of these requests that are not yet computed, each once; None without any."""
        roots = [key for request in requests for key in request.roots if key not in self._roots]
        nodes = np.concatenate([request.nodes for request in requests])
        actions = np.concatenate([request.actions for request in requests])
        new = self.children[nodes, actions] == _MISSING
        if not roots and not new.any():
            return None
        edges = np.unique(nodes[new] * self.top_k + actions[new])
        parents, ranks = edges // self.top_k, edges % self.top_k
        roots, tokens = list(dict.fromkeys(roots)), self.tokens[parents, ranks]
        allowed: list[BoolArray | None] = [None] * (len(roots) + len(edges))
        rules = [key.rules for key in roots] + [self.rules.get(root) for root in self.root[parents].tolist()]
        if self._allowed is not None or any(one is not None for one in rules):
            written = [[*c, t] for c, t in zip(self.completions(parents), tokens.tolist(), strict=True)]
            functions = [self._allowed if one is None else one.allowed for one in rules]
            ids = [*([] for _ in roots), *written]
            allowed = [None if f is None else f(sequence) for f, sequence in zip(functions, ids, strict=True)]
        return _Missing(self, roots, parents, ranks, tokens, allowed)

    def _add(self, missing: _Missing, handles: IntArray, outputs: Outputs) -> None:
        """Enter what was missing, with its handles and outputs, the prompts first."""
        count, parents, ranks = len(missing.roots), missing.parents, missing.ranks
        logprob = self.path_logprob[parents] + self.logprobs[parents, ranks]
        none, added = np.full(count, _MISSING), np.arange(len(self), len(self) + len(handles))
        values = {
            "hidden": outputs.hidden,
            # Engines return as many tokens as the tree with the largest k asks for.
            "tokens": outputs.tokens[:, : self.top_k],
            "logprobs": outputs.logprobs[:, : self.top_k],
            "parent": np.concatenate((none, parents)),
            "root": np.concatenate((added[:count], self.root[parents])),
            "action": np.concatenate((none, ranks)),
            "depth": np.concatenate((none + 1, self.depth[parents] + 1)),
            "path_logprob": np.concatenate((np.zeros(count), logprob)),
            "children": _MISSING,
            "handle": handles,
            "last_used": self._clock,
        }
        if not self._is_registered:
            self._engine.register(self)
            self._is_registered = True
        size = len(self)
        try:
            rows = self._columns.append(len(handles))
            for name, value in values.items():
                self._columns[name][rows] = value
        except BaseException:
            self._columns.size = size
            raise
        self._publish()
        self._columns["children"][parents, ranks] = added[count:]
        for key, root in zip(missing.roots, added.tolist(), strict=False):
            self._roots[key], self._prompts[root] = root, key.tokens
            if key.rules is not None:
                self.rules[root] = key.rules

    def _find(self, request: GrowRequest) -> tuple[IntArray, IntArray]:
        """Return the nodes of a request's prompts and edges, all of which exist, and note that they were used."""
        roots = np.array([self._roots[key] for key in request.roots], dtype=np.int64)
        children = self.children[request.nodes, request.actions]
        for asked in (roots, request.nodes, children):
            self._columns["last_used"][asked] = self._clock
        return roots, children

    def _publish(self) -> None:
        """Make read-only views of the columns, which growing replaces, attributes."""
        for name, view in self._columns.used().items():
            view.flags.writeable = False
            setattr(self, name, view)


class _Root(NamedTuple):
    """A prompt's tokens and rules: prompts of equal tokens and different rules are different roots."""

    tokens: tuple[int, ...]
    rules: TokenRules | None = None


class GrowRequest(NamedTuple):
    """The prompts and edges that one caller asks of one tree; see :meth:`TokenTree.grow`.

    Attributes:
        tree: The tree.
        prompts: Token ids of ``m`` prompts.
        nodes: int64 [n].
        actions: int64 [n].
        rules: Of each prompt, in place of the tree's own; None or empty for those.
    """

    tree: TokenTree
    prompts: Sequence[Sequence[int]]
    nodes: IntArray
    actions: IntArray
    rules: Sequence[TokenRules | None] = ()

    @property
    def roots(self) -> list[_Root]:
        """The prompts with their rules."""
        rules = self.rules or [None] * len(self.prompts)
        return [_Root(tuple(ids), one) for ids, one in zip(self.prompts, rules, strict=True)]


@dataclass(frozen=True)
class _Missing:
    """The prompts and edges that a tree has yet to compute.

    Attributes:
        tree: The tree.
        roots: ``m`` prompts.
        parents: int64 [n], the nodes of the edges.
        ranks: int64 [n], the actions of the edges.
        tokens: int64 [n], the tokens of the edges.
        allowed: [m + n] bool [V] each, the tokens that may follow; None for all.
    """

    tree: TokenTree
    roots: list[_Root]
    parents: IntArray
    ranks: IntArray
    tokens: IntArray
    allowed: list[BoolArray | None]


def grow_together(requests: Sequence[GrowRequest]) -> list[tuple[IntArray, IntArray]]:
    """Grow several trees, in one forward of each engine; on an error of an engine, its trees stay as they were.

    Trees that share an engine may differ in k, constraint and everything else.

    Returns:
        For each request, the nodes of its prompts, int64 [m], and those that its edges lead to, int64 [n].
    """
    by_tree: dict[int, list[GrowRequest]] = {}
    for request in requests:
        by_tree.setdefault(id(request.tree), []).append(request)
    by_engine: dict[int, list[list[GrowRequest]]] = {}
    for asked in by_tree.values():
        by_engine.setdefault(id(asked[0].tree._engine), []).append(asked)
    with ExitStack() as locks:
        # Threads take turns at a language model; all take several in the same order, or each could wait for the other.
        models = {id(request.tree.model): request.tree.model for request in requests}
        for _, model in sorted(models.items()):
            locks.enter_context(model.lock)
        computed = [
            (missing, *_compute(missing))
            for asked_of_engine in by_engine.values()
            if (missing := [m for asked in asked_of_engine if (m := asked[0].tree._missing(asked)) is not None])
        ]
        for missing, handles, outputs in computed:
            for one, rows in zip(missing, _rows_of_each(missing), strict=True):
                one.tree._add(
                    one, handles[rows], Outputs(outputs.hidden[rows], outputs.tokens[rows], outputs.logprobs[rows])
                )
        for asked in by_tree.values():
            asked[0].tree._clock += 1
        return [request.tree._find(request) for request in requests]


def _compute(missing: Sequence[_Missing]) -> tuple[IntArray, Outputs]:
    """Compute, in one forward, all that trees on one engine are missing; return the handles and outputs."""
    allowed = [
        *(mask for one in missing for mask in one.allowed[: len(one.roots)]),
        *(mask for one in missing for mask in one.allowed[len(one.roots) :]),
    ]
    return missing[0].tree._engine.compute(
        [key.tokens for one in missing for key in one.roots],
        np.concatenate([one.tree.handle[one.parents] for one in missing]),
        np.concatenate([one.tokens for one in missing]),
        max(one.tree.top_k for one in missing),
        None if all(mask is None for mask in allowed) else allowed,
    )


def _rows_of_each(missing: Sequence[_Missing]) -> Iterator[IntArray]:
    """Yield the rows of each tree among the handles: all trees' prompts stand first, then all their edges."""
    prompt, edge = 0, sum(len(one.roots) for one in missing)
    for one in missing:
        next_prompt, next_edge = prompt + len(one.roots), edge + len(one.tokens)
        yield np.concatenate((np.arange(prompt, next_prompt), np.arange(edge, next_edge)))
        prompt, edge = next_prompt, next_edge
