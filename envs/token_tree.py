"""The prefixes seen so far, and what the language model said at each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import check_integer
from .language_model import FloatArray, IntArray, LanguageModel, Outputs

__all__ = ["TokenTree"]

_MISSING = -1


class TokenTree:
    """A cache of prefixes: each is computed once, whoever asks, and known by a node number from then on.

    The columns below have one row per node; they are read-only views that a later ``roots`` or ``expand`` may replace.

    Attributes:
        top_k: Number k of next tokens kept at a node.
        hidden: float32 [nodes, d], the language model's last hidden state.
        tokens: int64 [nodes, k], the most likely next tokens, most likely first.
        logprobs: float32 [nodes, k], nats, of the full-vocabulary softmax.
        parent: int64 [nodes], -1 at a prompt.
        action: int64 [nodes], the rank of this node's token at its parent, -1 at a prompt.
        depth: int64 [nodes], tokens since the prompt.
        path_logprob: float64 [nodes], nats, summed since the prompt.
        children: int64 [nodes, k], the node that each action leads to, -1 where not yet computed.
    """

    def __init__(self, model: LanguageModel, top_k: int, kv_budget: int | None = None) -> None:
        """Start an empty tree.

        Args:
            model: The language model.
            top_k: Next tokens kept at each node, 1 to the vocabulary's size.
            kv_budget: Bytes of key-value memory; None for a share of the free memory.

        Raises:
            ConfigurationError: ``top_k`` is out of range.
        """
        self.model = model
        self.top_k = check_integer("top_k", top_k, high=model.vocab_size, meaning="at most the vocabulary")
        self._engine = model.engine(self.top_k, kv_budget)
        self._roots: dict[tuple[int, ...], int] = {}
        self._size = 0
        self._columns: dict[str, npt.NDArray[np.generic]] = {
            "hidden": np.empty((0, model.hidden_size), dtype=np.float32),
            "tokens": np.empty((0, self.top_k), dtype=np.int64),
            "logprobs": np.empty((0, self.top_k), dtype=np.float32),
            "parent": np.empty(0, dtype=np.int64),
            "action": np.empty(0, dtype=np.int64),
            "depth": np.empty(0, dtype=np.int64),
            "path_logprob": np.empty(0, dtype=np.float64),
            "children": np.empty((0, self.top_k), dtype=np.int64),
            "handle": np.empty(0, dtype=np.int64),
        }
        self._publish()

    hidden: FloatArray
    tokens: IntArray
    logprobs: FloatArray
    parent: IntArray
    action: IntArray
    depth: IntArray
    path_logprob: npt.NDArray[np.float64]
    children: IntArray

    def __len__(self) -> int:
        """Return the number of nodes."""
        return self._size

    @property
    def kv_bytes(self) -> int:
        """Bytes of key-value memory held now."""
        return self._engine.kv_bytes

    def roots(self, prompts: Sequence[Sequence[int]]) -> IntArray:
        """Return the nodes of ``n`` prompts (token ids), int64 [n]; the unseen ones are processed in one batch."""
        keys = [tuple(prompt) for prompt in prompts]
        new = [key for key in dict.fromkeys(keys) if key not in self._roots]
        if new:
            handles, outputs = self._engine.prefill(new)
            start = np.full(len(new), _MISSING)
            nodes = self._append(handles, outputs, start, start, np.zeros(len(new)), np.zeros(len(new)))
            self._roots.update(zip(new, nodes.tolist(), strict=True))
        return np.array([self._roots[key] for key in keys], dtype=np.int64)

    def expand(self, nodes: IntArray, actions: IntArray) -> IntArray:
        """Follow ``n`` edges and return the nodes they lead to, int64 [n]; unseen ones cost one forward together.

        Args:
            nodes: int64 [n].
            actions: int64 [n], ranks in the nodes' top-k lists.
        """
        missing = self.children[nodes, actions] == _MISSING
        if missing.any():
            parents, ranks = np.unique(np.stack((nodes[missing], actions[missing])), axis=1)
            handles, outputs = self._engine.extend(self._columns["handle"][parents], self.tokens[parents, ranks])
            logprob = self.path_logprob[parents] + self.logprobs[parents, ranks]
            new = self._append(handles, outputs, parents, ranks, self.depth[parents] + 1, logprob)
            self._columns["children"][parents, ranks] = new
        return self.children[nodes, actions]

    def completion_ids(self, node: int) -> list[int]:
        """Return the token ids from the prompt's end to ``node``."""
        ids = []
        while self.parent[node] != _MISSING:
            ids.append(int(self.tokens[self.parent[node], self.action[node]]))
            node = int(self.parent[node])
        return ids[::-1]

    def _append(
        self,
        handles: IntArray,
        outputs: Outputs,
        parent: IntArray,
        action: IntArray,
        depth: npt.NDArray[np.generic],
        path_logprob: npt.NDArray[np.float64],
    ) -> IntArray:
        nodes = np.arange(self._size, self._size + len(handles))
        self._size += len(handles)
        if self._size > len(self._columns["parent"]):
            capacity = max(2 * len(self._columns["parent"]), self._size, 1024)
            for name, column in self._columns.items():
                bigger = np.empty((capacity, *column.shape[1:]), dtype=column.dtype)
                bigger[: len(column)] = column
                self._columns[name] = bigger
        values = {"parent": parent, "action": action, "depth": depth, "path_logprob": path_logprob, "handle": handles}
        for name, value in {**outputs._asdict(), **values, "children": _MISSING}.items():
            self._columns[name][nodes] = value
        self._publish()
        return nodes

    def _publish(self) -> None:
        for name, column in self._columns.items():
            view = column[: self._size]
            view.flags.writeable = False
            setattr(self, name, view)
