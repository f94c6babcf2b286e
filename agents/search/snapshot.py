"""Snapshot of a search: plain arrays that outlive it, shown as JSON, DOT, networkx or HTML."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...errors import ConfigurationError
from ...files import to_jsonable
from .budget import TracePoint
from .state import Search, Status

if TYPE_CHECKING:
    import networkx

__all__ = ["SearchTree"]


@dataclass(frozen=True)
class SearchTree:
    """The edges of all expanded nodes, one row per edge, in the order in which their nodes were expanded.

    Attributes:
        parent: int64 [m], index of the node the edge leaves; node 0 is the prompt, node i the i-th expanded.
        child: int64 [m], index of the node it leads to, -1 if it was not expanded.
        action: int64 [m], rank among the node's candidates.
        token: int64 [m], of a step its last one.
        token_text: The text of the token, or step.
        logprob: float32 [m], nats.
        g: float64 [m], α · Σ log π up to the node the edge leaves.
        f: float64 [m], the edge's estimate g + h.
        bound: float64 [m], U.
        status: ``"open"``, ``"pruned"`` (open, but U says that nothing better lies there), ``"expanded"``,
            ``"finished"`` or ``"masked"``.
        objective: float64 [m], J of a finished edge, else NaN.
        best: Indices of the edges that lead to the text proposed, from the prompt on; empty if none was finished.
        prompt: The prompt's text.
        trace: LB and UB after each step.
    """

    parent: npt.NDArray[np.int64]
    child: npt.NDArray[np.int64]
    action: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    token_text: list[str]
    logprob: npt.NDArray[np.float32]
    g: npt.NDArray[np.float64]
    f: npt.NDArray[np.float64]
    bound: npt.NDArray[np.float64]
    status: list[str]
    objective: npt.NDArray[np.float64]
    best: list[int]
    prompt: str
    trace: list[TracePoint]

    _EDGES = ("parent", "child", "action", "token", "token_text", "logprob", "g", "f", "bound", "status", "objective")

    @classmethod
    def from_search(cls, search: Search, proposed: Sequence[int] | None = None) -> SearchTree:
        """Copy what ``search`` holds; ``proposed`` are the tokens of the text that the plan proposes."""
        mdp, rows, k = search.mdp, slice(0, search.size), search.mdp.top_k
        nodes = search.node[rows]
        every = np.repeat(nodes, k), np.tile(np.arange(k), search.size)
        objective = np.full((search.size, k), np.nan)
        for edge, completion in search.completions.items():
            objective[edge] = completion.objective
        names = np.array([Status(s).name.lower() for s in Status])[search.status[rows]].astype(object)
        names[(search.status[rows] == Status.OPEN) & (search.bound[rows] <= search.pruning_threshold)] = "pruned"
        ends = [edge for edge, completion in search.completions.items() if completion.token_ids == proposed]
        best: list[int] = []
        row, action = ends[0] if ends else (-1, -1)
        while row >= 0:
            best.insert(0, row * k + action)
            child, row = row, int(search.parent[row])
            action = int(np.flatnonzero(search.child[row] == child)[0]) if row >= 0 else -1
        return cls(
            parent=np.repeat(np.arange(search.size), k),
            child=search.child[rows].ravel(),
            action=np.tile(np.arange(k), search.size),
            token=mdp.last_tokens(*every),
            token_text=mdp.edge_texts(*every),
            logprob=mdp.logprobs(nodes).ravel().astype(np.float32),
            g=np.repeat(search.g[rows], k),
            f=search.f[rows].ravel(),
            bound=search.bound[rows].ravel(),
            status=names.ravel().tolist(),
            objective=objective.ravel(),
            best=best,
            prompt=search.prompt.text,
            trace=list(search.trace),
        )

    def __len__(self) -> int:
        """Return the number of edges."""
        return len(self.action)

    def edges(self) -> Iterator[dict[str, Any]]:
        """Yield each edge as a dict of plain values; ``h``, the heuristic's estimate f - g, is among them."""
        columns = {name: getattr(self, name) for name in self._EDGES}
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in columns.items()}
        plain["h"] = (self.f - self.g).tolist()
        for row in zip(*plain.values(), strict=True):
            yield dict(zip(plain, row, strict=True))

    def path(self, node: int) -> list[int]:
        """Return the indices of the edges that lead to a node, from the prompt on."""
        edges: list[int] = []
        while node:
            edges.append(int(np.flatnonzero(self.child == node)[0]))
            node = int(self.parent[edges[-1]])
        return edges[::-1]

    def candidates(self, node: int) -> list[dict[str, Any]]:
        """Return the actions of a node in order, as :meth:`edges` has them, ``best`` added; not finite is None."""
        chosen, on_path = np.flatnonzero(self.parent == node), set(self.best)
        rows = itertools.islice(self.edges(), int(chosen[0]), int(chosen[-1]) + 1)
        return [
            {**to_jsonable(row), "best": int(index) in on_path}
            for index, row in zip(chosen, rows, strict=True)
            if row["status"] != "masked"
        ]

    def to_json(self) -> str:
        """Return everything as one JSON object; what is not finite is null, as JSON has no infinity."""
        edges = to_jsonable(list(self.edges()))
        trace = [to_jsonable(tuple(point)) for point in self.trace]
        content = {"prompt": self.prompt, "best": self.best, "edges": edges, "trace": trace}
        return json.dumps(content, ensure_ascii=False)

    def to_networkx(self) -> networkx.DiGraph[Any]:
        """Return a directed graph: nodes are those expanded, and a leaf ``(node, action)`` for every other edge.

        Raises:
            ConfigurationError: networkx is not installed.
        """
        try:
            import networkx
        except ImportError as error:
            raise ConfigurationError(
                "to_networkx needs networkx, which is not installed: pip install networkx"
            ) from error
        graph: networkx.DiGraph[Any] = networkx.DiGraph(prompt=self.prompt)
        graph.add_node(0, order=0)
        on_path = set(self.best)
        for index, edge in enumerate(self.edges()):
            if edge["status"] == "masked":
                continue
            target = edge["child"] if edge["child"] >= 0 else (edge["parent"], edge["action"])
            graph.add_edge(edge["parent"], target, best=index in on_path, **edge)
            if edge["child"] >= 0:
                graph.nodes[target]["order"] = edge["child"]
        return graph

    def to_dot(self) -> str:
        """Return the edges that were followed, as Graphviz' DOT; the path to the text proposed is bold."""
        lines = ["digraph search {", '  rankdir=LR; node [shape=point]; edge [fontname="monospace", fontsize=10];']
        lines.append(f'  0 [shape=plaintext, label="{_quoted(self.prompt)}"];')
        on_path = set(self.best)
        for index, edge in enumerate(self.edges()):
            if edge["status"] not in ("expanded", "finished"):
                continue
            ends = edge["status"] == "finished"
            target = f'"{edge["parent"]}.{edge["action"]}"' if ends else edge["child"]
            if ends:
                lines.append(f'  {target} [shape=plaintext, label="{edge["objective"]:.3f}"];')
            label = f"{_quoted(edge['token_text'])}\\n{edge['f']:.2f}"
            style = ", penwidth=3, color=darkgreen" if index in on_path else ""
            lines.append(f'  {edge["parent"]} -> {target} [label="{label}"{style}];')
        return "\n".join([*lines, "}"]) + "\n"

    def to_html(self, path: str | Path | None = None, *, facts: Mapping[str, str] | None = None) -> str:
        """Return, and write to ``path`` if given, one page that shows the tree: no other file, no network.

        Every edge is there with its token, log-prob, h, f, U, order and fate; branches open and close at a click, edges
        tell their numbers under the pointer, a search finds tokens, and LB and UB are drawn beside the tree.

        Args:
            path: Where to write it.
            facts: What else a reader should know, by name, such as the decoder; shown above the tree.
        """
        template = (Path(__file__).parent / "snapshot.html").read_text(encoding="utf-8")
        # Columns, not objects, and three decimals: that keeps a search of thousands of edges far below a megabyte.
        columns = {
            "parent": self.parent.tolist(),
            "child": self.child.tolist(),
            "text": self.token_text,
            "logprob": _rounded(self.logprob),
            "h": _rounded(self.f - self.g),
            "f": _rounded(self.f),
            "u": _rounded(self.bound),
            "status": self.status,
            "objective": _rounded(self.objective),
            "best": self.best,
            "trace": [[point.lm_tokens, *_rounded(np.array(point[1:]))] for point in self.trace],
            "prompt": self.prompt,
            "facts": dict(facts or {}),
        }
        # "<" is the one character by which a text could end the script element that it stands in.
        data = json.dumps(columns, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        # Both at once, for the prompt may hold the other's mark.
        values = {"__TITLE__": html.escape(self.prompt), "__DATA__": data}
        page = re.sub("|".join(values), lambda mark: values[mark[0]], template)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page


def _rounded(values: npt.NDArray[np.floating[Any]]) -> list[float | None]:
    return [None if not math.isfinite(value) else round(value, 3) for value in values.tolist()]


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "⏎")
